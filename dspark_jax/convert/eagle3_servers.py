"""What each server makes of an EAGLE-3 drafter. Its layers are Llama's in the field, Qwen3's (with query and key norms)
where the reference or this project trained it; servers have classes for the one, the other or both.

The same key of layer ids counts inputs for vLLM and llama.cpp, and outputs (in `eagle_config`) for SGLang (trap 13).
"""

import dataclasses
from collections.abc import Sequence

from dspark_jax.convert.drafter_files import GREEDY, Files, Verdict, misleading_path

_IDS = "eagle_aux_hidden_state_layer_ids"
_LLAMA = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
_NO_NORMS = "has no query and key norms, which Qwen3's and Gemma 4's layers have"


def _default_inputs(files: Files) -> list[int]:
    """The layers, by their inputs, that servers tap where the config names none."""
    layers = files.target.num_hidden_layers
    return [2, layers // 2, layers - 3]


def _width(files: Files, layers: int) -> list[str]:
    """Why `fc` does not fit so many tapped layers; empty if it does."""
    shape = next((shape for name, shape in files.shapes.items() if name.endswith("fc.weight")), None)
    width = files.config.get("target_hidden_size") or files.target.hidden_size
    if shape is None or shape[1] == layers * width:
        return []
    return [f"fc.weight reads {shape[1]} features, it takes {layers} layers of width {width}: {layers * width}"]


def _read(files: Files, server: str, refusals: list[str], inputs: Sequence[int], *notes: str) -> Verdict:
    """The verdict of a server that taps the layers with these inputs, unless it refuses."""
    reading = None if refusals else dataclasses.replace(files.stated, taps=tuple(i - 1 for i in inputs))
    return Verdict(server, tuple(refusals), (), notes, reading)


def vllm_eagle3(files: Files) -> Verdict:
    """vLLM: classes for Qwen3's and Llama's layers; layer ids are used as they are, and count inputs."""
    known, raw, refusals = ("Eagle3Qwen3ForCausalLM", *_LLAMA), files.config.get(_IDS), list[str]()
    inputs = raw or _default_inputs(files)
    if not files.speculators and files.architecture not in known:
        remedy = "it has none for Gemma 4" if files.gemma else f"export as universal, which writes {known[0]}"
        refusals.append(f"architecture {files.architecture} is not registered: {remedy}")
    elif files.llama:  # the width of fc does not follow from the ids that are used
        refusals += _width(files, len(files.nested("eagle_config").get(_IDS) or ()) or 3)
    elif not raw:
        refusals.append(f"{_IDS} is missing; its number gives the width of fc")
    return _read(files, "vLLM", refusals, inputs, *misleading_path(files.path, "eagle3"))


def sglang_eagle3(files: Files) -> Verdict:
    """SGLang: one class, for Llama's layers; layer ids only from `eagle_config`, where they count outputs."""
    ids, refusals = files.nested("eagle_config").get(_IDS), list[str]()
    if files.speculators:
        refusals.append("it does not read the speculators format")
    if not files.llama:
        refusals.append(f"its only EAGLE-3 class {_NO_NORMS}: such a drafter cannot be served")
    elif not files.speculators and files.architecture != _LLAMA[0]:
        refusals.append(f"architecture {files.architecture} has no entry class: {_LLAMA[0]} is the name of it there")
    else:
        refusals += _width(files, len(ids or ()) or 3)
    return _read(files, "SGLang", refusals, [i + 1 for i in ids] if ids else _default_inputs(files))


def llama_cpp_eagle3(files: Files) -> Verdict:
    """llama.cpp: its converter takes Llama's layers, three tapped ones; layer ids count inputs."""
    inputs, refusals = files.config.get(_IDS) or _default_inputs(files), list[str]()
    if not files.speculators and files.architecture not in _LLAMA:
        refusals.append(f"architecture {files.architecture} is not known to its converter")
    if not files.llama:
        refusals.append(f"its EAGLE-3 {_NO_NORMS}")
    elif "draft_vocab_size" not in files.config or files.stated.num_layers != 1:
        refusals.append("its converter wants draft_vocab_size in config.json, and one layer")
    if len(inputs) != 3:
        refusals.append(f"it taps exactly three layers, config.json names {len(inputs)}")
    else:
        refusals += _width(files, 3)
    return dataclasses.replace(_read(files, "llama.cpp", refusals, inputs, GREEDY), greedy=True)


def tpu_inference_eagle3(files: Files) -> Verdict:
    """tpu-inference: vLLM's reading of the config, one class for Llama's layers, three taps of its own choice."""
    inputs, raw, refusals = _default_inputs(files), files.config.get(_IDS), list[str]()
    if not files.llama or (not files.speculators and files.architecture != _LLAMA[1]):
        refusals.append(f"its only EAGLE-3 class is {_LLAMA[1]}, for Llama's layers")
    else:
        refusals += _width(files, 3)
        refusals += [f"it taps the inputs of layers {inputs} whatever {_IDS} says"] if raw and raw != inputs else []
    return _read(files, "tpu-inference", refusals, inputs)


def sglang_jax_eagle3(files: Files) -> Verdict:
    """sglang-jax: SGLang's class for Llama's layers."""
    return dataclasses.replace(sglang_eagle3(files), server="sglang-jax")
