"""Names and shapes of drafter checkpoints in the layout of the PyTorch reference (DeepSpec `save_pretrained`)."""

from typing import Any

from flax import nnx

from dspark_jax.config import DrafterConfig
from dspark_jax.kinds import KINDS
from dspark_jax.target import families
from dspark_jax.target.families.deepseek_v4 import layer_weights, streams_weights
from dspark_jax.target.families.family import Family
from dspark_jax.target.layers import Layer
from dspark_jax.target.weights import Weight

_BACKBONE = {
    "backbone.fc": Weight("fc.weight", inputs=1),
    "backbone.hidden_norm": Weight("hidden_norm.weight"),
    "backbone.norm": Weight("norm.weight"),
}

MARKOV = {
    "markov.w1": Weight("markov_head.markov_w1.weight"),
    "markov.w2": Weight("markov_head.markov_w2.weight"),
}

HEADS: dict[str, dict[str, Weight]] = {
    "vanilla": {},
    "gated": {
        "markov.gate": Weight("markov_head.gate_proj.weight", inputs=1),
        "markov.gate_bias": Weight("markov_head.gate_proj.bias"),
    },
    "rnn": {
        "markov.joint": Weight("markov_head.joint_proj.weight", inputs=1),
        "markov.joint_bias": Weight("markov_head.joint_proj.bias"),
    },
    "selector": {
        "markov.w1": Weight("candidate_selector.predecessor_codebook"),
        "markov.w2": Weight("candidate_selector.successor_codebook"),
        "markov.projection": Weight("candidate_selector.hidden_projection.weight", inputs=1),
    },
}
"""By type of the sequential head, what it has besides its tables, or where these have other names. Other types have no
format."""

_CONVOLUTIONS = {
    f"backbone.layers.around_{part}.{name}": weight._replace(name=f"layers.{{i}}.{part}_conv.{weight.name}")
    for part in ("attention", "mlp")
    for name, weight in (
        ("base", Weight("base_kernel", whole=True)),
        ("projection", Weight("kernel_projection.weight", inputs=1)),
    )
}

CONFIDENCE = {
    "confidence.weight": Weight("confidence_head.proj.weight", row=True),
    "confidence.offset": Weight("confidence_head.proj.bias"),
}

_EAGLE3 = {
    "fc": Weight("fc.weight", inputs=1),
    "norm": Weight("norm.weight"),
    "layers.hidden_norm": Weight("layers.{i}.hidden_norm.weight"),
    "input_norm": Weight("input_norm.weight"),
    "fc_norm": Weight("fc_norm.{i}.weight"),
    "vocabulary.head": Weight("lm_head.weight"),
}
"""Of the last three a drafter has what its config says."""

_MTP = {
    "projection": Weight("layers.0.eh_proj.weight", inputs=1),
    "hidden_norm": Weight("layers.0.hnorm.weight"),
    "embedding_norm": Weight("layers.0.enorm.weight"),
    "norm": Weight("layers.0.shared_head.norm.weight"),
}
"""Named after DeepSeek-V3's module. Its eh_proj reads [embedding; hidden state], ours [hidden state; embedding]:
whoever exports it for a server has to swap the halves."""

_STREAM_ENDS = {
    "backbone.fc": Weight("mtp.0.main_proj.weight", inputs=1),
    "backbone.hidden_norm": Weight("mtp.0.main_norm.weight"),
    "backbone.norm": Weight("mtp.{last}.norm.weight"),
    **streams_weights("backbone.collapse", "mtp.{last}.hc_head"),
    "markov.w1": Weight("mtp.{last}.markov_head.markov_w1.weight"),
    "markov.w2": Weight("mtp.{last}.markov_head.markov_w2.weight"),
    "confidence.weight": Weight("mtp.{last}.confidence_head.proj.weight", row=True),
}
"""DSpark-5 inside a DeepSeek-V4: stages mtp.0, mtp.1, ..., of which the first has what is before the layers, and the
last what is after them. Embedding and LM head are the target's."""

_KINDS = {"eagle3": _EAGLE3, "mtp": _MTP}
"""By kind of drafter; the others are block drafters with `_BACKBONE` and heads."""

FROZEN = ("embed_tokens.weight", "lm_head.weight")
"""Copies of the target's tensors that the reference stores in every drafter."""


def frozen_names(config: DrafterConfig) -> tuple[str, ...]:
    """Those of `FROZEN` that a file has from the target: not the LM head, if the drafter has one of its own, and
    nothing if it is a part of the target's file."""
    if KINDS[config.kind].own_layers:
        return ()
    return FROZEN[:1] if config.draft_vocab_size else FROZEN


VOCABULARY_MAPS = ("t2d", "d2t")
"""Tensors of drafters that draft from a part of the vocabulary only."""


def drafter_family(drafter: nnx.Module) -> Family:
    """The family whose layers a drafter has."""
    return families.FAMILIES[next(part.family for _, part in nnx.iter_modules(drafter) if isinstance(part, Layer))]


def drafter_weights(drafter: nnx.Module, config: DrafterConfig) -> dict[str, Weight]:
    """Every parameter of a drafter and the tensor that holds it.

    Args:
      drafter: tells which family's layers it has; its parameters may be shapes only.
      config: says what kind of drafter it is.
    """
    if KINDS[config.kind].own_layers:
        return _stream_weights(drafter, config)
    stack = "backbone.layers." if hasattr(drafter, "backbone") else "layers."
    layers = drafter_family(drafter).drafter_weights()
    return _plain_weights(config) | {stack + path: weight for path, weight in layers.items()}


def _stream_weights(drafter: Any, config: DrafterConfig) -> dict[str, Weight]:
    """Those of a DSpark-5."""
    last = str(config.num_layers - 1)
    ends = {path: weight._replace(name=weight.name.replace("{last}", last)) for path, weight in _STREAM_ENDS.items()}
    if not config.confidence_head:
        del ends["confidence.weight"]
    layers = layer_weights("mtp.{i}", drafter.backbone.layers.mlp.shape)
    return ends | {f"backbone.layers.{path}": weight for path, weight in layers.items()}


def _plain_weights(config: DrafterConfig) -> dict[str, Weight]:
    """All but those of the layers."""
    weights = dict(_KINDS.get(config.kind, _BACKBONE))
    if config.markov_rank:
        weights |= MARKOV | HEADS[config.markov_head_type]
    if config.confidence_head:
        weights |= CONFIDENCE
    if config.conv_kernel_size:
        weights |= _CONVOLUTIONS
    return weights
