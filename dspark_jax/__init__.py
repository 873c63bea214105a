"""DSpark in JAX: train, evaluate and run drafters for speculative decoding (paper: arXiv 2607.05147).

What programs need is here by name, loaded when it is first used:

    run = dspark_jax.load_run("runs/quickstart_dspark")
    with dspark_jax.Engine(run.models, tokenizer=run.tokenizer, stop_tokens=run.stop_tokens) as engine:
        print(engine.submit(run.prompt("What is 12 + 30?"), max_new_tokens=100).result().text)
"""

import importlib
from typing import TYPE_CHECKING, Any

from dspark_jax.interrupt import guard_imports

if TYPE_CHECKING:
    from dspark_jax.command import load_config
    from dspark_jax.config import Config, InputError, MeshConfig, resolve
    from dspark_jax.convert.__main__ import export_run as export
    from dspark_jax.engine import schedulers
    from dspark_jax.engine.generate import generate
    from dspark_jax.engine.models import Models
    from dspark_jax.engine.schedulers import Scheduler
    from dspark_jax.engine.serving import Engine
    from dspark_jax.evaluation.setup import load_run
    from dspark_jax.sharding import make_mesh
    from dspark_jax.target.loading import load_target
    from dspark_jax.training.checkpoint import load_drafter

__all__ = [
    "Config",
    "Engine",
    "InputError",
    "MeshConfig",
    "Models",
    "Scheduler",
    "export",
    "generate",
    "load_config",
    "load_drafter",
    "load_run",
    "load_target",
    "make_mesh",
    "resolve",
    "schedulers",
]

guard_imports()

_HOMES = {
    "config": ("Config", "InputError", "MeshConfig", "resolve"),
    "command": ("load_config",),
    "convert.__main__": ("export",),
    "engine.models": ("Models",),
    "engine.schedulers": ("Scheduler",),
    "engine.serving": ("Engine",),
    "evaluation.setup": ("load_run",),
    "sharding": ("make_mesh",),
    "target.loading": ("load_target",),
    "training.checkpoint": ("load_drafter",),
}
_NAMES = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = {
    "schedulers": "dspark_jax.engine.schedulers",
    "generate": "dspark_jax.generate",  # the command; it can be called as the function, which it would replace
}
_THERE = {"export": "export_run"}  # what a name is called at home, where that is another


def __getattr__(name: str) -> Any:
    """Loads a public name from its module."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name not in _NAMES:
        raise AttributeError(f"dspark_jax has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"dspark_jax.{_NAMES[name]}"), _THERE.get(name, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
