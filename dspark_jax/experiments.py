"""The config files that come with the package: `configs/` of a checkout, `dspark_jax/configs/` of a wheel."""

import difflib
from pathlib import Path

from dspark_jax.errors import InputError


def directory() -> Path:
    """Where they are."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """By which they can be asked for, from anywhere."""
    return sorted(path.stem for path in directory().glob("*.py"))


def find(given: str) -> Path:
    """The file of a config.

    Args:
      given: one of `names()`, or a file that ends in .py or .json.

    Raises:
      InputError: there is none.
    """
    path = Path(given)
    if path.suffix not in (".py", ".json") and len(path.parts) == 1:
        if given in names():
            return directory() / f"{given}.py"
        near = difflib.get_close_matches(given, names(), n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else f"use one of {', '.join(names())}, or a file"
        raise InputError(f"--config {given}: no config of this name; {remedy}")
    if path.is_dir():
        raise InputError(f"--config {given}: a directory, not a file; name a config in it")
    if not path.is_file():
        if path.stem in names():
            near = [f"{path.stem}, which comes with the package"]
        else:
            near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.py")], n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]}?" if near else "check the path"
        raise InputError(f"--config {given}: no such file; {remedy}")
    if path.suffix not in (".py", ".json"):
        raise InputError(f"--config {given}: a config is a .py file, or a config.json that a run has written")
    return path
