"""The shape of a target, as the config.json of a Hugging Face directory states it: dense Qwen3 and Gemma 4.

What becomes of every field of such a file is listed in `config_fields`, family by family.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dspark_jax.config_fields import FAMILIES, Unsupported, check_rope, refuse_quantised, refuse_unsupported
from dspark_jax.errors import InputError
from dspark_jax.json_file import read_object

_GEMMA = {"gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"}
"""Values of `model_type` of Gemma 4, with and without other modalities; all are `gemma4` here."""


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
    """What a target is that has no definition here and only lends its features: its model_type, and how it differs
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
        raw = _language_model(raw, where) if model_type in _GEMMA else raw
        _check_values(raw, where)
        _require(raw, ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), model_type, where)
        refuse_unsupported(raw, model_type, where)
        read = {name: field.absent for name, field in FAMILIES[model_type].items() if field.treatment == "read"}
        values = {name: raw.get(name, absent) for name, absent in read.items() if name in raw or absent is not None}
        values |= _gemma_values(values, where) if model_type in _GEMMA else _qwen_values(values, where)
        _require(values, _PLAIN_FIELDS, model_type, where)
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if values.get(name) is not None})

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
        _check_values(text, where)
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
_FLAGS = [field.name for field in dataclasses.fields(TargetArchitecture) if field.type is bool]


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


def _require(values: Mapping[str, Any], names: Iterable[str], model_type: str, where: str) -> None:
    """Refuses a config without one of these fields."""
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}; this is not a complete {model_type} config.json")


def _check_values(raw: Mapping[str, Any], where: str) -> None:
    """Refuses sizes that are not positive whole numbers, other numbers that are none, and flags; null is absent."""
    for name, kind in _NUMBERS.items():
        value = raw.get(name)
        if value is None or (name in _MAY_BE_ZERO and value == 0):
            continue
        good = isinstance(value, int) if kind is int else isinstance(value, int | float)
        if not good or isinstance(value, bool) or not 0 < value < math.inf:
            whole = "a positive whole number" if kind is int else "a positive number"
            raise InputError(f"{where}: {name} {json.dumps(value)} is not {whole}; download it again")
    for name in _FLAGS:
        value = raw.get(name)
        if not isinstance(value, bool | None):
            raise InputError(f"{where}: {name} {json.dumps(value)} is neither true nor false; download it again")


_MAY_BE_ZERO = ("sliding_window", "final_logit_softcapping", "global_head_dim", "num_global_key_value_heads")
"""Where zero is none."""


def _qwen_values(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a Qwen3 config that are not simply there."""
    values, stated = dict[str, Any](), list[Mapping[str, Any]]()
    for name in ("rope_scaling", "rope_parameters"):
        rope = _part(raw, name, where)
        _check_values(rope, where)
        check_rope(rope, ("default",), where)
        if any(isinstance(value, Mapping) for value in rope.values()):
            raise Unsupported(where, f"{name} by kind of layers", "use a plain Qwen3 model")
        if rope and rope not in stated:
            stated.append(rope)
    if len(stated) > 1:
        raise Unsupported(where, "rope_scaling beside another rope_parameters", "keep the right one of the two")
    if stated and stated[0].get("rope_theta") is not None:
        values["rope_theta"] = stated[0]["rope_theta"]
    if "num_key_value_heads" in raw and raw["num_key_value_heads"] is None:
        values["num_key_value_heads"] = raw.get("num_attention_heads")
    return values


def _language_model(raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """What a Gemma 4 config says of its language model: all of it, where there are no other modalities."""
    text = _part(raw, "text_config", where)
    if not text:
        return raw
    tied = [json.dumps(part.get("tie_word_embeddings", True)) for part in (raw, text)]
    if tied[0] != tied[1]:
        raise InputError(
            f"{where}: tie_word_embeddings is {tied[0]}, and {tied[1]} in text_config; "
            "write into both whether the LM head is the embedding"
        )
    refuse_quantised(raw, where)
    return text


def _gemma_values(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of Gemma 4 that are not simply there; the released files mix several dialects (trap 23)."""
    kinds = _layer_kinds(raw, where)
    values: dict[str, Any] = {"model_type": "gemma4", "layer_types": kinds}
    values["global_head_dim"], values["num_global_key_value_heads"] = _full_heads(raw, kinds, where)
    if _SLIDING in kinds and not raw.get("sliding_window"):
        raise InputError(f"{where}: missing sliding_window, which {_SLIDING} layers need; download it again")
    ropes = _part(raw, "rope_parameters", where) or _DEFAULT_ROPES
    for kind, known in ((_FULL, ("proportional", "default")), (_SLIDING, ("default",))):
        rope = _part(ropes, kind, where)
        _check_values(rope, where)
        found = check_rope(rope, known, where)
        if kind in kinds and rope.get("rope_theta") is None:
            raise InputError(f"{where}: missing rope_theta in rope_parameters.{kind}; download it again")
        rope = rope or _DEFAULT_ROPES[kind]  # of layers that are not there
        values["rope_theta" if kind == _FULL else "sliding_rope_theta"] = rope["rope_theta"]
        if kind == _FULL:
            share = rope.get("partial_rotary_factor") if found == "proportional" else None
            if share is not None and share > 1:
                raise InputError(f"{where}: partial_rotary_factor {share} is above 1; download it again")
            values["partial_rotary_factor"] = 1.0 if share is None else share
    values["final_logit_softcapping"] = raw.get("final_logit_softcapping") or 0.0
    return values


_FULL, _SLIDING = "full_attention", "sliding_attention"
_DEFAULT_ROPES: Mapping[str, Any] = {
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
"""What transformers takes where a Gemma 4 config has no `rope_parameters`."""


def _layer_kinds(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Kinds of the layers of a Gemma 4, the last of which always sees everything."""
    layers = raw.get("num_hidden_layers") or 0
    kinds = raw.get("layer_types") or [_SLIDING if (i + 1) % 6 else _FULL for i in range(layers)]
    kinds = list(kinds) if isinstance(kinds, list | tuple) else [json.dumps(kinds)]
    if layers and (len(kinds) != layers or set(map(str, kinds)) - {_FULL, _SLIDING}):
        raise InputError(
            f"{where}: layer_types has {len(kinds)} entries {sorted(set(map(str, kinds)))} for {layers} layers; "
            "one of sliding_attention and full_attention is needed for each"
        )
    return (*kinds[:-1], _FULL) if layers else ()


def _full_heads(raw: Mapping[str, Any], kinds: tuple[str, ...], where: str) -> tuple[Any, Any]:
    """(width, key and value heads) of the full layers of a Gemma 4, in which they may differ from the sliding ones.

    Newer files say it layer by layer, where it does differ; older ones by name.
    """
    usual = raw.get("head_dim"), raw.get("num_key_value_heads")
    if "per_layer_config" not in raw:
        few = raw.get("num_global_key_value_heads") if raw.get("attention_k_eq_v") else None
        return raw.get("global_head_dim") or 512, few or usual[1]
    stated = _part(raw, "per_layer_config", where)
    own = {name.lstrip("0") or "0": _part(stated, name, where) for name in stated}
    others = [f"layer {i}" for i in own if i not in map(str, range(len(kinds)))]
    others += [name for layer in own.values() for name in layer if name not in ("head_dim", "num_key_value_heads")]
    if others and kinds:
        raise Unsupported(
            where, f"per_layer_config of {others[0]}", "use a dense Gemma 4 such as google/gemma-4-12B-it"
        )
    heads: dict[str, set[tuple[Any, Any]]] = {_FULL: set(), _SLIDING: {usual}}
    for i, kind in enumerate(kinds):
        layer = own.get(str(i), {})
        _check_values(layer, where)
        heads[kind].add((layer.get("head_dim", usual[0]), layer.get("num_key_value_heads", usual[1])))
    if max(map(len, heads.values())) > 1:
        raise Unsupported(where, "per_layer_config that differs among layers of a kind", "use a dense Gemma 4")
    return heads[_FULL].pop() if kinds else usual
