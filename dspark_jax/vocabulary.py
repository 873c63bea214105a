"""A reduced draft vocabulary: which of the target's tokens a drafter can draft, and how files say it.

A config holds it as text (`encode_vocabulary`), files as two tensors, the same in SpecForge's, speculators' and EAGLE's
own layout: `d2t` [Vd] int64, by which draft id i is the target's token i + d2t[i] (an offset, no token), and `t2d` [V]
bool, true at these tokens. Ids are in ascending order.
"""

import base64
import binascii
import functools
import zlib
from collections.abc import Iterable

import numpy as np


def as_map(ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """[V] bool, true at the ids."""
    inside = np.zeros(vocab_size, bool)
    inside[ids] = True
    return inside


def encode_vocabulary(ids: np.ndarray, vocab_size: int) -> str:
    """Ids, in any order, as text: a compressed map of the vocabulary."""
    return base64.b64encode(zlib.compress(np.packbits(as_map(ids, vocab_size)).tobytes(), 9)).decode()


@functools.lru_cache(maxsize=8)
def decode_vocabulary(text: str, size: int, vocab_size: int) -> np.ndarray:
    """Inverse of `encode_vocabulary`: [size] int32, ascending. Of an empty text: the first `size` ids.

    Raises:
      ValueError: it is no such text, or of another number of tokens.
    """
    if not text:
        return np.arange(size, dtype=np.int32)
    try:
        packed = zlib.decompress(base64.b64decode(text, validate=True))
    except (binascii.Error, zlib.error):
        raise ValueError("it is no list of tokens") from None
    inside = np.unpackbits(np.frombuffer(packed, np.uint8)).astype(bool)
    ids = np.flatnonzero(inside).astype(np.int32)
    if len(ids) != size or (size and ids[-1] >= vocab_size):
        raise ValueError(f"it has {len(ids)} tokens of a vocabulary of {inside.size}, not {size} of {vocab_size}")
    return ids


def most_frequent(counts: np.ndarray, size: int) -> np.ndarray:
    """The `size` tokens with the largest counts [V], ascending; of equal ones those with lower ids."""
    order = np.lexsort((np.arange(len(counts)), -counts))
    return np.sort(order[:size])


def count_tokens(samples: Iterable[tuple[np.ndarray, np.ndarray]], vocab_size: int) -> np.ndarray:
    """How often each token is supervised: [V] int64, of (tokens, loss_mask) pairs."""
    counts = np.zeros(vocab_size, np.int64)
    for tokens, mask in samples:
        counts += np.bincount(tokens[mask.astype(bool)], minlength=vocab_size)
    return counts


def to_maps(ids: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
    """The tensors d2t and t2d."""
    return {"d2t": ids.astype(np.int64) - np.arange(len(ids)), "t2d": as_map(ids, vocab_size)}


def from_maps(d2t: np.ndarray, t2d: np.ndarray | None, vocab_size: int) -> np.ndarray:
    """The ids that the tensors state.

    Raises:
      ValueError: says what is wrong with them: tokens instead of offsets, ids out of range or order, or two maps that
        contradict each other.
    """
    stated = np.asarray(d2t, np.int64)
    ids = stated + np.arange(len(stated))
    right = bool(len(ids)) and ids[0] >= 0 and ids[-1] < vocab_size and bool(np.all(np.diff(ids) > 0))
    same = t2d is None or (t2d.shape == (vocab_size,) and np.array_equal(np.flatnonzero(t2d), ids))
    if right and same:
        return ids
    absolute = bool(len(stated)) and bool(np.all(np.diff(stated) > 0)) and stated[-1] < vocab_size
    if absolute and (t2d is None or np.array_equal(np.flatnonzero(t2d), stated)):
        raise ValueError("tensor d2t holds tokens, all servers read offsets: subtract 0, 1, 2, ... from it")
    if right:
        raise ValueError("tensors d2t and t2d name other tokens; the drafter was put together of two")
    raise ValueError(f"tensor d2t gives ids that are not ascending in 0..{vocab_size - 1}; it is damaged")
