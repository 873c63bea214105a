"""Several hosts as one command: they join, agree on the config and on who holds the lock, or part again."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from dspark_jax.attached import STATUS
from dspark_jax.buckets.places import working_directory
from dspark_jax.config import Config, InputError, resolve
from dspark_jax.hub import with_architecture
from dspark_jax.paths import bucket_url


def join_hosts() -> None:
    """Makes this process one of several (`jax.distributed`); raises InputError where there are no others."""
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:  # JAX knows no coordinator, or cannot reach it
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--distributed: the other hosts cannot be joined ({reason}); start it where JAX finds them (a TPU slice, "
            "SLURM, GKE), or leave the flag out on one host"
        ) from error


@contextlib.contextmanager
def parted() -> Iterator[None]:
    """Ends JAX's connection to the other hosts; SIGTERM, which it has taken over and does not give back, ends us."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(STATUS)

    jax.process_count()  # is kept from here on
    jax.distributed.shutdown()
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def resolve_on_all(config: Config) -> Config:
    """The resolved config; where one of several hosts cannot use it, all end."""
    refusal = None
    try:
        config = resolve(with_architecture(config))
    except InputError as error:
        refusal = error
    if jax.distributed.is_initialized():
        refused = np.atleast_1d(multihost_utils.process_allgather(np.int32(refusal is not None)))
        if refused.any() and refusal is None:
            refusal = InputError(f"host {int(refused.argmax())} cannot use what it was given; its own output says why")
    if refusal is not None:
        raise refusal
    return config


@contextlib.contextmanager
def locked_by_one(workdir: Path, command: str) -> Iterator[Path]:
    """Gives the local folder to work in. Process 0 holds the lock for all; where it is refused, all end."""
    if not jax.distributed.is_initialized():
        with working_directory(workdir, command) as folder:
            yield folder
        return
    if url := bucket_url(workdir):
        raise InputError(
            f"--workdir {url}: with --distributed all hosts have to see one folder; mount the bucket (gcsfuse) "
            "or use a shared disk, and give that path"
        )
    refusal = None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(working_directory(workdir, command))
            except InputError as error:
                refusal = error
        if multihost_utils.broadcast_one_to_all(np.int32(refusal is not None)):
            raise refusal or InputError(f"--workdir {workdir}: cannot be used; process 0 says why")
        yield workdir
