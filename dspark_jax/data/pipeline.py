"""Batches for training: shuffled, padded, split over processes, and resumable at any batch (grain).

The order is a function of the seed alone. Global batch n is made of elements n*B .. (n+1)*B-1 of the endless sequence
of shuffled epochs, and a process takes its slice of each, so that the global batches are the same for any number of
processes, and a run can be continued on another one.
"""

import functools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.data.sources import Sample, Samples


def batches(
    samples: Samples,
    *,
    batch_size: int,
    max_length: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 1,
) -> grain.DatasetIterator:
    """Endless iterator over this process's part of the training batches.

    Every epoch is a new permutation of all samples; a batch may hold the end of one and the beginning of the next, so
    no sample is left out. `get_state()` gives a small JSON-able dict, the number of batches taken, and `set_state()`
    continues exactly there, whatever `process_count` then is.

    Args:
      samples: random access to all samples.
      batch_size: sequences over all processes (B global).
      max_length: S, to which sequences are padded with zeros.
      seed: of the order.
      process_index: of this process, 0..process_count-1.
      process_count: must divide `batch_size`.
      threads: that read ahead; the order does not depend on it.

    Returns:
      Iterator over dicts: tokens [B, S] int32, loss_mask [B, S] uint8, lengths [B] int32, sample_id [B] int32, where B
      is batch_size / process_count.

    Raises:
      InputError: there are no samples, or the batch cannot be divided; while iterating: a sample exceeds max_length.
    """
    if not len(samples):
        raise InputError("there are no samples to train on; run python -m dspark_jax.prepare with more prompts")
    if batch_size % process_count:
        raise InputError(
            f"train.batch_size={batch_size} is not divisible by the {process_count} processes; use a multiple of it"
        )
    dataset = grain.MapDataset.source(samples).seed(seed).shuffle().repeat(None)  # pyright: ignore[reportArgumentType]
    dataset = dataset.batch(batch_size // process_count, batch_fn=functools.partial(pad_batch, max_length=max_length))
    if process_count > 1:
        dataset = dataset.slice(slice(process_index, None, process_count))
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(ahead))


def pad_batch(samples: Sequence[Sample], max_length: int) -> dict[str, Any]:
    """Samples as arrays, padded to [B, S] with zeros at the end.

    Raises:
      InputError: a sample is longer than `max_length`; nothing is cut silently.
    """
    tokens = np.zeros((len(samples), max_length), np.int32)
    loss_mask = np.zeros((len(samples), max_length), np.uint8)
    lengths = np.array([len(sample.tokens) for sample in samples], np.int32)
    for row, (sample, length) in enumerate(zip(samples, lengths, strict=True)):
        if length > max_length:
            raise InputError(
                f"sample {sample.sample_id} has {length} tokens, data.max_length={max_length}; prepare the data again"
            )
        tokens[row, :length] = sample.tokens
        loss_mask[row, :length] = sample.loss_mask
    ids = np.array([sample.sample_id for sample in samples], np.int32)
    return {"tokens": tokens, "loss_mask": loss_mask, "lengths": lengths, "sample_id": ids}
