"""A served request as its owner sees it: a stream of committed tokens and text, its end, and what it took."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from dspark_jax.engine import arguments
from dspark_jax.tokenizer import Tokenizer

FinishReason = Literal["stop", "length", "cancelled", "error"]
FINISH_REASONS: tuple[FinishReason, ...] = ("stop", "length", "cancelled", "error")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a request is decoded; checked by `Engine.submit`, which describes them."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    random_stream: int
    stop_tokens: tuple[int, ...]
    stop_strings: tuple[str, ...]
    trace: bool


@dataclasses.dataclass(frozen=True)
class TracedRound:
    """One round of one request.

    Attributes:
      drafted: G drafted tokens; none in a round without drafts.
      confidence: G confidence logits, or None.
      admitted: drafts that were verified; in a round ended by an accepted stop token, those up to it.
      accepted: drafts that were committed.
      next_token: the bonus or correction, or None after an accepted stop token.
      running: requests that took part in the round.
      scheduled: tokens that were verified for all of them, each one's anchor included; counted as `admitted` is.
      rows: rows that the target computed for them, the padding of the batch included.
    """

    drafted: tuple[int, ...]
    confidence: tuple[float, ...] | None
    admitted: int
    accepted: int
    next_token: int | None
    running: int
    scheduled: int
    rows: int

    @property
    def emitted(self) -> int:
        """Its accepted length: the accepted drafts, and the bonus or correction."""
        return self.accepted + (self.next_token is not None)


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one round (or the prompt's last chunk) committed.

    Attributes:
      tokens: ids, a stop token included.
      text: what can be shown now. Text that might become a stop string, and bytes that are no whole character yet, are
        held back, so this is not the text of `tokens` alone. Empty without a tokenizer.
      round: for a traced request, what the round did; None for the prompt's last chunk.
      seconds: when it was here, since the request was submitted.
    """

    tokens: tuple[int, ...]
    text: str
    round: TracedRound | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """What a request took, in seconds since it was submitted; None where that point was not reached.

    Attributes:
      queue_seconds: until it had a slot.
      first_token_seconds: until its first token was here.
      total_seconds: until it ended.
      rounds: decoding rounds.
      accepted: drafts that were committed.
      admitted: drafts that were verified.
      emitted: tokens that the rounds gave, counted as in `DecodeResult.acceptance_lengths`; over `rounds`, it is tau.
    """

    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    total_seconds: float | None = None
    rounds: int = 0
    accepted: int = 0
    admitted: int = 0
    emitted: int = 0


@dataclasses.dataclass(frozen=True)
class RequestResult:
    """A request that has ended.

    Attributes:
      tokens: all committed tokens, a stop token included, up to the token that completed a stop string.
      text: their text without special tokens, up to the stop token or stop string. Empty without a tokenizer.
      finish_reason: `stop` (token or string), `length`, `cancelled`, or `error`.
      error: one line if the engine failed, else None.
      metrics: times and counts.
    """

    tokens: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    error: str | None
    metrics: RequestMetrics


@dataclasses.dataclass
class EngineMetrics:
    """Totals since the engine was made.

    Attributes:
      submitted: requests that were accepted into the queue.
      rejected: requests refused as bad input.
      refused: requests refused because the queue was full.
      finished: how many ended for each reason.
      rounds: decoding rounds launched.
      chunks: prompt chunks launched.
      tokens: tokens handed to requests.
      accepted: drafts committed.
      admitted: drafts verified.
      rows: rows that the target computed in rounds, whoever they were for.
      shares: rounds counted once for every request in them.
      emitted: tokens that the rounds gave, as in `RequestMetrics`; over `shares`, it is tau.
    """

    submitted: int = 0
    rejected: int = 0
    refused: int = 0
    finished: dict[FinishReason, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))
    rounds: int = 0
    chunks: int = 0
    tokens: int = 0
    accepted: int = 0
    admitted: int = 0
    rows: int = 0
    shares: int = 0
    emitted: int = 0


class TextStream:
    """Turns tokens into text as they come, and finds stop strings wherever tokens end."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stop_strings = stop_strings
        self.stopped = False
        self._ids: list[int] = []
        self._start = self._shown = 0  # the window of ids that is decoded, and those in it whose text has been given
        self._held = ""

    def push(self, token: int) -> str:
        """Text that can be shown after one more token; sets `stopped` if a stop string is complete."""
        self._ids.append(token)
        return self._release(self._fresh(final=False), final=False)

    def flush(self) -> str:
        """The rest, when no token follows."""
        return self._release(self._fresh(final=True), final=True)

    def _fresh(self, *, final: bool) -> str:
        """Text that the newest ids add.

        Some tokenizers decode an id differently at the start of a text, so ids before it are decoded along; a character
        of several bytes may end in a later token.
        """
        before, now = self._decode(self._ids[self._start : self._shown]), self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) if ids else ""

    def _release(self, fresh: str, *, final: bool) -> str:
        """Splits what is held back and `fresh` into what is shown and what might still become a stop string."""
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self.stop_strings) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = 0 if final else max((_overlap(text, stop) for stop in self.stop_strings), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that ends `text`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Request:
    """Handle of a submitted request: iterate over it for its pieces, or wait for its `result`.

    Made by `Engine.submit`. If the engine has no thread of its own, waiting drives it. Any number of threads may
    iterate; each sees every piece.
    """

    def __init__(
        self,
        number: int,
        prompt: np.ndarray,
        settings: Settings,
        stream: TextStream | None,
        drive: Callable[[float | None], bool],
        ended: Callable[["Request"], None],
    ):
        """`drive` advances the engine if it can within some seconds, or returns False if the engine's thread does;
        `ended` is called once."""
        self.number = number
        self.prompt = prompt
        self.settings = settings
        self.changed = threading.Condition()
        self.finish_reason: FinishReason | None = None
        self.error: str | None = None
        self.metrics = RequestMetrics()
        self.pieces: list[Piece] = []
        self._stream, self._drive, self._ended = stream, drive, ended
        self._on_change: Callable[[], None] | None = None
        self._submitted = time.monotonic()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    def __iter__(self) -> Iterator[Piece]:
        """Its pieces from the first on, as they come; ends with the request."""
        at = 0
        while True:
            self._until(lambda at=at: at < len(self.pieces) or self.done)
            if at >= len(self.pieces):
                return
            yield self.pieces[at]
            at += 1

    def result(self, timeout: float | None = None) -> RequestResult:
        """Waits until it has ended.

        Raises:
          TimeoutError: it has not ended after `timeout` seconds; see `Engine` for what they are without a thread.
          InputError: `timeout` is no number of seconds.
        """
        self._until(lambda: self.done, arguments.seconds("timeout", timeout))
        assert self.finish_reason is not None
        tokens = tuple(token for piece in self.pieces for token in piece.tokens)
        text = "".join(piece.text for piece in self.pieces)
        return RequestResult(tokens, text, self.finish_reason, self.error, self.metrics)

    def _until(self, ready: Callable[[], bool], timeout: float | None = None) -> None:
        started = time.monotonic()
        while not ready():
            left = None if timeout is None else timeout - (time.monotonic() - started)
            if left is not None and left <= 0:
                raise TimeoutError(f"request {self.number} has not ended after {timeout} seconds")
            if not self._drive(left):
                with self.changed:
                    self.changed.wait_for(ready, left)

    def cancel(self) -> bool:
        """Ends it with what it has; False if it had ended already."""
        return self.finish("cancelled")

    def on_change(self, call: Callable[[], None]) -> None:
        """Has `call` called whenever there is a new piece and at the end, for those who cannot wait in a thread.

        It is called in the engine's thread, which it must not hold up; once now, for what has happened already.
        """
        with self.changed:
            self._on_change = call
            call()

    # What follows is called by the engine.

    def finish(self, reason: FinishReason, error: str | None = None) -> bool:
        """Ends it, once; later calls change nothing and return False."""
        with self.changed:
            if self.done:
                return False
            rest = "" if self._stream is None or self._stream.stopped else self._stream.flush()
            if rest:
                self.pieces.append(Piece((), rest, seconds=self._age()))
            self._close(reason, error)
        self._ended(self)
        return True

    def admitted(self) -> None:
        """Notes that it has a slot."""
        with self.changed:
            self.metrics = dataclasses.replace(self.metrics, queue_seconds=self._age())

    def receive(
        self, tokens: Sequence[int], ended: FinishReason | None, traced: TracedRound | None, emitted: int
    ) -> int:
        """Takes what a launch committed for it.

        Args:
          tokens: new ids.
          ended: why the device ended it with these tokens, or None.
          traced: what the round did, or None for the prompt's last chunk.
          emitted: tokens that the round counts.

        Returns:
          How many tokens it kept: fewer than given after a stop string, none if it had ended before.
        """
        with self.changed:
            if self.done:
                return 0
            kept, text, stopped = self._read(tokens, ended)
            age, metrics = self._age(), self.metrics
            if metrics.first_token_seconds is None and kept:
                metrics = dataclasses.replace(metrics, first_token_seconds=age)
            if traced is not None:
                metrics = dataclasses.replace(
                    metrics,
                    rounds=metrics.rounds + 1,
                    accepted=metrics.accepted + traced.accepted,
                    admitted=metrics.admitted + traced.admitted,
                    emitted=metrics.emitted + emitted,
                )
            self.metrics = metrics
            self.pieces.append(Piece(tuple(tokens[:kept]), text, traced if self.settings.trace else None, age))
            reason: FinishReason | None = "stop" if stopped else ended
            if reason is not None:
                self._close(reason, None)
            else:
                self._tell()
        if reason is not None:
            self._ended(self)
        return kept

    def _read(self, tokens: Sequence[int], ended: FinishReason | None) -> tuple[int, str, bool]:
        """(tokens kept, text to show, whether a stop string is complete)."""
        stream = self._stream
        if stream is None:
            return len(tokens), "", False
        # A stop token is no text.
        shown = len(tokens) - (1 if ended == "stop" else 0)
        text = ""
        for number, token in enumerate(tokens[:shown]):
            text += stream.push(token)
            if stream.stopped:
                return number + 1, text, True
        if ended is not None:
            text += stream.flush()
        return len(tokens), text, stream.stopped

    def _close(self, reason: FinishReason, error: str | None) -> None:
        self.metrics = dataclasses.replace(self.metrics, total_seconds=self._age())
        self.finish_reason, self.error = reason, error
        self._tell()

    def _tell(self) -> None:
        """Wakes everybody who waits."""
        self.changed.notify_all()
        if self._on_change is not None:
            self._on_change()

    def _age(self) -> float:
        return time.monotonic() - self._submitted
