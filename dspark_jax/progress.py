"""Progress of a command: a bar or plain lines, `metrics.jsonl`, TensorBoard. Process 0 only."""

import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from tqdm import tqdm

from dspark_jax.errors import InputError
from dspark_jax.json_file import read_ours, write_json, written_whole
from dspark_jax.shown_paths import as_given


class Progress:
    """How far a loop has come. A tqdm bar if stderr is a terminal, else a line now and then; silent on other hosts.

    with Progress("train", total=1000, done=start) as progress:
        progress.update(step, {"loss": 4.21})
    """

    def __init__(self, title: str, total: int, *, done: int = 0, unit: str = "step", seconds: float = 10.0):
        """`done` of `total` units are done; without a terminal a line appears every `seconds`."""
        self.title, self.total, self.unit, self.seconds = title, total, unit, seconds
        self.done = self.begun = done
        self.started = self.printed = time.monotonic()
        self.shown: dict[str, str] = {}
        self.primary = jax.process_index() == 0
        self.bar: Any = None
        if self.primary and sys.stderr.isatty():
            self.bar = tqdm(desc=title, total=total, initial=done, unit=unit, dynamic_ncols=True)

    def update(self, done: int, values: Mapping[str, float | str] | None = None) -> None:
        """Moves to `done` units and shows `values` after the bar (kept until the next ones)."""
        if values:
            self.shown = {name: v if isinstance(v, str) else f"{v:.4g}" for name, v in values.items()}
        advanced, self.done = done - self.done, done
        if self.bar is not None:
            if values:
                self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update(advanced)
        elif self.primary and advanced and (time.monotonic() - self.printed >= self.seconds or done == self.total):
            self.printed = time.monotonic()
            self.print(self._line())

    def advance(self, units: int = 1, values: Mapping[str, float | str] | None = None) -> None:
        """Moves `units` further."""
        self.update(self.done + units, values)

    def print(self, line: str) -> None:
        """A line of text above the bar."""
        if self.bar is not None:
            self.bar.write(line, file=sys.stderr)
        elif self.primary:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is."""
        if self.bar is not None:
            self.bar.close()

    def _line(self) -> str:
        seconds = time.monotonic() - self.started
        left = seconds / max(self.done - self.begun, 1) * (self.total - self.done)
        values = "".join(f" {name}={value}" for name, value in self.shown.items())
        units = self.unit if self.unit.isupper() else self.unit + "s"  # MB has no plural
        return f"{self.title} {self.done}/{self.total} {units}{values} left={tqdm.format_interval(left)}"

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes."""
        self.close()


def log(line: str) -> None:
    """A plain line on stderr, on process 0."""
    if jax.process_index() == 0:
        print(as_given(line), file=sys.stderr, flush=True)


def check_wandb(project: str) -> None:
    """Refuses to log to a project of Weights & Biases where its package is missing.

    Raises:
      InputError: it is.
    """
    if project and importlib.util.find_spec("wandb") is None:
        raise InputError(
            f"train.wandb_project={project}: needs the package wandb; pip install wandb, or leave it empty"
        )


class MetricsWriter:
    """Rows of numbers by step, to `metrics.jsonl` and TensorBoard, and to Weights & Biases if that is asked for."""

    def __init__(self, workdir: Path, *, start: int = 0, wandb_project: str = "", name: str = ""):
        """Continues the files of `workdir` after step `start`: later rows, from a run cut short, are removed.

        Args:
          workdir: of the run.
          start: steps done.
          wandb_project: of Weights & Biases, or empty. The run there goes on with the one here.
          name: of the run, there.

        Raises:
          InputError: Weights & Biases cannot be used.
        """
        self.file: Any = None
        self.wandb: Any = None
        if jax.process_index() == 0:
            workdir.mkdir(parents=True, exist_ok=True)
            # Imported here: it imports torch wherever that is installed, a second that only training should pay.
            from tensorboardX import SummaryWriter

            path = workdir / "metrics.jsonl"
            _truncate(path, start)
            self.file = path.open("a", buffering=1)
            self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1 if start else None)
            if wandb_project:
                self.wandb = _open_wandb(wandb_project, name, workdir)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One row. A value that is not finite is null in the file: JSON has no NaN."""
        if self.file is None:
            return
        row = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name.replace("@", "_at_"), value, step)  # TensorBoard's tags have no @
        if self.wandb is not None:
            self.wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Writes what is buffered."""
        if self.file is not None:
            self.file.close()
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes."""
        self.close()


def _open_wandb(project: str, name: str, workdir: Path) -> Any:
    """The run of Weights & Biases that belongs to `workdir`, new or continued; it takes no row twice.

    Raises:
      InputError: its package refuses, because nobody is logged in, say.
    """
    wandb = importlib.import_module("wandb")  # optional, and unknown to type checkers
    file = workdir / "wandb.json"
    known = read_ours(file).get("id")
    try:
        run = wandb.init(project=project, name=name, id=known, dir=str(workdir), resume="allow")
    except wandb.Error as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"train.wandb_project={project}: {why}; correct it, or leave it empty") from None
    write_json(file, {"id": run.id})
    return run


def _truncate(path: Path, last: int) -> None:
    """Keeps the rows up to step `last`; a line that was being written when the process died is no row."""
    if not path.exists():
        return
    kept, lines = [], path.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            step = json.loads(line)["step"]
            if step <= last:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                log(f"{path}:{number}: left out, it is no row of metrics")
    with written_whole(path) as temporary:
        temporary.write_text("".join(kept), "utf-8")
