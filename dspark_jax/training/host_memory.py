"""Host memory: what features from disk need of it, and what compiling leaves behind."""

import ctypes
import math
import sys

import jax
from jax.sharding import Mesh

from dspark_jax.config import Config, InputError
from dspark_jax.data.pipeline import ON_HOST
from dspark_jax.platform import host_memory
from dspark_jax.training.step import batch_layout


def return_freed_memory() -> None:
    """Gives memory that was freed, but is kept by the C library, back to the operating system.

    Compiling a train step leaves several hundred MB of it behind. Array buffers are mapped on their own and cannot use
    it, so without this it stays in the process for as long as training runs. Does nothing where there is no glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def feature_memory(config: Config, mesh: Mesh) -> int:
    """Bytes of host memory, at most, for the features from disk of the micro-batches of this process; 0 if online."""
    features = [leaf for name, leaf in batch_layout(config, mesh).items() if name.startswith("feature_")]
    each = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in features)
    return ON_HOST * each // jax.process_count()


def describe_feature_memory(config: Config, mesh: Mesh) -> str:
    """What training from disk takes of this host, in one line."""
    size = feature_memory(config, mesh)
    amount = f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
    return f"features: {ON_HOST} micro-batches take at most {amount} of host memory"


def check_host_memory(config: Config, mesh: Mesh) -> None:
    """Refuses micro-batches whose features this host cannot hold; call it before hours of preparing.

    Raises:
      InputError: they take more than all of its memory.
    """
    needed, there = feature_memory(config, mesh), host_memory()
    if needed <= there:
        return
    train, rows = config.train, config.train.batch_size // config.train.accumulate
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    more = (n for n in range(train.accumulate + 1, train.batch_size // ways + 1) if train.batch_size % (n * ways) == 0)
    fits = next((n for n in more if needed * train.accumulate <= there * n), None)
    remedy = f"set train.accumulate={fits}" if fits else "lower data.max_length"
    raise InputError(
        f"data.features={config.data.features}: the features of {ON_HOST} micro-batches of {rows} sequences x "
        f"{config.data.max_length} tokens take {needed / 1e9:.1f} GB of each host's memory, this one has "
        f"{there / 1e9:.1f} GB; {remedy}, or data.pack=True with a smaller train.batch_size, or data.features=online"
    )
