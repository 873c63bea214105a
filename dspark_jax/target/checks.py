"""What a target's files may not be: without weights that are read here, quantised, with two heads, with NaN in them."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.registry import listed
from dspark_jax.target.quantised import FLOAT8, Quantisation

_SAVE = "let transformers write it: AutoModelForCausalLM.from_pretrained(FROM).save_pretrained(TO)"

_OTHERS = {  # pattern -> what such a file is, and what gives the weights
    "adapter_model.*": ("an adapter", "merge it into its base model (merge_and_unload in peft), and save that"),
    "model-*-of-*.safetensors": ("shards without their model.safetensors.index.json", "download the index as well"),
    "pytorch_model*.bin*": ("weights that PyTorch has pickled", _SAVE),
    "consolidated*": ("weights in the layout of their author", "use the checkpoint in the layout of transformers"),
    "*.gguf": ("weights of llama.cpp", "use the checkpoint that they were converted from"),
    "*.safetensors": ("tensors under another name", "name the file of a whole model model.safetensors"),
    "*.msgpack": ("weights of Flax", _SAVE),
    "*.h5": ("weights of TensorFlow", _SAVE),
}

_PARTS = (
    "weight_scale_inv", "weight_scale", "weight_scale_2", "weight_global_scale", "weight_packed", "input_scale",
    "activation_scale", "input_global_scale",
)  # fmt: skip
"""How names of tensors end that come with quantised ones of FP8, MXFP4 and NVFP4."""

_OTHERS_QUANTISED = {
    **dict.fromkeys(("qweight", "qzeros", "scales", "g_idx"), "GPTQ or AWQ"),
    **dict.fromkeys(("SCB", "absmax", "quant_map", "nested_absmax", "nested_quant_map"), "bitsandbytes"),
    **dict.fromkeys(("weight_zero_point", "weight_g_idx", "weight_shape"), "compressed-tensors"),
}
"""How names of tensors end that come with quantised ones of another kind, and what makes them."""

_PART = 1 << 24
"""Values that are compared at a time."""


def no_weights(directory: Path) -> InputError:
    """The error of a directory without `model.safetensors`, which says what is there instead."""
    path = directory / "model.safetensors"
    for pattern, (what, remedy) in _OTHERS.items():
        found = sorted(file.name for file in directory.glob(pattern))
        if found:
            return InputError(f"{path}: no such file, only {what} ({found[0]}); {remedy}")
    return InputError(f"{path}: no such file, and no other weights; give the directory of a whole model")


def refuse_quantised_tensors(tensors: Mapping[str, np.ndarray], where: str, stated: Quantisation | None = None) -> None:
    """Refuses integers, 8-bit floating point numbers and the scales of such that are no part of a known matrix.

    Args:
      tensors: of a checkpoint, without the quantised matrices that are read.
      where: the directory, for messages.
      stated: what its config says of quantised weights.

    Raises:
      InputError: names the first tensor.
    """
    for name, tensor in tensors.items():
        plain = jnp.issubdtype(tensor.dtype, jnp.floating) and tensor.dtype.itemsize > 1
        if not plain or name.rpartition(".")[2] in (*_PARTS, *_OTHERS_QUANTISED):
            raise InputError(f"{where}: tensor {name} {_quantised(name, tensor, stated or Quantisation())}")


def _quantised(name: str, tensor: np.ndarray, stated: Quantisation) -> str:
    """What a quantised tensor is, and what to do about it."""
    plain, end = "use the checkpoint in bfloat16 or float32", name.rpartition(".")[2]
    if end in _OTHERS_QUANTISED:
        return f"is a part of weights quantised by {_OTHERS_QUANTISED[end]}, in a way that is not read; {plain}"
    if stated.layouts:
        fitting = [layout for layout in stated.layouts if name.endswith(layout.codes) and layout.holds(tensor.dtype)]
        if missing := [name.removesuffix(layout.codes) + end for layout in fitting for end in layout.scales]:
            return f"is quantised, but its scales, {listed(dict.fromkeys(missing))}, are missing; download it again"
        return f"is no part of {stated.title}, which config.json states; download the checkpoint again, or {plain}"
    if end in _PARTS or tensor.dtype in FLOAT8:
        what = "is a part of quantised weights" if end in _PARTS else "is FP8"
        return (
            f"{what}, but config.json has no quantization_config, which says how they are stored; put back the "
            f"config.json that was published with it, or {plain}"
        )
    return f"has dtype {tensor.dtype}, so it is quantised or damaged; {plain}"


def remedy_of_missing(name: str, found: Iterable[str]) -> str:
    """What to do where a tensor of a layer or of an expert is not among those that are `found`."""
    if not _any_like(name, found):
        return "download the checkpoint again"
    return (
        "as there are others like it, config.json gives more layers or experts than the weights have, or a file is not "
        "whole; download both again"
    )


def unknown_tensor(name: str, known: Iterable[str], model_type: str, where: str) -> InputError:
    """The error of a tensor that is not among the `known` ones of such a model."""
    if _any_like(name, known):
        why = "is of a layer or expert that config.json does not give"
        return InputError(f"{where}: tensor {name} {why}; config.json and weights are not of the same model")
    return InputError(f"{where}: tensor {name} is unknown to {model_type}; use a plain checkpoint of it")


def _any_like(name: str, others: Iterable[str]) -> bool:
    """Whether one of the other names is the same but for its numbers, of layer and expert."""
    if not _NUMBER.search(name):
        return False
    form = _NUMBER.sub(".*.", name)
    return any(_NUMBER.sub(".*.", other) == form for other in others)


_NUMBER = re.compile(r"\.\d+\.")


def refuse_two_heads(tensors: Mapping[str, np.ndarray], embedding: str, head: str, where: str) -> None:
    """Refuses a stored LM head beside an embedding that the config says is the head, unless they are the same.

    The config and transformers would not agree on the model: the one says the embedding, the other takes the head.

    Args:
      tensors: of the checkpoint.
      embedding: name of the embedding.
      head: name that the LM head has if it is stored.
      where: the directory, for messages.

    Raises:
      InputError: the two differ.
    """
    if head not in tensors or embedding not in tensors:
        return
    a, b = tensors[embedding], tensors[head]
    rows = max(_PART // max(a.shape[-1], 1), 1)
    parts = (tuple(np.asarray(x[i : i + rows]) for x in (a, b)) for i in range(0, len(a), rows))
    if a.shape != b.shape or not all(np.array_equal(x, y) for x, y in parts):
        raise InputError(
            f"{where}: config.json says tie_word_embeddings true, but {head} is not {embedding}; set it to false if "
            f"that head is the model's (transformers takes it), or remove {head} from the checkpoint"
        )


def all_finite(values: np.ndarray) -> bool:
    """Whether there is no NaN or infinity among float32 or bfloat16 values: those have all bits of the exponent set.

    At 7 GB/s this is hardly seen when a checkpoint is read; `np.isfinite` takes five times as long for bfloat16.
    """
    bits = np.atleast_1d(values).view(np.uint16 if values.itemsize == 2 else np.uint32)
    exponent = bits.dtype.type(0x7F80 if values.itemsize == 2 else 0x7F800000)
    if not bits.size:
        return True
    rows = np.moveaxis(bits, int(np.argmax(bits.strides)), 0)  # as they are in memory
    step = max(_IN_CACHE * len(rows) // bits.size, 1)
    return not any(((rows[i : i + step] & exponent) == exponent).any() for i in range(0, len(rows), step))


_IN_CACHE = 1 << 18
"""Values that are looked at at a time."""
