"""A target that PyTorch runs, as the engine and the drafters know targets: for models that have no definition here.

Embedding and LM head are JAX's, as in training from the model's features (`target.frozen`). A pass over the layers is a
call from the program to the host, which is a function of its arguments: the cache that programs carry along is the
tokens that were read, and what PyTorch has kept of them (`target.torch_requests`) only makes the answer quicker. So
going back to an earlier length, giving a row to another request, and everything else that the engine does with a cache
means the same as for a target in JAX.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dspark_jax.config import InputError, TargetArchitecture, TargetConfig
from dspark_jax.hub import local_directory
from dspark_jax.ops.cached_attention import Rows
from dspark_jax.progress import log
from dspark_jax.target.decode_weights import head_columns
from dspark_jax.target.frozen import FrozenMatrices, fill_frozen
from dspark_jax.target.model import TargetOutput
from dspark_jax.target.torch_model import load_torch_model
from dspark_jax.target.torch_requests import COPY, CROP, TorchRequests


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadTokens:
    """What a cache says: the tokens that a pass may look back at.

    Attributes:
      numbers: [B] int32, of the requests, under which PyTorch keeps what it has read.
      tokens: [B, C] int32.
    """

    numbers: jax.Array
    tokens: jax.Array

    def write(self, tokens: jax.Array, starts: jax.Array) -> "ReadTokens":
        """With tokens [B, S] at positions starts[b].. of each request."""
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
        return dataclasses.replace(self, tokens=jax.vmap(put)(self.tokens, tokens.astype(jnp.int32), starts))


class TargetInTorch(FrozenMatrices):
    """A frozen language model whose layers run in PyTorch, one request after another.

    Attributes:
      requests: on the host; None of shapes only.
      narrow: see `target.model.Target`.
    """

    def __init__(
        self, arch: TargetArchitecture, embedding: Any, head: Any, softcap: float, *, dtype: Any, requests: Any = None
    ):
        """As `FrozenMatrices`; `requests` read rows."""
        super().__init__(arch, embedding, head, softcap, dtype=dtype)
        self.requests: TorchRequests | None = requests
        self.narrow = False

    def fuse_weights(self, dtype: Any, *, join: bool) -> None:
        """See `decode_weights`."""
        del join
        self.columns = head_columns(self.head, dtype)

    def init_cache(self, batch: int, length: int, block: int = 1) -> ReadTokens:
        """An empty cache for `length` positions of `batch` requests; any number of rows may be taken back."""
        del block
        return ReadTokens(jnp.arange(batch, dtype=jnp.int32), jnp.zeros((batch, length), jnp.int32))

    def forward(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Any = None,
        *,
        taps: tuple[int, ...] = (),
        rows: Rows | None = None,
        counts: jax.Array | None = None,
    ) -> TargetOutput:
        """As `target.model.Target.forward`; several documents in a sequence are not possible, and nobody asks for them.

        Without a cache positions count from 0.
        """
        if rows is not None:
            first, counts = rows.positions, rows.counts
            padded = self._pass(rows.pad(tokens[0]), first, cache, taps, counts)
            flat = [rows.flatten(part)[None] for part in (padded.features, padded.last_hidden)]
            return dataclasses.replace(padded, features=flat[0], last_hidden=flat[1])
        counts = jnp.full((len(tokens),), tokens.shape[1], jnp.int32) if counts is None else counts
        return self._pass(tokens, positions[:, 0], cache, taps, counts)

    def _pass(
        self, tokens: jax.Array, starts: jax.Array, cache: Any, taps: tuple[int, ...], counts: jax.Array
    ) -> TargetOutput:
        """Rows [B, S] from `starts` on, of which the first `counts` are real."""
        batch, width = tokens.shape
        nobody = ReadTokens(jnp.full((batch,), -1, jnp.int32), tokens.astype(jnp.int32))
        read = nobody if cache is None else cache.write(tokens, starts)
        sizes = (len(taps) * self.arch.hidden_size, self.arch.hidden_size)
        shape = jax.ShapeDtypeStruct((batch, width, sum(sizes)), jnp.float32)

        def call(*arguments: Any) -> Any:
            assert self.requests is not None
            numbers, every, first, real = map(np.asarray, arguments)
            return self.requests.rows(taps, width, numbers, every, first, real)

        found = jax.pure_callback(call, shape, read.numbers, read.tokens, starts, counts).astype(self.dtype)
        return TargetOutput(found[..., : sizes[0]], found[..., sizes[0] :], None if cache is None else read)


def runs_in_torch(target: Any) -> bool:
    """Whether PyTorch runs the layers of a target."""
    return isinstance(target, TargetInTorch)


def load_in_torch(config: TargetConfig, mesh: Mesh, dtype: Any) -> TargetInTorch:
    """Loads a target into PyTorch, and its embedding and LM head onto `mesh` in the compute type `dtype`; says so.

    Raises:
      InputError: PyTorch is not there, it cannot load the model, its logits are not those of its LM head, the model has
        another shape than the config says, or the mesh has several devices or hosts.
    """
    arch, path = config.architecture, config.path
    what = f"{path}: a {arch.unsupported or arch.model_type}"
    if mesh.size > 1 or jax.process_count() > 1:
        raise InputError(
            f"{what} is run by PyTorch, which decodes on one device of one host, and the mesh has {mesh.size} devices; "
            "decode with the commands, without --distributed"
        )
    arch.refuse_other(TargetArchitecture.of_any_model(local_directory(path)), path)
    needed = f"{what} has no definition here, so PyTorch has to run it: that"
    model = load_torch_model(path, config.dtype, needed_by=needed)
    embedding, head, softcap = model.frozen_matrices()
    return in_torch(arch, TorchRequests(model), (embedding, head, softcap), mesh, dtype)


def in_torch(arch: TargetArchitecture, requests: TorchRequests, frozen: Any, mesh: Mesh, dtype: Any) -> TargetInTorch:
    """A target of a model that PyTorch has; `frozen` as of `TorchModel.frozen_matrices`."""
    embedding, head, softcap = frozen
    shape: Any = jax.ShapeDtypeStruct((arch.vocab_size, arch.hidden_size), dtype)
    found = TargetInTorch(arch, shape, shape, softcap, dtype=dtype, requests=requests)
    fill_frozen(found, embedding, head, mesh)
    model = requests.model.model
    how = {
        CROP: "rejected rows are cut off its cache",
        COPY: "its cache, of which rows cannot be cut off, is copied before every round",
    }.get(requests.way, "it has no cache that can be gone back in, so every pass reads the whole sequence")
    log(
        f"target: {requests.model.path} runs in PyTorch ({type(model).__name__}, {str(model.dtype).rpartition('.')[2]} "
        f"on {model.device}), one request after another; {how}"
    )
    return found
