"""Runs every command against damaged files, and says which ones end in anything but a result or one clear line.

    python tests/matrix/broken_files.py
    python tests/matrix/broken_files.py --commands train,generate --files 'run/checkpoints/*' --json found.json

Makes a small run with all that commands write (`--target` names its target, by default the embedded one), then takes
each file of the run, of its target, of an exported drafter and of the prompts in turn: missing, empty, truncated, one
bit changed, a directory in its place, JSON of another type, and each directory missing, a file in its place, or mounted
read-only. A command is run against the files that it opens; all of them run in this process, so that it starts and
compiles once. Good is: status 0; status 2 with one line that begins with `error:`; status 1 of `check`, whose verdict
it is, and of `compare`, which reports what failed. Anything else is printed, and the status of this program is 1.
"""

import argparse
import contextlib
import dataclasses
import fnmatch
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import thread as threads
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from dspark_jax import calibrate, command, compare, distributed, evaluate, generate, jobs, plan, prepare, profile, train
from dspark_jax.config import (
    CompareConfig,
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    TargetArchitecture,
    TargetConfig,
    TrainConfig,
    to_json,
)
from dspark_jax.convert import __main__ as convert
from dspark_jax.planning.topology import CHIPS

STEPS, EVERY = 4, 2
TRAINED, HELD_OUT = 6, 2
WORDS = ("the sum of the numbers", "the answer is the sum", "numbers of the user", "the assistant is the user")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
      status: its exit status; None if it raised something else than SystemExit.
      said: the last line on stderr, or of the traceback.
      good: see the module.
      warned: it worked, and said what is damaged or what is done instead.
      left: files that a command which refused has left half-written, and threads that would hold the process.
    """

    status: int | None
    said: str
    good: bool
    warned: bool = False
    left: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The column of the table in the README."""
        if not self.good:
            return "bad"
        if self.status:
            return "refused" if self.status == 2 else "verdict"
        return "warned" if self.warned else "harmless"


# What commands run on: `run` (a working directory), `target`, `drafter` (an export), `prompts`, `settings.json`.


def settings(vocabulary: int, positions: int) -> Config:
    """A config that is trained in seconds; paths are given on the command line."""
    length = min(96, positions)
    return Config(
        name="matrix",
        drafter=DrafterConfig(
            num_layers=1, block_size=3, target_layer_ids=(0,), mask_token_id=vocabulary - 1, markov_rank=8
        ),
        data=DataConfig(max_length=length, max_prompt_length=48, min_loss_tokens=1, decode_batch_size=8),
        train=TrainConfig(
            steps=STEPS, batch_size=2, num_anchors=4, checkpoint_every=EVERY, log_every=2, evaluate=False
        ),
        eval=EvalConfig(max_new_tokens=8, batch_size=8, temperatures=(1.0,), speed_prompts=1, bootstrap=20),
        compare=CompareConfig(drafters=("dspark",)),
    )


def flags(world: Path, workdir: str = "run", **more: Any) -> list[str]:
    """The command line that all commands but `convert` take."""
    files = {"data": "train", "eval": "heldout"}
    paths = [f'--config.{group}.prompts=("{world / "prompts" / f"{name}.jsonl"}",)' for group, name in files.items()]
    fields = [f"--config.{name.replace('__', '.')}={value}" for name, value in more.items()]
    config = ["--config", str(world / "settings.json"), f"--config.target.path={world / 'target'}"]
    return [*config, *paths, *fields, f"--workdir={world / workdir}"]


def steps(workdir: Path) -> int:
    """For a run to train for: one more than it has, so that the trials of one that is trained read its data."""
    done = [int(one.name) for one in (workdir / "checkpoints").glob("*") if one.name.isdigit()]
    return max(done) + 1 if done else STEPS


def started(module: Any, *argv: str, name: str = "") -> None:
    """Runs the command of a module as `python -m` would."""
    main = getattr(module, name or module.__name__.split(".")[-1])
    command.run(main, define=getattr(module, "_define", None), argv=argv)


def unlocked(workdir: Path, name: str) -> contextlib.AbstractContextManager[Path]:
    """In the place of `places.working_directory`."""
    del name
    return contextlib.nullcontext(workdir)


def step_here(arguments: Sequence[str], environment: Any) -> str | None:
    """What `compare` does in processes of their own, in this one."""
    del environment
    name, *argv = arguments
    module = {"dspark_jax.prepare": prepare, "dspark_jax.train": train}.get(name)
    from dspark_jax.evaluation import rounds

    try:
        # The lock is that of `compare`, which is this process.
        with mock.patch.object(distributed, "working_directory", unlocked):
            started(module, *argv) if module else jobs.do(rounds.work, Path(argv[0]))
    except SystemExit as ended:
        return f"status {ended.code}" if ended.code else None
    return None


def compare_here(config: Config, workdir: Path, **options: Any) -> None:
    """`compare` in one process."""
    compare.compare(config, workdir, step=step_here, **options)


compare_here.__module__, compare_here.__name__ = compare.__name__, "compare"


def plan_here(world: Path) -> None:
    """`plan` but for the compiler, which need not be installed and reads no file."""
    chip = (CHIPS["v5e"], jax.devices()[:1])
    with (
        mock.patch.object(plan, "devices_of", lambda topology: chip),
        mock.patch.object(plan, "estimate_in_process", lambda *job: {"crashed": "nothing is compiled"}),
    ):
        started(plan, *flags(world), "--topology=v5e:1x1")


COMMANDS: dict[str, Callable[[Path], Any]] = {
    "prepare": lambda world: started(prepare, *flags(world)),
    "train": lambda world: started(train, *flags(world, train__steps=steps(world / "run"))),
    "features": lambda world: started(prepare, *flags(world, "cached", data__features="cache")),
    "train cached": lambda world: started(
        train, *flags(world, "cached", data__features="cache", train__steps=steps(world / "cached"))
    ),
    "warm start": lambda world: started(
        train, *flags(world, "warm", train__init_from=world / "run", data__regenerate=False)
    ),
    "evaluate": lambda world: started(evaluate, *flags(world), f"--cost_table={world / 'run' / 'cost_table.json'}"),
    "calibrate": lambda world: started(calibrate, *flags(world)),
    "profile": lambda world: started(profile, *flags(world), "--slots=1", "--contexts=8", "--rounds=1"),
    "generate": lambda world: started(generate, *flags(world), "--prompt=the sum", "--scheduler=lagged"),
    "compare": lambda world: command.run(
        compare_here, define=compare._define, argv=[*flags(world, "compared"), "--studies=main"]
    ),
    "export": lambda world: convert.main(
        ["export", f"--workdir={world / 'run'}", f"--target={world / 'target'}", f"--output={world / 'exported'}"]
    ),
    "convert": lambda world: convert.main(
        ["export", f"--drafter={world / 'drafter'}", f"--target={world / 'target'}", f"--output={world / 'exported'}"]
    ),
    "import": lambda world: convert.main(
        ["import", f"--drafter={world / 'drafter'}", f"--target={world / 'target'}", f"--workdir={world / 'imported'}"]
    ),
    "check": lambda world: convert.main(
        ["check", f"--drafter={world / 'drafter'}", f"--target={world / 'target'}", "--tokens=8", "--limit=2"]
    ),
    "plan": plan_here,
}
VERDICTS = {"check": (1, 3), "compare": (1,), "plan": (1,)}  # status of an answer that is not the wanted one


def outcome(name: str, world: Path, opened: set[str] | None = None) -> Outcome:
    """Runs a command and judges how it ends; what it opens is added to `opened`."""
    global _opened
    err = io.StringIO()
    status: int | None = 0
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        try:
            _opened = opened
            COMMANDS[name](world)
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:  # what this program is there to find
            status = None
            traceback.print_exc()
        finally:
            _opened = None
    lines = [line for line in err.getvalue().splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    most = 2 if name == "compare" else 1  # what a run of its own says is said again
    clear = status == 0 or (status == 2 and 1 <= len(errors) <= most) or status in VERDICTS.get(name, ())
    warnings = [line for line in lines if any(word in line for word in WARNINGS)]
    told = errors[-1] if errors else next(iter(warnings), lines[-1] if lines else "")
    left = (*half_written(world), *held_by()) if status else held_by()
    good = clear and not left and "Traceback" not in err.getvalue()
    return Outcome(status, told, good, bool(warnings), left)


WARNINGS = ("damaged", "set aside", "warning", "WARNING", "again", "left out", "not used", "instead")
"""Words of lines that say of a command that worked what was not as it should be."""


def half_written(world: Path) -> tuple[str, ...]:
    """Files that nobody would take for whole, but for those that `prepare` goes on with (`data.partial`)."""
    found = [path for ending in ("*.tmp", ".*", "*.tmp.npz", "*orbax-checkpoint-tmp*") for path in world.rglob(ending)]
    return tuple(str(one.relative_to(world)) for one in found if "data.partial" not in str(one))


def held_by() -> tuple[str, ...]:
    """Names of threads that a process would wait for at its end, and that do not end by themselves in some seconds."""

    def found() -> set[threading.Thread]:
        pooled = set(threads._threads_queues)  # of executors: they end with the process
        alive = {one for one in threading.enumerate() if one is not threading.main_thread() and not one.daemon}
        return alive - pooled - _reported

    until = time.monotonic() + 5
    while found() and time.monotonic() < until:
        time.sleep(0.1)
    left = found()
    _reported.update(left)
    return tuple(sorted(f"thread {one.name}" for one in left))


_reported = set[threading.Thread]()


def build(world: Path, target: Path) -> None:
    """Everything that commands read, made by the commands themselves; a part of it stays behind if one fails."""
    shutil.rmtree(world, ignore_errors=True)
    shutil.copytree(target, world / "target")
    (world / "prompts").mkdir(parents=True)
    for name, count in {"train": TRAINED, "heldout": HELD_OUT}.items():
        turns = [{"role": "user", "content": ""}, {"role": "assistant", "content": " ".join(WORDS)}]
        lines = [
            json.dumps({"messages": [turns[0] | {"content": f"{WORDS[i % 4]} {i}"}, turns[1]]}) for i in range(count)
        ]
        (world / "prompts" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    arch = TargetArchitecture.from_hf(target)
    config = settings(arch.vocab_size, arch.max_position_embeddings)
    (world / "settings.json").write_text(to_json(dataclasses.replace(config, target=TargetConfig())))
    order = ("prepare", "train", "calibrate", "profile", "evaluate", "features", "train cached", "compare", "export")
    for name in order:
        found = outcome(name, world)
        assert found.status == 0, (name, found)
    (world / "exported").rename(world / "drafter")


# Damages: each changes one path.


def truncate(path: Path) -> None:
    """Half of it."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit in the middle is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def file_instead(path: Path) -> None:
    """Where a directory was."""
    shutil.rmtree(path)
    path.write_text("x")


def directory_instead(path: Path) -> None:
    """Where a file was."""
    path.unlink()
    path.mkdir()


FILE_DAMAGES: dict[str, Callable[[Path], Any]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": truncate,
    "bit changed": flip,
    "a directory": directory_instead,
}
JSON_DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a list": lambda path: path.write_text("[1]"),
    "a number": lambda path: path.write_text("3"),
    "no fields": lambda path: path.write_text("{}"),
    "null fields": lambda path: path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text())))),
    "text fields": lambda path: path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), "x"))),
}
DIRECTORY_DAMAGES: dict[str, Callable[[Path], Any]] = {"missing": shutil.rmtree, "a file": file_instead}


def is_object(path: Path) -> bool:
    """Whether a file holds a JSON object."""
    try:
        return isinstance(json.loads(path.read_text("utf-8")), dict)
    except ValueError:
        return False


def damages(path: Path) -> dict[str, Callable[[Path], Any]]:
    """What can happen to a path."""
    if path.is_dir():
        return DIRECTORY_DAMAGES
    return FILE_DAMAGES | (JSON_DAMAGES if is_object(path) else {})


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """A mount that refuses writes: permission bits do not stop the superuser."""
    subprocess.run(["mount", "--bind", path, path], check=True, capture_output=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", path], check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["umount", path], check=True, capture_output=True)


def can_mount(folder: Path) -> bool:
    """Whether `read_only` works here."""
    try:
        with read_only(folder):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


# Which files a command opens: what Python opens is seen; what libraries in other languages open is listed.

NATIVE = ("*/checkpoints/*", "*.array_record*", "*.safetensors", "target/tokenizer*")
_opened: set[str] | None = None


def _audit(event: str, arguments: Any) -> None:
    if _opened is not None and event in ("open", "os.rename", "os.mkdir", "os.listdir", "os.scandir"):
        _opened.update(str(one) for one in arguments[:2] if isinstance(one, str | Path))


def opened_by(name: str, world: Path) -> set[str]:
    """Paths below `world` that a command opens, and their directories; files of checkpoints, too, if it reads any."""
    paths = set[str]()
    found = outcome(name, world, paths)
    assert found.good, (name, found)
    inside = {os.path.relpath(one, world) for one in paths if str(one).startswith(str(world))}
    inside |= {str(parent) for one in inside for parent in Path(one).parents}
    return inside


def relevant(name: str, base: Path, scratch: Path) -> list[str]:
    """Paths of the base that a command may stumble over."""
    world = fresh(base, scratch)
    inside = opened_by(name, world)
    existing = [str(path.relative_to(base)) for path in sorted(base.rglob("*"))]

    def reached(one: str) -> bool:
        """Whether a library may open it: something of its folder, below that of the run, has been opened."""
        folders = [str(folder) for folder in Path(one).parents][:-1]
        native = any(fnmatch.fnmatch(one, pattern) for pattern in NATIVE)
        return native and any(folder in inside for folder in folders[:-1] or folders)

    return [one for one in existing if one in inside or reached(one)]


def fresh(base: Path, scratch: Path, roots: Collection[str] | None = None) -> Path:
    """A copy to damage, of all or of some of its parts."""
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    for path in base.iterdir():
        if path.is_file():
            shutil.copy(path, scratch)
        elif roots is None or path.name in roots:
            shutil.copytree(path, scratch / path.name, symlinks=True)
    return scratch


def trials(name: str, base: Path, scratch: Path, patterns: str) -> Iterator[tuple[str, str, Outcome]]:
    """(path, damage, outcome) of a command and every path that it opens."""
    wanted = [one for one in patterns.split(",") if not one.startswith("!")] or ["*"]
    spared = [one[1:] for one in patterns.split(",") if one.startswith("!")]
    paths = relevant(name, base, scratch)
    roots = {one.split("/")[0] for one in paths}
    for relative in paths:
        if not any(fnmatch.fnmatch(relative, one) for one in wanted):
            continue
        if any(fnmatch.fnmatch(relative, one) for one in spared):
            continue
        for damage, change in damages(base / relative).items():
            world = fresh(base, scratch, roots)
            change(world / relative)
            yield relative, damage, outcome(name, world)
        if (base / relative).is_dir() and MOUNTS:
            world = fresh(base, scratch, roots)
            with read_only(world / relative):
                found = outcome(name, world)
            yield relative, "read-only", found


MOUNTS = False


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    global MOUNTS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quickstart = Path(prepare.__file__).parent / "quickstart" / "target"
    parser.add_argument("--target", type=Path, default=quickstart, help="a Hugging Face directory")
    parser.add_argument("--commands", default=",".join(COMMANDS), help="comma-separated; default: all")
    parser.add_argument("--files", default="*", help="comma-separated patterns of what is damaged; !PATTERN: is not")
    parser.add_argument("--base", type=Path, help="where the run is made, or one from before; default: made anew")
    parser.add_argument("--json", type=Path, help="file for all outcomes")
    options = parser.parse_args(argv)
    sys.addaudithook(_audit)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        MOUNTS = can_mount(Path(folder))
        if not MOUNTS:
            print("read-only: skipped, nothing can be mounted here", flush=True)
        base, scratch = options.base or Path(folder) / "base", Path(folder) / "world"
        if not (base / "drafter").exists():
            build(base, options.target)
        for name in options.commands.split(","):
            before = len(rows)
            for path, damage, found in trials(name, base, scratch, options.files):
                rows.append({"command": name, "path": path, "damage": damage, "kind": found.kind, **vars(found)})
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n")
                if not found.good:
                    left = f" (left: {', '.join(found.left)})" if found.left else ""
                    print(
                        f"BAD  {name:<13} {path}: {damage}: status {found.status}{left}: {found.said[:250]}", flush=True
                    )
            kinds = Counter(row["kind"] for row in rows[before:])
            print(f"{name}: {len(rows) - before} trials: {dict(kinds)}", flush=True)
    return int(any(not row["good"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
