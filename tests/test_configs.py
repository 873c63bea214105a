"""Every experiment file validates and its models can be built abstractly, whether or not weights are here."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dspark_jax.config import MeshConfig, resolve
from dspark_jax.config_rules import problems
from dspark_jax.convert.hf import expected_tensors
from dspark_jax.drafter import make_drafter
from dspark_jax.kinds import names
from dspark_jax.sharding import make_mesh, state_shardings
from dspark_jax.target.loading import abstract_target
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, state_layout

ROOT = Path(__file__).resolve().parents[1]
RELEASED = ("dspark_qwen3_4b", "dspark_qwen3_8b", "dspark_qwen3_14b", "dspark_gemma4_12b")
EXPERIMENTS = [
    *(("quickstart", kind) for kind in names()),
    ("compare_quickstart", ""),
    *((name, kind) for name in RELEASED for kind in ("dspark", "dflash", "eagle3")),
    ("dspark_qwen3_4b", "mtp"),
    ("dspark_deepseek_v4_flash", "dspark5"),
    ("dspark_deepseek_v4_pro", "dspark5"),
    *((f"dspark_{name}", "dspark") for name in ("llama31_8b", "qwen25_7b", "qwen3_30b_a3b", "qwen35_4b")),
]


def load(name: str, arg: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def test_all_files_are_covered():
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == {name for name, _ in EXPERIMENTS}


@pytest.mark.parametrize(
    ("name", "arg"),
    [pytest.param(*one, marks=pytest.mark.slow if "deepseek_v4_pro" in one[0] else ()) for one in EXPERIMENTS],
)
def test_validates_and_builds(name, arg):
    config = resolve(load(name, arg))
    assert not list(problems(config))
    arch = config.target.architecture
    target = abstract_target(arch, jnp.bfloat16)
    drafter = nnx.eval_shape(lambda: make_drafter(arch, config.drafter, rngs=nnx.Rngs(0)))
    assert (drafter.confidence is not None) == (config.drafter.kind in ("dspark", "dspark5"))
    assert (drafter.markov is not None) == (config.drafter.kind in ("dspark", "dspark5", "dflash2"))
    assert arg not in ("dflash", "dflash2", "eagle3", "mtp") or config.drafter.kind == arg
    mesh = make_mesh(MeshConfig(2, 2, 2))
    shardings = jax.tree.leaves(state_shardings(nnx.state(drafter), mesh))
    assert any("tensor" in str(s.spec) for s in shardings) and any("fsdp" in str(s.spec) for s in shardings)
    state = state_layout(abstract_drafter(config), make_optimizer(config.optim, config.train.steps), mesh)
    assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
    batch, length, g = 2, 8, config.drafter.block_size

    def run(target, drafter, tokens):
        positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
        out = target.forward(tokens, positions, taps=drafter.taps)
        from dspark_jax.drafter.blocks import sample_anchors

        keys = jax.random.split(jax.random.key(0), batch)
        anchors = sample_anchors(keys, jnp.ones_like(tokens), 3)
        return drafter(target, out.features, tokens, jnp.ones_like(tokens), anchors).hidden

    shape = jax.eval_shape(run, target, drafter, jax.ShapeDtypeStruct((batch, length), jnp.int32)).shape
    assert shape == (batch, 3, g, arch.hidden_size)


def test_qwen3_4b_has_the_size_of_the_released_drafter():
    """615 M trainable parameters (measured on the reference's shapes), and W1 in rows that a TPU can fetch."""
    config = resolve(load("dspark_qwen3_4b", "dspark"))
    drafter = nnx.eval_shape(lambda: make_drafter(config.target.architecture, config.drafter, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(drafter)))
    d, f, v, r, q, kv = 2560, 9728, 151936, 256, 4096, 1024
    layer = 2 * d * q + 2 * d * kv + 3 * d * f + 2 * d + 2 * 128
    assert count == 5 * layer + 5 * d * d + 2 * d + 2 * v * r + (d + r + 1)
    assert 600e6 < count < 630e6
    assert drafter.markov.w1.shape == (v, 2, 128)


# d, query width, key/value width, head width, MLP width, layers, vocabulary (formats.md 4a, of the released files)
SHAPES = {
    "dspark_qwen3_4b": (2560, 4096, 1024, 128, 9728, 36, 151936),
    "dspark_qwen3_8b": (4096, 4096, 1024, 128, 12288, 36, 151936),
    "dspark_qwen3_14b": (5120, 5120, 1024, 128, 17408, 40, 151936),
    "dspark_gemma4_12b": (3840, 16 * 512, 512, 512, 15360, 48, 262144),
}


@pytest.mark.parametrize("name", RELEASED)
def test_tensors_are_those_of_the_released_drafters(name):
    config = resolve(load(name, "dspark"))
    arch = config.target.architecture
    d, q, kv, h, f, layers, v = SHAPES[name]
    assert arch.num_hidden_layers == layers
    expected = {
        "embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "fc.weight": (d, 5 * d), "norm.weight": (d,),
        "hidden_norm.weight": (d,), "markov_head.markov_w1.weight": (v, 256), "markov_head.markov_w2.weight": (v, 256),
        "confidence_head.proj.weight": (1, d + 256), "confidence_head.proj.bias": (1,),
    }  # fmt: skip
    layer = {
        "self_attn.q_proj.weight": (q, d), "self_attn.k_proj.weight": (kv, d), "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q), "self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,),
        "mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f),
        "input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
    }  # fmt: skip
    if name == "dspark_gemma4_12b":
        del layer["self_attn.v_proj.weight"]
        norms = {"pre_feedforward_layernorm.weight": (d,), "post_feedforward_layernorm.weight": (d,)}
        layer |= norms | {"layer_scalar": (1,)}
    expected |= {f"layers.{i}.{key}": shape for i in range(5) for key, shape in layer.items()}
    assert expected_tensors(arch, config.drafter) == expected
