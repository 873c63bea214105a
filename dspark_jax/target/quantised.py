"""Which quantised checkpoints are read: what a `quantization_config` states, and how matrices are then stored.

A quantised matrix [O, I] is stored as codes, of 8 bits or two of 4 bits in a byte, and a scale for every block of them:
value = number that the code stands for x scale of its block (/ a divisor of the whole matrix). A `Layout` says so of
one kind of matrices. `METHODS` has a function for each quant_method that is read, `FORMATS` one for each format of
compressed-tensors; `target.dequantise` computes the values. Which matrices are quantised is told by names and types of
the tensors, not by the config's lists of modules.

The module is loaded with the config, before JAX is.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dspark_jax.errors import InputError, Unsupported

NAMES = ("quantization_config", "compression_config")
"""Fields of a config.json that say how weights are quantised."""

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_EXPONENTS = (np.dtype(np.uint8), np.dtype(ml_dtypes.float8_e8m0fnu))  # E8M0: 2^(byte - 127), and 255 is NaN
_NUMBERS = (*(np.dtype(x) for x in (np.float32, np.float16, ml_dtypes.bfloat16)), FLOAT8[0])

REMEDY = "use the checkpoint in bfloat16 or float32, or one in FP8, MXFP4 or NVFP4 as docs/targets.md lists them"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a kind of quantised matrices is stored.

    Attributes:
      title: what it is called in messages.
      weight: how the names of weights end that may be stored so.
      codes: the end of the name that the codes have instead.
      scales: ends of the names that the scales may have.
      block: rows and columns that share a scale; 0: all of them.
      scale_types: types that the scales may have.
      halves: two codes of FP4 in a byte, the first one in its lower half; otherwise codes of FP8.
      divisor: the end of the name of a number through which a matrix is divided; empty: there is none.
      grouped: codes have an axis more, [..., O, I/32, 16].
      signed: bytes of two codes may have the signed type.
    """

    title: str
    weight: str
    codes: str
    scales: tuple[str, ...]
    block: tuple[int, int]
    scale_types: tuple[np.dtype[Any], ...] = _NUMBERS
    halves: bool = False
    divisor: str = ""
    grouped: bool = False
    signed: bool = False

    def holds(self, dtype: np.dtype[Any]) -> bool:
        """Whether codes may have this type."""
        if self.halves:
            return dtype == np.uint8 or (self.signed and dtype == np.int8)
        return dtype in FLOAT8


@dataclasses.dataclass(frozen=True)
class Quantisation:
    """What a config says of quantised weights.

    Attributes:
      layouts: that matrices may have; none: nothing is quantised.
      activations: how servers quantise those, dynamic or static; empty: they do not.
      cache: whether they quantise keys and values.
    """

    layouts: tuple[Layout, ...] = ()
    activations: str = ""
    cache: bool = False

    @property
    def title(self) -> str:
        """What it is called in messages."""
        return ", ".join(dict.fromkeys(layout.title for layout in self.layouts))


@dataclasses.dataclass(frozen=True)
class _Stated:
    """A quantization_config, or a part of it, and how to refuse it."""

    values: Mapping[str, Any]
    where: str
    name: str

    def refused(self, what: str) -> Unsupported:
        return Unsupported(self.where, f"a quantised checkpoint ({self.name}: {what})", REMEDY)

    def wrong(self, field: str, wanted: str) -> InputError:
        value = json.dumps(self.values.get(field))
        return InputError(f"{self.where}: {self.name}.{field} {value} is not {wanted}; download it again")

    def part(self, field: str) -> "_Stated":
        found = self.values.get(field)
        if not isinstance(found, Mapping):
            raise self.wrong(field, "an object")
        return _Stated(found, self.where, f"{self.name}.{field}")

    def size(self, field: str) -> int:
        if not _is_size(self.values.get(field)):
            raise self.wrong(field, "a positive whole number")
        return self.values[field]

    def sizes(self, field: str) -> tuple[int, int]:
        found = self.values.get(field)
        if not isinstance(found, list | tuple) or len(found) != 2 or not all(map(_is_size, found)):
            raise self.wrong(field, "two positive whole numbers")
        return found[0], found[1]


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def of_config(raw: Mapping[str, Any], where: str) -> Quantisation:
    """How the weights are quantised that a config.json describes.

    Args:
      raw: its content, or a part of it.
      where: the file, for messages.

    Raises:
      Unsupported: in a way that is not read here; names it.
      InputError: what it states makes no sense.
    """
    parts = [raw, raw["text_config"]] if isinstance(raw.get("text_config"), Mapping) else [raw]
    stated = {name: part[name] for part in parts for name in NAMES if part.get(name)}
    if not stated:
        return Quantisation()
    name, found = next(iter(stated.items()))
    if not all(other == found for part in parts for other in (part.get(name) for name in NAMES) if other):
        raise InputError(f"{where}: it states two different {' and '.join(NAMES)}; keep the right one")
    if not isinstance(found, Mapping):
        raise InputError(f"{where}: {name} {json.dumps(found)} is not an object; download it again")
    method = found.get("quant_method")
    if raw.get("expert_dtype") is not None:  # DeepSeek-V4 says it beside the object
        found = {"expert_dtype": raw["expert_dtype"], **found}
    config = _Stated(found, where, name)
    if method not in [*METHODS]:
        bits = found.get("bits") or next((n for n in (4, 8) if found.get(f"load_in_{n}bit")), None)
        raise config.refused(f"quant_method {json.dumps(method)}" + (f", {bits} bits" if bits else ""))
    return METHODS[str(method)](config)


def _fp8(config: _Stated) -> Quantisation:
    """FP8 as DeepSeek and Qwen store it, in blocks, or with one scale per matrix; experts may be in FP4."""
    stated = config.values
    if stated.get("expert_dtype") not in (None, "fp8", "fp4"):
        raise config.refused(f"expert_dtype {json.dumps(stated['expert_dtype'])}")
    if stated.get("activation_scheme", "dynamic") not in ("dynamic", "static"):
        raise config.wrong("activation_scheme", "dynamic or static")
    blocks = [config.sizes("weight_block_size")] if stated.get("weight_block_size") is not None else [(0, 0)]
    if "weight_block_size" not in stated:  # one scale per matrix to vLLM, to transformers such blocks
        blocks.append((128, 128))
    names = (".weight_scale_inv", ".weight_scale", ".scale")
    layouts = tuple(_eight_bits(block, (*_NUMBERS, *_EXPONENTS), names) for block in blocks)
    if stated.get("expert_dtype") == "fp4":
        title = "MXFP4 in blocks of 32 values"
        layouts += (Layout(title, ".weight", ".weight", (".scale",), (1, 32), _EXPONENTS, halves=True, signed=True),)
    return Quantisation(layouts, stated.get("activation_scheme", "dynamic"))


def _gpt_oss(config: _Stated) -> Quantisation:
    """MXFP4 as GPT-OSS has it: each tensor's codes and scales are called after it."""
    del config
    names = ("", "_blocks", ("_scales",))
    layout = Layout("MXFP4 in blocks of 32 values", *names, (1, 32), _EXPONENTS, halves=True, grouped=True)
    return Quantisation((layout,))


def _compressed_tensors(config: _Stated) -> Quantisation:
    """What the package of this name writes: a format for all matrices, or one per group of them."""
    stated, layouts, activations = config.values, list[Layout](), ""
    for field, none in (("transform_config", {"config_groups": {}}), ("sparsity_config", {"format": "dense"})):
        if stated.get(field) not in (None, {}, none):
            raise config.refused(f"{field} {json.dumps(stated[field])[:80]}")
    groups = config.part("config_groups")
    for name in groups.values:
        group = groups.part(name)
        inputs = group.values.get("input_activations")
        if isinstance(inputs, Mapping):
            activations = "dynamic" if inputs.get("dynamic") else activations or "static"
        if group.values.get("weights") is None:
            continue
        form, weights = group.values.get("format") or stated.get("format"), group.part("weights")
        kind = str(weights.values.get("type", "int")).lower()
        what = f"format {json.dumps(form)}, {weights.values.get('num_bits', 8)}-bit {kind} weights"
        if form not in [*FORMATS] or kind != "float":
            raise config.refused(what)
        layout = FORMATS[str(form)](weights)
        if weights.values.get("num_bits", 8) != (4 if layout.halves else 8):
            raise config.refused(what)
        if weights.values.get("symmetric") is False or weights.values.get("actorder"):
            raise config.refused(f"{what} with zero points or in the order of activations")
        layouts += [] if layout in layouts else [layout]
    if not layouts:
        raise config.wrong("config_groups", "anything that says how weights are stored")
    return Quantisation(tuple(layouts), activations, bool(stated.get("kv_cache_scheme")))


def _by_strategy(weights: _Stated) -> Layout:
    """FP8 with one scale per matrix, row, group of a row, or block."""
    stated = weights.values
    strategy, group = stated.get("strategy"), stated.get("group_size")
    strategy = strategy or ("tensor" if group is None else "channel" if group == -1 else "group")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise weights.refused(f"strategy {json.dumps(strategy)}")
    if strategy == "block":
        block = weights.sizes("block_structure")
    else:
        block = {"tensor": (0, 0), "channel": (1, 0)}.get(strategy) or (1, weights.size("group_size"))
    return _eight_bits(block)


def _eight_bits(
    block: tuple[int, int], types: tuple[np.dtype[Any], ...] = _NUMBERS, names: tuple[str, ...] = (".weight_scale",)
) -> Layout:
    """FP8 with a scale per block."""
    shared = {(0, 0): "one scale per matrix", (1, 0): "one scale per row"}
    title = f"FP8 with {shared.get(block) or f'one scale per {block[0]} x {block[1]} values'}"
    return Layout(title, ".weight", ".weight", names, block, types)


def _four_bits(title: str, group: int, types: tuple[np.dtype[Any], ...], divisor: str = "") -> Callable[..., Layout]:
    """FP4 of compressed-tensors with a scale per group of a row."""

    def layout(weights: _Stated) -> Layout:
        if weights.values.get("group_size") != group:
            raise weights.wrong("group_size", f"{group}, as {title} has it")
        names = (".weight", ".weight_packed", (".weight_scale",), (1, group), types)
        return Layout(f"{title} in blocks of {group} values", *names, halves=True, divisor=divisor)

    return layout


METHODS: dict[str, Callable[[_Stated], Quantisation]] = {
    "fp8": _fp8,
    "mxfp4": _gpt_oss,
    "compressed-tensors": _compressed_tensors,
}
"""quant_method -> what its config says."""

FORMATS: dict[str, Callable[[_Stated], Layout]] = {
    "float-quantized": _by_strategy,
    "naive-quantized": _by_strategy,
    "mxfp8-quantized": lambda weights: _eight_bits((1, 32), _EXPONENTS),
    "mxfp4-pack-quantized": _four_bits("MXFP4", 32, _EXPONENTS),
    "nvfp4-pack-quantized": _four_bits("NVFP4", 16, FLOAT8[:1], ".weight_global_scale"),
}
"""format of compressed-tensors -> how it stores weights."""
