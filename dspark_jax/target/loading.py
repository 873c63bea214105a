"""Target weights from a Hugging Face directory, streamed tensor by tensor into their device shards.

On the host there is never more than one tensor (of one layer) beyond what the devices hold: files are mapped, a tensor
is cut into the shards of the devices here, and its pages are given back when it is on them.
"""

import functools
import hashlib
import json
import math
import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspark_jax import platform
from dspark_jax.config import InputError, TargetArchitecture, TargetConfig
from dspark_jax.hub import local_directory
from dspark_jax.progress import Progress, log
from dspark_jax.sharding import state_shardings
from dspark_jax.target import families
from dspark_jax.target.checks import (
    all_finite,
    no_weights,
    refuse_quantised_tensors,
    refuse_two_heads,
    remedy_of_missing,
    unknown_tensor,
)
from dspark_jax.target.dequantise import Matrix, stated_by, summary, with_matrices
from dspark_jax.target.families.family import Family
from dspark_jax.target.fused import with_experts
from dspark_jax.target.interface import LanguageModel
from dspark_jax.target.model import Target
from dspark_jax.target.weights import Weight

_DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip


def compute_dtype(name: str) -> Any:
    """`float32`, `bfloat16`, or `auto`: bfloat16 on accelerators, float32 on CPU."""
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[platform.compute_dtype() if name == "auto" else name]


_REMEDY = "download the file again"

_AT_ONCE = 64 << 20
"""Stacks of layers up to so many bytes are put together on the host, which spares compiling programs for them."""


def read_safetensors(path: Path, remedy: str = _REMEDY) -> dict[str, np.ndarray]:
    """Memory-mapped tensors of one file by name; nothing is read until an array is sliced.

    The header is checked here, and not by the safetensors package, for errors that name the file, the cause and the
    `remedy`.

    Raises:
      InputError: no such file, or it is truncated or otherwise not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= size - 8:
                raise InputError(f"{path}: truncated safetensors file ({size} bytes, no whole header); {remedy}")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {remedy}") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a directory, not a file; remove it and {remedy}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise InputError(f"{path}: the header is not JSON, so this is no safetensors file; {remedy}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: damaged header (not a JSON object); {remedy}")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_entry(entry):
            raise InputError(f"{path}: damaged header (tensor {name}: {json.dumps(entry)[:200]}); {remedy}")
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size - 8 - length < end:
        raise InputError(f"{path}: truncated safetensors file ({size} bytes, {8 + length + end} expected); {remedy}")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"{path}: tensor {name} has dtype {entry['dtype']}; convert it to bfloat16 or float32")
        start, stop = entry["data_offsets"]
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        if stop - start != dtype.itemsize * math.prod(shape):
            raise InputError(f"{path}: tensor {name} has {stop - start} bytes, shape {shape} needs others; {remedy}")
        if stop == start:
            tensors[name] = np.zeros(shape, dtype)
        else:
            tensors[name] = np.memmap(path, dtype, mode="r", offset=8 + length + start, shape=shape)
    return tensors


def _is_entry(entry: Any) -> bool:
    """Whether this is what a safetensors header says of a tensor: its type, its shape, where its data begin and end."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not all(isinstance(part, list) and all(type(n) is int and n >= 0 for n in part) for part in (shape, offsets)):
        return False
    return len(offsets) == 2 and offsets[0] <= offsets[1]


def read_checkpoint(directory: Path) -> dict[str, np.ndarray]:
    """Memory-mapped tensors of a model directory: `model.safetensors`, or the shards its index names.

    Raises:
      InputError: a file is missing or damaged, the index names a tensor that its shard does not hold, or two shards
        hold the same one.
    """
    index_path = directory / "model.safetensors.index.json"
    if not index_path.exists():
        if not (directory / "model.safetensors").exists():
            raise no_weights(directory)
        return read_safetensors(directory / "model.safetensors")
    try:
        weight_map = json.loads(index_path.read_text("utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, KeyError, TypeError, AttributeError):
        raise InputError(f"{index_path}: no valid weight_map (tensor name -> file name); {_REMEDY}") from None
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise InputError(f"{index_path}: {shard!r} is no name of a file beside it; {_REMEDY}")
    tensors: dict[str, np.ndarray] = {}
    for shard in shards:
        found = read_safetensors(directory / shard)
        for name in found.keys() & tensors.keys():
            raise InputError(f"{directory / shard}: tensor {name} is in another shard as well; {_REMEDY}")
        tensors |= found
    for name, shard in weight_map.items():
        if name not in tensors:
            raise InputError(f"{directory / shard}: tensor {name} is in the index but not in the file; {_REMEDY}")
    return tensors


def parameter_paths(module: nnx.Module) -> dict[str, Any]:
    """Parameters of a module by dotted path, e.g. `layers.attention.query`."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(str(part) for part in path): variable for path, variable in flat}


def fill_module(
    module: nnx.Module,
    tensors: Mapping[str, np.ndarray],
    weights: Mapping[str, Weight],
    where: str,
    mesh: Mesh,
    dtype: Any,
    *,
    title: str = "",
    finite: bool = True,
) -> None:
    """Puts checkpoint tensors into a module's (abstract) parameters, tensor by tensor and shard by shard.

    Only the slices that a device here holds are read and converted. All tensors are checked before any is read.

    Args:
      module: its parameters are replaced in place.
      tensors: by checkpoint name; `{i}` in a weight's name runs over the stacked layers.
      weights: parameter path -> where its values are.
      where: the directory, for messages.
      mesh: gives each parameter's sharding.
      dtype: type of the parameters in memory, but for those that a weight says are exact.
      title: shows progress under this name, in megabytes of the files; empty = silently.
      finite: refuse values that are not.

    Raises:
      InputError: a tensor is missing, has another shape, holds no floating point numbers, or some that are not finite.
    """
    parameters = parameter_paths(module)
    for path, variable in parameters.items():
        _check_tensors(tensors, weights[path], variable.get_value().shape, where)
    needed = {path: weights[path].names(variable.get_value().shape[0]) for path, variable in parameters.items()}
    total = sum(tensors[name].nbytes for names in needed.values() for name in names)
    progress = Progress(title, -(-total >> 20), unit="MB") if title else None
    done = 0
    for path, variable in parameters.items():
        stored = {f"{where}: tensor {name}": tensors[name] for name in needed[path]}
        shape, sharding = variable.get_value().shape, state_shardings(variable, mesh).get_value()

        def read(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress.update(done >> 20)

        own = weights[path].held(dtype)
        variable.set_value(_load(weights[path], stored, shape, sharding, own, read, finite=finite))
    if progress is not None:
        progress.update(progress.total)
        progress.close()


def _check_tensors(tensors: Mapping[str, np.ndarray], weight: Weight, shape: tuple[int, ...], where: str) -> None:
    """Refuses a checkpoint in which a parameter of this shape is not as it should be."""
    expected = weight.stored_shape(shape[weight.stacked + bool(weight.experts) :])
    for name in weight.names(shape[0] if weight.stacked else 1):
        if name not in tensors:
            raise InputError(f"{where}: tensor {name} is missing; {remedy_of_missing(name, tensors)}")
        found = tensors[name]
        if found.shape != expected:
            raise InputError(
                f"{where}: tensor {name} has shape {found.shape}, the config gives {expected}; "
                "config.json and weights are not of the same model"
            )
        if not isinstance(found, Matrix) and not (weight.below and np.issubdtype(found.dtype, np.integer)):
            refuse_quantised_tensors({name: found}, where)


def _load(
    weight: Weight,
    tensors: Mapping[str, np.ndarray],
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: Any,
    read: Callable[[int], None],
    *,
    finite: bool,
) -> jax.Array:
    """A parameter on its devices, of tensors by what messages call them; `read` is told the bytes of each that is done.

    Slices are handed over as views of the mapped file: turning them round is much faster there than in NumPy.
    """
    single = shape[1:] if weight.stacked else shape
    titles, stored, experts = list(tensors), list(tensors.values()), weight.experts

    def cut(i: int, index: Any) -> np.ndarray:
        if not experts:
            return cut_tensor(i, single, index)
        wanted = range(i * experts, (i + 1) * experts)[index[0]]
        return np.stack([cut_tensor(tensor, single[1:], index[1:]) for tensor in wanted])

    def cut_tensor(i: int, shape: tuple[int, ...], index: Any) -> np.ndarray:
        part = weight.load(stored[i], shape)[index]
        if weight.below:
            if part.size and not 0 <= part.min() <= part.max() < weight.below:
                raise InputError(f"{titles[i]} holds numbers that are not from 0 to {weight.below - 1}; {_REMEDY}")
            return part.astype(dtype)
        part = part if part.dtype == dtype else part.astype(dtype)
        if finite and not all_finite(part):
            raise InputError(f"{titles[i]} holds values that are not finite in {np.dtype(dtype)}; {_REMEDY}")
        return part

    def finished(tensor: np.ndarray) -> None:
        read(tensor.nbytes)
        _give_back(tensor)

    if not weight.stacked:  # copied, as a CPU device would go on using the mapped file
        value = _put(shape, sharding, lambda index: np.array(cut(0, index), order="K"))
        finished(stored[0])
        return value
    if np.prod(shape) * np.dtype(dtype).itemsize <= _AT_ONCE:

        def stack(index: Any) -> np.ndarray:
            return np.stack([cut(i, index[1:]) for i in range(*index[0].indices(shape[0]))])

        value = _put(shape, sharding, stack)
        for tensor in stored:
            finished(tensor)
        return value
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    value = jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
    for i in range(shape[0]):
        layer = _put(single, of_layer, functools.partial(cut, i))
        value = jax.block_until_ready(_placer(sharding)(value, layer, i))  # or the layers would queue up
        del layer
        for tensor in stored[i * (experts or 1) : (i + 1) * (experts or 1)]:
            finished(tensor)
    return value


def _put(shape: tuple[int, ...], sharding: NamedSharding, cut: Callable[[Any], np.ndarray]) -> jax.Array:
    """An array on the devices here, slice by slice, so that only one at a time is on the host.

    Devices that hold the same slice get it from the first of them.
    """
    places = sharding.addressable_devices_indices_map(shape)
    first: dict[Any, jax.Array] = {}
    parts = []
    for device, index in places.items():
        key = tuple(part.indices(size) for part, size in zip(index or (), shape, strict=True))
        value = first[key] if key in first else cut(index)
        parts.append(jax.block_until_ready(jax.device_put(value, device)))
        first.setdefault(key, parts[-1])
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


@functools.cache
def _placer(sharding: NamedSharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """(stack, layer, index) -> the stack with this layer, in place."""

    def place(value: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
        dtype = value.dtype
        if dtype.itemsize == 2:  # a CPU would convert bfloat16 to float32 and back
            value, layer = (jax.lax.bitcast_convert_type(x, jnp.uint16) for x in (value, layer))
        value = jax.lax.dynamic_update_index_in_dim(value, layer, index, axis=0)
        return value if value.dtype == dtype else jax.lax.bitcast_convert_type(value, dtype)

    return jax.jit(place, donate_argnums=0, out_shardings=sharding)


def _give_back(tensor: np.ndarray) -> None:
    """Lets the system take back the pages of a mapped tensor, which otherwise count as this process's memory."""
    _advise(tensor, "MADV_DONTNEED")


def _advise(tensor: np.ndarray, advice: str) -> None:
    for part in tensor.stored.values() if isinstance(tensor, Matrix) else [tensor]:
        mapped = getattr(part, "_mmap", None)
        if mapped is not None and hasattr(mmap, advice):
            mapped.madvise(getattr(mmap, advice))


def abstract_target(arch: TargetArchitecture, dtype: Any, where: str | Path = "target") -> Target:
    """A target whose parameters are shapes only, of the types that loading gives them; `where` it is from, for the
    message.

    Raises:
      InputError: it has no definition here.
    """
    if arch.unsupported:
        raise InputError(
            f"{where}: a {arch.unsupported} has no definition in JAX; with PyTorch its features can be trained on "
            "(data.features=torch), and evaluate, calibrate, compare, generate and convert check run it"
        )
    family = families.of_shape(arch)
    made, weights = family.model() or Target, family.weights(arch)
    target = nnx.eval_shape(lambda: made(arch, rngs=nnx.Rngs(0), dtype=dtype))
    for path, variable in parameter_paths(target).items():
        variable.set_value(jax.ShapeDtypeStruct(variable.get_value().shape, weights[path].held(dtype)))
    return target


def read_target(directory: Path, family: Family, dtype: Any) -> tuple[dict[str, Any], str]:
    """The tensors of a target, with quantised matrices that are computed in `dtype` where they are sliced.

    Returns:
      Without those that the family ignores; and a line about what is quantised, empty where nothing is.

    Raises:
      InputError: as `read_checkpoint` and `with_matrices`.
    """
    stored, stated = read_checkpoint(directory), stated_by(directory)
    tensors = {name: tensor for name, tensor in stored.items() if not family.ignores(name)}
    integers = {name: tensor for name, tensor in tensors.items() if family.integers(name)}
    others = {name: tensor for name, tensor in tensors.items() if name not in integers}
    matrices = with_matrices(others, stated, str(directory), dtype)
    return with_experts(matrices, family.fused, str(directory)) | integers, summary(matrices | integers, stated)


def load_target(config: TargetConfig, mesh: Mesh) -> LanguageModel:
    """Loads the target of a resolved config onto `mesh`, in its compute type; from the hub where its path is an id.

    One that has no definition here is run by PyTorch (`target.in_torch`).

    Raises:
      InputError: a file or tensor is missing, damaged, quantised, not finite or of another shape, a tensor is unknown,
        or the model's config says another shape than ours, or tied embeddings beside a head that differs from them.
    """
    directory, arch, dtype = local_directory(config.path), config.architecture, compute_dtype(config.dtype)
    if arch.unsupported:
        from dspark_jax.target.in_torch import load_in_torch  # which reads files with what is here

        return load_in_torch(config, mesh, dtype)
    target = abstract_target(arch, dtype, directory)
    if (directory / "config.json").exists():  # of a model on the hub, nobody has compared it before
        arch.refuse_other(TargetArchitecture.from_hf(directory), config.path)
    tensors, line = read_target(directory, target.family, dtype)
    weights = target.family.weights(arch, tensors)
    known = {name for weight in weights.values() for name in weight.names(arch.num_hidden_layers)}
    for name in tensors:
        if name not in known:
            raise unknown_tensor(name, known, arch.model_type, str(directory))
    if arch.tie_word_embeddings:
        refuse_two_heads(tensors, weights["embedding"].name, weights["lm_head"].name, str(directory))
    if line:
        log(line)
    large = sum(tensor.nbytes for tensor in tensors.values()) > _AT_ONCE
    fill_module(target, tensors, weights, str(directory), mesh, dtype, title="loading" if large else "")
    exact = {
        name
        for weight in weights.values()
        if weight.exact or weight.below
        for name in weight.names(arch.num_hidden_layers)
    }
    target.narrow = all(tensor.dtype == ml_dtypes.bfloat16 for name, tensor in tensors.items() if name not in exact)
    return target


def fingerprint(directory: str | Path) -> str:
    """Hash that tells one target from another: shape fields, tensor names, shapes, types and samples of their values.

    Reads eight pages of memory per tensor, so it is quick for any size, over a network too. The tokenizer has its own,
    `tokenizer_fingerprint`.
    """
    directory = local_directory(directory)
    arch = TargetArchitecture.of_any_model(directory)
    digest = hashlib.sha256(families.of_shape(arch).identity(arch).encode())
    tensors = read_checkpoint(directory)
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = "uint8" if tensor.dtype.itemsize == 1 and tensor.dtype.kind == "V" else tensor.dtype  # as it always was
        digest.update(f"{name} {kind} {tensor.shape}".encode())
        _advise(tensor, "MADV_RANDOM")  # or the system would read far ahead of every sample
        flat = tensor.reshape(-1)
        pieces = [flat] if flat.size <= 8 * _SAMPLE else [flat[at : at + _SAMPLE] for at in _sample_starts(flat.size)]
        for piece in pieces:
            digest.update(piece.tobytes())
        _give_back(tensor)
    return digest.hexdigest()[:32]


_SAMPLE = 256
"""Values in one sample of a tensor."""


def _sample_starts(size: int) -> list[int]:
    """Where eight samples of `size` values begin: the first at the beginning, the last at the end."""
    return [round(i * (size - _SAMPLE) / 7) for i in range(8)]


def tokenizer_fingerprint(directory: str | Path) -> str:
    """Hash of the tokenizer files and the chat template of a model directory."""
    digest, directory = hashlib.sha256(), local_directory(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        path = directory / name
        digest.update(name.encode() + (path.read_bytes() if path.exists() else b""))
    return digest.hexdigest()[:32]
