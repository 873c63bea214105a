"""Drafters from and to Hugging Face directories in the layout of the PyTorch reference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dspark_jax.config import DrafterConfig, InputError, TargetArchitecture
from dspark_jax.convert.mapping import FROZEN, drafter_weights
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.dspark import DSpark
from dspark_jax.target.loading import fill_module, parameter_paths, read_checkpoint

_ARCHITECTURES = ("Qwen3DSparkModel",)


def read_drafter_config(directory: Path) -> tuple[TargetArchitecture, DrafterConfig]:
    """The drafter's own shape and its settings from a reference `config.json` (all keys at the top level).

    Raises:
      InputError: the file is missing, or describes a drafter that is not implemented.
    """
    path = directory / "config.json"
    arch = TargetArchitecture.from_hf(path)
    raw: dict[str, Any] = json.loads(path.read_text())
    if raw.get("architectures", [None])[0] not in _ARCHITECTURES:
        raise InputError(f"{path}: architectures {raw.get('architectures')} is not one of {list(_ARCHITECTURES)}")
    rank = raw.get("markov_rank", 0)
    head = raw.get("markov_head_type", "vanilla") if rank else "vanilla"
    if head not in ("vanilla", "gated", "rnn"):
        raise InputError(f"{path}: markov_head_type {head!r} is not supported; use vanilla, gated or rnn")
    missing = [key for key in ("block_size", "mask_token_id", "target_layer_ids") if key not in raw]
    if missing:
        raise InputError(f"{path}: missing {', '.join(missing)}; this is not a DSpark or DFlash config")
    confidence = bool(raw.get("enable_confidence_head", False))
    config = DrafterConfig(
        kind="dspark" if rank or confidence else "dflash",
        num_layers=raw["num_hidden_layers"],
        block_size=raw["block_size"],
        target_layer_ids=tuple(raw["target_layer_ids"]),
        mask_token_id=raw["mask_token_id"],
        markov_rank=rank,
        confidence_head=confidence,
        confidence_with_markov=bool(raw.get("confidence_head_with_markov", False)),
        markov_head_type=head,
    )
    return arch, config


def import_drafter(directory: str | Path, mesh: Mesh, *, dtype: Any = np.float32) -> tuple[DrafterConfig, DSpark]:
    """Loads a drafter that the reference wrote; its copies of the target's embedding and LM head are left out.

    Args:
      directory: holds config.json and safetensors.
      mesh: parameters are put on their shards of it, as float32.
      dtype: compute type of the drafter.

    Raises:
      InputError: the directory is incomplete, damaged, or holds an unknown tensor or another kind of drafter.
    """
    directory = Path(directory)
    arch, config = read_drafter_config(directory)
    tensors = read_checkpoint(directory)
    weights = drafter_weights(config)
    known = {name for weight in weights.values() for name in weight.names(config.num_layers)} | set(FROZEN)
    for name in tensors:
        if name not in known:
            raise InputError(f"{directory}: tensor {name} is unknown to a {config.kind} drafter; check config.json")
    drafter = nnx.eval_shape(lambda: make_drafter(arch, config, rngs=nnx.Rngs(0), dtype=dtype))
    fill_module(drafter, tensors, weights, str(directory), mesh, np.float32)
    return config, drafter


def drafter_tensors(drafter: DSpark, config: DrafterConfig) -> dict[str, np.ndarray]:
    """Parameters of a drafter (or gradients in its shape) as float32 arrays under the reference's names."""
    tensors = {}
    for path, variable in parameter_paths(drafter).items():
        weight, value = drafter_weights(config)[path], np.asarray(variable.get_value(), np.float32)
        layers = list(value) if weight.stacked else [value]
        names = weight.names(len(layers))
        tensors |= {name: weight.store(layer) for name, layer in zip(names, layers, strict=True)}
    return tensors
