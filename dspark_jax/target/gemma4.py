"""Gemma 4 text targets (12B): what differs from the plain `Target` (traps 21 to 23).

In `layers.attention_shape` and `layers.Layer`: sliding and global layers of different head widths, values that are the
raw keys, scale-less value norms, partial rotation, norms after attention and MLP, layer scalars. Here: scaled
embeddings, the two stacks, and the names. The soft-cap is `Target.softcap`.
"""

from collections.abc import Collection, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from dspark_jax.config import TargetArchitecture
from dspark_jax.target.layers import FULL, SLIDING
from dspark_jax.target.model import Target, stack_layers
from dspark_jax.target.qwen3 import LAYER_WEIGHTS as PLAIN
from dspark_jax.target.weights import Weight, behind

LAYER_WEIGHTS = PLAIN | {
    "attention_out_norm": Weight("layers.{i}.post_attention_layernorm.weight"),
    "mlp_norm": Weight("layers.{i}.pre_feedforward_layernorm.weight"),
    "mlp_out_norm": Weight("layers.{i}.post_feedforward_layernorm.weight"),
    "scalar": Weight("layers.{i}.layer_scalar"),
}
"""Parameters of a `target.layers.Layer` stack of Gemma 4. Where values are keys there is no `attention.value`."""

OTHER_TOWERS = ("vision", "audio", "embed_vision", "embed_audio", "multi_modal_projector")
"""What the names of the other modalities' tensors begin with after `model.`; they take no part in text."""


class Gemma4(Target):
    """A Gemma 4 language model."""

    STACKS: ClassVar[Mapping[str, str]] = {SLIDING: "layers", FULL: "global_layers"}

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] -> [..., D] in the compute type, times sqrt(D) as the weights' type can hold it (62 for 12B)."""
        scale = jnp.asarray(self.arch.hidden_size**0.5, self.dtype)
        return super().embed(tokens) * scale


def weights(arch: TargetArchitecture, names: Collection[str]) -> dict[str, Weight]:
    """Every parameter of `Gemma4` and the tensor it is loaded from.

    Args:
      arch: says which layers are in which stack.
      names: of the checkpoint's tensors, from which the prefix is told: `model.language_model.` where the model has
        other modalities, `model.` for a text model alone.
    """
    prefix = "model.language_model."
    if not any(name.startswith(prefix) for name in names):
        prefix = "model."
    found = {
        "embedding": Weight(f"{prefix}embed_tokens.weight"),
        "norm": Weight(f"{prefix}norm.weight"),
        "lm_head": Weight("lm_head.weight"),
    }
    for kind, stack in Gemma4.STACKS.items():
        table = behind(prefix, LAYER_WEIGHTS, stack_layers(arch, kind))
        if kind == FULL and arch.attention_k_eq_v:
            del table["attention.value"]
        found |= {f"{stack}.{path}": weight for path, weight in table.items()}
    return found


def of_another_tower(name: str) -> bool:
    """Whether a tensor belongs to vision or audio."""
    return name.removeprefix("model.").startswith(OTHER_TOWERS)
