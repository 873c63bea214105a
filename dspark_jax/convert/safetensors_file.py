"""Writes safetensors files tensor by tensor, so that the host holds one of them at a time."""

import itertools
import json
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES: dict[str, tuple[str, np.dtype]] = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
"""Our name of a type -> its name in a safetensors header, and the array type."""

_OWN = {
    np.dtype(np.int64): "I64",
    np.dtype(np.bool_): "BOOL",
    np.dtype(np.int8): "I8",
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
}
"""Types that single tensors keep -> their names there."""


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, np.ndarray]],
    dtype: str,
    whole: Mapping[str, np.ndarray] | None = None,
    own: Mapping[str, np.dtype] | None = None,
) -> None:
    """Writes one file, flushed to disk.

    Args:
      path: is replaced.
      shapes: every tensor of the file and its shape; the header is made of it.
      tensors: each of them once, in any order; converted to `dtype`.
      dtype: float32 or bfloat16, of all these tensors but those in `own`.
      whole: further tensors, of whole numbers or truth values, which keep their type; they are in `shapes`, too.
      own: type of those of `tensors` that have another one than `dtype`.

    Raises:
      OSError: the disk is full.
    """
    whole = whole or {}
    kept = {name: value.dtype for name, value in whole.items()} | dict(own or {})
    types = {name: (_OWN[kind], kind) for name, kind in kept.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offsets, end = {}, 0
    for name in sorted(shapes, key=lambda name: (-types.get(name, DTYPES[dtype])[1].itemsize, name)):  # aligned
        code, numpy_type = types.get(name, DTYPES[dtype])
        size = numpy_type.itemsize * int(np.prod(shapes[name]))
        header[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [end, end + size]}
        offsets[name], end = end, end + size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    written = set()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, value in itertools.chain(tensors, whole.items()):
            numpy_type = types.get(name, DTYPES[dtype])[1]
            assert value.shape == shapes[name] and name not in written, name
            file.seek(8 + len(text) + offsets[name])
            file.write(np.ascontiguousarray(value, numpy_type).reshape(-1).view(np.uint8).data)
            written.add(name)
        assert written == set(shapes), sorted(set(shapes) - written)
        file.flush()
        os.fsync(file.fileno())
