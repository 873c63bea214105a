"""What a drafter directory says about itself: the config dialects in the field, each read by its own home's rules.

    deepspec      all keys at the top level (the PyTorch reference; our universal export has copies in nested dicts)
    specforge     `architectures: ["DSparkDraftModel"]`, keys in `dflash_config`
    dflash        `architectures: ["DFlashDraftModel"]` or DFlash2DraftModel, keys in `dflash_config`; fill-in blocks
    speculators   `speculators_model_type`; layer ids are one higher (the layer whose input is tapped)
    deepseek      the config of a DeepSeek-V4 with the fields `dspark_*`: the drafter that comes with the model

How each server reads the same file is another matter: see `convert.servers` and `convert/servers.toml`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.config_rules import EAGLE3_NORMS
from dspark_jax.convert.llama_fields import as_qwen3, unread_fields
from dspark_jax.json_file import read_object
from dspark_jax.layer_sizes import FAMILY
from dspark_jax.target.families import FAMILIES, claiming
from dspark_jax.target.families.family import SLIDING
from dspark_jax.target.quantised import NAMES as QUANTISED

DFLASH2 = "DFlash2DraftModel"
STAGES = "mtp."
"""With what the tensors of a drafter begin that comes with a DeepSeek-V4."""
Z_LAB = ("DFlashDraftModel", DFLASH2)
LLAMA_EAGLE_ARCHITECTURES = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")


def block_architectures() -> list[str]:
    """Classes of DSpark and DFlash with the layers of the families that have such."""
    return [f"{family.drafter_class}DSparkModel" for family in FAMILIES.values() if family.drafter_class]


def eagle_architectures() -> list[str]:
    """Classes of EAGLE-3: the reference's, vLLM's, and those with Llama's layers."""
    own = [f"{family.drafter_class}Eagle3Model" for family in FAMILIES.values() if family.drafter_class]
    served = [family.eagle3_class for family in FAMILIES.values() if family.eagle3_class]
    return [*own, *served, *LLAMA_EAGLE_ARCHITECTURES]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A drafter's settings in our conventions, whatever dialect they were written in.

    Attributes:
      dialect: deepspec, specforge, dflash, speculators or deepseek.
      family: block (DSpark, DFlash) or eagle3.
      block_size: rows of a block, its anchor included; for eagle3 the steps it was trained for, 0 where that is not
        said.
      taps: tapped layers, i = output of layer i, -1 = the embeddings; empty where they are left to the server.
      mask_token_id: fills a block after its anchor; -1 for eagle3.
      anchor_first: row k predicts anchor + k + 1; else row 0 is thrown away and row k predicts anchor + k (trap 1).
      num_layers: of the drafter.
      markov_rank: 0 = no Markov head.
      markov_head_type: vanilla, gated, rnn or selector.
      confidence: whether there is a confidence head.
      confidence_with_markov: whether it reads the Markov embedding.
      conv_kernel_size: taps of the convolutions; 0 = there are none.
      conv_group_size: channels that share a coefficient.
      selector_top_k: candidates of a selector.
      qk_norms: whether the layer of eagle3 norms queries and keys, as the config says; its tensors may say otherwise.
      eagle3_norms: which norms eagle3 has besides, see `DrafterConfig`.
      draft_vocab_size: tokens of eagle3's own LM head; 0: the head is the target's.
    """

    dialect: str
    family: str
    block_size: int
    taps: tuple[int, ...]
    mask_token_id: int
    anchor_first: bool
    num_layers: int
    markov_rank: int = 0
    markov_head_type: str = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = False
    conv_kernel_size: int = 0
    conv_group_size: int = 16
    selector_top_k: int = 16
    qk_norms: bool = True
    eagle3_norms: tuple[str, ...] = ()
    draft_vocab_size: int = 0

    @property
    def drafts(self) -> int:
        """Draft tokens per round."""
        return self.block_size if self.anchor_first else self.block_size - 1


def read_config(directory: Path) -> dict[str, Any]:
    """The content of a drafter directory's `config.json`.

    Raises:
      InputError: it is missing or not a JSON object.
    """
    return read_object(directory / "config.json", "give the directory of a drafter")


def layers_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a drafter's config that gives the shape of its layers, with the fields of a Hugging Face model."""
    return raw["transformer_layer_config"] if "speculators_model_type" in raw else raw


def layers_shape(where: Path, raw: Mapping[str, Any]) -> TargetArchitecture:
    """The shape of a drafter's layers; of Llama's, that of the same layers with Qwen3's fields.

    Raises:
      InputError: see `TargetArchitecture.from_hf`.
    """
    source = layers_config(raw)
    if is_llama(raw):
        return TargetArchitecture.from_hf(as_qwen3(source), where)
    return TargetArchitecture.from_hf(where if source is raw else source, where)


def architecture(raw: Mapping[str, Any]) -> str:
    """The class name that servers look up; empty where there is none."""
    names = raw.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def is_llama(raw: Mapping[str, Any]) -> bool:
    """Whether an EAGLE-3 drafter says that its layers are Llama's."""
    named = layers_config(raw).get("model_type", "llama" if "speculators_model_type" in raw else None)
    return named == "llama" or architecture(raw) in LLAMA_EAGLE_ARCHITECTURES


def unsupported_parts(raw: Mapping[str, Any]) -> list[str]:
    """What of a drafter has no implementation here, although servers may know it: it can be neither run nor scored.

    What `TargetArchitecture.from_hf` refuses of the layers (scaled RoPE, biases, ...) is not repeated.
    """
    if has_stages(raw):
        return _unsupported_stages(raw)
    layers, nested = layers_config(raw), raw.get("dflash_config") or {}
    found = [f"{name} {raw[name]}" for name in _OFF if raw.get(name)]
    found += [f"quantised weights ({name})" for name in QUANTISED if raw.get(name) or layers.get(name)]
    model_type = "llama" if "speculators_model_type" in raw and "model_type" not in layers else layers.get("model_type")
    eagle = raw.get("speculators_model_type") == "eagle3" or architecture(raw) in eagle_architectures()
    family = claiming(model_type)
    if not eagle:
        found += [f"{name} {raw[name]}" for name in EAGLE3_NORMS if raw.get(name)]
    if eagle and is_llama(raw):
        found += unread_fields(raw, layers)
    elif not (family and family.drafter_class):
        found.append(f"layers of a {model_type}")
    elif eagle and family.name != "qwen3":
        found += [f"{name} with layers of {family.title}" for name in eagle3_norms(raw)]
    width = raw.get("target_hidden_size")
    if eagle and width not in (None, layers.get("hidden_size")):
        found.append(f"target_hidden_size {width} of a drafter that is {layers.get('hidden_size')} wide")
    if eagle and (layers.get("num_hidden_layers") or 1) != 1:
        found.append(f"an EAGLE-3 of {layers['num_hidden_layers']} layers")
    if (eagle or not (family and family.long_drafters)) and SLIDING in (layers.get("layer_types") or []):
        found.append("layers with a sliding window")
    if not eagle and is_causal(raw):
        why = "" if _stated_causal(raw) else ", as those of layers with a window are where is_causal is not false"
        found.append(f"blocks that are attended causally{why}")
    found += [
        f"{name} {nested[name]}" for name, off in _DFLASH2_OFF.items() if nested.get(name, off) not in (off, None)
    ]
    if nested.get("projector_type") not in (None, "dspark", "dflash"):
        found.append(f"projector_type {nested['projector_type']}")
    whole = layers.get("vocab_size")
    reads = eagle and (is_llama(raw) or (family and family.name == "qwen3"))
    if isinstance(whole, int) and (raw.get("draft_vocab_size") or whole) < whole and not reads:
        found.append("a reduced draft vocabulary")
    return found


def eagle3_norms(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of `EAGLE3_NORMS` an EAGLE-3 drafter has.

    A speculators file that says nothing of norm_before_residual has it: so it was before the package wrote it always,
    and so vLLM reads it.
    """
    nested = raw.get("eagle_config") or {}
    absent = {"norm_before_residual": "speculators_model_type" in raw}
    return tuple(name for name in EAGLE3_NORMS if nested.get(name, raw.get(name, absent.get(name))))


def is_causal(raw: Mapping[str, Any]) -> bool:
    """Whether a row of a block sees no later one, in some layer: as servers take the file."""
    stated = _stated_causal(raw)
    if stated is not None or SLIDING not in (layers_config(raw).get("layer_types") or []):
        return bool(stated)
    return not raw.get("sliding_window_non_causal", raw.get("speculators_model_type") == "dflash2")


def _stated_causal(raw: Mapping[str, Any]) -> Any:
    """What a file says of it, or None."""
    places = raw, layers_config(raw)
    stated = [place.get("is_causal") for place in places] + [(raw.get("dflash_config") or {}).get("causal")]
    return next((value for value in stated if value is not None), None)


_DFLASH2_OFF = {"input_embedding_scale": 1.0, "output_multiplier": 1.0, "final_logit_softcapping": 0.0}
"""Numbers of DFlash 2 that servers take and the values that change nothing."""

_OFF = ("use_aux_norm",)
"""Switches of EAGLE-3 variants: off, or the computation is another one."""


def read_layout(where: str, raw: Mapping[str, Any]) -> Layout:
    """Reads a config by the rules of the tool that wrote it.

    Args:
      where: the file, for messages.
      raw: its content.

    Raises:
      InputError: the drafter is of a kind that has no implementation here, or a key is missing or of another type.
    """
    _check_types(where, raw)
    name = architecture(raw)
    if has_stages(raw):
        return _stages(where, raw)
    if "speculators_model_type" in raw:
        return _speculators(where, raw)
    if name in block_architectures():
        return _block(where, raw, raw, "deepspec", anchor_first=bool(raw.get("sample_from_anchor", True)))
    if name in eagle_architectures():
        return _eagle(where, raw)
    if name in ("DSparkDraftModel", *Z_LAB):
        nested = raw.get("dflash_config") or raw.get("dspark_config") or {}
        values = {**raw, **nested}
        dspark = name == "DSparkDraftModel"
        dialect = "specforge" if dspark else "dflash"
        return _block(where, values, raw, dialect, anchor_first=bool(values.get("sample_from_anchor", dspark)))
    raise InputError(
        f"{where}: architectures {raw.get('architectures')} is not one of "
        f"{[*block_architectures(), *eagle_architectures(), 'DSparkDraftModel', *Z_LAB]} and there is no "
        "speculators_model_type; this is not a drafter that is known here"
    )


def _block(
    where: str, values: Mapping[str, Any], raw: Mapping[str, Any], dialect: str, *, anchor_first: bool
) -> Layout:
    """DSpark and DFlash with keys at the top level of `values`."""
    _require(where, values, "block_size", "mask_token_id", "target_layer_ids")
    _require(where, raw, "num_hidden_layers")
    rank, taps = int(values.get("markov_rank") or 0), tuple(values["target_layer_ids"])
    if int(values["block_size"]) < (1 if anchor_first else 2):
        alone = "" if anchor_first else " of a fill-in block, in which the anchor's row drafts nothing"
        raise InputError(f"{where}: block_size={values['block_size']}{alone} leaves no drafts; correct it")
    layout = Layout(
        dialect=dialect,
        family="block",
        block_size=int(values["block_size"]),
        taps=taps,
        mask_token_id=int(values["mask_token_id"]),
        anchor_first=anchor_first,
        num_layers=int(raw["num_hidden_layers"]),
        markov_rank=rank,
        markov_head_type=str(values.get("markov_head_type") or "vanilla"),
        confidence=bool(values.get("enable_confidence_head", False)),
        confidence_with_markov=bool(values.get("confidence_head_with_markov", False)),
    )
    if architecture(values) == DFLASH2:
        _require(where, values, *DFLASH2_KEYS)
        taps, group, rank, candidates = (int(values[name]) for name in DFLASH2_KEYS)
        layout = dataclasses.replace(
            layout,
            markov_rank=rank,
            markov_head_type="selector",
            selector_top_k=candidates,
            conv_kernel_size=taps,
            conv_group_size=group,
        )
    return layout


def has_stages(raw: Mapping[str, Any]) -> bool:
    """Whether a config is of a DeepSeek-V4 that comes with a drafter."""
    return raw.get("model_type") == FAMILY and raw.get("dspark_block_size") is not None


def _unsupported_stages(raw: Mapping[str, Any]) -> list[str]:
    """What of such a drafter is not implemented here."""
    needed = {"scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "n_shared_experts": 1, "hidden_act": "silu"}
    needed |= {"attention_bias": False, "num_key_value_heads": 1}
    found = [f"{name} {raw[name]!r}" for name, value in needed.items() if raw.get(name, value) not in (value, None)]
    return found + [f"{name} {raw[name]}" for name in _OTHER_EXPERTS if raw.get(name)]


_OTHER_EXPERTS = ("dspark_n_routed_experts", "dspark_num_experts_per_tok")
"""Of DeepSeek-V4.1, whose hyper-connections are others as well."""


def _stages(where: str, raw: Mapping[str, Any]) -> Layout:
    """The drafter of a DeepSeek-V4. Its stages are as many as its tapped layers where nothing says how many."""
    names = ("block_size", "noise_token_id", "target_layer_ids", "markov_rank")
    _require(where, raw, *(f"dspark_{name}" for name in names))
    size, mask, taps, rank = (raw[f"dspark_{name}"] for name in names)
    return Layout(
        dialect="deepseek",
        family="block",
        block_size=size,
        taps=tuple(taps),
        mask_token_id=mask,
        anchor_first=True,
        num_layers=int(raw.get("n_mtp_layers") or len(taps)),
        markov_rank=rank,
        confidence=bool(raw.get("enable_confidence_head", True)),
        confidence_with_markov=True,
    )


DFLASH2_KEYS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")


def _eagle(where: str, raw: Mapping[str, Any]) -> Layout:
    """EAGLE-3: the reference's own config and SGLang's `eagle_config` have ids of outputs, that of vLLM of inputs."""
    inputs = raw.get("eagle_aux_hidden_state_layer_ids")
    nested = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    outputs = raw.get("target_layer_ids") or nested
    if inputs is None and not is_llama(raw):
        _require(where, raw, "target_layer_ids")
    taps = tuple(i - 1 for i in inputs) if inputs is not None else tuple(outputs or ())
    layers = int(raw.get("num_hidden_layers") or 1)
    steps = int(raw.get("ttt_length") or 0)
    return Layout("deepspec", "eagle3", steps, taps, -1, anchor_first=True, num_layers=layers, **_eagle3_parts(raw))


def default_taps(target_layers: int) -> tuple[int, ...]:
    """What servers and SpecForge tap for an EAGLE-3 that does not say: the inputs of layers 2, L/2 and L-3."""
    return 1, target_layers // 2 - 1, target_layers - 4


def _eagle3_parts(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the variants of EAGLE-3 differ in. Those with Llama's layers have a head of their own, others where it is
    for a part of the vocabulary."""
    whole, llama = int(layers_config(raw).get("vocab_size") or 0), is_llama(raw)
    size = int(raw.get("draft_vocab_size") or whole)
    own = size if llama or size < whole else 0
    return {"qk_norms": not llama, "eagle3_norms": eagle3_norms(raw), "draft_vocab_size": own}


def _speculators(where: str, raw: Mapping[str, Any]) -> Layout:
    """The speculators package. Missing keys have the defaults of its 0.9.0."""
    kind = raw["speculators_model_type"]
    _require(where, raw, "transformer_layer_config")
    layers = int(raw["transformer_layer_config"].get("num_hidden_layers") or 1)
    if kind == "eagle3":
        if not is_llama(raw):
            _require(where, raw, "eagle_aux_hidden_state_layer_ids")
        taps = tuple(i - 1 for i in raw.get("eagle_aux_hidden_state_layer_ids") or ())
        methods = (raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
        steps = int(methods[0].get("speculative_tokens") or 0)
        parts = _eagle3_parts(raw)
        return Layout("speculators", "eagle3", steps, taps, -1, anchor_first=True, num_layers=layers, **parts)
    if kind not in ("dspark", "dflash", "dflash2"):
        raise InputError(
            f"{where}: speculators_model_type {kind!r} is not supported; use one of: dspark, dflash, dflash2, eagle3"
        )
    _require(where, raw, "block_size", "mask_token_id", "aux_hidden_state_layer_ids")
    heads = {"markov_rank": 256, "enable_confidence_head": True, "confidence_head_with_markov": True}
    defaults = {"dspark": heads, "dflash2": dict(zip(DFLASH2_KEYS, (2, 16, 256, 16), strict=True))}
    values = {**defaults.get(kind, {}), **raw}
    if kind == "dflash2":
        values["architectures"] = [DFLASH2]
    values["target_layer_ids"] = [i - 1 for i in raw["aux_hidden_state_layer_ids"]]
    anchor_first = bool(raw.get("sample_from_anchor", kind == "dspark"))
    return _block(where, values, raw["transformer_layer_config"], "speculators", anchor_first=anchor_first)


_OBJECTS = ("dflash_config", "dspark_config", "eagle_config", "transformer_layer_config", "speculators_config")
_LISTS = ("target_layer_ids", "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids")
_NUMBERS = (
    "block_size", "mask_token_id", "num_hidden_layers", "markov_rank", "ttt_length", "draft_vocab_size",
    "noise_token_id", "speculative_tokens", "target_hidden_size", *DFLASH2_KEYS,
)  # fmt: skip


def _check_types(where: str, raw: Mapping[str, Any]) -> None:
    """Refuses a config in which a key that is read, here or by a server, has a value of another type; null is absent.

    Keys may be prefixed (`dspark_`), and are looked for in the nested objects as well.
    """
    for name, value in raw.items():
        key = name if name in _OBJECTS else name.removeprefix("dspark_")
        inner: list[Any] = []
        if value is None:
            continue
        if key in _OBJECTS:
            good, wanted, inner = isinstance(value, Mapping), "an object", [value]
        elif key == "proposal_methods":
            inner = value if isinstance(value, list) else [value]
            good, wanted = inner is value and all(isinstance(method, Mapping) for method in inner), "a list of objects"
        elif key in _LISTS:
            good = isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
            wanted = "a list of layer ids"
        elif key in _NUMBERS:
            good, wanted = type(value) is int, "a whole number"
        elif key == "layer_types":
            good, wanted = isinstance(value, list), "a list"
        else:
            continue
        if not good:
            raise InputError(f"{where}: {name} {json.dumps(value)} is not {wanted}; correct it or download it again")
        for part in inner:
            _check_types(where, part)


def _require(where: str, raw: Mapping[str, Any], *keys: str) -> None:
    missing = [key for key in keys if raw.get(key) is None]
    if missing:
        raise InputError(f"{where}: missing {', '.join(missing)}; this is not a complete drafter config")
