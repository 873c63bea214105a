"""Features of a sample as bytes: what they are of, 8-bit values with scales, and the record of one sample.

Values are 8-bit integers with a scale per token and group of 128 of them: one large value, which language models have,
then costs the others of its group their precision and no more. Or they are bfloat16.
"""

import dataclasses
import struct
import zlib
from collections.abc import Callable
from typing import Any

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


def quantise(rows: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [T, W] as int8 with a bfloat16 scale per group, rounded up so that nothing is cut.

    Returns:
      values [T, W] int8 and scales [T, W / group] bfloat16; values * scales is off by at most half a scale.
    """
    parts = np.asarray(rows, np.float32).reshape(len(rows), -1, group)
    wanted = np.abs(parts).max(axis=-1) / 127
    bits = wanted.view(np.uint32)
    scales = ((bits >> 16) + ((bits & 0xFFFF) > 0)).astype(np.uint16).view(ml_dtypes.bfloat16)  # the next one up
    divisor = np.where(scales == 0, 1, scales.astype(np.float32))
    values = np.rint(parts / divisor[..., None]).astype(np.int8)
    return values.reshape(rows.shape), scales


def dequantise(values: jax.Array, scales: jax.Array, dtype: Any) -> jax.Array:
    """Rows [..., W] in `dtype` from int8 values and scales [..., groups], or from bfloat16 values without scales."""
    if not scales.shape[-1]:
        return values.astype(dtype)
    parts = values.reshape(*scales.shape, -1).astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
    return parts.reshape(values.shape).astype(dtype)


def encode(sample: Sample, rows: np.ndarray, identity: Identity) -> bytes:
    """One record.

    Raises:
      InputError: the target gave a number that is not finite.
    """
    if not np.isfinite(np.asarray(rows, np.float32)).all():
        raise InputError(f"sample {sample.sample_id}: its features are not finite; try target.dtype=float32")
    head = _HEADER.pack(_MAGIC, sample.sample_id, len(sample.tokens), _crc(sample))
    if identity.dtype == "bfloat16":
        return head + np.asarray(rows, ml_dtypes.bfloat16).tobytes()
    values, scales = quantise(rows, group_size(identity.hidden_size))
    return head + values.tobytes() + scales.tobytes()


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
