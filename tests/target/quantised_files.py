"""Checkpoints in the quantised formats, and the values that they stand for, from the formats' definitions in float64.

Codes and scales are random, so a checkpoint is made without any quantiser: whatever they are, they stand for numbers.
"""

import json
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from dspark_jax.architecture import TargetArchitecture
from dspark_jax.config import MeshConfig, TargetConfig
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import abstract_target, load_target, parameter_paths, read_safetensors
from dspark_jax.target.model import Target

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
