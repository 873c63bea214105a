"""Parameters -> a Hugging Face directory: bfloat16 safetensors with Qwen3's tensor names, configs and the tokenizer."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.flax import save_file
from tokenizers import Tokenizer

from dspark_jax.target.model import Target
from tests.quickstart.builder.tokenizer import EOS, PAD, save_tokenizer


def tensors(model: Target) -> dict[str, jax.Array]:
    """HF name -> bfloat16 array, projections as [out, in]; the LM head is tied and therefore absent."""
    arch, layers = model.arch, model.layers
    d = arch.hidden_size
    found = {"model.embed_tokens.weight": model.embedding[...], "model.norm.weight": model.norm[...]}
    at, mlp = layers.attention, layers.mlp
    inputs_first = {
        "self_attn.q_proj": at.query[...].reshape(-1, d, arch.num_attention_heads * arch.head_dim),
        "self_attn.k_proj": at.key[...].reshape(-1, d, arch.num_key_value_heads * arch.head_dim),
        "self_attn.v_proj": at.value[...].reshape(-1, d, arch.num_key_value_heads * arch.head_dim),
        "self_attn.o_proj": at.out[...].reshape(-1, arch.num_attention_heads * arch.head_dim, d),
        "mlp.gate_proj": mlp.gate[...],
        "mlp.up_proj": mlp.up[...],
        "mlp.down_proj": mlp.down[...],
    }
    vectors = {
        "input_layernorm": layers.attention_norm[...],
        "post_attention_layernorm": layers.mlp_norm[...],
        "self_attn.q_norm": at.query_norm[...],
        "self_attn.k_norm": at.key_norm[...],
    }
    stacked = {name: w.swapaxes(1, 2) for name, w in inputs_first.items()} | vectors
    for name, weights in stacked.items():
        for i, weight in enumerate(weights):
            found[f"model.layers.{i}.{name}.weight"] = weight
    return {name: jnp.asarray(value, jnp.bfloat16) for name, value in found.items()}


def hf_config(model: Target, tokenizer: Tokenizer) -> dict[str, object]:
    """`config.json`, with RoPE written in both of the layouts that readers know."""
    return model.arch.to_hf() | {
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": tokenizer.token_to_id(EOS),
        "initializer_range": 0.02,
        "max_window_layers": model.arch.num_hidden_layers,
        "pad_token_id": tokenizer.token_to_id(PAD),
        "rope_parameters": {"rope_theta": model.arch.rope_theta, "rope_type": "default"},
        "rope_scaling": None,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }


def write_target(model: Target, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the whole directory beside its place, then swaps it in, so that a reader never finds half of it."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(tensors(model), fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)  # safetensors makes it private
    save_tokenizer(tokenizer, fresh)
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
    generation = {
        "do_sample": True,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
    }
    for name, content in (("config.json", hf_config(model, tokenizer)), ("generation_config.json", generation)):
        (fresh / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")
    card = folder / "README.md"
    if card.exists():
        shutil.copy(card, fresh / "README.md")
    for file in sorted(fresh.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        file.replace(folder / file.name)
    fresh.rmdir()
