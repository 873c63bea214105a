"""How a run begins: with random parameters, those of another drafter (`warm_start`), or layers of the target."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import optax

from dspark_jax.buckets.places import reading
from dspark_jax.config import Config, DrafterConfig, InputError
from dspark_jax.convert.hf import abstract_drafter as abstract_import
from dspark_jax.convert.hf import head_tables, import_drafter, read_drafter_config
from dspark_jax.progress import log
from dspark_jax.run import Run, checkpoint_directory
from dspark_jax.target.loading import abstract_target
from dspark_jax.target.model import Target
from dspark_jax.training.checkpoint import load_drafter, saved_config, trained_for
from dspark_jax.training.layer_start import TARGET, plan_layers, start_layers
from dspark_jax.training.state import TrainState, abstract_drafter, init_state, to_params
from dspark_jax.training.vocabulary import known_vocabulary
from dspark_jax.training.warm_start import plan_takeover, stand_ins, warm_start


def check_start(config: Config) -> Config:
    """Refuses what a fresh drafter cannot begin as; it begins only when the data is there, hours later perhaps.

    Returns:
      The config, with the draft vocabulary of the drafter that it starts from if both have one.

    Raises:
      InputError: `train.init_from` names no drafter, or one that cannot become the config's; or see `plan_layers`.
    """
    source = config.train.init_from
    if config.drafter.init_layers == TARGET:
        target = abstract_target(config.target.architecture, jnp.float32, config.target.path)
        plan_layers(target, to_params(abstract_drafter(config)), config.drafter)
    if not source:
        return config
    folder = reading(source)
    with _naming_source(source):
        without: set[str] = set()
        if _is_exported(folder):
            arch, drafter = read_drafter_config(folder, config.target.architecture.num_hidden_layers)
            found: Any = abstract_import(arch, drafter)
            without = stand_ins(head_tables(folder))
        else:
            saved = saved_config(folder)
            if saved is None:
                raise InputError(
                    "no checkpoint and no config.json of a drafter here; "
                    "give the working directory of a run, or a drafter in a Hugging Face directory"
                )
            found, drafter = abstract_drafter(saved), saved.drafter
        wanted = to_params(abstract_drafter(config))
        plan_takeover(to_params(found), wanted, drafter, config.drafter, without)
        return known_vocabulary(config, dataclasses.replace(config, drafter=drafter))


def fresh_state(run: Run, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of step 0, with the parameters of `train.init_from` if there is one."""
    state, source = init_state(run.config, optimizer, run.mesh), run.config.train.init_from
    if not source:
        return state
    folder = reading(source)
    with _naming_source(source):
        exported = _is_exported(folder)
        if exported:
            depth = run.config.target.architecture.num_hidden_layers
            config, drafter = import_drafter(folder, run.mesh, target_layers=depth)
        else:
            saved, drafter = load_drafter(folder, run.mesh, any_target=True)
            config = saved.drafter
        state, takeover = warm_start(state, drafter, config, run.config.drafter, exported=exported)
    log(f"starting from the parameters of {source}")
    for line in takeover.lines():
        log(f"  {line}")
    return state


def tell_other_target(run: Run) -> None:
    """Says that the run of `train.init_from` was trained for other weights of the target, where that is so."""
    source = run.config.train.init_from
    if not source or _is_exported(folder := reading(source)):
        return
    if trained_for(folder) != run.target_fingerprint:
        log(f"{source} was trained for another target: its weights are not those of {run.config.target.path}")


def begin_layers(state: TrainState, target: Target, config: DrafterConfig) -> TrainState:
    """A fresh state with layers of the target, which it says in a line; see `layer_start.start_layers`."""
    state, start = start_layers(state, target, config)
    log(start.line())
    return state


def _is_exported(folder: Path) -> bool:
    """Whether a drafter lies there as a Hugging Face directory; a run has a config.json, too."""
    return not checkpoint_directory(folder).is_dir() and (folder / "config.json").exists()


@contextlib.contextmanager
def _naming_source(source: str) -> Iterator[None]:
    """Says in errors which field they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"train.init_from={source}: {error}") from None
