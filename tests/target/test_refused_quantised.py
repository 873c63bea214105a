"""Quantised checkpoints that are refused in one line: tensors that do not fit, configs that say something else."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax.architecture import TargetArchitecture
from dspark_jax.config_fields import Unsupported
from dspark_jax.convert.hf import read_drafter_config
from dspark_jax.errors import InputError
from tests.target.quantised_files import (
    BF16,
    CASES,
    DENSE,
    E4M3,
    EIGHT,
    FOUR,
    INV,
    NVFP4,
    SCALE,
    compressed,
    load,
    of_blocks,
    stored_in,
    write,
)


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
