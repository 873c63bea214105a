"""Decodes held-out prompt sets for evaluation: answers, speed, and whether greedy decoding is reproduced.

Every call of `generate` is padded to the same prompt width and batch size, so that all prompt sets share an executable.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.architecture import TargetArchitecture
from dspark_jax.data.chat import ChatError, Options, answer_text, prompt_tokens, with_system
from dspark_jax.data.prompts import Message
from dspark_jax.data.regenerate import Conversation, Rejected, next_prompt
from dspark_jax.engine.generate import generate, ladder
from dspark_jax.engine.models import Models
from dspark_jax.engine.result import DecodeResult
from dspark_jax.engine.sampling import fold_keys, request_keys
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.evaluation.run_scheduler import run_scheduler
from dspark_jax.target.interface import LanguageModel
from dspark_jax.tokenizer import ChatTokenizer

OnRejected = Callable[[Conversation, Rejected], None]
Advance = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The models and what all decoding of an evaluation has in common.

    Attributes:
      models: target and drafter.
      tokenizer: the target's.
      stop_tokens: ids that end an answer.
      max_new_tokens: budget of an answer.
      batch_size: requests decoded together.
      seed: of the request keys.
      step: of the checkpoint that the drafter is from; None where it was loaded already.
      system_prompt: that conversations begin with; "" is none.
      thinking: the target is asked to think before it answers.
      workdir: of the run that it was loaded from.
    """

    models: Models
    tokenizer: ChatTokenizer
    stop_tokens: tuple[int, ...]
    max_new_tokens: int
    batch_size: int
    seed: int
    step: int | None = None
    system_prompt: str = ""
    thinking: bool = False
    workdir: Path | None = None

    def scheduler(self, name: str, *, slots: int = 1, confidence: float | None = None) -> Scheduler:
        """A rule by its name, with the run's cost table for `slots` requests and its calibration (`run_scheduler`).

        Raises:
          InputError: see `run_scheduler`.
          ValueError: this is no run that was loaded.
        """
        if self.workdir is None:
            raise ValueError("scheduler(...) is of a run that was loaded; use the functions of dspark_jax.schedulers")
        return run_scheduler(name, self.models.drafter, self.workdir, slots=slots, confidence=confidence)

    def prompt(self, text: str) -> list[int]:
        """A user's message in the target's chat template, as token ids."""
        messages = with_system([{"role": "user", "content": text}], self.system_prompt)
        return prompt_tokens(self.tokenizer, messages, Options(self.thinking))

    def decode(
        self,
        requests: "Requests",
        temperature: float,
        *,
        speculative: bool,
        batch_size: int = 0,
        trace: bool = False,
        advance: Advance | None = None,
        scheduler: Scheduler | None = None,
    ) -> DecodeResult:
        """Decodes requests, with or without the drafter.

        The random numbers of a request follow from its prompt and turn, so they are the same in every batch.
        """
        streams = request_keys(self.seed, jnp.asarray([item.stream for item in requests.items], jnp.int32))
        keys = fold_keys(streams, jnp.asarray([item.turn for item in requests.items], jnp.int32))
        return generate(
            self.models if speculative else self.models.plain(),
            [item.prompt for item in requests.items],
            max_new_tokens=self.max_new_tokens,
            temperature=temperature,
            stop_tokens=self.stop_tokens,
            keys=keys,
            batch_size=batch_size or self.batch_size,
            prompt_width=requests.width,
            scheduler=scheduler,
            trace=trace,
            progress=advance,
        )


@dataclasses.dataclass(frozen=True)
class Request:
    """A question of a conversation.

    Attributes:
      prompt: token ids.
      owner: index of its conversation.
      stream: random stream of its conversation.
      turn: 0 for the first question.
    """

    prompt: list[int]
    owner: int
    stream: int
    turn: int


@dataclasses.dataclass(frozen=True)
class Requests:
    """Questions that are decoded alike: prompts are padded to `width` tokens."""

    items: list[Request]
    width: int

    def take(self, indices: Sequence[int]) -> "Requests":
        """Some of them, padded as before."""
        return Requests([self.items[i] for i in indices], self.width)

    @property
    def owners(self) -> np.ndarray:
        """[N] index of each one's conversation."""
        return np.asarray([item.owner for item in self.items], np.int64)


def position_limit(target: TargetArchitecture, max_new_tokens: int) -> int:
    """Longest prompt that a target has positions for, beside its answer."""
    positions = target.max_position_embeddings
    return positions - max_new_tokens if positions else 1 << 30


def first_requests(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], limit: int, on_rejected: OnRejected
) -> tuple[list[Conversation], Requests]:
    """The first question of every conversation; those that cannot be asked, or are longer than `limit`, are rejected.

    Returns:
      The conversations that are left, and their requests in that order.
    """
    kept, items = [], []
    for conversation in conversations:
        try:
            _, ids = next_prompt(tokenizer, conversation, conversation.opening, 0)
            if len(ids) > limit:
                raise Rejected("prompt_too_long", f"{len(ids)} tokens, at most {limit} (data.max_prompt_length)")
        except ChatError as error:
            on_rejected(conversation, Rejected(error.reason, str(error)))
        except Rejected as error:
            on_rejected(conversation, error)
        else:
            items.append(Request(ids, len(kept), conversation.sample_id, turn=0))
            kept.append(conversation)
    return kept, Requests(items, ladder(max((len(item.prompt) for item in items), default=1)))


def answer(
    decoder: Decoder,
    conversations: Sequence[Conversation],
    first: Requests,
    temperature: float,
    *,
    trace: bool = False,
    advance: Advance | None = None,
) -> tuple[Requests, DecodeResult]:
    """Answers all turns of all conversations speculatively: the first turn of each, then the second ones, and so on.

    A later question is asked with the answers before it in its prompt. Questions for which the target has no positions
    left are not asked.

    Returns:
      All requests, with more than one per conversation where it has several turns, and their answers.
    """
    histories = [one.opening for one in conversations]
    requests, asked, results = first, first, []
    while asked.items:
        result = decoder.decode(asked, temperature, speculative=True, trace=trace, advance=advance)
        results.append(result)
        following = []
        for item, ids in zip(asked.items, result.tokens, strict=True):
            questions = conversations[item.owner].questions
            if item.turn + 1 == len(questions):
                continue
            reply: Message = {"role": "assistant", "content": answer_text(decoder.tokenizer, ids.tolist())}
            histories[item.owner] = (*histories[item.owner], questions[item.turn], reply)
            _, prompt = next_prompt(decoder.tokenizer, conversations[item.owner], histories[item.owner], item.turn + 1)
            if len(prompt) <= position_limit(decoder.models.arch, decoder.max_new_tokens):
                following.append(dataclasses.replace(item, prompt=prompt, turn=item.turn + 1))
        longest = max((len(item.prompt) for item in following), default=1)
        asked = Requests(following, max(requests.width, ladder(longest)))
        requests = Requests(requests.items + following, asked.width)
    return requests, join(results)


def join(results: Sequence[DecodeResult]) -> DecodeResult:
    """The requests of several results as one."""
    joined: dict[str, Any] = {"block_size": results[0].block_size}
    joined["stopped"] = np.concatenate([one.stopped for one in results])
    for name in ("tokens", "acceptance_lengths", "accepted_lengths", "proposal_lengths", "drafted", "confidence"):
        parts = [getattr(one, name) for one in results]
        joined[name] = None if parts[0] is None else [rows for part in parts for rows in part]
    return DecodeResult(**joined)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Where a speculative greedy answer first leaves the plain one.

    Attributes:
      request: its index.
      position: index of the token in the answer.
      tokens: (plain, speculative), -1 where the answer had ended.
      gap: the target's logit of the plain token minus that of the other, in one pass over the answer; near 0 the two
        are tied and rounding decides, NaN where an answer had ended.
    """

    request: int
    position: int
    tokens: tuple[int, int]
    gap: float


def compare_greedy(
    decoder: Decoder, requests: Requests, speculative: Sequence[np.ndarray], advance: Advance | None = None
) -> list[Difference]:
    """Decodes all requests plainly at temperature 0 and compares token for token with the speculative answers."""
    plain = decoder.decode(requests, 0.0, speculative=False, advance=advance).tokens
    differences = []
    for number, (want, got) in enumerate(zip(plain, speculative, strict=True)):
        position = first_difference(want, got)
        if position is not None:
            pair = tuple(int(ids[position]) if position < len(ids) else -1 for ids in (want, got))
            gap = _logit_gap(decoder, [*requests.items[number].prompt, *want[:position].tolist()], pair)
            differences.append(Difference(number, position, (pair[0], pair[1]), gap))
    return differences


def first_difference(a: np.ndarray, b: np.ndarray) -> int | None:
    """First index at which two sequences differ, the shorter one's length if it is a prefix; None if they are equal."""
    shared = min(len(a), len(b))
    unequal = np.flatnonzero(a[:shared] != b[:shared])
    if len(unequal):
        return int(unequal[0])
    return shared if len(a) != len(b) else None


def _logit_gap(decoder: Decoder, prefix: list[int], pair: tuple[int, ...]) -> float:
    """Logit of pair[0] minus that of pair[1] after `prefix`."""
    if min(pair) < 0:
        return float("nan")
    tokens = np.zeros((1, ladder(len(prefix))), np.int32)  # rows after the prefix are invisible to it
    tokens[0, : len(prefix)] = prefix
    logits = _logits_at(decoder.models.target, jnp.asarray(tokens), jnp.int32(len(prefix) - 1))
    return float(logits[pair[0]] - logits[pair[1]])


@jax.jit
def _logits_at(target: LanguageModel, tokens: jax.Array, row: jax.Array) -> jax.Array:
    """Logits [V] after tokens[0, row], without a cache."""
    positions = jnp.arange(tokens.shape[1])[None]
    return target.unembed(target.forward(tokens, positions).last_hidden[:, row])[0]
