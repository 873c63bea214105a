"""What decoding gives back to the host: tokens and round-by-round counts of every request."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dspark_jax.engine.state import DecodeState, RoundLog


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """N decoded requests, in the order of their prompts.

    The first token comes from the prefill and belongs to no round. The last round may overrun the token budget; its
    surplus tokens are cut from `tokens` but counted in its lengths, as the reference counts them (trap 25). Unlike
    the reference, no round runs once the budget is full (golden.md D.1).

    Attributes:
      block_size: G.
      tokens: new tokens of each request, a stop token included.
      stopped: [N] bool, ended by a stop token.
      acceptance_lengths: tokens that each round gave: accepted drafts and the bonus or correction.
      accepted_lengths: accepted drafts of each round.
      proposal_lengths: verified drafts of each round (those up to an accepted stop token).
      drafted: [rounds, G] per request when traced; -1 in rounds without drafts, whose proposal length is 0.
      confidence: [rounds, G] confidence logits per request when traced and when the drafter has such a head.
    """

    block_size: int
    tokens: list[np.ndarray]
    stopped: np.ndarray
    acceptance_lengths: list[np.ndarray]
    accepted_lengths: list[np.ndarray]
    proposal_lengths: list[np.ndarray]
    drafted: list[np.ndarray] | None
    confidence: list[np.ndarray] | None

    @property
    def rounds(self) -> np.ndarray:
        """[N] rounds of each request."""
        return np.asarray([len(lengths) for lengths in self.acceptance_lengths], np.int64)

    @property
    def tau(self) -> float:
        """Mean accepted length per round over all requests; NaN when there was no round."""
        lengths = np.concatenate([*self.acceptance_lengths, np.zeros(0)])
        return float(lengths.mean()) if len(lengths) else float("nan")


def collect(parts: Sequence[tuple[list[int], Any]], requests: int, block_size: int) -> DecodeResult:
    """Joins decoded batches: `parts` are (request numbers, (DecodeState, RoundLog) on the host)."""
    rows: list[tuple[DecodeState, RoundLog, int]] = [None] * requests  # type: ignore[list-item]
    for numbers, (state, log) in parts:
        for column, number in enumerate(numbers):
            rows[number] = (state, log, column)

    def per_round(name: str) -> list[np.ndarray]:
        return [np.asarray(getattr(log, name))[: state.rounds[i], i] for state, log, i in rows]

    def traced(name: str) -> list[np.ndarray] | None:
        return per_round(name) if rows and getattr(rows[0][1], name) is not None else None

    return DecodeResult(
        block_size=block_size,
        tokens=[np.asarray(state.tokens[i, state.prompt_lengths[i] : state.lengths[i]]) for state, _, i in rows],
        stopped=np.asarray([bool(state.stopped[i]) for state, _, i in rows], bool),
        acceptance_lengths=per_round("emitted"),
        accepted_lengths=per_round("accepted"),
        proposal_lengths=per_round("proposed"),
        drafted=traced("drafted"),
        confidence=traced("confidence"),
    )
