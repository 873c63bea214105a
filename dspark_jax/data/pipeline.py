"""Batches for training: shuffled, padded or packed, split over processes, and resumable at any batch (grain).

The order is a function of the seed alone. Global batch n is made of elements n*B .. (n+1)*B-1 of the endless sequence
of shuffled epochs, and a process takes its slice of each, so that the global batches are the same for any number of
processes, and a run can be continued on another one.
"""

import dataclasses
import functools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.data.packing import PackedSamples, empty_features, pack_batch, pad_batch, read_features
from dspark_jax.data.sources import Samples

ON_HOST = 3
"""Micro-batches of features that a host holds with `MicroBatches`: on the way to the devices, waited for, ahead."""

_Reading = tuple[dict[str, np.ndarray], list[Future[None]]]


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch of which the first micro-batch is being read, and the state of the iterator after it."""

    state: Any
    pieces: list[dict[str, Any]]
    first: _Reading


def batches(
    samples: Samples,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
    pack: bool = False,
) -> grain.DatasetIterator:
    """Endless iterator over this process's part of the training batches.

    Every epoch is a new permutation of all sequences; a batch may hold the end of one and the beginning of the next, so
    no sequence is left out. A sequence is a sample, or several of them when they are packed. `get_state()` gives a
    small JSON-able dict, the number of batches taken, and `set_state()` continues exactly there, whatever
    `process_count` then is.

    Args:
      samples: random access to all samples.
      batch_size: sequences over all processes (B global).
      max_length: S, to which sequences are padded with zeros.
      seed: of the order.
      process_index: of this process, 0..process_count-1.
      process_count: must divide `batch_size`.
      threads: that read ahead; the order does not depend on it.
      pack: put several samples into a sequence (see `data.packing`).

    Returns:
      Iterator over dicts: tokens [B, S] int32, loss_mask [B, S] uint8, lengths [B] int32, sample_id [B] int32, where B
      is batch_size / process_count; packed ones have starts [B, S] int32 besides, and those with features `unread` (see
      `data.packing`), which `MicroBatches` reads.

    Raises:
      InputError: there are no samples, or the batch cannot be divided; while iterating: a sample exceeds max_length.
    """
    if not len(samples):
        raise InputError("there are no samples to train on; run python -m dspark_jax.prepare with more prompts")
    if batch_size % process_count:
        raise InputError(
            f"train.batch_size={batch_size} is not divisible by the {process_count} processes; use a multiple of it"
        )
    source: Any = PackedSamples(samples, max_length) if pack else samples
    fill: Any = functools.partial(pack_batch if pack else pad_batch, max_length=max_length)
    # As often as a length can be counted: of a dataset without an end, batches of one are too many for grain to count.
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(MOST_SAMPLES // len(source))
    dataset = dataset.batch(batch_size // process_count, batch_fn=fill)
    if process_count > 1:
        dataset = dataset.slice(slice(process_index, None, process_count))
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(ahead))


MOST_SAMPLES = 2**62
"""That an order has, over all epochs."""


class MicroBatches:
    """Batches in micro-batches with their features, which threads read one micro-batch ahead.

    Of the features of a batch, which can be tens of GB, the host holds those of `ON_HOST` micro-batches. Besides
    iterating, it keeps the iterator's state: that after the last batch that was handed out.
    """

    def __init__(self, batches: grain.DatasetIterator, count: int, threads: int = 1):
        """`batches` of samples with features, each cut into `count` micro-batches of consecutive sequences."""
        self._batches, self._count = batches, count
        self._pool = ThreadPoolExecutor(threads, "features")
        self._state = batches.get_state()
        self._next: _Batch | None = None

    def __next__(self) -> Iterator[dict[str, np.ndarray]]:
        """The micro-batches of the next batch, to be taken before those of another one.

        Each has the arrays of its rows, feature_values [B, S, (M+1) D] and feature_scales [B, S, groups] among them
        (see `data.feature_codec`), zeros after the samples.

        Raises:
          InputError: while iterating: a record of the cache is damaged.
        """
        batch = self._next or self._begin()
        self._state, self._next = batch.state, None
        return self._read(batch)

    def get_state(self) -> Any:
        """As of `batches`."""
        return self._state

    def set_state(self, state: Any) -> None:
        """As of `batches`."""
        self._batches.set_state(state)
        self._state, self._next = state, None

    def _read(self, batch: _Batch) -> Iterator[dict[str, np.ndarray]]:
        first = batch.first
        for index in range(self._count):
            arrays, reading = first
            if index + 1 < self._count:
                first = self._start(batch.pieces[index + 1])
            else:
                self._next = self._begin()
            for future in reading:
                future.result()
            yield arrays

    def _begin(self) -> _Batch:
        """Takes a batch and starts to read its first micro-batch."""
        rows = next(self._batches)
        size = len(rows["tokens"]) // self._count
        pieces = [
            {name: part[index * size : (index + 1) * size] for name, part in rows.items()}
            for index in range(self._count)
        ]
        return _Batch(self._batches.get_state(), pieces, self._start(pieces[0]))

    def _start(self, piece: dict[str, Any]) -> _Reading:
        """Starts to read a micro-batch."""
        sequences = piece["unread"]
        features = empty_features(len(sequences), piece["tokens"].shape[1], sequences[0][0].identity)
        reading = [self._pool.submit(read_features, features, row, members) for row, members in enumerate(sequences)]
        return {name: rows for name, rows in piece.items() if name != "unread"} | features, reading
