"""The shape of a target, as the config.json of a Hugging Face directory states it.

What becomes of every field of such a file is listed family by family, in `target.families`.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_jax.config_fields import COMMON, Unsupported, check_values, part, read, refuse_unsupported, require
from dspark_jax.errors import InputError
from dspark_jax.json_file import read_object
from dspark_jax.target import families
from dspark_jax.target.families.family import SIZES


@dataclasses.dataclass
class TargetArchitecture:
    """Shape of a target model, with the field names of its Hugging Face `config.json`."""

    model_type: str = dataclasses.field(default="qwen3", metadata={"choices": families.known})
    """Its family."""
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
    """What follows only some families have. Gemma 4: sliding_attention or full_attention, by layer."""
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

    own: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)
    """What only this model's family has, by the names that it gives them."""
    unsupported: str = dataclasses.field(default="", repr=False)
    """What a target is that has no definition here, so that PyTorch runs it: its model_type, and how it differs
    where that is a known one. Empty for all others."""

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any], where: object = "") -> "TargetArchitecture":
        """Reads a Hugging Face config: a directory, a `config.json`, or its decoded content, which is from `where`.

        Raises:
          InputError: the file is missing or not JSON, or a needed field is absent or of another type.
          Unsupported: the model uses a feature that has no implementation here (biases, scaled RoPE, experts, ...).
        """
        found, raw = _read(source)
        where = str(where) or found
        model_type = raw.get("model_type")
        family = families.of_config(model_type, where)
        raw, fields = family.language_model(raw, where), family.configs[str(model_type)]
        check_values(raw, fields, where)
        require(raw, ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), str(model_type), where)
        refuse_unsupported(raw, fields, family.instead, where)
        read = {name: field.absent for name, field in fields.items() if field.treatment == "read"}
        values = {name: raw.get(name, absent) for name, absent in read.items() if name in raw or absent is not None}
        values |= {"model_type": family.name, **family.values(values, where)}
        require(values, SIZES, str(model_type), where)
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if values.get(name) is not None})

    @classmethod
    def of_any_model(cls, directory: str | os.PathLike[str]) -> "TargetArchitecture":
        """As `from_hf`; of a model that has no definition here, the shape that a drafter for it has (a Qwen3's).

        Raises:
          InputError: as `from_hf` but for what is unsupported, or a size that the drafter needs is not in the config.
        """
        where, raw = _read(Path(directory) / "config.json")
        text = {**raw, **part(raw, "text_config", where)}
        kind = str(text.get("model_type"))
        if families.claiming(kind):
            try:
                return cls.from_hf(directory)
            except Unsupported as error:
                kind = f"{kind} with {error.what}"
        for name, others in _OTHER_NAMES.items():
            given = [text[other] for other in (name, *others) if text.get(other) is not None]
            text[name] = given[0] if given else None
        rope = part(text, "rope_parameters", where)
        rope = part(rope, "full_attention", where) or rope
        if rope.get("rope_theta") is not None:
            text["rope_theta"] = rope["rope_theta"]
        check_values(text, _SIZES_OF_ANY, where)
        if text.get("num_key_value_heads") is None:
            text["num_key_value_heads"] = text["num_attention_heads"]
        sizes = [name for name in SIZES if name.startswith(("num_", "vocab", "hidden", "max_"))]
        missing = [name for name in sizes if text.get(name) is None]
        if missing:
            raise InputError(f"{where}: missing {', '.join(missing)}; add them to the file under these names")
        if text.get("head_dim") is None:
            text["head_dim"] = text["hidden_size"] // text["num_attention_heads"]
        if text.get("intermediate_size") is None:
            text["intermediate_size"] = 4 * text["hidden_size"]
        names = [*sizes, "head_dim", "intermediate_size", "rope_theta", "rms_norm_eps"]
        values = {name: text[name] for name in names if text.get(name) is not None}
        return cls(**values, tie_word_embeddings=bool(text.get("tie_word_embeddings", True)), unsupported=kind)

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
        return families.FAMILIES[self.model_type].to_hf(self)


_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"), "num_hidden_layers": ("n_layer", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"), "max_position_embeddings": ("n_positions", "max_seq_len"),
}  # fmt: skip
"""Our name of a size -> those of GPT-2's descendants."""

_SIZES_OF_ANY = {
    **COMMON,
    "head_dim": read("width of a head", kind="size"),
    "rope_theta": read("base of the rotary frequencies", kind="number"),
    "tie_word_embeddings": read("whether the LM head is the embedding", kind="flag"),
}
"""What a model without a definition here has to state."""


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(name for messages, content) of a config: a directory, a file, or the content itself."""
    if isinstance(source, Mapping):
        return "config", source
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    return str(path), read_object(path, "give a Hugging Face model directory")
