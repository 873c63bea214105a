"""Quantised checkpoints: their values from the formats' definitions in float64, and what is refused.

Codes and scales are random, so a checkpoint is made without any quantiser: whatever they are, they stand for numbers.
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax.architecture import TargetArchitecture
from dspark_jax.config import MeshConfig, TargetConfig
from dspark_jax.config_fields import Unsupported
from dspark_jax.convert.export import frozen_tensors
from dspark_jax.convert.hf import read_drafter_config
from dspark_jax.errors import InputError
from dspark_jax.sharding import make_mesh
from dspark_jax.target import dequantise, loading
from dspark_jax.target.dequantise import Matrix, with_matrices
from dspark_jax.target.loading import abstract_target, load_target, parameter_paths, read_safetensors
from dspark_jax.target.model import Target
from dspark_jax.target.quantised import FORMATS, METHODS, of_config

E4M3, E5M2, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.bfloat16
DENSE = TargetArchitecture("qwen3", 40, 64, 2, 4, 2, 16, 96, 1e-6, 1e4, False, 64)


# The definitions: OCP's 8-bit and microscaling formats


def minifloat(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The number of a code, sign first, with the usual bias and subnormals; codes of NaN and infinity are not used."""
    mantissa = code % 2**mantissa_bits / 2**mantissa_bits
    exponent = code >> mantissa_bits & 2**exponent_bits - 1
    sign = -1 if code >> mantissa_bits + exponent_bits else 1
    bias = 2 ** (exponent_bits - 1) - 1
    return sign * (mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias))


def numbers(codes: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    return np.vectorize(lambda code: minifloat(int(code), exponent_bits, mantissa_bits), otypes=[float])(codes)


def spread(scales: np.ndarray, block: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The scale of every value, where each is for so many rows and columns."""
    rows, columns = (np.arange(size) // n for size, n in zip(shape, block, strict=True))
    return scales[rows][:, columns]


Made = tuple[dict[str, np.ndarray], np.ndarray]  # what is stored for a weight, by the ends of names; its values
Maker = Callable[[tuple[int, ...], np.random.Generator], Made]


def fp8(block, *, scale: str, dtype: Any = np.float32, codes: Any = E4M3, shape=None, more=None) -> Maker:
    """One scale per block; 0: one for all rows or columns."""

    def make(size, rng):
        height, width = (n or whole for n, whole in zip(block, size, strict=True))
        grid = -(-size[0] // height), -(-size[1] // width)
        raw = rng.integers(0, 256, size, dtype=np.uint8)
        bits = (4, 3) if codes == E4M3 else (5, 2)
        raw = np.where(raw % 128 >= (127 if codes == E4M3 else 124), 1, raw).astype(np.uint8)  # no NaN, no infinity
        if dtype == np.uint8:
            scales = rng.integers(118, 124, grid, dtype=np.uint8)
            factors = 2.0 ** (scales.astype(float) - 127)
        else:
            scales = rng.uniform(0.001, 0.01, grid).astype(dtype)
            factors = scales.astype(float)
        stored = {".weight": raw.view(codes), scale: scales if shape is None else scales.reshape(shape)}
        return stored | (more or {}), numbers(raw, *bits) * spread(factors, (height, width), size)

    return make


def fp4(group: int, *, grouped=False, divisor=False) -> Maker:
    """Two codes in a byte, the first in its lower half; with a divisor, scales are E4M3, otherwise E8M0."""

    def make(size, rng):
        codes = rng.integers(0, 16, size, dtype=np.uint8)
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        grid, number = (size[0], size[1] // group), np.float32(1)
        if divisor:
            number = np.float32(rng.uniform(500, 2000))
            raw = rng.integers(40, 127, grid, dtype=np.uint8)
            scales, factors = raw.view(E4M3), numbers(raw, 4, 3)
        else:
            scales = rng.integers(118, 124, grid, dtype=np.uint8)
            factors = 2.0 ** (scales.astype(float) - 127)
        values = numbers(codes, 2, 1) * spread(factors, (1, group), size) / float(number)
        if grouped:
            return {".weight_blocks": packed.reshape(*grid, -1), ".weight_scales": scales}, values
        stored = {".weight_packed": packed, ".weight_scale": scales}
        return stored | ({".weight_global_scale": number.reshape(1)} if divisor else {}), values

    return make


def of_blocks(**more):
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [24, 40]} | more


def compressed(form: str, weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "format": None}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups, "ignore": ["lm_head"]} | more


EIGHT = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
FOUR = EIGHT | {"num_bits": 4}
NVFP4 = compressed("nvfp4-pack-quantized", FOUR | {"strategy": "tensor_group", "group_size": 16})
INV, SCALE = ".weight_scale_inv", ".weight_scale"
INPUT = {".input_scale": np.ones((), np.float32)}

CASES: dict[str, tuple[dict[str, Any], Maker]] = {
    "fp8_blocks": (of_blocks(fmt="e4m3", modules_to_not_convert=["lm_head"]), fp8((24, 40), scale=INV, dtype=BF16)),
    "fp8_exponents": (of_blocks(scale_fmt="ue8m0"), fp8((24, 40), scale=INV, dtype=np.uint8)),
    "fp8_e5m2": (of_blocks(fmt="e5m2"), fp8((24, 40), scale=INV, codes=E5M2)),
    "fp8_matrix": ({"quant_method": "fp8", "weight_block_size": None}, fp8((0, 0), scale=INV, shape=())),
    "fp8_static": ({"quant_method": "fp8", "activation_scheme": "static"}, fp8((0, 0), scale=SCALE, more=INPUT)),
    "fp8_usual": ({"quant_method": "fp8"}, fp8((128, 128), scale=INV)),
    "ct_matrix": (compressed("float-quantized", EIGHT | {"strategy": "tensor"}), fp8((0, 0), scale=SCALE, shape=(1,))),
    "ct_row": (compressed("naive-quantized", EIGHT | {"strategy": "channel"}), fp8((1, 0), scale=SCALE, dtype=BF16)),
    "ct_block": (
        compressed("float-quantized", EIGHT | {"strategy": "block", "block_structure": [24, 40]}),
        fp8((24, 40), scale=SCALE, dtype=BF16),
    ),
    "mxfp8": (
        compressed("mxfp8-quantized", EIGHT | {"strategy": "group", "group_size": 32}),
        fp8((1, 32), scale=SCALE, dtype=np.uint8),
    ),
    "mxfp4": (compressed("mxfp4-pack-quantized", FOUR | {"strategy": "group", "group_size": 32}), fp4(32)),
    "nvfp4": (NVFP4, fp4(16, divisor=True)),
    "gpt_oss": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, fp4(32, grouped=True)),
}


def quantised(name: str) -> bool:
    return name.endswith("_proj.weight")


def write(directory, case: str, arch=DENSE) -> dict[str, np.ndarray]:
    """A checkpoint whose linear layers are of a case; returns the values of all weights, float64."""
    config, make = CASES[case]
    rng, stored, values = np.random.default_rng(7), {}, {}
    target = abstract_target(arch, jnp.float32)
    weights = target.family.weights(arch)
    for path, variable in parameter_paths(target).items():
        weight, shape = weights[path], variable.get_value().shape
        for name in weight.names(shape[0] if weight.stacked else 1):
            size = weight.stored_shape(shape[weight.stacked + bool(weight.experts) :])
            if quantised(name):
                found, values[name] = make(size, rng)
                stored |= {name.removesuffix(".weight") + end: value for end, value in found.items()}
            else:
                stored[name] = rng.uniform(0.5, 1.5, size).astype(BF16)
                values[name] = stored[name].astype(float)
    save_file(stored, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(arch.to_hf() | {"quantization_config": config}))
    return values


def stored_in(directory) -> dict[str, np.ndarray]:
    """Copies of the tensors, so that the file may be written again."""
    return {name: np.array(tensor) for name, tensor in read_safetensors(directory / "model.safetensors").items()}


def load(directory, mesh=None, dtype="float32"):
    arch = TargetArchitecture.from_hf(directory)
    mesh = make_mesh(MeshConfig(2, 2, 2)) if mesh is None else mesh
    return load_target(TargetConfig(path=str(directory), dtype=dtype, architecture=arch), mesh)


def assert_loaded(target: Target, values: dict[str, np.ndarray], rtol: float) -> None:
    """Every parameter is what these values are, as close as its type rounds."""
    weights = target.family.weights(target.arch)
    for path, variable in parameter_paths(target).items():
        weight, found = weights[path], np.asarray(variable.get_value(), float)
        names = weight.names(len(found))
        single = found.shape[weight.stacked + bool(weight.experts) :]
        wanted = np.stack([weight.load(values[name], single) for name in names]).reshape(found.shape)
        np.testing.assert_allclose(found, wanted, rtol=rtol, err_msg=path)


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


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("fp8_blocks", {Q + INV: None}, f"{Q}.weight is quantised, but its scales, {Q}.weight_scale_inv, .* missing"),
        ("fp8_blocks", {Q + ".weight": None}, f"{Q}.weight is missing beside {Q}.weight_scale_inv"),
        (
            "fp8_blocks",
            {Q + ".weight": np.ones((64, 64), BF16)},
            f"{Q}.weight is bfloat16, not FP8, beside",
        ),
        (
            "fp8_blocks",
            {Q + INV: ones(2, 2)},
            r"shape \(2, 2\); .* of shape \(64, 64\) needs \(3, 2\)",
        ),
        ("fp8_blocks", {Q + INV: np.ones((3, 2), np.int32)}, f"{Q}.weight_scale_inv is int32, scales of FP8 with one"),
        (
            "fp8_blocks",
            {Q + INV: np.nan * ones(3, 2)},
            f"{Q}.weight_scale_inv holds values that",
        ),
        (
            "fp8_blocks",
            {Q + ".weight": np.full((64, 64), np.nan, E4M3)},
            f"{Q}.weight holds values that are not",
        ),
        ("fp8_blocks", {Q + SCALE: ones(3, 2)}, "is not the only one that scales"),
        ("fp8_blocks", {UP + ".weight": np.ones((96, 32), E4M3)}, f"{UP}.weight_scale_inv has shape"),
        ("fp8_blocks", {UP + ".qweight": np.ones((3, 2), np.int32)}, "quantised by GPTQ or AWQ, in a way that is not"),
        (
            "fp8_blocks",
            {"model.norm.weight": np.ones(64, np.int8)},
            "model.norm.weight is no part of FP8 with",
        ),
        ("fp8_exponents", {Q + INV: np.full((3, 2), 255, np.uint8)}, f"{Q}.weight_scale_inv holds values that"),
        (
            "fp8_matrix",
            {Q + INV: ones(64, 1)},
            r"shape \(64, 1\); .* \(1, 1\), as config",
        ),
        ("ct_row", {Q + SCALE: np.ones(64, BF16)}, r"shape \(64,\); .* needs \(64, 1\)"),
        ("nvfp4", {Q + SCALE: None}, f"{Q}.weight_packed is quantised, but its scales, {Q}.weight_scale, are missing"),
        ("nvfp4", {Q + ".weight_global_scale": None}, f"{Q}.weight_global_scale is missing beside {Q}.weight_scale"),
        (
            "nvfp4",
            {Q + ".weight_global_scale": np.zeros(1, np.float32)},
            "global_scale is not one positive",
        ),
        ("nvfp4", {Q + ".weight_zero_point": np.ones((64, 4), E4M3)}, "quantised by compressed-tensors, in a way that"),
        (
            "nvfp4",
            {Q + SCALE: np.ones((64, 4), np.uint8)},
            "is uint8, scales of NVFP4 .* are float8_e4m3fn",
        ),
        (
            "mxfp4",
            {Q + ".weight_packed": np.ones((64, 32), np.int8)},
            "weight_packed is int8, not uint8, two codes",
        ),
        ("mxfp4", {Q + ".weight_packed": np.ones((64, 64), np.uint8)}, r"needs \(64, 4\), as config.json says MXFP4"),
        (
            "gpt_oss",
            {Q + ".weight_scales": None},
            "weight_blocks is quantised, but its scales, .* missing",
        ),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, case, change, message):
    write(tmp_path, case)
    stored = stored_in(tmp_path) | change
    save_file({name: value for name, value in stored.items() if value is not None}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("case", CASES)
def test_without_a_config_each_is_refused(tmp_path, case):
    write(tmp_path, case)
    (tmp_path / "config.json").write_text(json.dumps(DENSE.to_hf()))
    message = "has dtype uint8, so it is" if case == "gpt_oss" else "but config.json has no quantization_config"
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_a_config_that_outlived_its_quantised_weights(tmp_path):
    values = write(tmp_path, "fp8_blocks")
    save_file({name: value.astype(np.float32) for name, value in values.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="stored as FP8 with one .* but none is; remove its quantization_config"):
        load(tmp_path)


INT4 = compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128})


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, Unsupported, 'quant_method "gptq", 4 bits'),
        ({"quant_method": "awq", "bits": 4}, Unsupported, 'quant_method "awq", 4 bits'),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, Unsupported, 'quant_method "bitsandbytes", 8 bits'),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, Unsupported, 'quant_method "modelopt"'),
        ({"bits": 2}, Unsupported, "quant_method null, 2 bits"),
        ({"quant_method": ["fp8"]}, Unsupported, r'quant_method \["fp8"\]'),
        ("fp8", InputError, 'config "fp8" is not an object'),
        (INT4, Unsupported, 'format "pack-quantized", 4-bit int weights'),
        (compressed("naive-quantized", EIGHT | {"type": "int"}), Unsupported, 'format "naive-quantized", 8-bit int'),
        (compressed("float-quantized", FOUR | {"strategy": "tensor"}), Unsupported, '"float-quantized", 4-bit float'),
        (compressed("float-quantized", EIGHT | {"symmetric": False}), Unsupported, "with zero points"),
        (compressed("float-quantized", EIGHT | {"strategy": "token"}), Unsupported, 'strategy "token"'),
        (compressed("float-quantized", EIGHT | {"strategy": "block"}), InputError, "block_structure null is not two"),
        (
            compressed("nvfp4-pack-quantized", FOUR | {"group_size": 32}),
            InputError,
            "group_size 32 is not 16",
        ),
        (NVFP4 | {"transform_config": {"config_groups": {"u": {}}}}, Unsupported, "transform_config"),
        (NVFP4 | {"sparsity_config": {"format": "sparse-24-bitmask"}}, Unsupported, "sparsity_config"),
        (
            NVFP4 | {"config_groups": {"FP8": ["Linear"]}},
            InputError,
            r'FP8 \["Linear"\] is not an object',
        ),
        (NVFP4 | {"config_groups": {}}, InputError, "config_groups {} is not anything that says"),
        (
            of_blocks(weight_block_size=[128]),
            InputError,
            r"weight_block_size \[128\] is not two positive",
        ),
        (of_blocks(weight_block_size=[128, 0]), InputError, r"weight_block_size \[128, 0\] is not two"),
        (of_blocks(activation_scheme="often"), InputError, 'activation_scheme "often" is not dynamic or static'),
        (of_blocks(expert_dtype="int4"), Unsupported, 'expert_dtype "int4"'),
    ],
)
def test_configs_that_are_refused(config, error, message):
    for name in ("quantization_config", "compression_config"):
        with pytest.raises(error, match=message) as found:
            TargetArchitecture.from_hf(DENSE.to_hf() | {name: config})
        assert name in str(found.value)
        if error is Unsupported:
            assert "use the checkpoint in bfloat16 or float32, or one in FP8, MXFP4 or NVFP4" in str(found.value)


def test_two_configs_have_to_agree():
    raw = DENSE.to_hf() | {"quantization_config": NVFP4, "compression_config": NVFP4}
    assert TargetArchitecture.from_hf(raw) == TargetArchitecture.from_hf(DENSE.to_hf())
    with pytest.raises(InputError, match="two different quantization_config and compression_config"):
        TargetArchitecture.from_hf(raw | {"compression_config": of_blocks()})


def test_drafters_are_not_quantised(tmp_path):
    drafter = DENSE.to_hf() | {"architectures": ["Qwen3DSparkModel"], "target_layer_ids": [0], "block_size": 3}
    drafter |= {"mask_token_id": 1, "markov_rank": 0, "quantization_config": of_blocks()}
    (tmp_path / "config.json").write_text(json.dumps(drafter))
    with pytest.raises(Unsupported, match=r"quantised weights \(quantization_config\) is not supported"):
        read_drafter_config(tmp_path)


def test_the_page_names_every_method_and_format():
    page = Path(__file__).parents[2] / "docs" / "targets.md"
    section = page.read_text().split("\n## Quantised checkpoints\n")[1].split("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")][1:]
    assert set(re.findall(r"`([^`]+)`", " ".join(rows))) == {*METHODS, *FORMATS}
