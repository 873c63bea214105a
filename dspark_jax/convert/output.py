"""Where an export goes: a place that is free or holds an export, and files that are there whole or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dspark_jax.config import DrafterConfig, InputError
from dspark_jax.convert.layouts import read_config, read_layout
from dspark_jax.kinds import served_as
from dspark_jax.run_lock import locked

SIDE_FILES = ("calibration.json", "cost_table.json")
"""What servers can use beside config and weights, if there is any of it."""
EXPORT_FILES = ("config.json", "model.safetensors", "README.md", *SIDE_FILES)
"""Every file that an export may hold."""


def check_output(output: Path, config: DrafterConfig, *, overwrite: bool) -> None:
    """Refuses a place that is taken, and a name by which vLLM would choose another method than the drafter's.

    Raises:
      InputError: see above; nothing has been written.
    """
    _check_words(f"--output {output}", output.name, config)
    if not output.name:
        raise InputError(f"--output {output}: a directory name is needed, e.g. exports/drafter")
    if output.exists() and not overwrite:
        raise InputError(f"--output {output}: exists; choose another place, or --overwrite to replace it")
    reason = _no_export(output) if output.exists() else ""
    if reason:
        raise InputError(f"--output {output}: {reason}, so it is not overwritten; choose another place")


def check_repository(repository: str, config: DrafterConfig) -> None:
    """Refuses the name of a repository, which is a path to vLLM as well, as `check_output` does that of a directory.

    Raises:
      InputError: a word in it misleads vLLM.
    """
    _check_words(f"--push {repository}", repository, config)


def _check_words(option: str, name: str, config: DrafterConfig) -> None:
    """Refuses a name by which vLLM would choose another method than the drafter's."""
    for word in ("dflash", "eagle3"):
        if word in name.lower() and word != served_as(config):  # anchor-first DFlash is served as dspark
            raise InputError(
                f"{option}: vLLM guesses the method from the path, and {word!r} in it is not how this "
                f"{config.kind} drafter is served; choose another name"
            )


def _no_export(directory: Path) -> str:
    """Why a directory is not an export and must not be deleted (a run, a target, anything else); empty if it is."""
    if not directory.is_dir():
        return "is no directory"
    for entry in sorted(directory.iterdir()):
        if entry.name not in EXPORT_FILES or entry.is_symlink() or not entry.is_file():
            return f"holds {entry.name}, which no export does"
    try:
        read_layout(str(directory), read_config(directory))
    except InputError:
        return "is no drafter directory"
    return "" if (directory / "model.safetensors").exists() else "is no drafter directory"


@contextlib.contextmanager
def built_beside(output: Path) -> Iterator[Path]:
    """A fresh directory on the same disk that becomes `output` at the end; nothing is left of it after an error.

    It lies in `.NAME.partial/`, which one process at a time has. What a killed one has left there is removed, but for
    the old `output` if that was just being replaced: it is put back first.

    Where `output` is a symbolic link, what it points to is replaced.

    Raises:
      InputError: another process is writing the same export, or nothing can be written there.
    """
    output = output.resolve()
    work = output.with_name(f".{output.name}.partial")
    new, old = work / "new", work / "old"
    try:
        with locked(work, "convert export", option="--output"):
            _finish_swap(output, new, old)
            try:
                new.mkdir()
                yield new
                if output.exists():
                    output.rename(old)
                new.rename(output)
            except OSError as error:  # a full disk comes without the name of a file
                error.filename = error.filename or str(output)
                raise
            finally:
                _finish_swap(output, new, old)
    finally:
        with contextlib.suppress(OSError):  # gone; or another process has it by now
            work.rmdir()


def _finish_swap(output: Path, new: Path, old: Path) -> None:
    """Puts `old` back where nothing has taken its place, and removes what is not needed."""
    if old.exists() and not output.exists():
        old.rename(output)
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file, flushed to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
