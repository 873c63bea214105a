"""Target and drafter as one value, and the form of their weights in which they decode."""

import dataclasses
import functools
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dspark_jax import platform
from dspark_jax.config import TargetArchitecture
from dspark_jax.drafter.interface import Drafter, DrafterModule, is_confident
from dspark_jax.drafter.none import NO_DRAFTER, NoDrafter
from dspark_jax.sharding import mesh_of, on_mesh_of
from dspark_jax.target.decode_weights import decode_weights, has_decode_weights, moved
from dspark_jax.target.interface import LanguageModel

Loaded = TypeVar("Loaded", bound=LanguageModel | DrafterModule | NoDrafter)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Models:
    """What decodes: a target, and a drafter that drafts for it. `Models(target)` decodes plainly.

    Attributes:
      target: the language model.
      drafter: trained for this target; the default drafts nothing.
    """

    target: LanguageModel
    drafter: Drafter = NO_DRAFTER

    @property
    def arch(self) -> TargetArchitecture:
        """The target's shape."""
        return self.target.arch

    @property
    def block_size(self) -> int:
        """G, drafts of a round; 0 without a drafter."""
        return self.drafter.block_size

    @property
    def rows(self) -> int:
        """G + 1, rows of a request that a round writes into the target's cache."""
        return self.drafter.block_size + 1

    @property
    def pending_rows(self) -> int:
        """R, rows that the drafter reads at once of those that wait: on a CPU 32 cost twice what 8 do (0.6, 0.3 ms)."""
        return 4 * self.rows

    def most_pending(self, batch: int) -> int:
        """Rows of a request that may wait for the drafter, a multiple of R.

        Of one request alone, many, since an answer that ends before drafts are tried need never be read (1.6 % of a
        plain step of the embedded model for each of its tokens). Of several, every round writes all of them anew.
        """
        return self.pending_rows * (8 if batch == 1 else 1)

    def defers_prompts(self, batch: int) -> bool:
        """Whether a drafter reads a prompt only when it is to draft, where rounds without drafts are possible.

        For one request on a CPU: answers without drafts then save what the drafter takes for a prompt (0.8 ms of 128
        tokens beside the embedded target's 18.7). On an accelerator the prompt is read at once, which costs it next to
        nothing, and not R rows at a time.
        """
        return batch == 1 and platform.current() == "cpu"

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers whose outputs the drafter reads."""
        return self.drafter.taps

    @property
    def drafts(self) -> bool:
        """Whether there is a drafter."""
        return not isinstance(self.drafter, NoDrafter)

    @property
    def confident(self) -> bool:
        """Whether the drafter has a confidence head."""
        return is_confident(self.drafter)

    def plain(self) -> "Models":
        """The target alone."""
        return Models(self.target)

    def target_cache(self, batch: int, capacity: int) -> Any:
        """The target's empty cache for requests of up to `capacity` rows."""
        return self.target.init_cache(batch, capacity, self.rows)

    def draft_cache(self, batch: int, capacity: int) -> Any:
        """The drafter's empty cache for requests of up to `capacity` rows, with room for R more.

        Pending rows are absorbed in a window of R, whose end may lie after what the target's cache has room for.
        """
        return self.drafter.init_cache(batch, capacity + self.pending_rows)

    def for_decoding(self, *, batch_size: int, consume: bool = False) -> Self:
        """The models with their weights as decoding `batch_size` requests wants them here; to be made once.

        Models that have been through here are returned as they are. `generate` does this itself at every call, which
        takes some milliseconds of a small model and a second copy of a large one.

        Args:
          batch_size: requests decoded together; on a CPU it decides how weights are held, elsewhere it does not matter.
          consume: give up the given models' weights while the new ones are made (on a GPU), so that there is never a
            second copy of all of them.
        """
        with on_mesh_of(self):
            if platform.current() == "cpu":
                separate, dtype = batch_size > 1, _weight_type(self.target, batch_size * self.rows)
                return dataclasses.replace(
                    self,
                    target=_on_cpu(self.target, dtype=dtype, separate_caches=separate, drafts=self._head_rows()),
                    drafter=_on_cpu(self.drafter, dtype=self.drafter.dtype, separate_caches=separate),
                )
            target, drafter = (
                decode_weights(model, model.dtype, separate_caches=True, consume=consume)
                for model in (self.target, self.drafter)
            )
        return dataclasses.replace(self, target=target, drafter=drafter)

    def _head_rows(self) -> Any:
        """Type of the rows by which the drafter reads the target's LM head; None where it has its own, or none."""
        own = getattr(self.drafter, "vocabulary", None) is not None
        return None if own or not self.drafts else self.drafter.dtype

    def decoding_on(self, mesh: Mesh, *, batch_size: int) -> Self:
        """The models of a run that trains, as they decode on `mesh`; themselves where they lie there anyway."""
        if mesh.size == 1 or mesh_of(self) == mesh:
            return self
        return self.moved(mesh).for_decoding(batch_size=batch_size, consume=True)  # their own copy

    def moved(self, mesh: Mesh) -> Self:
        """The models on another mesh of the same devices; what is there already is not copied."""
        return dataclasses.replace(self, target=moved(self.target, mesh), drafter=moved(self.drafter, mesh))


def when_loaded(model: Loaded) -> Loaded:
    """A target or drafter that has just been loaded to decode, in its form where no batch decides about it.

    That is on a GPU or TPU; the given model cannot be used any more on a GPU.
    """
    if platform.current() == "cpu":
        return model
    with on_mesh_of(model):
        return decode_weights(model, model.dtype, separate_caches=True, consume=True)


def _on_cpu(model: Any, **form: Any) -> Any:
    """The form for a CPU; one that has it is not gone through, since jit would copy its weights."""
    return model if has_decode_weights(model) else _converted(model, **form)


@functools.partial(jax.jit, static_argnames=("dtype", "separate_caches", "drafts"))
def _converted(model: Any, *, dtype: Any, separate_caches: bool, drafts: Any = None) -> Any:
    return decode_weights(model, dtype, separate_caches=separate_caches, drafts=drafts)


def _weight_type(target: LanguageModel, rows: int) -> Any:
    """Type in which a CPU keeps a target's matrices while it decodes `rows` tokens at a time.

    Bfloat16 loses nothing where the checkpoint was bfloat16 (`ops.product.exact`) and is faster for several rows; one
    row is fastest as a float32 product.
    """
    narrow = target.narrow and rows > 1 and platform.has_matrix_units()
    return jnp.bfloat16 if narrow or target.dtype == jnp.bfloat16 else jnp.float32
