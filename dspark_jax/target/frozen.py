"""What training from a feature cache needs of a target: its embedding and its LM head, nothing else.

They are stored beside the cache, so that they can also be those of a model that has no definition here.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError
from safetensors.numpy import save_file

from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.errors import as_os_error, is_full_disk
from dspark_jax.json_file import written_whole
from dspark_jax.sharding import Param, gather, state_shardings
from dspark_jax.target.decode_weights import head_logits
from dspark_jax.target.loading import read_safetensors


class FrozenMatrices(nnx.Module):
    """A target without layers: it lends `embed`, `unembed` and `head`, and cannot run."""

    def __init__(self, arch: TargetArchitecture, embedding: Any, head: Any, softcap: float, *, dtype: Any):
        """`embedding` and `head` are [V, D]; the embedding's scale is in it. Logits are soft-capped unless it is 0."""
        self.arch = arch
        self.dtype = dtype
        self.softcap = softcap
        self.embedding = Param(embedding, axes=("vocab", "embed"))
        self.lm_head = Param(head, axes=("vocab", "embed"))

    @property
    def head(self) -> jax.Array:
        """LM head [V, D]."""
        return gather(self.lm_head[...], "vocab", "embed")

    def embed(self, tokens: jax.Array) -> jax.Array:
        """tokens [...] -> [..., D] in the compute type."""
        return gather(self.embedding[...], "vocab", "embed")[tokens].astype(self.dtype)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """hidden [..., D] -> float32 logits [..., V]."""
        logits = head_logits(hidden, lambda: self.head, getattr(self, "columns", None))
        return self.softcap * jnp.tanh(logits / self.softcap) if self.softcap else logits


def save_frozen(path: Path, embedding: np.ndarray, head: np.ndarray, softcap: float) -> None:
    """Writes the file that `load_frozen` reads; bfloat16 where that loses nothing.

    Raises:
      InputError: the disk is full.
      OSError: the file cannot be written for another reason.
    """
    tensors: dict[str, np.ndarray] = {"softcap": np.asarray([softcap], np.float32)}
    for name, value in {"embedding": embedding, "head": head}.items():
        value = np.ascontiguousarray(value, np.float32)
        narrow = value.astype(ml_dtypes.bfloat16)
        tensors[name] = narrow if np.array_equal(narrow.astype(np.float32), value) else value
    try:
        with written_whole(path) as temporary:
            save_file(tensors, temporary)
    except SafetensorError as error:
        if not is_full_disk(error):
            if (found := as_os_error(error, path)) is None:
                raise
            raise found from error
        raise InputError(f"{path}: the disk is full; free space and run again") from error


def read_frozen(path: Path, arch: TargetArchitecture) -> tuple[np.ndarray, np.ndarray, float]:
    """What `save_frozen` wrote: embedding and LM head [V, D], memory-mapped, and the soft-cap.

    Raises:
      InputError: the file is missing, damaged or of another shape.
    """
    remedy = "remove it and run python -m dspark_jax.prepare again"
    if not path.exists():
        raise InputError(f"{path}: no such file; {remedy.removeprefix('remove it and ')}")
    tensors, shape = read_safetensors(path, remedy), (arch.vocab_size, arch.hidden_size)
    for name in ("embedding", "head", "softcap"):
        if name not in tensors or (name != "softcap" and tensors[name].shape != shape):
            raise InputError(f"{path}: {name} is missing or not {list(shape)}; {remedy}")
    return tensors["embedding"], tensors["head"], float(tensors["softcap"][0])


def abstract_frozen(arch: TargetArchitecture, dtype: Any, softcap: float) -> FrozenMatrices:
    """One whose parameters are shapes only."""
    abstract: Any = jax.ShapeDtypeStruct((arch.vocab_size, arch.hidden_size), dtype)
    return FrozenMatrices(arch, abstract, abstract, softcap, dtype=dtype)


def load_frozen(path: Path, arch: TargetArchitecture, mesh: Mesh, dtype: Any) -> FrozenMatrices:
    """The embedding and LM head beside a feature cache, on `mesh`, in the compute type.

    Raises:
      InputError: the file is missing, damaged or of another shape.
    """
    embedding, head, softcap = read_frozen(path, arch)
    found = abstract_frozen(arch, dtype, softcap)
    fill_frozen(found, embedding, head, mesh)
    return found


def fill_frozen(found: FrozenMatrices, embedding: np.ndarray, head: np.ndarray, mesh: Mesh) -> None:
    """Puts embedding and LM head [V, D] in the place of their shapes, on `mesh`, in the compute type."""
    for value, variable in ((embedding, found.embedding), (head, found.lm_head)):
        where = state_shardings(variable, mesh).get_value()

        def cut(index: Any, value: np.ndarray = value) -> np.ndarray:
            return np.asarray(value[index], found.dtype)

        variable.set_value(jax.make_array_from_callback(value.shape, where, cut))
