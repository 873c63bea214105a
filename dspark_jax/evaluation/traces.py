"""Recorded rounds: what the drafter predicted and what the target accepted, with everything verified.

They are the material for calibration, for the threshold sweep and for replays under other schedulers.

A round says nothing about drafts after a stop token: accepted, it ends the request, and what follows is cut (trap 25).
Which rounds count at position k must not depend on whether draft k survives. The reference counts the drafts up to
an *accepted* stop token, which takes out rounds because they survived and leaves in those that did not, so later
positions look worse than they are. Here a position counts if no stop token was *drafted* before it, accepted or not:
that is known before the target has spoken. The token budget hides nothing: a round that overruns it was verified too.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dspark_jax.engine.result import DecodeResult


@dataclasses.dataclass(frozen=True)
class Traces:
    """Rounds of N requests, decoded with all G drafts verified.

    Attributes:
      block_size: G.
      set_names: prompt sets.
      prompt_set: [N] index into `set_names`.
      prompt: [N] held-out prompt (conversation) that the request belongs to; several turns share one.
      request: [R] request of each round; ascending, the rounds of a request in their order.
      accepted: [R] accepted drafts, those up to an accepted stop token.
      proposed: [R] verified drafts, those up to an accepted stop token.
      emitted: [R] accepted length, the bonus or correction included.
      usable: [R] positions whose outcome the round shows, see the module's docstring; at least 1.
      confidence: [R, G] confidence logits, or None without a confidence head.
    """

    block_size: int
    set_names: tuple[str, ...]
    prompt_set: np.ndarray
    prompt: np.ndarray
    request: np.ndarray
    accepted: np.ndarray
    proposed: np.ndarray
    emitted: np.ndarray
    usable: np.ndarray
    confidence: np.ndarray | None

    @property
    def rounds_of(self) -> np.ndarray:
        """[N + 1] first round of each request, and R."""
        return np.searchsorted(self.request, np.arange(len(self.prompt) + 1))

    def take(self, requests: np.ndarray) -> "Traces":
        """Some of the requests, in their order: [N] bool."""
        number = np.cumsum(requests) - 1
        kept = requests[self.request]
        per_round = {name: getattr(self, name)[kept] for name in ("accepted", "proposed", "emitted", "usable")}
        return Traces(
            block_size=self.block_size,
            set_names=self.set_names,
            prompt_set=self.prompt_set[requests],
            prompt=self.prompt[requests],
            request=number[self.request[kept]],
            confidence=None if self.confidence is None else self.confidence[kept],
            **per_round,
        )

    def halves(self) -> tuple["Traces", "Traces"]:
        """Two halves that share no prompt: within each prompt set, prompts alternate between them."""
        second = np.zeros(len(self.prompt), bool)
        for number in range(len(self.set_names)):
            members = self.prompt_set == number
            second[members] = np.unique(self.prompt[members], return_inverse=True)[1] % 2 == 1
        return self.take(~second), self.take(second)

    def save(self, path: Path) -> None:
        """Writes an .npz file."""
        values = {name: value for name, value in vars(self).items() if value is not None}
        np.savez_compressed(path, **{**values, "set_names": np.asarray(self.set_names)})

    @classmethod
    def load(cls, path: Path) -> "Traces":
        """Inverse of `save`."""
        with np.load(path) as file:
            values = dict(file)
        confidence = values.pop("confidence", None)
        names = tuple(str(name) for name in values.pop("set_names"))
        return cls(block_size=int(values.pop("block_size")), set_names=names, confidence=confidence, **values)


def record(result: DecodeResult, prompts: np.ndarray, prompt_sets: Sequence[str], stop_tokens: Sequence[int]) -> Traces:
    """The rounds of a traced result.

    Args:
      result: decoded with `trace=True` and all drafts verified.
      prompts: [N] prompt of each request.
      prompt_sets: name of the set of each prompt.
      stop_tokens: ids that end a request.
    """
    assert result.drafted is not None, "the result was not traced"
    names = tuple(dict.fromkeys(prompt_sets))
    empty = np.zeros((0, result.block_size), np.int64)
    drafted = np.concatenate([empty, *result.drafted])
    confidence = None
    if result.confidence is not None:
        confidence = np.concatenate([empty.astype(np.float32), *result.confidence])

    def flat(rows: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *rows])

    return Traces(
        block_size=result.block_size,
        set_names=names,
        prompt_set=np.asarray([names.index(prompt_sets[prompt]) for prompt in prompts], np.int64),
        prompt=np.asarray(prompts, np.int64),
        request=np.repeat(np.arange(len(prompts)), result.rounds),
        accepted=flat(result.accepted_lengths),
        proposed=flat(result.proposal_lengths),
        emitted=flat(result.acceptance_lengths),
        usable=usable_positions(drafted, stop_tokens),
        confidence=confidence,
    )


def usable_positions(drafted: np.ndarray, stop_tokens: Sequence[int]) -> np.ndarray:
    """Drafts [R, G] -> [R] number of drafts up to and including the first stop token, G where there is none."""
    stops = np.isin(drafted, np.asarray(stop_tokens, np.int64))
    return np.where(stops.any(axis=1), stops.argmax(axis=1) + 1, drafted.shape[1])
