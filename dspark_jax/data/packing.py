"""Several samples in one training sequence: which go together, and the arrays of such a sequence.

Padding costs as much as tokens: conversations of a hundred tokens in sequences of 256 leave more than half of the
target's forward pass to zeros. Which samples share a sequence is decided once, by best fit from the longest to the
shortest; the sequences are then shuffled again in every epoch. Samples of a sequence never see each other: rows carry
the first row of their document, positions begin at 0 in each, and no block crosses into the next one.
"""

import bisect
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.data.feature_codec import FeatureSample, Identity
from dspark_jax.data.sources import Sample, Samples


def plan_sequences(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Indices of the samples of every sequence: best fit, longest first; a function of the lengths alone.

    Args:
      lengths: of the samples, 1..room.
      room: tokens of a sequence.
    """
    left: list[int] = []  # distinct amounts of room that sequences have left, ascending
    having: dict[int, list[int]] = {}  # sequences by the room they have left
    sequences: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        at = bisect.bisect_left(left, lengths[index])
        if at == len(left):
            chosen, before = len(sequences), room
            sequences.append([])
        else:
            before = left[at]
            chosen = having[before].pop()
            if not having[before]:
                del left[at], having[before]
        sequences[chosen].append(index)
        after = before - lengths[index]
        if after and after not in having:
            bisect.insort(left, after)
        if after:
            having.setdefault(after, []).append(chosen)
    return sequences


class PackedSamples:
    """Random access to sequences of several samples.

    Args:
      samples: read once, for their lengths.
      max_length: tokens of a sequence.

    Raises:
      InputError: a sample is longer than a sequence.
    """

    def __init__(self, samples: Samples, max_length: int):
        self._samples = samples
        lengths = getattr(samples, "lengths", None)  # a feature cache knows them without reading the features
        if lengths is None or max(lengths) > max_length:
            lengths = []
            for index in range(len(samples)):
                sample = samples[index]
                _check_length(sample, max_length)
                lengths.append(len(sample.tokens))
        self._sequences = plan_sequences(lengths, max_length)

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self._sequences)

    def __getitem__(self, index: int) -> list[Sample]:
        """The samples of sequence `index` in 0..len-1."""
        return [self._samples[member] for member in self._sequences[index]]

    def __repr__(self) -> str:
        """Names the data, and only that: grain prints it in its error messages."""
        return f"PackedSamples({self._samples!r})"


def pad_batch(samples: Sequence[Sample], max_length: int) -> dict[str, Any]:
    """One sample per sequence: tokens, loss_mask [B, S] padded with zeros at the end; lengths, sample_id [B].

    Samples with features are themselves in it, as `unread`: the samples of every sequence, in a list of B.

    Raises:
      InputError: a sample is longer than `max_length`; nothing is cut silently.
    """
    return _fill([[sample] for sample in samples], max_length)


def pack_batch(sequences: Sequence[Sequence[Sample]], max_length: int) -> dict[str, Any]:
    """Several samples per sequence: as `pad_batch`, and starts [B, S], the first row of each row's document.

    The padding is a document of its own. The first token of a document is not supervised: nothing before it predicts
    it. sample_id is that of the first sample, and lengths are those of all samples together.

    Raises:
      InputError: the samples of a sequence are longer than `max_length`.
    """
    batch = _fill(sequences, max_length)
    starts = np.zeros_like(batch["tokens"])
    for row, members in enumerate(sequences):
        bounds = np.cumsum([0, *(len(sample.tokens) for sample in members)])
        firsts = np.append(bounds[bounds < max_length], max_length)
        starts[row] = np.repeat(firsts[:-1], np.diff(firsts))
        batch["loss_mask"][row, firsts[:-1]] = 0
    return batch | {"starts": starts}


def _fill(sequences: Sequence[Sequence[Sample]], max_length: int) -> dict[str, Any]:
    tokens = np.zeros((len(sequences), max_length), np.int32)
    loss_mask = np.zeros((len(sequences), max_length), np.uint8)
    lengths = np.zeros(len(sequences), np.int32)
    for row, members in enumerate(sequences):
        for sample in members:
            _check_length(sample, max_length - lengths[row])
            rows = slice(lengths[row], lengths[row] + len(sample.tokens))
            tokens[row, rows], loss_mask[row, rows] = sample.tokens, sample.loss_mask
            lengths[row] = rows.stop
    ids = np.array([members[0].sample_id for members in sequences], np.int32)
    batch = {"tokens": tokens, "loss_mask": loss_mask, "lengths": lengths, "sample_id": ids}
    first = sequences[0][0]
    return batch | ({"unread": list(sequences)} if isinstance(first, FeatureSample) else {})


def empty_features(count: int, max_length: int, identity: Identity) -> dict[str, np.ndarray]:
    """feature_values [count, S, (M+1) D] and feature_scales [count, S, groups] of zeros.

    The system gives memory to what is written only, so that padding takes none.
    """
    values = np.zeros((count, max_length, identity.width), identity.value_type)
    return {
        "feature_values": values,
        "feature_scales": np.zeros((count, max_length, identity.groups), ml_dtypes.bfloat16),
    }


def read_features(arrays: Mapping[str, np.ndarray], row: int, members: Sequence[FeatureSample]) -> None:
    """Reads the features of a sequence's samples into its row of `empty_features`.

    Raises:
      InputError: a record is damaged.
    """
    start = 0
    for sample in members:
        rows = slice(start, start + len(sample.tokens))
        arrays["feature_values"][row, rows], arrays["feature_scales"][row, rows] = sample.read()
        start = rows.stop


def _check_length(sample: Sample, room: int) -> None:
    if len(sample.tokens) > room:
        raise InputError(
            f"sample {sample.sample_id} has {len(sample.tokens)} tokens, data.max_length={room}; prepare the data again"
        )
