"""Quantised checkpoints: their values are those of the definitions and of other libraries, whole or in slices."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax.architecture import TargetArchitecture
from dspark_jax.config import MeshConfig
from dspark_jax.convert.export import frozen_tensors
from dspark_jax.errors import InputError
from dspark_jax.sharding import make_mesh
from dspark_jax.target import dequantise, loading
from dspark_jax.target.dequantise import Matrix, with_matrices
from dspark_jax.target.loading import parameter_paths
from dspark_jax.target.quantised import FORMATS, METHODS, of_config
from tests.target.quantised_files import (
    BF16,
    CASES,
    E4M3,
    NVFP4,
    assert_loaded,
    compressed,
    load,
    quantised,
    stored_in,
    write,
)


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_definition(tmp_path, monkeypatch, case):
    """On the shards of eight devices, a few rows at a time; two roundings in float32, of the scale and of the value."""
    values = write(tmp_path, case)
    monkeypatch.setattr(dequantise, "_AT_ONCE", 7 * 32)
    assert_loaded(load(tmp_path), values, rtol=2**-22.5)


def test_large_stacks_are_filled_layer_by_layer(tmp_path, monkeypatch):
    values = write(tmp_path, "fp8_blocks")
    monkeypatch.setattr(loading, "_AT_ONCE", 0)
    target = load(tmp_path, dtype="bfloat16")
    assert target.layers.mlp.gate[...].dtype == jnp.bfloat16
    assert_loaded(target, values, rtol=2**-8)
    assert target.narrow  # all of it is bfloat16, in memory


MIXTURE = {
    "model_type": "qwen3_moe", "vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "max_position_embeddings": 64,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
    "mlp_only_layers": [1], "rope_theta": 100.0,
}  # fmt: skip


@pytest.mark.parametrize("case", ["fp8_blocks", "nvfp4"])
def test_logits_are_those_of_transformers_with_the_values(tmp_path, case):
    """A mixture, whose experts are quantised one by one."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    values = write(tmp_path, case, TargetArchitecture.from_hf(MIXTURE))
    target = load(tmp_path, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({name: value.astype(np.float32) for name, value in values.items()}, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(target.arch.to_hf()))
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype="float32").double().eval()
    model.set_experts_implementation("eager")  # the others have no float64
    tokens = np.random.default_rng(0).integers(0, 40, (2, 11))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    out = target.forward(jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(11), tokens.shape))
    found = target.unembed(out.last_hidden)
    np.testing.assert_allclose(found, expected, rtol=0, atol=6e-6 * np.abs(expected).max())


GEMMA = {
    "model_type": "gemma4_text", "vocab_size": 40, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 32,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 8, "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention"], "hidden_size_per_layer_input": 0, "rms_norm_eps": 1e-6,
}  # fmt: skip


def test_a_gemma_4_of_several_modalities_is_dequantised_for_its_text(tmp_path):
    """`quantization_config` is beside `text_config`; how the other modalities are stored does not matter."""
    values = write(tmp_path, "fp8_blocks", TargetArchitecture.from_hf(GEMMA))
    raw = json.loads((tmp_path / "config.json").read_text())
    whole = {"model_type": "gemma4", "quantization_config": raw.pop("quantization_config"), "text_config": raw}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    stored, prefix = stored_in(tmp_path), "model.language_model."
    stored = {name.replace("model.", prefix, 1): tensor for name, tensor in stored.items()}
    stored |= {"model.vision_tower.a_proj.weight": np.ones((8, 8), E4M3)}
    save_file(stored, tmp_path / "model.safetensors")
    target = load(tmp_path)
    found = parameter_paths(target)["global_layers.attention.query"].get_value()
    wanted = values["model.layers.1.self_attn.q_proj.weight"].T.reshape(found.shape)
    np.testing.assert_allclose(found, wanted, rtol=2**-22.5)


def matrix(case: str, shape=(50, 96)) -> tuple[Matrix, np.ndarray]:
    """One matrix of a case, and its values."""
    config, make = CASES[case]
    stored, values = make(shape, np.random.default_rng(1))
    tensors = {f"a{end}": value for end, value in stored.items()}
    found = with_matrices(tensors, of_config({"quantization_config": config}, "x"), "x", np.float32)
    return found["a.weight"], values


@pytest.mark.parametrize("case", ["fp8_blocks", "ct_row", "nvfp4", "gpt_oss"])
def test_slices_are_those_of_the_array(case):
    """In any order of axes, with odd beginnings, of merged axes, with steps, and empty."""
    found, values = matrix(case)
    assert (found.shape, found.ndim, len(found), found.size) == ((50, 96), 2, 50, values.size)
    pairs = [(found, values), (found.T, values.T)]
    pairs += [(found.T.reshape((4, 24, 5, 1, 10)), values.T.reshape(4, 24, 5, 1, 10))]
    pairs += [(found.reshape((1, 50, 96)), values.reshape(1, 50, 96))]
    cuts = [slice(None), slice(1, 3), slice(3, None, 2), slice(0, 0)]
    for (ours, theirs), first, second in itertools.product(pairs, cuts, cuts):
        for index in ((first,), (first, second), (first, *[slice(None)] * (ours.ndim - 2), second)):
            a, b = ours[index], theirs[index]
            assert a.shape == b.shape
            np.testing.assert_allclose(a, b, rtol=2**-22.5)
    np.testing.assert_allclose(np.asarray(found.T), values.T, rtol=2**-22.5)


def test_only_the_scales_of_a_slice_are_looked_at():
    """So each device of a mesh reads its own part of the file."""
    found, values = matrix("fp8_blocks")
    found.scales[-1, -1] = np.nan
    np.testing.assert_allclose(found[:48, :80], values[:48, :80], rtol=2**-22.5)
    with pytest.raises(InputError, match="x: tensor a.weight_scale_inv holds values that are not finite"):
        found[:49]


def as_torch(array: np.ndarray) -> Any:
    """The same in PyTorch, which NumPy's types of few bits are unknown to."""
    torch = pytest.importorskip("torch")
    kinds = {np.dtype(E4M3): torch.float8_e4m3fn, np.dtype(BF16): torch.bfloat16}
    if array.dtype not in kinds:
        return torch.from_numpy(array.copy())
    raw = np.ascontiguousarray(array).view(np.uint8 if array.dtype.itemsize == 1 else np.uint16)
    return torch.from_numpy(raw.copy()).view(kinds[array.dtype])


@pytest.mark.parametrize("case", ["fp8_usual", "fp8_exponents"])
def test_fp8_is_what_transformers_makes_of_it(case):
    torch = pytest.importorskip("torch")
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    found, _ = matrix(case, (128, 256) if case == "fp8_usual" else (48, 80))
    codes, scales = (as_torch(x) for x in found.stored.values())
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.float32)
    np.testing.assert_array_equal(np.asarray(found), theirs.numpy())


def test_mxfp4_is_what_transformers_makes_of_it():
    """Of GPT-OSS's experts, [E, O, I], which it turns round."""
    torch = pytest.importorskip("torch")
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    rng = np.random.default_rng(3)
    blocks, scales = rng.integers(0, 256, (3, 5, 2, 16), np.uint8), rng.integers(100, 140, (3, 5, 2), np.uint8)
    tensors = {"mlp.experts.down_proj_blocks": blocks, "mlp.experts.down_proj_scales": scales}
    stated = of_config({"quantization_config": CASES["gpt_oss"][0]}, "x")
    found = with_matrices(tensors, stated, "x", np.float32)["mlp.experts.down_proj"]
    theirs = _convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    assert found.shape == (3, 5, 64)
    np.testing.assert_array_equal(np.asarray(found).swapaxes(1, 2), theirs.numpy())
    np.testing.assert_array_equal(found[1:2, 2:4, 5:37].swapaxes(1, 2), theirs.numpy()[1:2, 5:37, 2:4])


@pytest.mark.parametrize("case", ["ct_matrix", "ct_row", "ct_block", "mxfp8", "mxfp4", "nvfp4"])
def test_values_are_what_compressed_tensors_makes_of_them(case):
    """It multiplies in bfloat16, where we have float32: up to two roundings of the one."""
    package = pytest.importorskip("compressed_tensors")
    found, _ = matrix(case, (48, 80) if case == "ct_block" else (50, 96))
    config = CASES[case][0]
    scheme = package.quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = package.compressors.BaseCompressor.get_value_from_registry(config["format"])
    tensors = {name.removeprefix("a."): as_torch(x) for name, x in found.stored.items()}
    theirs = compressor.decompress(tensors, scheme)["weight"].float().numpy()
    np.testing.assert_allclose(np.asarray(found), theirs, rtol=2**-7)


def test_formats_of_different_layers_are_told_apart(tmp_path):
    """mixed-precision: attention in FP8 by row, the rest in NVFP4, with scales of servers' activations and caches."""
    values = write(tmp_path, "nvfp4")
    rows, make = CASES["ct_row"]
    stored = stored_in(tmp_path)
    for name in [name for name in values if quantised(name) and "self_attn" in name]:
        base = name.removesuffix(".weight")
        for end in CASES["nvfp4"][1]((1, 16), np.random.default_rng(0))[0]:
            del stored[base + end]
        made, values[name] = make(values[name].shape, np.random.default_rng(5))
        stored |= {base + end: value for end, value in made.items()}
        stored |= {f"{base}.input_global_scale": np.ones(1, np.float32), "model.layers.0.self_attn.k_scale": np.ones(1)}
    save_file(stored, tmp_path / "model.safetensors")
    groups = {"a": rows["config_groups"]["group_0"] | {"format": "float-quantized"}}
    groups["b"] = NVFP4["config_groups"]["group_0"] | {"format": "nvfp4-pack-quantized"}
    groups["a"] = groups["a"] | {"input_activations": {"dynamic": True}}
    config = compressed("mixed-precision", {}, config_groups=groups, kv_cache_scheme={"num_bits": 8})
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization_config": config}))
    assert_loaded(load(tmp_path), values, rtol=2**-22.5)


def test_one_line_says_what_is_dequantised(tmp_path, capfd):
    write(tmp_path, "fp8_blocks")
    load(tmp_path)
    line = capfd.readouterr().err
    values, scales = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64), 2 * 2 * (2 * 3 * 2 + 2 * 2 * 2 + 2 * 4 * 2 + 3 * 3)
    assert "target: 14 of 25 tensors are FP8 with one scale per 24 x 40 values; they become float32 as they" in line
    assert f": {(values + scales) / 1e6:.2f} MB of files take {4 * values / 1e6:.2f} MB of memory; that" in line
    assert "quantise activations (dynamic) as well is not simulated" in line


def test_embedding_and_head_of_an_export_are_what_is_stored(tmp_path):
    """And a quantised head is what the target computes with."""
    write(tmp_path, "fp8_blocks")
    stored = stored_in(tmp_path)
    found = frozen_tensors(tmp_path)
    for name, value in zip(("model.embed_tokens.weight", "lm_head.weight"), found.values(), strict=True):
        np.testing.assert_array_equal(value.view(np.uint16), stored[name].view(np.uint16))
    made, head = CASES["fp8_blocks"][1]((40, 64), np.random.default_rng(2))
    save_file(stored | {f"lm_head{end}": value for end, value in made.items()}, tmp_path / "model.safetensors")
    found = [*frozen_tensors(tmp_path).values()][1]
    np.testing.assert_allclose(found, head, rtol=2**-22.5)
    np.testing.assert_array_equal(load(tmp_path).lm_head[...], found)


def test_the_page_names_every_method_and_format():
    page = Path(__file__).parents[2] / "docs" / "targets.md"
    section = page.read_text().split("\n## Quantised checkpoints\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")][1:]
    assert set(re.findall(r"`([^`]+)`", " ".join(rows))) == {*METHODS, *FORMATS}
