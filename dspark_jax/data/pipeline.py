"""Batches for training: shuffled, padded or packed, split over processes, and resumable at any batch (grain).

The order is a function of the seed alone. Global batch n is made of elements n*B .. (n+1)*B-1 of the endless sequence
of shuffled epochs, and a process takes its slice of each, so that the global batches are the same for any number of
processes, and a run can be continued on another one.
"""

import functools
from typing import Any

import grain

from dspark_jax.config import InputError
from dspark_jax.data.packing import PackedSamples, pack_batch, pad_batch
from dspark_jax.data.sources import Samples


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
      is batch_size / process_count; packed ones have starts [B, S] int32 besides, and those with features
      feature_values [B, S, (M+1) D] and feature_scales [B, S, groups] (see `data.feature_codec`).

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
    dataset = grain.MapDataset.source(source).seed(seed).shuffle().repeat(None)
    dataset = dataset.batch(batch_size // process_count, batch_fn=fill)
    if process_count > 1:
        dataset = dataset.slice(slice(process_index, None, process_count))
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.to_iter_dataset(ahead))
