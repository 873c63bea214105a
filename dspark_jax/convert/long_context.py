"""Windows and scaled RoPE of block drafters in a `config.json`, as z-lab, vLLM, SGLang and speculators read them.

A layer has a window where `layer_types` says so, of `sliding_window` rows, which Qwen3's config class drops unless
`use_sliding_window` is true. `dflash_config.use_swa` gives all layers one, of `swa_window_size` rows. A block with a
window is causal inside for servers unless the file says `is_causal` false (or `dflash_config.causal` false; for
speculators it is `sliding_window_non_causal`): such a drafter is another one than ours.
"""

from collections.abc import Mapping
from typing import Any

from dspark_jax.architecture import Unsupported
from dspark_jax.config import DrafterConfig
from dspark_jax.convert.layouts import layers_config
from dspark_jax.errors import InputError
from dspark_jax.rope_scaling import NEEDED, OPTIONAL, problems
from dspark_jax.target.families import claiming
from dspark_jax.target.families.family import FULL, SLIDING

_READ = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers", "is_causal")
_USUAL_WINDOW_LAYERS = 28
"""`max_window_layers` of Qwen3's config class where a file has none: so many layers have no window."""


def fields(where: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a block drafter's config.json says of `DrafterConfig.sliding_window`, `layer_types`, and RoPE's two fields.

    Raises:
      InputError: it contradicts itself, or a number is missing.
    """
    return _windows(where, raw) | _rope(where, layers_config(raw)) if _may_have(layers_config(raw)) else {}


def _may_have(layers: Mapping[str, Any]) -> bool:
    """Whether layers of this family may have windows and scaled RoPE in drafters."""
    family = claiming(layers.get("model_type"))
    return family is not None and family.long_drafters


def _windows(where: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    layers, nested = layers_config(raw), raw.get("dflash_config") or {}
    kinds, count = layers.get("layer_types"), int(layers.get("num_hidden_layers") or 0)
    window, used = layers.get("sliding_window"), layers.get("use_sliding_window", True)
    if kinds is not None and (len(kinds) != count or set(map(str, kinds)) - {FULL, SLIDING}):
        raise InputError(
            f"{where}: layer_types {kinds} must name {FULL} or {SLIDING} for each of the {count} layers; correct it"
        )
    if nested.get("use_swa") and SLIDING not in (kinds or []):
        kinds, used = [SLIDING] * count, True
    elif kinds is None and layers.get("use_sliding_window") and window is not None:
        first = layers.get("max_window_layers", _USUAL_WINDOW_LAYERS)
        kinds = [SLIDING if i >= first else FULL for i in range(count)]
    if SLIDING not in (kinds or []):
        return {}
    window = nested.get("swa_window_size", window if used else None)
    if type(window) is not int or window < 1:
        why = "" if used else ", which use_sliding_window false switches off"
        raise InputError(
            f"{where}: layers have a window and sliding_window is {layers.get('sliding_window')}{why}; state its rows, "
            "with use_sliding_window true"
        )
    alike = set(kinds or []) == {SLIDING}
    return {"sliding_window": window, "layer_types": () if alike else tuple(kinds or [])}


def _rope(where: str, layers: Mapping[str, Any]) -> dict[str, Any]:
    rope = layers.get("rope_parameters") or layers.get("rope_scaling") or {}
    kind = _rope_type(rope)
    if kind == "default" or kind not in NEEDED:  # what is unknown is for the architecture to refuse
        return {}
    numbers = {name: rope[name] for name in NEEDED[kind] + OPTIONAL.get(kind, ()) if rope.get(name) is not None}
    if "original_max_position_embeddings" in NEEDED[kind]:  # as transformers takes it where it is not stated
        numbers.setdefault("original_max_position_embeddings", layers.get("max_position_embeddings", 0))
    wrong = [name for name, value in numbers.items() if not isinstance(value, int | float)]
    if wrong:
        raise InputError(f"{where}: {wrong[0]} {rope.get(wrong[0])!r} of rope_type {kind!r} is no number; correct it")
    numbers = {name: float(value) for name, value in numbers.items()}
    for problem in problems(kind, numbers):
        raise InputError(f"{where}: {problem.replace('drafter.rope_scaling', 'its RoPE')}")
    if layers.get("partial_rotary_factor") not in (None, 1.0) or rope.get("partial_rotary_factor") not in (None, 1.0):
        raise Unsupported(where, f"partial_rotary_factor with rope_type {kind!r}", "servers may know it")
    return {"rope_type": kind, "rope_scaling": numbers}


def _rope_type(rope: Any) -> Any:
    """Of a RoPE in either form; anything that is none is the architecture's to refuse."""
    return (rope.get("rope_type") or rope.get("type") or "default") if isinstance(rope, Mapping) else None


def without(layers: Mapping[str, Any]) -> Mapping[str, Any]:
    """The layers' config without what `fields` reads, for `TargetArchitecture.from_hf`, whose models have neither."""
    if not _may_have(layers):
        return layers
    plain = {name: value for name, value in layers.items() if name not in _READ}
    for name in ("rope_parameters", "rope_scaling"):
        rope = plain.get(name)
        if rope and _rope_type(rope) in set(NEEDED) - {"default"}:
            plain[name] = {"rope_theta": rope["rope_theta"]} if rope.get("rope_theta") is not None else None
    return plain


def keys(drafter: DrafterConfig, config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a drafter's config.json has another value than without windows and scaled RoPE."""
    found: dict[str, Any] = {}
    if SLIDING in drafter.layer_kinds:
        found = {
            "layer_types": list(drafter.layer_kinds),
            "sliding_window": drafter.sliding_window,
            "use_sliding_window": True,
            "is_causal": False,
        }
        if "dflash_config" in config:
            found["dflash_config"] = {**config["dflash_config"], "causal": False}
    if drafter.rope_type != "default":
        numbers: dict[str, Any] = dict(drafter.rope_scaling)
        if "truncate" in numbers:
            numbers["truncate"] = bool(numbers["truncate"])
        if "original_max_position_embeddings" in numbers:  # a length: servers take whole numbers
            numbers["original_max_position_embeddings"] = int(numbers["original_max_position_embeddings"])
        scaling = {"rope_type": drafter.rope_type, **numbers}
        if "rope_scaling" in config:  # the older form, beside rope_theta
            found["rope_scaling"] = scaling
        found["rope_parameters"] = {"rope_theta": config["rope_parameters"]["rope_theta"], **scaling}
    return found
