"""Features of a sample as bytes: what they are of, 8-bit values with scales, and the record of one sample.

Values are 8-bit integers with a scale per token and group of 128 of them: one large value, which language models have,
then costs the others of its group their precision and no more. Or they are bfloat16.
"""

import dataclasses
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.data.sources import Sample

GROUP = 128
"""Values that share a scale, at most; of a width that 128 does not divide, its largest divisor below."""
AGAIN = "run python -m dspark_jax.prepare again"
"""Where `prepare` sees for itself that something is missing."""
REMEDY = f"remove it and {AGAIN}"

_HEADER = struct.Struct("<4sqII")  # magic, sample id, length, crc32 of the tokens
_MAGIC = b"DSF1"


@dataclasses.dataclass(frozen=True)
class Identity:
    """What features are of. A cache with another identity is not used.

    Attributes:
      target: fingerprint of the target's weights.
      tokenizer: fingerprint of its tokenizer.
      data: fingerprint of the samples.
      source: jax or torch, which computed them.
      taps: tapped layers.
      hidden_size: D.
      dtype: int8 or bfloat16.
      target_dtype: the config's target.dtype, in which they were computed. Caches of older versions do not say it and
        are taken for `auto`, its default.
    """

    target: str
    tokenizer: str
    data: str
    source: str
    taps: tuple[int, ...]
    hidden_size: int
    dtype: str
    target_dtype: str = "auto"

    @property
    def width(self) -> int:
        """Values per token, (M+1) D."""
        return (len(self.taps) + 1) * self.hidden_size

    @property
    def groups(self) -> int:
        """Scales per token; 0 for bfloat16."""
        return self.width // group_size(self.hidden_size) if self.dtype == "int8" else 0

    @property
    def value_type(self) -> Any:
        """NumPy type of the values."""
        return np.int8 if self.dtype == "int8" else ml_dtypes.bfloat16

    @property
    def bytes_per_token(self) -> int:
        """Size of a token's row on disk."""
        return self.width + 2 * self.groups if self.dtype == "int8" else 2 * self.width


@dataclasses.dataclass(frozen=True)
class FeatureSample(Sample):
    """A sample whose features are on disk.

    Attributes:
      identity: what they are of.
      read: () -> values [length, (M+1) D] int8 or bfloat16, and bfloat16 scales [length, groups] of int8 values, or
        [length, 0]. Raises InputError where the record is damaged.
    """

    identity: Identity
    read: Callable[[], tuple[np.ndarray, np.ndarray]]


def group_size(hidden_size: int) -> int:
    """Values that share a scale: no group crosses from one layer into the next."""
    return max(size for size in range(1, min(GROUP, hidden_size) + 1) if hidden_size % size == 0)


_STEP = np.float32(1) / np.float32(127)
"""Scales are products with it, and values products with the scales' inverses: XLA makes those of divisions, and what is
near a tie would be rounded another way than on the host."""


def quantise(rows: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [T, W] as int8 with a bfloat16 scale per group, rounded up so that nothing is cut.

    Returns:
      values [T, W] int8 and scales [T, W / group] bfloat16; values * scales is off by at most half a scale.
    """
    parts = np.asarray(rows, np.float32).reshape(len(rows), -1, group)
    bits = (np.abs(parts).max(axis=-1) * _STEP).view(np.uint32)
    scales = ((bits >> 16) + ((bits & 0xFFFF) > 0)).astype(np.uint16).view(ml_dtypes.bfloat16)  # the next one up
    inverse = np.float32(1) / np.where(scales == 0, 1, scales.astype(np.float32))
    values = np.rint(parts * inverse[..., None]).astype(np.int8)
    return values.reshape(rows.shape), scales


def quantise_on_device(rows: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """`quantise` of rows [..., W] within a program: the same bits."""
    parts = rows.astype(jnp.float32).reshape(*rows.shape[:-1], -1, group)
    bits = jax.lax.bitcast_convert_type(jnp.max(jnp.abs(parts), axis=-1) * _STEP, jnp.uint32)
    upper = (bits >> 16) + ((bits & 0xFFFF) > 0)
    scales = jax.lax.bitcast_convert_type(upper << 16, jnp.float32)
    inverse = 1 / jnp.where(scales == 0, 1, scales)
    values = jnp.rint(parts * inverse[..., None]).astype(jnp.int8)
    return values.reshape(rows.shape), scales.astype(jnp.bfloat16)


def dequantise(values: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """Rows [..., W] in `dtype` from int8 values and scales [..., groups], or from bfloat16 values without scales."""
    if not scales.shape[-1]:
        return values.astype(dtype)
    parts = values.reshape(*scales.shape, -1).astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
    return parts.reshape(values.shape).astype(dtype)


class Coded(NamedTuple):
    """Features of a sample as its record holds them.

    Attributes:
      values: [length, (M+1) D] int8 or bfloat16.
      scales: [length, groups] bfloat16, of int8 values; [length, 0] of others.
      finite: whether they were numbers before.
    """

    values: np.ndarray
    scales: np.ndarray
    finite: bool


def code(parts: Sequence[np.ndarray], identity: Identity) -> Coded:
    """The features of a sample from what some layers each gave, [length, D] in any type: one after another."""
    found = []
    for part in parts:
        rows = np.asarray(part, np.float32)
        finite = bool(np.isfinite(rows).all())
        if identity.groups and finite:
            values, scales = quantise(rows, group_size(identity.hidden_size))
        else:
            values = np.zeros(rows.shape, np.int8) if identity.groups else rows.astype(ml_dtypes.bfloat16)
            scales = np.zeros((len(rows), 0), ml_dtypes.bfloat16)
        found.append(Coded(values, scales, finite))
    values, scales, finite = zip(*found, strict=True)
    return Coded(np.concatenate(values, axis=1), np.concatenate(scales, axis=1), all(finite))


def code_on_device(rows: jax.Array, lengths: jax.Array, identity: Identity) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`code` within a program, of B samples: rows [B, S, (M+1) D], of which those past `lengths` [B] do not count.

    Returns:
      values [B, S, (M+1) D], scales [B, S, groups] and whether all numbers of a sample are finite [B].
    """
    padding = jnp.arange(rows.shape[1]) >= lengths[:, None]
    finite = jnp.all(jnp.isfinite(rows) | padding[..., None], axis=(1, 2))
    if identity.groups:
        return *quantise_on_device(rows, group_size(identity.hidden_size)), finite
    return rows.astype(jnp.bfloat16), jnp.zeros((*rows.shape[:2], 0), jnp.bfloat16), finite


def encode(sample: Sample, coded: Coded, identity: Identity) -> bytes:
    """One record.

    Raises:
      InputError: the target gave a number that is not finite.
    """
    if not coded.finite:
        raise InputError(f"sample {sample.sample_id}: its features are not finite; try target.dtype=float32")
    assert coded.values.shape == (len(sample.tokens), identity.width), (coded.values.shape, identity)
    head = _HEADER.pack(_MAGIC, sample.sample_id, len(sample.tokens), _crc(sample))
    return b"".join((head, coded.values.tobytes(), coded.scales.tobytes()))


def decode(record: bytes, sample: Sample, identity: Identity, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of a sample's record, as `FeatureSample.read` gives them.

    Raises:
      InputError: the record is not this sample's, or has another size.
    """
    length = len(sample.tokens)
    if len(record) != _HEADER.size + length * identity.bytes_per_token:
        raise InputError(f"{where}: {len(record)} bytes, a sample of {length} tokens has others; {REMEDY}")
    if _HEADER.unpack_from(record) != (_MAGIC, sample.sample_id, length, _crc(sample)):
        raise InputError(f"{where}: is not of sample {sample.sample_id}, the samples have changed; {REMEDY}")
    kind = np.dtype(identity.value_type)
    count = length * identity.width
    values = np.frombuffer(record, kind, count, _HEADER.size).reshape(length, -1)
    scales = np.frombuffer(record, ml_dtypes.bfloat16, length * identity.groups, _HEADER.size + count * kind.itemsize)
    return values, scales.reshape(length, identity.groups)


def _crc(sample: Sample) -> int:
    return zlib.crc32(np.asarray(sample.tokens, np.int32).tobytes())
