"""JSON files: those that others wrote, with one line about what is wrong with them, and our own."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.errors import InputError


def read_object(path: Path, missing: str, damaged: str = "download it again") -> dict[str, Any]:
    """The content of a file that holds a JSON object.

    Args:
      path: the file.
      missing: what to do where there is no such file.
      damaged: what to do where it holds something else.

    Raises:
      InputError: it is missing, cannot be read, or holds no JSON object.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; {missing}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); {damaged}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid JSON (nested too deeply); {damaged}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not valid JSON (not UTF-8); {damaged}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {missing or damaged}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a JSON object; {damaged}")
    return found


def read_ours(path: Path) -> dict[str, Any]:
    """The content of a file that `write_json` wrote; empty where there is none.

    Raises:
      InputError: it is damaged: `write_json` leaves no half of it.
    """
    return read_object(path, "", "remove it and run again") if path.exists() else {}


def part(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside an object; empty where there is none, or something else."""
    found = content.get(name)
    return found if isinstance(found, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a JSON file that is there whole or not at all; returns what it holds: NaN is null, tuples are lists.

    Raises:
      OSError: it cannot be written; names `path`.
    """
    text = json.dumps(_plain(content), indent=1, allow_nan=False) + "\n"
    with written_whole(path) as temporary:
        temporary.write_text(text, "utf-8")
    return json.loads(text)


@contextlib.contextmanager
def written_whole(path: Path, ending: str = ".tmp") -> Iterator[Path]:
    """Gives the name under which a file is to be written; it gets its own when that is done, and is removed if not.

    Raises:
      OSError: of the operating system; names `path`, which is what the user knows.
    """
    temporary = path.with_suffix(ending)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        if temporary.is_file():
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _plain(value: Any) -> Any:
    """The value in types that JSON has."""
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value
