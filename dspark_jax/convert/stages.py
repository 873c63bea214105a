"""DSpark-5 inside a DeepSeek-V4: its fields in that model's `config.json`, and its tensors `mtp.*` among the model's.

A directory of such a drafter is the checkpoint of the model, or has that config and the tensors of the drafter alone.
Embedding and LM head are the model's.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from dspark_jax.config import DrafterConfig, InputError, TargetArchitecture
from dspark_jax.convert.layouts import STAGES, Layout
from dspark_jax.layer_sizes import FAMILY, layer_sizes
from dspark_jax.target.dequantise import with_matrices
from dspark_jax.target.quantised import FLOAT8, of_config

if TYPE_CHECKING:
    from dspark_jax.convert.export import Source

_EXPONENTS = np.dtype(ml_dtypes.float8_e8m0fnu)
_SCALES = (".scale",)
_EXPERTS, _INT8 = ".ffn.experts.", np.dtype(np.int8)


def stages_config(layout: Layout, raw: Mapping[str, Any]) -> DrafterConfig:
    """The drafter's settings; the sizes of its layers are those of the model's own.

    Raises:
      InputError: see `TargetArchitecture.from_hf`.
    """
    sizes = dataclasses.asdict(layer_sizes(TargetArchitecture.from_hf(raw), {}))
    return DrafterConfig(
        kind="dspark5",
        num_layers=layout.num_layers,
        block_size=layout.block_size,
        target_layer_ids=layout.taps,
        mask_token_id=layout.mask_token_id,
        markov_rank=layout.markov_rank,
        confidence_head=layout.confidence,
        sliding_window=int(raw.get("sliding_window") or 128),
        layer_sizes=sizes,
    )


def stages_fields(source: "Source", form: str, dtype: str) -> dict[str, Any]:
    """`config.json` of an export: that of its DeepSeek-V4 with the drafter's fields, in a directory of its own.

    Raises:
      InputError: no server would load it so.
    """
    drafter, target = source.config, source.target
    if form != "universal":
        raise InputError(f"--format {form} has no word for the layers of a {drafter.kind}; use --format universal")
    if target.get("model_type") != FAMILY:
        raise InputError(
            f"a drafter of kind {drafter.kind!r} is served with a DeepSeek-V4 alone, its target is a "
            f"{target.get('model_type')}: no server would load it"
        )
    stated = target.get("quantization_config") or {"quant_method": "fp8", "weight_block_size": [0, 0]}
    if stated.get("quant_method") != "fp8" or not isinstance(stated.get("weight_block_size"), list):
        raise InputError(
            f"--target has quant_method {stated.get('quant_method')!r} with weight_block_size "
            f"{stated.get('weight_block_size')}, and vLLM takes its drafter for quantised in the same way; only fp8 in "
            "blocks is written: give the released target, or one in bfloat16"
        )
    own = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "dtype": dtype,
        "sliding_window": drafter.sliding_window,
        "n_mtp_layers": drafter.num_layers,
        "enable_confidence_head": drafter.confidence_head,
        "dspark_block_size": drafter.block_size,
        "dspark_noise_token_id": drafter.mask_token_id,
        "dspark_target_layer_ids": list(drafter.target_layer_ids),
        "dspark_markov_rank": drafter.markov_rank,
    }
    left_out = ("torch_dtype", "transformers_version", "auto_map", "partial_rotary_factor")
    rest = {name: value for name, value in target.items() if name not in left_out}
    return rest | own | dataclasses.asdict(layer_sizes(source.arch, drafter.layer_sizes))


@dataclasses.dataclass(frozen=True)
class StoredStages:
    """The tensors of an export.

    Attributes:
      tensors: gives them.
      shapes: of each.
      types: of those that have not the export's.
    """

    tensors: Callable[[], Iterable[tuple[str, np.ndarray]]]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, np.dtype]


def stored_stages(source: "Source", shapes: Mapping[str, tuple[int, ...]]) -> StoredStages:
    """A drafter's tensors, of these shapes, as its target stores its own: quantised, or not.

    Raises:
      InputError: an expert's rows are no whole blocks of FP4.
    """
    stated = source.target.get("quantization_config")
    block = tuple(stated["weight_block_size"]) if stated else (0, 0)
    four = bool(stated) and source.target.get("expert_dtype") == "fp4"
    found, types = dict[str, tuple[int, ...]](), dict[str, np.dtype]()
    for name, shape in shapes.items():
        sizes = _sizes_of(name, shape, block, four=four) if stated else None
        for part, size, kind in sizes or ((name, shape, np.dtype(np.float32) if _exact(name) else None),):
            found[part] = size
            types |= {part: kind} if kind else {}

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, value in source.tensors():
            if not stated or not _is_quantised(name):
                yield name, value
                continue
            codes, exponents = quantised_4(value) if four and _EXPERTS in name else quantised_8(value, block)
            yield name, codes
            yield _scale_of(name), exponents

    return StoredStages(tensors, found, types)


def _sizes_of(
    name: str, shape: tuple[int, ...], block: tuple[int, ...], *, four: bool
) -> tuple[tuple[str, tuple[int, ...], np.dtype], ...] | None:
    """Codes and scales of a matrix that is quantised: names, shapes and types; None of others."""
    if not _is_quantised(name):
        return None
    rows, columns = shape
    if four and _EXPERTS in name:
        if columns % 32:
            raise InputError(f"tensor {name} has rows of {columns}, which are no whole blocks of 32 values in FP4")
        return (name, (rows, columns // 2), _INT8), (_scale_of(name), (rows, columns // 32), _EXPONENTS)
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    return (name, shape, FLOAT8[0]), (_scale_of(name), grid, _EXPONENTS)


def quantised_8(value: np.ndarray, block: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Codes [O, I] of FP8, and exponents as scales of its blocks, so that the largest code is at most 448."""
    (rows, columns), (height, width) = value.shape, block
    padded = np.pad(value, ((0, -rows % height), (0, -columns % width)))
    parts = padded.reshape(padded.shape[0] // height, height, padded.shape[1] // width, width)
    exponents = _exponents(np.abs(parts).max(axis=(1, 3)) / 448)
    codes = (parts / np.exp2(exponents)[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return codes.astype(FLOAT8[0]), _as_scales(exponents)


def quantised_4(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of FP4, two in a byte [O, I/2], the first one in its lower half; and exponents of blocks of 32 values."""
    parts = value.reshape(len(value), -1, 32)
    exponents = _exponents(np.abs(parts).max(axis=2) / 6)
    codes = (parts / np.exp2(exponents)[..., None]).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    pairs = codes.reshape(len(value), -1, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).view(np.int8), _as_scales(exponents)


def _exponents(sizes: np.ndarray) -> np.ndarray:
    """The least whole e with 2^e >= sizes; 0 where that is 0."""
    mantissa, exponent = np.frexp(sizes.astype(np.float32))
    return np.where(sizes > 0, np.clip(exponent - (mantissa == 0.5), -127, 127), 0).astype(np.int32)


def _as_scales(exponents: np.ndarray) -> np.ndarray:
    return (exponents + 127).astype(np.uint8).view(_EXPONENTS)


def _is_quantised(name: str) -> bool:
    """Whether the releases have a matrix quantised: those of attention, of experts, and that of the features."""
    return any(part in name for part in (".attn.w", _EXPERTS, ".shared_experts.", ".main_proj."))


def _exact(name: str) -> bool:
    """Whether they have a tensor in float32."""
    return any(part in name for part in (".hc_", ".attn_sink", ".gate.bias"))


def _scale_of(name: str) -> str:
    return name.removesuffix(".weight") + _SCALES[0]


def stages_tensors(tensors: Mapping[str, np.ndarray], raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The drafter's tensors of a checkpoint, of quantised ones the values.

    Raises:
      InputError: there are none; or see `with_matrices`.
    """
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(STAGES)}
    if not own:
        raise InputError(f"{where}: there are no tensors {STAGES}*; this checkpoint comes without its drafter")
    return with_matrices(own, of_config(raw, where), where, np.float32)
