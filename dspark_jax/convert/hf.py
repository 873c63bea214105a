"""Drafters from Hugging Face directories, and their tensors by checkpoint name."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dspark_jax.architecture import Unsupported
from dspark_jax.config import DrafterConfig, InputError, TargetArchitecture
from dspark_jax.convert.layouts import (
    Layout,
    default_taps,
    has_stages,
    layers_config,
    layers_shape,
    read_config,
    read_layout,
    unsupported_parts,
)
from dspark_jax.convert.long_context import fields as long_fields
from dspark_jax.convert.long_context import without
from dspark_jax.convert.mapping import (
    CONFIDENCE,
    FROZEN,
    HEADS,
    MARKOV,
    VOCABULARY_MAPS,
    drafter_family,
    drafter_weights,
    frozen_names,
)
from dspark_jax.convert.stages import stages_config, stages_tensors
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.kinds import KINDS
from dspark_jax.registry import listed
from dspark_jax.target import families
from dspark_jax.target.loading import fill_module, parameter_paths, read_checkpoint
from dspark_jax.vocabulary import encode_vocabulary, from_maps

ELSEWHERE = "servers may know it: convert check tells which"
"""What remains to be done with a drafter that cannot be run here."""


def read_drafter_config(directory: Path, target_layers: int = 0) -> tuple[TargetArchitecture, DrafterConfig]:
    """The drafter's own shape and its settings, from the `config.json` of any dialect that is known.

    Args:
      directory: of the drafter.
      target_layers: of its target, from which the tapped layers of an EAGLE-3 follow that names none; 0: not known.

    Raises:
      InputError: the file is missing, or describes a drafter that is not implemented.
    """
    path, raw = directory / "config.json", read_config(directory)
    layout = read_layout(str(path), raw)
    parts = unsupported_parts(raw)
    if parts:
        raise Unsupported(str(path), parts[0], ELSEWHERE)
    if not layout.taps and not target_layers:
        raise InputError(
            f"{path}: names no tapped layers, they follow from the target; give its own config or --target"
        )
    layout = layout if layout.taps else dataclasses.replace(layout, taps=default_taps(target_layers))
    arch, config = drafter_shape(path, raw, layout), drafter_config(str(path), layout, raw)
    if layout.family == "eagle3":
        config = of_tensors(directory, config, arch, read_checkpoint(directory))
    return arch, config


def of_tensors(
    directory: Path, config: DrafterConfig, arch: TargetArchitecture, tensors: Mapping[str, np.ndarray]
) -> DrafterConfig:
    """The settings of an EAGLE-3 drafter with what its tensors say: norms of queries and keys, and its vocabulary.

    Raises:
      InputError: the tensors do not say which tokens it drafts, or not what config.json says.
    """
    config = dataclasses.replace(config, qk_norms=any("self_attn.q_norm" in name for name in tensors))
    size, maps = config.draft_vocab_size, {name: tensors[name] for name in VOCABULARY_MAPS if name in tensors}
    if not size or (FROZEN[1] not in tensors and not maps):
        return dataclasses.replace(config, draft_vocab_size=0)  # the target's head
    if "d2t" not in maps:
        if size < arch.vocab_size:
            raise InputError(
                f"{directory}: tensor d2t, which says what tokens it drafts, is missing; download it again"
            )
        return config
    try:
        ids = from_maps(maps["d2t"], maps.get("t2d"), arch.vocab_size)
    except ValueError as error:
        raise InputError(f"{directory}: {error}") from None
    if len(ids) != size:
        raise InputError(
            f"{directory}: d2t has {len(ids)} tokens, config.json says draft_vocab_size {size}; correct it"
        )
    whole = size == arch.vocab_size
    return dataclasses.replace(config, draft_vocabulary="" if whole else encode_vocabulary(ids, arch.vocab_size))


def canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of an EAGLE-3 drafter by the names that the reference has, without the maps of its vocabulary."""
    names = {name: name.removeprefix("model.").replace("midlayer.", "layers.0.", 1) for name in tensors}
    return {names[name]: tensor for name, tensor in tensors.items() if name not in VOCABULARY_MAPS}


def drafter_shape(path: Path, raw: Mapping[str, Any], layout: Layout) -> TargetArchitecture:
    """The shape of a drafter's layers but for windows and scaled RoPE, which `drafter_config` has; see `from_hf`."""
    if layout.family == "eagle3":
        return layers_shape(path, raw)
    if has_stages(raw):
        model = TargetArchitecture.from_hf(path)
        return families.of_shape(model).drafter_shape(model)
    source = layers_config(raw)
    plain = without(source)
    return TargetArchitecture.from_hf(path if plain == raw else plain, path)


def drafter_config(where: str, layout: Layout, raw: Mapping[str, Any]) -> DrafterConfig:
    """The drafter that a layout describes, and what its config.json, `raw`, has of windows and RoPE.

    Raises:
      InputError: it is of a kind that is not implemented.
    """
    if layout.family == "eagle3":
        return eagle3_config(layout)
    if has_stages(raw):
        return stages_config(layout, raw)
    head = layout.markov_head_type if layout.markov_rank else "vanilla"
    if head not in HEADS:
        raise Unsupported(where, f"markov_head_type {head!r}", f"use {listed(HEADS)}")
    kind = "dspark" if layout.markov_rank or layout.confidence else "dflash"
    return DrafterConfig(
        kind="dflash2" if head == "selector" else kind,
        num_layers=layout.num_layers,
        block_size=layout.drafts,
        block_layout="anchor_first" if layout.anchor_first else "fill_in",
        target_layer_ids=layout.taps,
        mask_token_id=layout.mask_token_id,
        markov_rank=layout.markov_rank,
        confidence_head=layout.confidence,
        confidence_with_markov=layout.confidence_with_markov,
        markov_head_type=head,
        conv_kernel_size=layout.conv_kernel_size,
        conv_group_size=layout.conv_group_size,
        selector_top_k=layout.selector_top_k,
        **long_fields(where, raw),
    )


def eagle3_config(layout: Layout) -> DrafterConfig:
    """The EAGLE-3 drafter that a layout describes; with the reference's seven steps where it does not say."""
    return DrafterConfig(
        kind="eagle3",
        num_layers=1,
        block_size=layout.block_size or 7,
        target_layer_ids=layout.taps,
        mask_token_id=0,
        markov_rank=0,
        confidence_head=False,
        confidence_with_markov=False,
        qk_norms=layout.qk_norms,
        eagle3_norms=layout.eagle3_norms,
        draft_vocab_size=layout.draft_vocab_size,
    )


def abstract_drafter(arch: TargetArchitecture, config: DrafterConfig, *, dtype: Any = np.float32) -> DrafterModule:
    """A drafter whose parameters are shapes only."""
    return nnx.eval_shape(lambda: make_drafter(arch, config, rngs=nnx.Rngs(0), dtype=dtype))


def expected_tensors(arch: TargetArchitecture, config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this drafter holds, frozen copies of the target's included, and its shape."""
    drafter = abstract_drafter(arch, config)
    weights, shapes = drafter_weights(drafter, config), dict[str, tuple[int, ...]]()
    shapes |= {name: (1,) for name in _constants(drafter, config)}
    for path, variable in parameter_paths(drafter).items():
        weight, shape = weights[path], variable.get_value().shape
        single = shape[weight.stacked + bool(weight.experts) :]
        for name in weight.names(shape[0] if weight.stacked else 1):
            shapes[name] = weight.stored_shape(single)
    for name in frozen_names(config):
        shapes[name] = (arch.vocab_size, arch.hidden_size)
    return shapes


def _constants(drafter: DrafterModule, config: DrafterConfig) -> list[str]:
    """Tensors of one number in the file, always 1, never trained, and no parameters here."""
    if KINDS[config.kind].own_layers:
        return []
    names = drafter_family(drafter).drafter_constants
    return [name.format(i=i) for name in names for i in range(config.num_layers)]


def compare_tensors(
    where: str,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    kind: str,
    frozen: tuple[str, ...] = FROZEN,
) -> None:
    """Refuses any difference between the tensors that are there and those that should be.

    The `frozen` copies of the target's embedding and LM head may be left out, all of them.

    Raises:
      InputError: an unknown, missing or misshaped tensor, or a checkpoint with a vocabulary of its own.
    """
    for name in found:
        if name in VOCABULARY_MAPS:
            raise Unsupported(where, f"a reduced draft vocabulary (tensor {name})", ELSEWHERE)
        if name not in expected:
            raise InputError(f"{where}: tensor {name} is unknown to a {kind} drafter; check config.json")
    optional = () if any(name in found for name in frozen) else frozen
    for name, shape in expected.items():
        if name not in found:
            if name not in optional:
                raise InputError(f"{where}: tensor {name} is missing; download the checkpoint again")
        elif found[name] != shape:
            raise InputError(
                f"{where}: tensor {name} has shape {found[name]}, the config gives {shape}; "
                "config.json and weights are not of the same model"
            )


def import_drafter(
    directory: str | Path, mesh: Mesh, *, dtype: Any = np.float32, target_layers: int = 0
) -> tuple[DrafterConfig, DrafterModule]:
    """Loads a drafter that the reference, speculators or `convert export` wrote, without its copies of target tensors.

    Args:
      directory: holds config.json and safetensors.
      mesh: parameters are put on their shards of it, as float32.
      dtype: compute type of the drafter.
      target_layers: see `read_drafter_config`.

    Raises:
      InputError: the directory is incomplete, damaged, or holds an unknown tensor, one that is not finite, or another
        kind of drafter.
    """
    directory = Path(directory)
    arch, config = read_drafter_config(directory, target_layers)
    return config, load_tensors(directory, arch, config, mesh, dtype=dtype)


def load_tensors(
    directory: Path,
    arch: TargetArchitecture,
    config: DrafterConfig,
    mesh: Mesh,
    *,
    dtype: Any = np.float32,
    finite: bool = True,
) -> DrafterModule:
    """The drafter of a directory whose config has been read already; see `import_drafter` and `fill_module`."""
    tensors = read_checkpoint(directory)
    if config.kind == "eagle3":
        tensors = canonical(tensors)
    if KINDS[config.kind].own_layers:
        tensors = stages_tensors(tensors, read_config(directory), str(directory))
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    compare_tensors(str(directory), shapes, expected_tensors(arch, config), config.kind, frozen_names(config))
    drafter = abstract_drafter(arch, config, dtype=dtype)
    for name in _constants(drafter, config):
        if np.any(np.asarray(tensors[name], np.float32) != 1):
            raise InputError(f"{directory}: tensor {name} is not 1, which is not supported; scale the layer's weights")
    weights = drafter_weights(drafter, config)
    fill_module(drafter, tensors, weights, str(directory), mesh, np.float32, finite=finite)
    return drafter


def head_tables(directory: Path) -> dict[str, np.ndarray]:
    """Matrices of the Markov and the confidence head in a directory, by our names, as far as they are there."""
    weights, tensors = MARKOV | {"confidence.weight": CONFIDENCE["confidence.weight"]}, read_checkpoint(directory)
    return {path: tensors[weight.name] for path, weight in weights.items() if weight.name in tensors}


def stored_tensors(drafter: DrafterModule, config: DrafterConfig) -> Iterable[tuple[str, np.ndarray]]:
    """Parameters and constants of a drafter under the reference's names, one stack on the host at a time.

    Yields:
      (name, float32 array in PyTorch layout).
    """
    yield from _parameters(drafter, config)
    yield from ((name, np.ones(1, np.float32)) for name in _constants(drafter, config))


def _parameters(drafter: DrafterModule, config: DrafterConfig) -> Iterable[tuple[str, np.ndarray]]:
    weights = drafter_weights(drafter, config)
    for path, variable in parameter_paths(drafter).items():
        weight, value = weights[path], np.asarray(variable.get_value(), np.float32)
        layers = list(value) if weight.stacked else [value]
        matrices = [matrix for layer in layers for matrix in layer] if weight.experts else layers
        for name, matrix in zip(weight.names(len(layers)), matrices, strict=True):
            yield name, weight.store(matrix)


def drafter_tensors(drafter: DrafterModule, config: DrafterConfig) -> dict[str, np.ndarray]:
    """Parameters of a drafter (or gradients in its shape) as float32 arrays under the reference's names."""
    return dict(_parameters(drafter, config))
