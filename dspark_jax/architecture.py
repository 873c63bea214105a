"""The shape of a target, as the config.json of a Hugging Face directory states it: dense Qwen3 and Gemma 4."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_jax.errors import InputError
from dspark_jax.json_file import read_object

_GEMMA = {"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"}
"""Values of `model_type` of Gemma 4, with and without other modalities; all are `gemma4` here."""


class Unsupported(InputError):
    """A model of a known family that uses what has no implementation here; `what` names it."""

    def __init__(self, where: str, what: str, remedy: str):
        super().__init__(f"{where}: {what} is not supported; {remedy}")
        self.what = what


@dataclasses.dataclass
class TargetArchitecture:
    """Shape of a target model, with the field names of its Hugging Face `config.json`."""

    model_type: str = "qwen3"
    """qwen3 or gemma4."""
    vocab_size: int = 0
    hidden_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    intermediate_size: int = 0
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    """Of the layers that see all earlier tokens."""
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 0
    layer_types: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    """Gemma 4, as all that follow: sliding_attention or full_attention, by layer."""
    sliding_window: int = dataclasses.field(default=0, repr=False)
    """Tokens that sliding layers see."""
    sliding_rope_theta: float = dataclasses.field(default=0.0, repr=False)
    global_head_dim: int = dataclasses.field(default=0, repr=False)
    """Head width of the full layers; sliding ones have `head_dim`."""
    num_global_key_value_heads: int = dataclasses.field(default=0, repr=False)
    attention_k_eq_v: bool = dataclasses.field(default=False, repr=False)
    """Whether the full layers' values are their raw keys."""
    partial_rotary_factor: float = dataclasses.field(default=1.0, repr=False)
    """Share of the full layers' pairs that RoPE rotates."""
    final_logit_softcapping: float = dataclasses.field(default=0.0, repr=False)
    """Logits are this times tanh(logits / this); 0 = not capped."""

    foreign: str = dataclasses.field(default="", repr=False)
    """What a target is that has no definition here and only lends its features: its model_type, and what sets it apart
    where that is a known one. Empty for all others."""

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> "TargetArchitecture":
        """Reads a Hugging Face config: a directory, a `config.json`, or its decoded content.

        Raises:
          InputError: the file is missing or not JSON, or a needed field is absent or of another type.
          Unsupported: the model uses a feature that has no implementation here (biases, scaled RoPE, experts, ...).
        """
        where, raw = _read(source)
        model_type = raw.get("model_type")
        if model_type not in ("qwen3", *_GEMMA):
            raise Unsupported(where, f"model_type {model_type!r}", "use one of: qwen3, gemma4")
        if model_type == "qwen3":
            _check_numbers(raw, where)
            values = _qwen_values(raw, where)
        else:
            raw = {**raw, **_part(raw, "text_config", where)}
            _check_numbers(raw, where)
            values = _gemma_values(raw, where)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        optional = {"tie_word_embeddings", "head_dim"} | {name for name, field in fields.items() if not field.repr}
        missing = [name for name in fields if values.get(name) is None and name not in optional]
        if missing:
            raise InputError(f"{where}: missing {', '.join(missing)}; this is not a complete {model_type} config.json")
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        return cls(**{name: values[name] for name in fields if values.get(name) is not None})

    @classmethod
    def of_any_model(cls, directory: str | os.PathLike[str]) -> "TargetArchitecture":
        """As `from_hf`; of a model that has no definition here, the shape that a drafter for it has (a Qwen3's).

        Raises:
          InputError: as `from_hf` but for what is unsupported, or a size that the drafter needs is not in the config.
        """
        where, raw = _read(Path(directory) / "config.json")
        text = {**raw, **_part(raw, "text_config", where)}
        kind = str(text.get("model_type"))
        if kind in (*_GEMMA, "qwen3"):
            try:
                return cls.from_hf(directory)
            except Unsupported as error:
                kind = f"{kind} with {error.what}"
        for name, others in _OTHER_NAMES.items():
            given = [text[other] for other in (name, *others) if text.get(other) is not None]
            text[name] = given[0] if given else None
        rope = _part(text, "rope_parameters", where)
        rope = _part(rope, "full_attention", where) or rope
        if rope.get("rope_theta") is not None:
            text["rope_theta"] = rope["rope_theta"]
        _check_numbers(text, where)
        if text.get("num_key_value_heads") is None:
            text["num_key_value_heads"] = text["num_attention_heads"]
        sizes = [name for name in _PLAIN_FIELDS if name.startswith(("num_", "vocab", "hidden", "max_"))]
        missing = [name for name in sizes if text.get(name) is None]
        if missing:
            raise InputError(f"{where}: missing {', '.join(missing)}; add them to the file under these names")
        if text.get("head_dim") is None:
            text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
        if text.get("intermediate_size") is None:
            text["intermediate_size"] = 4 * text["hidden_size"]
        names = [*sizes, "head_dim", "intermediate_size", "rope_theta", "rms_norm_eps"]
        values = {name: text[name] for name in names if text.get(name) is not None}
        return cls(**values, tie_word_embeddings=bool(text.get("tie_word_embeddings", True)), foreign=kind)

    def refuse_other(self, found: "TargetArchitecture", path: str | os.PathLike[str]) -> None:
        """Refuses a model of another shape than this one, which a config states.

        Raises:
          InputError: names the first field of `found`, read at `path`, that differs.
        """
        for field in dataclasses.fields(found):
            stated, there = getattr(self, field.name), getattr(found, field.name)
            if stated != there:
                raise InputError(
                    f"target.architecture.{field.name}={stated} but {path}/config.json has {there}; "
                    "drop the stated architecture or point target.path at the right model"
                )

    def to_hf(self) -> dict[str, Any]:
        """The fields as a Hugging Face `config.json` states them."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name in _PLAIN_FIELDS}
        rope = {"rope_theta": self.rope_theta, "rope_type": "default"}
        if self.model_type == "qwen3":
            extra = {"hidden_act": "silu", "attention_bias": False, "rope_parameters": rope}
            return {"architectures": ["Qwen3ForCausalLM"], **fields, **extra}
        del fields["rope_theta"]
        rope |= {"rope_type": "proportional", "partial_rotary_factor": self.partial_rotary_factor}
        sliding = {"rope_theta": self.sliding_rope_theta, "rope_type": "default"}
        extra = {
            "model_type": "gemma4_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "rope_parameters": {"full_attention": rope, "sliding_attention": sliding},
            "layer_types": list(self.layer_types),
            "sliding_window": self.sliding_window,
            "global_head_dim": self.global_head_dim,
            "num_global_key_value_heads": self.num_global_key_value_heads,
            "attention_k_eq_v": self.attention_k_eq_v,
            "final_logit_softcapping": self.final_logit_softcapping or None,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": False,
            "num_kv_shared_layers": 0,
        }
        return {"architectures": ["Gemma4ForCausalLM"], **fields, **extra}


_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"), "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"), "max_position_embeddings": ("n_positions", "max_seq_len"),
}  # fmt: skip
"""Our name of a size -> those of GPT-2's descendants."""

_PLAIN_FIELDS = [field.name for field in dataclasses.fields(TargetArchitecture) if field.repr]
_NUMBERS = {field.name: field.type for field in dataclasses.fields(TargetArchitecture) if field.type in (int, float)}


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(name for messages, content) of a config: a directory, a file, or the content itself."""
    if isinstance(source, Mapping):
        return "config", source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    return str(path), read_object(path, "give a Hugging Face model directory")


def _part(raw: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """A nested object of a config; empty where it is absent or null."""
    found = raw.get(name)
    if found is not None and not isinstance(found, Mapping):
        raise InputError(f"{where}: {name} {json.dumps(found)} is not an object; download it again")
    return found or {}


def _check_numbers(raw: Mapping[str, Any], where: str) -> None:
    """Refuses sizes that are not positive whole numbers and other numbers that are not numbers; null is absent."""
    for name, kind in _NUMBERS.items():
        value = raw.get(name)
        if value is None or (name in _MAY_BE_ZERO and value == 0):
            continue
        good = isinstance(value, int) if kind is int else isinstance(value, int | float)
        if not good or isinstance(value, bool) or value <= 0:
            whole = "a positive whole number" if kind is int else "a positive number"
            raise InputError(f"{where}: {name} {json.dumps(value)} is not {whole}; download it again")


_MAY_BE_ZERO = ("sliding_window", "final_logit_softcapping", "global_head_dim", "num_global_key_value_heads")
"""Where zero is none."""


def _rope_type(rope: Mapping[str, Any]) -> Any:
    """The kind of RoPE, which older files call `type`."""
    return rope.get("rope_type", rope.get("type", "default"))


def _refuse(raw: Mapping[str, Any], where: str, wanted: Mapping[str, Any], remedy: str) -> None:
    """Refuses a Hugging Face config with another value than the only one that is implemented; absent is fine."""
    for name, value in wanted.items():
        if raw.get(name) is not None and raw[name] != value:
            raise Unsupported(where, f"{name} {json.dumps(raw[name])}", remedy)


def _qwen_values(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a Qwen3 config."""
    values = {name: raw[name] for name in _PLAIN_FIELDS if name in raw}
    for name in ("rope_scaling", "rope_parameters"):
        rope = _part(raw, name, where)
        _check_numbers(rope, where)
        if rope.get("rope_theta") is not None:
            values["rope_theta"] = rope["rope_theta"]
        if _rope_type(rope) != "default":
            raise Unsupported(where, f"rope_type {_rope_type(rope)!r}", "use a model with default RoPE")
    _refuse(raw, where, {"attention_bias": False, "use_sliding_window": False}, "use a plain Qwen3 model")
    values.setdefault("tie_word_embeddings", False)
    return values


def _gemma_values(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of the text part of a Gemma 4 config, of which the released files mix several dialects (trap 23)."""
    only = {"attention_bias": False, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    only |= {"enable_moe_block": False, "hidden_activation": "gelu_pytorch_tanh"}
    _refuse(raw, where, only, "use a dense Gemma 4 such as google/gemma-4-12B-it")
    if raw.get("use_bidirectional_attention") == "all":
        raise Unsupported(where, "use_bidirectional_attention all", "use a causal Gemma 4")
    values = {field.name: raw[field.name] for field in dataclasses.fields(TargetArchitecture) if field.name in raw}
    values |= {"model_type": "gemma4"}
    values.setdefault("tie_word_embeddings", True)
    layers = raw.get("num_hidden_layers") or 0
    kinds = raw.get("layer_types") or [
        "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)
    ]
    kinds = list(kinds) if isinstance(kinds, list | tuple) else [json.dumps(kinds)]
    if layers and (len(kinds) != layers or set(map(str, kinds)) - {"full_attention", "sliding_attention"}):
        raise InputError(
            f"{where}: layer_types has {len(kinds)} entries {sorted(set(map(str, kinds)))} for {layers} layers; "
            "one of sliding_attention and full_attention is needed for each"
        )
    values["layer_types"] = tuple(kinds[:-1]) + ("full_attention",) if layers else ()
    # Newer files give what full layers have of their own layer by layer, older ones by name.
    layers_own = _part(raw, "per_layer_config", where)
    own = _part(layers_own, next(iter(layers_own), ""), where)
    _check_numbers(own, where)
    values["global_head_dim"] = own.get("head_dim", raw.get("global_head_dim") or 512)
    few = raw.get("num_global_key_value_heads") if raw.get("attention_k_eq_v") else None
    values["num_global_key_value_heads"] = own.get("num_key_value_heads", few or raw.get("num_key_value_heads"))
    rope = _part(raw, "rope_parameters", where)
    full = _part(rope, "full_attention", where) or {"rope_type": "proportional", "partial_rotary_factor": 0.25}
    sliding = _part(rope, "sliding_attention", where)
    for entry, known in ((full, ("proportional", "default")), (sliding, ("default",))):
        _check_numbers(entry, where)
        if _rope_type(entry) not in known:
            raise Unsupported(where, f"rope_type {_rope_type(entry)!r}", f"use one of: {known}")
    values["rope_theta"], values["sliding_rope_theta"] = full.get("rope_theta", 1e6), sliding.get("rope_theta", 1e4)
    values["partial_rotary_factor"] = full.get("partial_rotary_factor", 1.0)
    values["final_logit_softcapping"] = raw.get("final_logit_softcapping") or 0.0
    return values
