"""Whether a checkpoint is what was saved, and one line about one that is not.

Orbax and TensorStore notice missing and truncated files, each in its own way and at great length. What they do not
notice is a changed byte of an array: they store no checksums of values. So a checkpoint carries sums over its arrays
and a digest of its JSON.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.config import InputError
from dspark_jax.training.orbax_reports import quiet


class Damaged(InputError):
    """A checkpoint that is not what was saved; the message names it, and the file or array where that is known."""


def digest(content: Any) -> str:
    """Hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def array_sums(arrays: Any) -> dict[str, int]:
    """Dotted path -> sum of the bits of every array in a pytree, modulo 2^32: the same on every mesh."""
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }
    return {name: int(value) for name, value in jax.device_get(_sums(named)).items()}


@jax.jit
def _sums(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    def total(array: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")
        return jnp.sum(bits, dtype=jnp.uint32)

    return {name: total(array) for name, array in arrays.items()}


def check_sums(where: Path, arrays: Any, saved: Mapping[str, int]) -> None:
    """Compares restored arrays with what was saved; arrays of which nothing is known are left alone.

    Raises:
      Damaged: names the first array that differs.
    """
    for name, value in array_sums(arrays).items():
        if saved.get(name, value) != value:
            raise Damaged(f"{where}: damaged (the values of {name} are not those that were saved)")


@contextlib.contextmanager
def naming_damage(checkpoint: Path, items: Sequence[str]) -> Iterator[None]:
    """Turns what Orbax raises where `items` of a checkpoint are missing, truncated or changed into `Damaged`.

    It documents no types for it, and raises a bare `Exception` where a part of an array cannot be read.
    """
    for item in items:
        if not (checkpoint / item).is_dir():
            raise Damaged(f"{checkpoint / item}: damaged (the directory is missing)")
    try:
        with quiet():
            yield
    except Damaged:
        raise
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, _RAISED):
            raise
        raise Damaged(_line(error, checkpoint, items)) from error


_RAISED = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError)


def _line(error: Exception, checkpoint: Path, items: Sequence[str]) -> str:
    """What is wrong with which file, as far as the error and a look at the files tell."""
    for file in (file for item in items for file in _json_files(checkpoint / item)):
        try:
            json.loads(file.read_text("utf-8"))
        except FileNotFoundError:
            return f"{file}: damaged (no such file)"
        except OSError as unreadable:
            return f"{file}: damaged ({unreadable.strerror})"
        except ValueError:
            return f"{file}: damaged (not valid JSON)"
    cause = error.__cause__ if type(error) is Exception and error.__cause__ else error
    text = str(cause).split(" [tensorstore_spec")[0]
    named = list(re.finditer(r'local file "([^"]*)"[:\s]*', text))
    if named:
        file, words = named[-1][1], text[named[-1].end() :]
        array = re.search(r'reading "([^"]*?)/[^"/]*" in OCDBT', text)
        of = f" while reading {array[1]}" if array else ""
        known = {"NOT_FOUND": "no such file", "OUT_OF_RANGE": "truncated"}
        why = known.get(text.split(":")[0], words.split(";")[0])
        return f"{file.rstrip('/')}: damaged ({why}{of})"
    return f"{checkpoint}: damaged ({type(cause).__name__}: {' '.join(text.split())[:200]})"


def _json_files(item: Path) -> list[Path]:
    """Files of an item that Orbax reads as JSON: of arrays, or of plain values."""
    if (item / "manifest.ocdbt").exists() or (item / "_METADATA").exists():
        return [item / "_METADATA", *sorted((item / "array_metadatas").glob("*"))]
    return [item / "metadata"]
