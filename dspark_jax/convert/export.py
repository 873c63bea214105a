"""Drafters to Hugging Face directories that others serve.

Three formats (names, keys and their reasons in the comments):

    universal    one directory that transformers, vLLM, SGLang and llama.cpp load: the reference's names and keys, and
                 what each of the others wants besides; of a fill-in DFlash z-lab's, which tpu-inference and
                 sglang-jax load too. The default.
    deepspec     exactly what the PyTorch reference writes
    speculators  the speculators package, and vLLM through it

The directory is built beside its place and renamed when it is whole.
"""

import dataclasses
import functools
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.config import DrafterConfig, InputError, TargetArchitecture
from dspark_jax.convert.dflash_keys import dflash2_keys, dflash_keys, refuse_unknown_parts
from dspark_jax.convert.eagle3_keys import eagle3_keys, eagle3_serving, llama_config, llama_layers, vocabulary_maps
from dspark_jax.convert.hf import expected_tensors
from dspark_jax.convert.layouts import DFLASH2
from dspark_jax.convert.long_context import keys as long_keys
from dspark_jax.convert.mapping import FROZEN, HEADS, frozen_names
from dspark_jax.convert.output import built_beside, check_output, write_text
from dspark_jax.convert.safetensors_file import write_safetensors
from dspark_jax.convert.stages import stages_fields, stored_stages
from dspark_jax.kinds import KINDS, served_as
from dspark_jax.registry import listed
from dspark_jax.target import families
from dspark_jax.target.checks import refuse_two_heads
from dspark_jax.target.dequantise import Matrix
from dspark_jax.target.families.family import Family
from dspark_jax.target.loading import read_target
from dspark_jax.target.quantised import NAMES as QUANTISED

FORMATS = ("universal", "deepspec", "speculators")
ZERO_RANK = 16
"""Rank of the Markov head, all zeros, that makes servers take an anchor-first DFlash for what it is."""
CERTAIN = 20.0
"""Logit of the constant confidence of a drafter without a confidence head: nothing is ever cut."""


Tensors = Callable[[], Iterable[tuple[str, np.ndarray]]]


@dataclasses.dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
      tensors: gives its tensors by the reference's names, as float32 (`hf.stored_tensors`).
      config: its settings.
      arch: shape of its layers; the number of layers is the target's.
      target: the decoded `config.json` of the target (or of the drafter directory that it comes from).
      frozen: the target's embedding and LM head by the names of `mapping.FROZEN`; empty leaves them out.
      target_name: how the target is called where it is served, e.g. Qwen/Qwen3-4B.
      num_anchors: blocks per sequence in training; a note in the reference's config.
      notes: sentences about the target that belong on the card.
      own_embedding: why a server goes wrong that takes the embedding from the target; empty if none does.
      split: what llama.cpp's converter has to be told of the target's tokenizer (`llama_tokenizer.split_to_tell`).
    """

    tensors: Tensors
    config: DrafterConfig
    arch: TargetArchitecture
    target: Mapping[str, Any]
    frozen: Mapping[str, np.ndarray]
    target_name: str
    num_anchors: int = 512
    notes: tuple[str, ...] = ()
    own_embedding: str = ""
    split: str = ""

    @property
    def family(self) -> Family:
        """Whose layers it has."""
        return families.of_drafters(self.arch)


@dataclasses.dataclass(frozen=True)
class Content:
    """What is going to be written.

    Attributes:
      source: the drafter with the heads that the file has.
      config: content of config.json.
      shapes: of all tensors.
      maps: those of them that say which tokens it drafts.
      prefix: with what the names of the one layer of EAGLE-3 begin, where that is not layers.0.
      types: of tensors that have another type than the export.
    """

    source: Source
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    maps: Mapping[str, np.ndarray]
    prefix: str = ""
    types: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """All but the maps, by their names in the file."""
        frozen = {name: self.source.frozen[name] for name in frozen_names(self.source.config) if self.source.frozen}
        for name, value in itertools.chain(self.source.tensors(), frozen.items()):
            yield self.named(name), value

    def named(self, name: str) -> str:
        """The reference's name of a tensor -> its name in the file."""
        return self.prefix + name.removeprefix(LAYER) if self.prefix and name.startswith(LAYER) else name


LAYER = "layers.0."


def content(source: Source, form: str, dtype: str) -> Content:
    """A drafter in one of `FORMATS`.

    Raises:
      InputError: this drafter cannot be stated in this format.
    """
    drafter = source.config
    if served_as(drafter) is None:
        exported = listed(name for name, kind in KINDS.items() if kind.served_as)
        other = KINDS[drafter.kind].fill_in_served_as and ", or this one with drafter.block_layout='fill_in'"
        raise InputError(
            f"a drafter of kind {drafter.kind!r} has no format that a server loads; only {exported} is exported{other}"
        )
    if drafter.markov_rank and drafter.markov_head_type not in HEADS:
        raise InputError(f"no server has the head {drafter.markov_head_type!r}; only {listed(HEADS)} is exported")
    if KINDS[drafter.kind].own_layers:
        config = stages_fields(source, form, dtype)
        stored = stored_stages(source, expected_tensors(source.arch, drafter))
        written = dataclasses.replace(source, tensors=stored.tensors)
        return Content(written, config, stored.shapes, {}, types=stored.types)
    refuse_unknown_parts(drafter)
    source = servable(source) if form != "deepspec" else source
    config = CONFIGS[form](source, dtype)
    reason = source.own_embedding or (source.family.slim_refusal if form == "universal" else "")
    if served_as(drafter) == "eagle3" and not (drafter.qk_norms or drafter.draft_vocab_size):
        reason = reason or "EAGLE-3's class for Llama's layers wants an LM head in the file"
    if not source.frozen and reason:
        raise InputError(f"--slim leaves out embedding and LM head, but {reason}; export without --slim")
    shapes = expected_tensors(source.arch, source.config)
    if not source.frozen:
        left_out = frozen_names(source.config)
        shapes = {name: shape for name, shape in shapes.items() if name not in left_out}
    prefix = "midlayer." if form == "universal" and not drafter.qk_norms else ""
    made = Content(source, config, {}, vocabulary_maps(source), prefix)
    named = {made.named(name): shape for name, shape in shapes.items()}
    return dataclasses.replace(made, shapes=named | {name: value.shape for name, value in made.maps.items()})


def write_export(
    output: Path,
    source: Source,
    *,
    form: str = "universal",
    dtype: str = "bfloat16",
    files: Mapping[str, str | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes a drafter as a directory, whole or not at all.

    Args:
      output: the directory; its name may not mislead servers, which guess the method from the path.
      source: the drafter and its target.
      form: one of `FORMATS`.
      dtype: float32 or bfloat16.
      files: name -> text, or file to copy, that are put beside config and weights.
      overwrite: replace an existing export.

    Returns:
      `output`.

    Raises:
      InputError: the place is taken or badly named, or this drafter cannot be stated in this format.
    """
    check_output(output, source.config, overwrite=overwrite)
    made = content(source, form, dtype)
    with built_beside(output) as folder:
        write_safetensors(folder / "model.safetensors", made.shapes, made.tensors(), dtype, made.maps, made.types)
        write_text(folder / "config.json", json.dumps(made.config, indent=2, sort_keys=True) + "\n")
        for name, file in (files or {}).items():
            if isinstance(file, Path):
                shutil.copyfile(file, folder / name)
            else:
                write_text(folder / name, file)
    return output


def frozen_tensors(directory: str | Path) -> dict[str, np.ndarray]:
    """Embedding and LM head (the embedding again where they are tied) of a target's directory, memory-mapped.

    The embedding is what a server's class of drafters expects: with the target's scale in it, where drafters have the
    layers of another family, which knows nothing of the scale.

    Raises:
      InputError: one of them is not in it, or its config says tied beside a head that differs.
    """
    arch = TargetArchitecture.from_hf(directory)
    family = families.of_shape(arch)
    tensors, _ = read_target(Path(directory), family, np.float32)
    weights = family.outer_weights(family.prefix(tensors))
    embedding, head = weights["embedding"].name, weights["lm_head"].name
    if arch.tie_word_embeddings:
        refuse_two_heads(tensors, embedding, head, str(directory))
        head = embedding
    for name in (embedding, head):
        if name not in tensors:
            raise InputError(f"{directory}: tensor {name} is missing; download the checkpoint again")
    rows, scale = tensors[embedding], family.embedding_scale(arch)
    if scale != 1 and families.of_drafters(arch) is not family:
        rows = np.asarray(rows, np.float32) * np.float32(scale)
    values = {FROZEN[0]: rows, FROZEN[1]: tensors[head]}
    return {name: np.asarray(value) if isinstance(value, Matrix) else value for name, value in values.items()}


def servable(source: Source) -> Source:
    """The same drafter with the heads that servers insist on, made so that they change nothing.

    An anchor-first DFlash gets an all-zero Markov head: without one, vLLM and SGLang take it for a fill-in drafter. A
    fill-in DFlash is left as it is. A
    missing confidence head becomes a constant one, since SGLang builds it in any case and llama.cpp wants it beside a
    Markov head; one that does not read the Markov embedding gets zeros to read it with, for llama.cpp.
    """
    config = source.config
    if served_as(config) != "dspark":
        return source
    if config.markov_rank and config.confidence_head and config.confidence_with_markov:
        return source
    rank = config.markov_rank or ZERO_RANK
    wanted = dataclasses.replace(
        config, kind="dspark", markov_rank=rank, confidence_head=True, confidence_with_markov=True
    )
    return dataclasses.replace(source, config=wanted, tensors=functools.partial(_completed, source, rank))


def _completed(source: Source, rank: int) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of a drafter with heads added, or widened by zeros (see `servable`)."""
    width, vocabulary = source.arch.hidden_size, source.arch.vocab_size
    missing = {
        "markov_head.markov_w1.weight": np.zeros((vocabulary, rank), np.float32),
        "markov_head.markov_w2.weight": np.zeros((vocabulary, rank), np.float32),
        "confidence_head.proj.weight": np.zeros((1, width + rank), np.float32),
        "confidence_head.proj.bias": np.full((1,), CERTAIN, np.float32),
    }
    for name, value in source.tensors():
        default = missing.pop(name, None)
        if default is not None and value.shape != default.shape:
            value = np.concatenate([value, default[:, value.shape[1] :]], axis=1)
        yield name, value
    yield from missing.items()


def deepspec_config(source: Source, dtype: str) -> dict[str, Any]:
    """`config.json` as the reference writes it, which has no word for the layout of a block.

    Raises:
      InputError: its blocks are not laid out as the reference's.
    """
    if source.config.block_layout != "anchor_first":
        raise InputError(
            "--format deepspec: the reference's blocks are anchor-first and its config cannot say otherwise, this "
            "drafter fills them in; use --format universal or speculators"
        )
    drafter = source.config
    if drafter.draft_vocab_size or drafter.eagle3_norms or not drafter.qk_norms:
        raise InputError(
            "--format deepspec: the reference's EAGLE-3 has Qwen3's layers and the target's whole vocabulary and head, "
            "this drafter has others; use --format universal or speculators"
        )
    if drafter.sliding_window:
        raise InputError(
            "--format deepspec: no layer of the reference has a window, and it would ignore those of this drafter; use "
            "--format universal or speculators"
        )
    config = reference_config(source, dtype)
    return config | long_keys(drafter, config)


def reference_config(source: Source, dtype: str) -> dict[str, Any]:
    """A `config.json` in the reference's form: the target's (text) config with the drafter's keys at the top level.

    The shape of the layers is the drafter's own in any case: a target's config may state it in a way that does not fit
    fewer layers (`per_layer_config`), and a drafter may have another one than its target.
    """
    drafter, target, arch, family = source.config, source.target, source.arch, source.family
    text = dict(target.get("text_config") or target)
    if arch.unsupported or text.get("model_type") not in family.configs:  # nothing else has a meaning for these layers
        text = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in text}
    for name in _TARGETS_OWN:
        text.pop(name, None)
    shape = family.to_hf(families.of_shape(arch).drafter_shape(arch))
    if "rope_theta" not in text:
        shape.pop("rope_theta", None)
    config = (
        text
        | shape
        | {
            "dtype": dtype,
            "num_target_layers": int(target.get("num_target_layers") or arch.num_hidden_layers),
            "num_hidden_layers": drafter.num_layers,
            "layer_types": ["full_attention"] * drafter.num_layers,
            "tie_word_embeddings": False,
            "target_layer_ids": list(drafter.target_layer_ids),
        }
    )
    keys = {"eagle3": eagle3_keys, "dflash": dflash_keys, "dspark": _dspark_keys}[served_as(drafter) or ""]
    return family.drafter_config(config | keys(source), target)


_TARGETS_OWN = ("torch_dtype", "transformers_version", "auto_map", "_name_or_path", *QUANTISED)
_TARGETS_OWN += ("per_layer_config",)
"""Keys of a target's config that would be wrong in its drafter's."""


def _dspark_keys(source: Source) -> dict[str, Any]:
    """Keys of DSpark, and of a DFlash that is served as such."""
    drafter = source.config
    keys = {
        "architectures": [f"{source.family.drafter_class}DSparkModel"],
        "mask_token_id": drafter.mask_token_id,
        "block_size": drafter.block_rows,
        "num_anchors": source.num_anchors,
        "enable_confidence_head": drafter.confidence_head,
        "markov_rank": drafter.markov_rank,
    }
    if drafter.confidence_head:
        keys["confidence_head_with_markov"] = drafter.confidence_with_markov
    if drafter.markov_rank:
        keys["markov_head_type"] = drafter.markov_head_type
    return keys


def universal_config(source: Source, dtype: str) -> dict[str, Any]:
    """The reference's config, and the same settings wherever another reader looks for them first.

    `sample_from_anchor` is stated because readers guess it differently; not in `dflash_config`, where vLLM refuses it
    whatever the method is, and nobody needs it. RoPE is written in the old and the new form. There is no
    `eagle_aux_hidden_state_layer_ids`: servers prefer it and disagree about what it counts (trap 13).
    """
    config, kind = reference_config(source, dtype), served_as(source.config)
    if kind == "eagle3":
        return _vllm_eagle3(source, config)
    first = config["sample_from_anchor"] = source.config.block_layout == "anchor_first"
    if kind == "dspark":
        keys = ("block_size", "mask_token_id", "target_layer_ids", "markov_rank", "markov_head_type")
        nested = {key: config[key] for key in keys}
        config |= {"dflash_config": nested, "dspark_config": nested | {"sample_from_anchor": first}}
    config |= source.family.drafter_rope(source.arch)
    return config | long_keys(source.config, config)


def _vllm_eagle3(source: Source, config: dict[str, Any]) -> dict[str, Any]:
    """What vLLM, the one server of Qwen3's EAGLE-3, wants besides: its class, and ids of layer inputs."""
    family = source.family
    if not source.config.qk_norms:
        return llama_config(source, str(config["dtype"]))
    if not family.eagle3_class:
        raise InputError(f"--format universal: no server has an EAGLE-3 for {family.title}; use --format deepspec")
    return config | family.drafter_rope(source.arch) | eagle3_serving(source, family.eagle3_class)


def speculators_config(source: Source, dtype: str) -> dict[str, Any]:
    """`config.json` for the speculators package; layer ids count inputs, so they are one higher.

    Raises:
      InputError: a drafter that would compute something else there.
    """
    if source.family.speculators_refusal:
        raise InputError(f"--format speculators: {source.family.speculators_refusal}")
    base, kind = universal_config(source, dtype), served_as(source.config)
    own = {"dflash_config", "dspark_config", "sample_from_anchor", "num_target_layers", "target_layer_ids"}
    own |= {"eagle_aux_hidden_state_layer_ids", "norm_before_residual", "draft_vocab_size"}
    own |= set(_dspark_keys(source)) | set(eagle3_keys(source))
    if kind in _SPECULATORS:
        architecture, names = _SPECULATORS[kind]
        keys = {name: base[name] for name in ("block_size", "mask_token_id", "sample_from_anchor", *names)}
        if source.config.kind == "dflash2":
            kind, architecture = "dflash2", DFLASH2
            keys |= dflash2_keys(source.config)
        keys |= {"architectures": [architecture], "sliding_window_non_causal": True}
        keys |= {"aux_hidden_state_layer_ids": [i + 1 for i in base["target_layer_ids"]]}
    else:
        off = ("norm_before_fc", "fc_norm", "norm_output", "embed_requires_grad")
        keys = dict.fromkeys(off, False) | eagle3_serving(source, "Eagle3Speculator")
        if not source.config.qk_norms:
            base = llama_layers(source, dtype)
            if (taps := len(source.config.target_layer_ids)) != 3:  # vLLM takes 3 for granted here
                base["num_aux_hidden_states"] = taps
    proposal = {"proposal_type": "greedy", "speculative_tokens": source.config.block_size}
    return keys | {
        "speculators_model_type": kind,
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": kind,
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": source.target_name,
                "architectures": list(source.target.get("architectures") or ["Qwen3ForCausalLM"]),
            },
        },
        "transformer_layer_config": {name: value for name, value in base.items() if name not in own},
        "draft_vocab_size": source.config.draft_vocab_size or source.arch.vocab_size,
        "target_hidden_size": source.arch.hidden_size,
        "dtype": dtype,
        "tie_word_embeddings": False,
    }


_DSPARK_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")
_SPECULATORS = {"dspark": ("DSparkSpeculator", _DSPARK_HEADS), "dflash": ("DFlashSpeculator", ())}
"""By method what speculators calls a block drafter, and the keys of its heads."""

CONFIGS = {"universal": universal_config, "deepspec": deepspec_config, "speculators": speculators_config}
