"""The feature cache of a working directory: what it has to be of, writing it with the target, opening it to train."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.buckets.places import fetch
from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.data.feature_codec import Coded, Identity, code, code_on_device
from dspark_jax.data.features import (
    PASS_TOKENS,
    CachedSamples,
    Pass,
    check_identity,
    estimate,
    frozen_file,
    is_complete,
    read_manifest,
    write_features,
)
from dspark_jax.data.sources import SampleReader
from dspark_jax.hosts import mesh_of_one_host
from dspark_jax.hub import local_directory
from dspark_jax.progress import Progress, log
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.target.frozen import save_frozen
from dspark_jax.target.loading import load_target
from dspark_jax.target.model import Target
from dspark_jax.target.torch_model import TorchModel, load_torch_model


def feature_identity(run: Run, data: str | None = None) -> Identity:
    """What a cache for this run has to be of.

    Args:
      run: has the samples.
      data: fingerprint of the samples, where they are not there yet.

    Raises:
      InputError: the samples' fingerprint is not known, or the target is missing, damaged, or not of the shape that the
        config states.
    """
    config = run.config
    found = TargetArchitecture.of_any_model(local_directory(config.target.path))
    config.target.architecture.refuse_other(found, config.target.path)
    data = data or run.prepared_fingerprint
    if data is None:
        raise InputError(f"{run.data_folder}: has no report.json with a fingerprint; run prepare again")
    return Identity(
        target=run.target_fingerprint,
        tokenizer=run.tokenizer_fingerprint,
        data=data,
        source="torch" if config.data.features == "torch" else "jax",
        taps=tuple(config.drafter.target_layer_ids),
        hidden_size=config.target.architecture.hidden_size,
        dtype=config.data.feature_dtype,
        target_dtype=config.target.dtype,
    )


def check_features(run: Run) -> None:
    """Refuses what `prepare_features` would, before samples are prepared again for it.

    Raises:
      InputError: there is a cache, of something else.
    """
    if read_manifest(run.feature_folder):
        check_identity(run.feature_folder, feature_identity(run, run.data_fingerprint))


def open_features(run: Run) -> CachedSamples:
    """The samples of a run with their features.

    Raises:
      InputError: there is no complete cache for this config.
    """
    fetch(run.feature_folder)
    return CachedSamples(SampleReader(run.data_folder), run.feature_folder, feature_identity(run))


def prepare_features(run: Run) -> None:
    """Makes `workdir/features`, or what is missing of it, with the devices of this host; one host calls it.

    Raises:
      InputError: the target cannot be used, there is a cache of something else, or the disk has no room.
    """
    config, directory, identity = run.config, run.feature_folder, feature_identity(run)
    fetch(directory)
    check_identity(directory, identity)
    if is_complete(directory, identity):
        log(f"features: {directory} is up to date")
        return
    samples = SampleReader(run.data_folder)
    lengths = [len(samples[i].tokens) for i in range(len(samples))]
    size, plain = estimate(identity, sum(lengths))
    log(
        f"features: {len(lengths)} samples, {sum(lengths)} tokens x {identity.bytes_per_token} bytes = "
        f"{size / 1e9:.2f} GB in {directory} ({plain / 1e9:.2f} GB as bfloat16)"
    )
    with Progress("features", len(lengths), unit="sample") as progress:
        write_features(
            directory,
            identity,
            samples,
            lengths,
            functools.partial(feature_pass, run, identity),
            batch_size=config.data.decode_batch_size,
            pass_tokens=PASS_TOKENS * (1 if config.data.features == "torch" else jax.local_device_count()),
            progress=progress.advance,
        )


def feature_pass(run: Run, identity: Identity) -> Pass:
    """The target, loaded, as the function that gives features; its embedding and LM head are put beside the cache.

    Features are coded where they are computed, and only then fetched: on a host's single thread it would take longer
    than the pass.
    """
    config = run.config
    taps = tuple(config.drafter.target_layer_ids)
    if config.data.features == "torch":
        model = load_torch_model(config.target.path, config.target.dtype)
        save_frozen(frozen_file(run.feature_folder), *model.frozen_matrices())
        return functools.partial(_torch_pass, model, taps, identity)
    mesh = run.mesh
    if jax.process_count() > 1:
        devices = jax.local_devices()
        mesh = make_mesh(mesh_of_one_host(config.mesh, len(devices)), devices)
    with jax.set_mesh(mesh):
        target = load_target(config.target, mesh)
        embedding = jax.jit(target.embed)(jnp.arange(config.target.architecture.vocab_size))
        save_frozen(frozen_file(run.feature_folder), np.asarray(embedding), np.asarray(target.head), target.softcap)

    @jax.jit
    def forward(target: Target, tokens: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        out = target.forward(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), taps=taps)
        # After the barrier they are what training would see online: rounded to the compute type.
        features, last = jax.lax.optimization_barrier((out.features, out.last_hidden))
        return code_on_device(jnp.concatenate([features, last], axis=-1), lengths, identity)

    def start(tokens: np.ndarray, lengths: np.ndarray) -> Callable[[], Iterator[Coded]]:
        with jax.set_mesh(mesh):
            started = forward(target, jnp.asarray(tokens), jnp.asarray(lengths))

        def fetch() -> Iterator[Coded]:
            values, scales, finite = jax.device_get(started)
            for row, count in enumerate(lengths):
                yield Coded(values[row, :count], scales[row, :count], bool(finite[row]))

        return fetch

    return start


def _torch_pass(
    model: TorchModel, taps: tuple[int, ...], identity: Identity, tokens: np.ndarray, lengths: np.ndarray
) -> Callable[[], Iterator[Coded]]:
    """A pass as `data.features.Pass`; a layer of a sample at a time becomes float32 and is coded on the host."""
    hidden, _ = model.run(tokens, taps)

    def fetch() -> Iterator[Coded]:
        for row, count in enumerate(lengths):
            yield code([part[row, :count].float().cpu().numpy() for part in hidden], identity)

    return fetch
