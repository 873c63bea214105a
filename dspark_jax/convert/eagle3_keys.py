"""How EAGLE-3 is written into a config.json: the reference's keys, those that servers want, and Llama's fields."""

from typing import TYPE_CHECKING, Any

import numpy as np

from dspark_jax.config_rules import EAGLE3_NORMS
from dspark_jax.convert.layouts import LLAMA_EAGLE_ARCHITECTURES
from dspark_jax.target.families.family import SIZES
from dspark_jax.vocabulary import decode_vocabulary, to_maps

if TYPE_CHECKING:
    from dspark_jax.convert.export import Source

STEP_DECAY = 0.8
"""Of EAGLE-3's training-time-test steps (trap 33); a note in the reference's config."""


def vocabulary_maps(source: "Source") -> dict[str, np.ndarray]:
    """The tensors that say which tokens a drafter drafts; none where it is all of them, where vLLM refuses such."""
    drafter, whole = source.config, source.arch.vocab_size
    if drafter.draft_vocab_size in (0, whole):
        return {}
    return to_maps(decode_vocabulary(drafter.draft_vocabulary, drafter.draft_vocab_size, whole), whole)


def eagle3_keys(source: "Source") -> dict[str, Any]:
    """Keys of EAGLE-3."""
    return {
        "architectures": [f"{source.family.drafter_class}Eagle3Model"],
        "draft_num_hidden_layers": source.config.num_layers,
        "target_model_name_or_path": source.target_name,
        "ttt_length": source.config.block_size,
        "step_loss_decay": STEP_DECAY,
    }


def eagle3_serving(source: "Source", architecture: str) -> dict[str, Any]:
    """What vLLM wants of a class of its own; ids of layers count inputs."""
    drafter = source.config
    return {
        "architectures": [architecture],
        "eagle_aux_hidden_state_layer_ids": [i + 1 for i in drafter.target_layer_ids],
        "norm_before_residual": "norm_before_residual" in drafter.eagle3_norms,
        **{name: True for name in EAGLE3_NORMS if name in drafter.eagle3_norms},
        "draft_vocab_size": drafter.draft_vocab_size or source.arch.vocab_size,
    }


def llama_config(source: "Source", dtype: str) -> dict[str, Any]:
    """EAGLE-3 with a layer of Llama, as SpecForge writes it and SGLang, vLLM and llama.cpp read it.

    The ids of tapped layers count inputs at the top level, which vLLM and llama.cpp read, and outputs in
    `eagle_config`, which SGLang reads (trap 13).
    """
    layers = llama_layers(source, dtype)
    ids = {"eagle_aux_hidden_state_layer_ids": list(source.config.target_layer_ids), "use_aux_hidden_state": True}
    served = eagle3_serving(source, LLAMA_EAGLE_ARCHITECTURES[0])
    return layers | served | {"eagle_config": ids, "ttt_length": source.config.block_size}


def llama_layers(source: "Source", dtype: str) -> dict[str, Any]:
    """The config of a Llama of one layer, of the drafter's shape."""
    arch, text = source.arch, source.target.get("text_config") or source.target
    rope = {"rope_theta": arch.rope_theta, "rope_type": "default"}
    tokens = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in text}
    shape = {name: getattr(arch, name) for name in SIZES}
    return tokens | shape | {
        "model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False, "hidden_act": "silu",
        "attention_bias": False, "mlp_bias": False, "rope_scaling": None, "rope_parameters": rope, "dtype": dtype,
    }  # fmt: skip
