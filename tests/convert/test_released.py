"""The twelve released checkpoints: their tensors, and that training goes on from an import of each with its config."""

import importlib.util
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax.config import Config, DrafterConfig, InputError, LossConfig, TargetArchitecture, resolve
from dspark_jax.convert import __main__ as convert
from dspark_jax.convert.hf import compare_tensors, expected_tensors
from dspark_jax.kinds import as_kind
from dspark_jax.run import Run
from dspark_jax.training.checkpoint import check_continuation, saved_config
from dspark_jax.training.state import TrainState

EAGLE3_LOSS = as_kind(Config(), "eagle3").loss
HEADLESS = {"markov_rank": 0, "confidence_head": False, "confidence_with_markov": False}


def released(hidden, heads, mlp, taps):
    """Names and shapes of a released DSpark checkpoint for Qwen3, written out from the format's description."""
    vocabulary, rank, head = 151936, 256, 128
    shapes = {
        "embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "fc.weight": (hidden, taps * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "markov_head.markov_w1.weight": (vocabulary, rank),
        "markov_head.markov_w2.weight": (vocabulary, rank),
        "confidence_head.proj.weight": (1, hidden + rank),
        "confidence_head.proj.bias": (1,),
    }
    for i in range(5):
        layer = f"layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (hidden,), layer + "post_attention_layernorm.weight": (hidden,)}
        shapes |= {layer + "self_attn.q_proj.weight": (heads * head, hidden)}
        shapes |= {layer + f"self_attn.{name}_proj.weight": (8 * head, hidden) for name in "kv"}
        shapes |= {layer + "self_attn.o_proj.weight": (hidden, heads * head)}
        shapes |= {layer + f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes |= {layer + f"mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes |= {layer + "mlp.down_proj.weight": (hidden, mlp)}
    return shapes


@pytest.mark.parametrize(("hidden", "heads", "mlp"), [(2560, 32, 9728), (4096, 32, 12288), (5120, 40, 17408)])
@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_released_checkpoints_have_exactly_these_tensors(hidden, heads, mlp, kind):
    arch = TargetArchitecture("qwen3", 151936, hidden, 36, heads, 8, 128, mlp, max_position_embeddings=40960)
    config, shapes = DrafterConfig(), released(hidden, heads, mlp, 5)
    if kind == "dflash":
        config = DrafterConfig(kind=kind, **HEADLESS)
        shapes = {name: shape for name, shape in shapes.items() if not re.match("markov|confidence", name)}
    assert expected_tensors(arch, config) == shapes
    compare_tensors("x", shapes, expected_tensors(arch, config), kind)
    with pytest.raises(InputError, match=r"^x: tensor lm_head.weight is missing"):
        compare_tensors("x", {n: s for n, s in shapes.items() if n != "lm_head.weight"}, shapes, kind)
    with pytest.raises(InputError, match=r"^x: tensor fc.weight has shape \(7,\), the config gives"):
        compare_tensors("x", shapes | {"fc.weight": (7,)}, shapes, kind)
    with pytest.raises(InputError, match="a reduced draft vocabulary .tensor d2t. is not supported; servers may"):
        compare_tensors("x", shapes | {"d2t": (32000,)}, shapes, kind)


GEMMA = TargetArchitecture(
    "gemma4", 262144, 3840, 48, 16, 8, 256, 15360, tie_word_embeddings=True, max_position_embeddings=262144,
    layer_types=(("sliding_attention",) * 5 + ("full_attention",)) * 8, sliding_window=1024, sliding_rope_theta=1e4,
    global_head_dim=512, num_global_key_value_heads=1, attention_k_eq_v=True, partial_rotary_factor=0.25,
    final_logit_softcapping=30.0,
)  # fmt: skip
GEMMA_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def released_gemma(kind):
    """As `released`, for Gemma 4 12B: global attention without a value projection, four norms and a scalar a layer."""
    vocabulary, rank, hidden, mlp, taps = 262144, 256, 3840, 15360, 5
    query, key, head = 16 * 512, 512, 512
    width = 2 * hidden if kind == "eagle3" else hidden
    shapes = {name: (vocabulary, hidden) for name in ("embed_tokens.weight", "lm_head.weight")}
    shapes |= {"fc.weight": (hidden, taps * hidden), "norm.weight": (hidden,)}
    if kind == "dspark":
        shapes |= {f"markov_head.markov_w{i}.weight": (vocabulary, rank) for i in (1, 2)}
        shapes |= {"confidence_head.proj.weight": (1, hidden + rank), "confidence_head.proj.bias": (1,)}
    shapes |= {("layers.0." if kind == "eagle3" else "") + "hidden_norm.weight": (hidden,)}
    for i in range(1 if kind == "eagle3" else 5):
        layer = f"layers.{i}."
        norms = ("input_layernorm", "post_attention_layernorm", *GEMMA_NORMS)
        shapes |= {f"{layer}{norm}.weight": (hidden,) for norm in norms} | {layer + "layer_scalar": (1,)}
        shapes |= {layer + "self_attn.q_proj.weight": (query, width), layer + "self_attn.k_proj.weight": (key, width)}
        shapes |= {layer + "self_attn.o_proj.weight": (hidden, query)}
        shapes |= {layer + f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
        shapes |= {layer + f"mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes |= {layer + "mlp.down_proj.weight": (hidden, mlp)}
    return shapes


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
def test_released_checkpoints_for_gemma_have_exactly_these_tensors(kind):
    config = DrafterConfig(target_layer_ids=(5, 17, 29, 41, 46))
    if kind != "dspark":
        layers = 1 if kind == "eagle3" else 5
        config = DrafterConfig(kind=kind, num_layers=layers, target_layer_ids=(5, 17, 29, 41, 46), **HEADLESS)
    assert expected_tensors(GEMMA, config) == released_gemma(kind)


@pytest.mark.parametrize(("hidden", "heads", "mlp"), [(2560, 32, 9728), (4096, 32, 12288), (5120, 40, 17408)])
def test_released_eagle3_checkpoints_have_exactly_these_tensors(hidden, heads, mlp):
    """One layer whose projections read embedding and hidden state side by side."""
    arch = TargetArchitecture("qwen3", 151936, hidden, 36, heads, 8, 128, mlp, max_position_embeddings=40960)
    dspark = released(hidden, heads, mlp, 5)
    shapes = {name: shape for name, shape in dspark.items() if not re.match(r"markov|confidence|layers\.[1-4]", name)}
    shapes["layers.0.hidden_norm.weight"] = shapes.pop("hidden_norm.weight")
    for name in "qkv":
        rows, _ = shapes[f"layers.0.self_attn.{name}_proj.weight"]
        shapes[f"layers.0.self_attn.{name}_proj.weight"] = (rows, 2 * hidden)
    assert expected_tensors(arch, DrafterConfig(kind="eagle3", num_layers=1, **HEADLESS)) == shapes


ROOT = Path(__file__).resolve().parents[2]
RELEASED = ("dspark_qwen3_4b", "dspark_qwen3_8b", "dspark_qwen3_14b", "dspark_gemma4_12b")
TAPS = {36: [1, 9, 17, 25, 33], 40: [1, 10, 19, 28, 37], 48: [5, 17, 29, 41, 46]}
"""By layers of the target."""
GEMMA_KEYS = {
    "model_type": "gemma4_text", "target_model_type": "gemma4_unified", "hidden_activation": "gelu_pytorch_tanh",
    "target_text_model_type": "gemma4_unified_text", "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
    "final_logit_softcapping": 30.0, "hidden_size_per_layer_input": 0, "enable_moe_block": False,
    "num_kv_shared_layers": 0, "rms_norm_eps": 1e-6, "sliding_window": 1024, "vocab_size": 262144,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}, "rope_theta": None, "rope_type": "default",
    },
    "hidden_size": 3840, "intermediate_size": 15360, "max_position_embeddings": 262144, "mask_token_id": 4,
}  # fmt: skip


def released_config(arch: TargetArchitecture, kind: str) -> dict:
    """`config.json` of a released checkpoint, from the format's description."""
    gemma, layers = arch.model_type == "gemma4", 1 if kind == "eagle3" else 5
    raw = GEMMA_KEYS if gemma else arch.to_hf() | {"mask_token_id": 151669}
    family = "Gemma4" if gemma else "Qwen3"
    raw = raw | {
        "num_target_layers": arch.num_hidden_layers, "num_hidden_layers": layers, "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * layers, "target_layer_ids": TAPS[arch.num_hidden_layers],
    }  # fmt: skip
    if kind == "eagle3":
        del raw["mask_token_id"]
        steps = {"ttt_length": 7, "step_loss_decay": 0.8, "draft_num_hidden_layers": 1}
        return raw | {"architectures": [f"{family}Eagle3Model"], "target_model_name_or_path": "x", **steps}
    heads = {"markov_rank": 0, "enable_confidence_head": False}
    if kind == "dspark":
        heads = {"markov_rank": 256, "markov_head_type": "vanilla", "enable_confidence_head": True}
        heads["confidence_head_with_markov"] = True
    return raw | {"architectures": [f"{family}DSparkModel"], "block_size": 7, "num_anchors": 512, **heads}


def config_of(name: str, kind: str) -> Config:
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(kind)


@pytest.mark.parametrize("kind", ["dspark", "dflash", "eagle3"])
@pytest.mark.parametrize("name", RELEASED)
def test_training_goes_on_from_every_released_checkpoint_with_its_own_config(name, kind, tmp_path, monkeypatch):
    """Everything is real but the parameters, which neither side looks at."""
    config = config_of(name, kind)
    folders = {"drafter": released_config(config.target.architecture, kind)}
    folders["target"] = config.target.architecture.to_hf()
    for folder, raw in folders.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(json.dumps(raw))
        norm = {"layers.0.self_attn.q_norm.weight": np.zeros(2, np.float32)}  # which tells Qwen3's layers from Llama's
        save_file(norm, tmp_path / folder / "model.safetensors")
    monkeypatch.setattr(convert, "import_drafter", lambda *_, **__: (None, None))
    monkeypatch.setattr(convert, "init_state", lambda *_: TrainState(jnp.int32(0), {}, {}))
    monkeypatch.setattr(convert, "to_params", lambda _: {"x": jnp.zeros(2)})
    paths = [f"--{folder}={tmp_path / folder}" for folder in folders]
    convert.main(["import", *paths, f"--workdir={tmp_path / 'run'}"])
    config.target.path = str(tmp_path / "target")
    config = resolve(config)
    monkeypatch.setattr(Run, "data_inputs", property(lambda _: pytest.fail("an import has no data")))
    assert check_continuation(Run(config, tmp_path / "run"))
    imported = saved_config(tmp_path / "run")
    assert imported is not None and imported.loss == (EAGLE3_LOSS if kind == "eagle3" else LossConfig())
    assert imported.train.num_anchors == (imported.data.max_length if kind == "eagle3" else 512)
    together = 1 if kind == "eagle3" else 4  # samples that share a sequence, of which a checkpoint says nothing
    assert (imported.loss, together * imported.train.num_anchors) == (config.loss, config.train.num_anchors)
