"""Names and shapes of drafter checkpoints in the layout of the PyTorch reference (DeepSpec `save_pretrained`)."""

from collections.abc import Iterable

from dspark_jax.config import DrafterConfig
from dspark_jax.target import gemma4
from dspark_jax.target.qwen3 import LAYER_WEIGHTS
from dspark_jax.target.weights import Weight

_BACKBONE = {
    "backbone.fc": Weight("fc.weight", inputs=1),
    "backbone.hidden_norm": Weight("hidden_norm.weight"),
    "backbone.norm": Weight("norm.weight"),
} | {f"backbone.layers.{path}": weight for path, weight in LAYER_WEIGHTS.items()}

_MARKOV = {
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
}
"""By type of the sequential head, what it has besides its tables. Other types have no format."""

_CONFIDENCE = {
    "confidence.weight": Weight("confidence_head.proj.weight", row=True),
    "confidence.offset": Weight("confidence_head.proj.bias"),
}

_EAGLE3 = {
    "fc": Weight("fc.weight", inputs=1),
    "norm": Weight("norm.weight"),
    "layers.hidden_norm": Weight("layers.{i}.hidden_norm.weight"),
} | {f"layers.{path}": weight for path, weight in LAYER_WEIGHTS.items()}

_MTP = {
    "projection": Weight("layers.0.eh_proj.weight", inputs=1),
    "hidden_norm": Weight("layers.0.hnorm.weight"),
    "embedding_norm": Weight("layers.0.enorm.weight"),
    "norm": Weight("layers.0.shared_head.norm.weight"),
} | {f"layers.{path}": weight for path, weight in LAYER_WEIGHTS.items()}
"""Named after DeepSeek-V3's module. Its eh_proj reads [embedding; hidden state], ours [hidden state; embedding]:
whoever exports it for a server has to swap the halves."""

_KINDS = {"eagle3": _EAGLE3, "mtp": _MTP}
"""By kind of drafter; the others are block drafters with `_BACKBONE` and heads."""

FROZEN = ("embed_tokens.weight", "lm_head.weight")
"""Copies of the target's tensors that the reference stores in every drafter."""

VOCABULARY_MAPS = ("t2d", "d2t")
"""Tensors of drafters that draft from a part of the vocabulary only."""


LAYER_SCALAR = "layers.{i}.layer_scalar"
"""A buffer of one number in every layer of a Gemma 4 drafter: always 1, never trained, and no parameter here."""


_GEMMA_ONLY = "mlp_out_norm"


def is_gemma(paths: Iterable[str]) -> bool:
    """Whether a drafter with these parameters has Gemma 4's layers."""
    return any(path.endswith(f"layers.{_GEMMA_ONLY}") for path in paths)


def drafter_weights(config: DrafterConfig, paths: Iterable[str] = ()) -> dict[str, Weight]:
    """Every parameter of a drafter and the tensor that holds it.

    Args:
      config: says what kind of drafter it is.
      paths: of its parameters; they tell Gemma 4's layers, of which some norms have other names, from Qwen3's.
    """
    weights = dict(_KINDS.get(config.kind, _BACKBONE))
    if config.markov_rank:
        weights |= _MARKOV | HEADS[config.markov_head_type]
    if config.confidence_head:
        weights |= _CONFIDENCE
    for path in paths:
        if is_gemma([path]):
            stack = path.removesuffix(_GEMMA_ONLY)
            weights |= {stack + name: weight for name, weight in gemma4.LAYER_WEIGHTS.items() if name != "scalar"}
    return weights
