"""The matrices of a quantised checkpoint as arrays whose values are computed where they are sliced.

So a quantised target is loaded as any other: each device's slice is computed from the part of the file that it needs,
in float32, some rows at a time, and rounded once, to the compute type. Beside the slice the host holds some MB.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from dspark_jax.errors import InputError
from dspark_jax.json_file import read_object
from dspark_jax.target.checks import refuse_quantised_tensors
from dspark_jax.target.quantised import Layout, Quantisation, of_config

_OF_SERVERS = (
    ".input_scale", ".activation_scale", ".input_global_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip
"""How names of scales end with which servers quantise activations, keys and values."""

_AT_ONCE = 1 << 18
"""Values that are computed at a time."""

_AGAIN = "download the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A quantised matrix; stands for the array of its values, which are computed where it is sliced.

    Attributes:
      layout: how it is stored.
      codes: [O, bytes of a row].
      scales: [block rows, block columns].
      divisor: of all values.
      title: of the scales, for messages.
      dtype: of the values.
      stored: the tensors of the file.
      axes: what rows and columns are split into.
      turned: columns come first.
    """

    layout: Layout
    codes: np.ndarray
    scales: np.ndarray
    divisor: float
    title: str
    dtype: np.dtype[Any]
    stored: Mapping[str, np.ndarray]
    axes: tuple[tuple[int, ...], tuple[int, ...]]
    turned: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""
        first, second = self._in_order(*self.axes)
        return first + second

    @property
    def ndim(self) -> int:
        """Of the array that it stands for."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """What it takes in the file."""
        return sum(tensor.nbytes for tensor in self.stored.values())

    @property
    def T(self) -> "Matrix":
        """The transposed matrix [I, O]."""
        assert self.ndim == 2
        return dataclasses.replace(self, turned=not self.turned)

    def reshape(self, shape: tuple[int, ...]) -> "Matrix":
        """The same with its rows and its columns each split into other axes."""
        first, second = (math.prod(axes) for axes in self._in_order(*self.axes))
        at = next(i for i in range(len(shape) + 1) if math.prod(shape[:i]) == first)
        assert math.prod(shape[at:]) == second
        return dataclasses.replace(self, axes=self._in_order(shape[:at], shape[at:]))

    def rows(self, some: slice) -> "Matrix":
        """Some rows of a matrix whose rows share no scales, with all row axes merged."""
        assert self.layout.block[0] == 1 and not self.turned, "each row has scales of its own"
        parts = {"codes": self.codes[some], "scales": self.scales[some]}
        return dataclasses.replace(self, **parts, stored=parts, axes=((len(parts["codes"]),), self.axes[1]))

    def _in_order(self, rows: Any, columns: Any) -> tuple[Any, Any]:
        """(first, second) <-> (rows, columns)."""
        return (columns, rows) if self.turned else (rows, columns)

    def __len__(self) -> int:
        """Of the first axis."""
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of its values."""
        del copy
        return np.asarray(self[()], dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """The values of a slice; only what it needs of the file is read.

        Raises:
          InputError: a scale that it needs is not finite.
        """
        index = index if isinstance(index, tuple) else (index,)
        index += (slice(None),) * (self.ndim - len(index))
        first, second = self._in_order(*self.axes)
        a, b = _box(first, index[: len(first)]), _box(second, index[len(first) :])
        rows, columns = self._in_order(a.rows, b.rows)
        values = self._values(rows, columns)
        return (values.T if self.turned else values).reshape(a.axes + b.axes)[a.rest + b.rest]

    def _values(self, rows: range, columns: range) -> np.ndarray:
        """A rectangle of the stored matrix."""
        out = np.empty((len(rows), len(columns)), self.dtype)
        step = max(_AT_ONCE // max(len(columns), 1), 1)
        for at in range(0, len(rows), step):
            part = rows[at : at + step]
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is found by who loads it
                out[at : at + step] = self._numbers(part, columns) * self._scales(part, columns)
        return out

    def _numbers(self, rows: range, columns: range) -> np.ndarray:
        """What the codes stand for, float32."""
        if not self.layout.halves:
            codes = self.codes[rows.start : rows.stop, columns.start : columns.stop]
            return np.take(_numbers_of(codes.dtype), codes.view(np.uint8), mode="clip")  # which spares a check
        first = columns.start // 2
        codes = self.codes[rows.start : rows.stop, first : -(-columns.stop // 2)]
        skipped = columns.start - 2 * first
        return np.take(_pairs(), codes, mode="clip").view(np.float32)[:, skipped : skipped + len(columns)]

    def _scales(self, rows: range, columns: range) -> np.ndarray:
        """The scale of every value, or of every row where all columns share one, float32."""
        sizes = (math.prod(axes) for axes in self.axes)
        height, width = (n or size for n, size in zip(self.layout.block, sizes, strict=True))
        top, left = rows.start // height, columns.start // width
        part = self.scales[top : -(-rows.stop // height), left : -(-columns.stop // width)]
        part = part.view(ml_dtypes.float8_e8m0fnu) if part.dtype == np.uint8 else part
        part = part.astype(np.float32) / np.float32(self.divisor)
        if not np.isfinite(part).all():
            raise InputError(f"{self.title} holds values that are not finite; {_AGAIN}")
        part = part[np.arange(rows.start, rows.stop) // height - top]
        if not self.layout.block[1]:
            return part
        skipped = columns.start - left * width
        return np.repeat(part, width, axis=1)[:, skipped : skipped + len(columns)]


@dataclasses.dataclass(frozen=True)
class _Box:
    """What to read of merged axes for a slice of them.

    Attributes:
      rows: the range.
      axes: those of what is read.
      rest: the slice of that.
    """

    rows: range
    axes: tuple[int, ...]
    rest: tuple[slice, ...]


def _box(axes: tuple[int, ...], index: tuple[slice, ...]) -> _Box:
    """Of the first axis no more than is needed, of the others all."""
    if not axes:
        return _Box(range(1), (), ())
    inner, wanted = math.prod(axes[1:]), range(axes[0])[index[0]]
    assert wanted.step > 0
    start, stop = (wanted[0], wanted[-1] + 1) if wanted else (0, 0)
    rest = (slice(None, None, wanted.step), *index[1:])
    return _Box(range(start * inner, stop * inner), (stop - start, *axes[1:]), rest)


@functools.cache
def _numbers_of(dtype: np.dtype[Any]) -> np.ndarray:
    """The number of every code of an 8-bit type, [256] float32."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


@functools.cache
def _pairs() -> np.ndarray:
    """The two numbers of FP4 (E2M1: three bits, and a sign) in every byte: float32, two of them as one float64."""
    numbers = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
    numbers = np.concatenate([numbers, -numbers])
    byte = np.arange(256)
    return np.stack([numbers[byte % 16], numbers[byte // 16]], axis=1).view(np.float64)[:, 0]


def stated_by(directory: Path) -> Quantisation:
    """What the config.json of a directory states; nothing where there is none.

    Raises:
      InputError: as `of_config`.
    """
    path = directory / "config.json"
    return of_config(read_object(path, ""), str(path)) if path.exists() else Quantisation()


def with_matrices(
    tensors: Mapping[str, np.ndarray], quantisation: Quantisation, where: str, dtype: Any
) -> dict[str, Any]:
    """The tensors of a checkpoint with its quantised matrices under the names of the weights that they are.

    Scales of activations, keys and values are left out.

    Args:
      tensors: by name.
      quantisation: that the config states.
      where: the directory, for messages.
      dtype: type of the matrices' values.

    Raises:
      InputError: a quantised tensor, or a scale, has no place in what the config states; a matrix does not have the
        tensors that it needs, or one of another shape or type; or nothing is quantised, although the config says so.
    """
    found, used = dict[str, Any](), set[str]()
    for name in tensors:
        matrix = _matrix(name, tensors, quantisation, where, dtype)
        if matrix is None:
            continue
        weight, values = matrix
        if weight in found:
            raise InputError(f"{where}: tensor {name} is not the only one that scales {weight}; {_AGAIN}")
        found[weight] = values
        used |= values.stored.keys()
    rest = {name: tensor for name, tensor in tensors.items() if name not in used}
    if quantisation.layouts:
        rest = {name: tensor for name, tensor in rest.items() if not name.endswith(_OF_SERVERS)}
    codes = tuple(layout.codes for layout in quantisation.layouts)
    first = sorted(rest, key=lambda name: not name.endswith(codes))  # their scales are missing; others follow from that
    refuse_quantised_tensors({name: rest[name] for name in first}, where, quantisation)
    if quantisation.layouts and not found:
        raise InputError(
            f"{where}: config.json says that weights are stored as {quantisation.title}, but none is; remove its "
            "quantization_config if these are the right weights"
        )
    return rest | found


def _matrix(
    name: str, tensors: Mapping[str, np.ndarray], quantisation: Quantisation, where: str, dtype: Any
) -> tuple[str, Matrix] | None:
    """The weight that a tensor is the scales of, and its matrix; None where the tensor is none.

    Raises:
      InputError: it fits none of the layouts; says why it does not fit the first one.
    """
    errors = list[InputError]()
    for layout in quantisation.layouts:
        for end in layout.scales:
            if not name.endswith(end):
                continue
            try:
                return name.removesuffix(end) + layout.weight, _read(layout, name, end, tensors, where, dtype)
            except InputError as error:
                errors.append(error)
    if errors:
        raise errors[0]
    return None


def _read(layout: Layout, scales: str, end: str, tensors: Mapping[str, np.ndarray], where: str, dtype: Any) -> Matrix:
    """The matrix that has these scales, whose name ends so.

    Raises:
      InputError: a tensor is missing, or has another shape or type.
    """
    base = scales.removesuffix(end)
    names = [base + layout.codes, scales, *([base + layout.divisor] if layout.divisor else [])]
    for name in names:
        if name not in tensors:
            raise InputError(f"{where}: tensor {name} is missing beside {scales} ({layout.title}); {_AGAIN}")
    stored = {name: tensors[name] for name in names}
    codes, scale = stored[names[0]], stored[scales]
    if not layout.holds(codes.dtype):
        wanted = "uint8, two codes in a byte" if layout.halves else "FP8"
        raise InputError(f"{where}: tensor {names[0]} is {codes.dtype}, not {wanted}, beside {scales}; {_AGAIN}")
    if scale.dtype not in layout.scale_types:
        types = ", ".join(map(str, layout.scale_types))
        raise InputError(f"{where}: tensor {scales} is {scale.dtype}, scales of {layout.title} are {types}; {_AGAIN}")
    outer = codes.shape[: -2 if layout.grouped else -1]
    rows, columns = math.prod(outer), math.prod(codes.shape[len(outer) :]) * (2 if layout.halves else 1)
    grid = tuple(-(-size // (n or size or 1)) for size, n in zip((rows, columns), layout.block, strict=True))
    needed = (*outer, grid[1]) if layout.grouped else grid
    if scale.shape != needed and not scale.size == math.prod(grid) == 1:
        raise InputError(
            f"{where}: tensor {scales} has shape {scale.shape}; {names[0]} of shape {codes.shape} needs {needed}, as "
            f"config.json says {layout.title}; they are not of the same model"
        )
    return Matrix(
        layout=layout,
        codes=(codes.view(np.uint8) if codes.dtype == np.int8 else codes).reshape(rows, -1),
        scales=scale.reshape(grid),
        divisor=_divisor(f"{where}: tensor {names[2]}", stored[names[2]]) if layout.divisor else 1.0,
        title=f"{where}: tensor {scales}",
        dtype=np.dtype(dtype),
        stored=stored,
        axes=(outer, (columns,)),
    )


def _divisor(title: str, stored: np.ndarray) -> float:
    """The number through which a matrix is divided."""
    number = float(stored.reshape(-1)[0]) if stored.size == 1 else math.nan
    if not 0 < number < math.inf:
        raise InputError(f"{title} is not one positive number; {_AGAIN}")
    return number


def summary(tensors: Mapping[str, Any], quantisation: Quantisation) -> str:
    """What is dequantised, what that costs in memory, and what is not simulated, in one line; empty: nothing is."""
    matrices = [tensor for tensor in tensors.values() if isinstance(tensor, Matrix)]
    if not matrices:
        return ""
    dtype = matrices[0].dtype
    stored, loaded = sum(matrix.nbytes for matrix in matrices), sum(matrix.size for matrix in matrices) * dtype.itemsize
    title = ", ".join(dict.fromkeys(matrix.layout.title for matrix in matrices))
    line = (
        f"target: {len(matrices)} of {len(tensors)} tensors are {title}; they become {dtype} as they are loaded: "
        f"{_bytes(stored)} of files take {_bytes(loaded)} of memory"
    )
    others = [f"activations ({quantisation.activations})"] if quantisation.activations else []
    others += ["cached keys and values"] if quantisation.cache else []
    return f"{line}; that servers quantise {' and '.join(others)} as well is not simulated" if others else line


def _bytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
