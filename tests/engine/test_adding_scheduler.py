"""A scheduler that is not part of the package (docs/adding.md): a file of its own, and nothing else."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.engine import Models, generate
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.engine.serving import Engine


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Alternating(Scheduler):
    """Verifies all drafts of a request, then none, then all. Its history is a number per request and one of all."""

    name: ClassVar[str] = "alternating"
    reads_confidence: ClassVar[bool] = False

    @property
    def remembers(self) -> bool:
        return True

    def start(self, batch: int, block_size: int) -> Any:
        return {"own": jnp.zeros(batch, jnp.int32), "all": jnp.int32(0)}

    def admit(self, proposal: Any, active: jax.Array, history: Any) -> tuple[jax.Array, Any]:
        size = proposal.tokens.shape[1]
        after = {"own": history["own"] + active, "all": history["all"] + 1}
        return self.within(jnp.where(history["own"] % 2 == 0, size, 0), active, size), after

    def observe(self, history: Any, *_: Any, **__: Any) -> Any:
        return history


@pytest.mark.slow
def test_a_scheduler_of_ones_own(models: Any) -> None:
    target = models.qwen3()
    both = Models(target, models.near(target, 3, noise=1.0))
    prompts = [[1, 2, 3], [4], [5, 6], [7, 8], [9]]
    plain = generate(both.plain(), prompts, max_new_tokens=12)
    result = generate(both, prompts, max_new_tokens=12, scheduler=Alternating())
    assert all(np.array_equal(a, b) for a, b in zip(plain.tokens, result.tokens, strict=True))
    assert all(set(lengths[::2]) == {3} and set(lengths[1::2]) <= {0} for lengths in result.proposal_lengths)
    engine = Engine(both, slots=2, capacity=24, prefill_chunk=4, scheduler=Alternating())
    handles = [engine.submit(prompt, max_new_tokens=12, trace=True) for prompt in prompts]
    while engine.step():
        pass
    for handle, tokens in zip(handles, plain.tokens, strict=True):
        admitted = [piece.round.admitted for piece in handle.pieces if piece.round is not None]
        assert list(handle.result().tokens) == tokens.tolist() and set(admitted[::2]) == {3} >= set()
        assert not any(admitted[1::2])  # every request begins anew in its slot
