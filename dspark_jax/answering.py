"""The target answers questions here, with our own engine: slots are filled again as soon as an answer has ended.

`prepare` lets it answer alone; a run that is being trained lends it its drafter (`refresh`).

A round of the engine reads the cache of every slot up to its capacity, and few answers are as long as the longest may
be. So questions begin in an engine of a small capacity; answers that outgrow it go on from what they have in one of
twice the capacity, and so on. The draws of a request depend on its stream and on its position only, so an answer does
not depend on its neighbours, nor on the capacities that it went through (but for rounding: other shapes sum in another
order).
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from dspark_jax.config import Config, DataConfig
from dspark_jax.data.chat import load_tokenizer, stop_tokens
from dspark_jax.data.regenerate import Decode, Question
from dspark_jax.engine.models import Models, when_loaded
from dspark_jax.engine.request import Request
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.engine.serving import Engine
from dspark_jax.run import Run
from dspark_jax.target.loading import load_target

SMALLEST_CAPACITY = 256
"""Tokens of prompt and answer in the first engine; in each further one twice as many, up to `data.max_length`."""

LEAST_ROOM = 64
"""An engine has room for so many further tokens of an answer at least, or for all of them."""

CHUNK = 256
"""Tokens of a prompt that are read at a time; 64 in the smallest engine, where prompts are short."""


def target_decoder(run: Run) -> Decode:
    """Answers by the run's target without a drafter; the target is loaded here.

    The sample id of a question is the number of its random stream.
    """
    config, mesh = run.config, run.mesh
    return make_decoder(config, Models(when_loaded(load_target(config.target, mesh))), mesh)


@dataclasses.dataclass
class Effort:
    """What answers have taken.

    Attributes:
      answers: that are complete.
      tokens: in them.
      rounds: of single requests.
      drafting_rounds: those that drafted.
      emitted: tokens of these, bonus tokens included.
    """

    answers: int = 0
    tokens: int = 0
    rounds: int = 0
    drafting_rounds: int = 0
    emitted: int = 0

    def add(self, request: Request) -> None:
        """Counts a request that has ended, and was traced."""
        traced = [piece.round for piece in request.pieces if piece.round is not None]
        drafting = [one for one in traced if one.drafted]
        self.rounds += len(traced)
        self.drafting_rounds += len(drafting)
        self.emitted += sum(one.accepted + (one.next_token is not None) for one in drafting)

    def report(self) -> dict[str, Any]:
        """JSON-able; `accepted_length` is tokens per round that drafted, None if none did."""
        length = self.emitted / self.drafting_rounds if self.drafting_rounds else None
        counts = {name: value for name, value in vars(self).items() if name != "emitted"}
        return counts | {"accepted_length": length}


def make_decoder(
    config: Config, models: Models, mesh: Mesh, scheduler: Scheduler | None = None, effort: Effort | None = None
) -> Decode:
    """Answers by models that are loaded.

    Args:
      config: resolved; `data` says how answers are sampled.
      models: the config's target, with or without a drafter.
      mesh: where they live.
      scheduler: decides how many drafts are verified; None verifies all.
      effort: is added to.
    """
    vocabulary = config.target.architecture.vocab_size
    stops = [one for one in stop_tokens(config.target.path, load_tokenizer(config.target.path)) if one < vocabulary]

    def decode(ask: Callable[[], Question | None]) -> Iterator[tuple[Question, list[int]]]:
        return _Ladder(models, mesh, config.data, stops, ask, scheduler, effort).answers()

    return decode


class _Ladder:
    """Questions by the capacity that they need next, and the engine that has some of them."""

    def __init__(
        self,
        models: Models,
        mesh: Mesh,
        data: DataConfig,
        stops: Sequence[int],
        ask: Callable[[], Question | None],
        scheduler: Scheduler | None,
        effort: Effort | None,
    ):
        self.models, self.mesh, self.data, self.stops, self.ask = models, mesh, data, stops, ask
        self.scheduler, self.effort = scheduler, effort
        self.waiting: dict[int, collections.deque[tuple[Question, list[int]]]] = {}

    def answers(self) -> Iterator[tuple[Question, list[int]]]:
        """Questions with their answers, until there are no more."""
        while True:
            needed = [capacity for capacity, questions in self.waiting.items() if questions]
            if needed:
                yield from self._answers_of(min(needed))
            elif question := self.ask():
                self._put(question, [])
            else:
                return

    def _put(self, question: Question, written: list[int]) -> None:
        """Lets a question wait for an engine that has room for more of its answer than what is written."""
        length = len(question.ids) + len(written)
        least, capacity = length + min(LEAST_ROOM, question.room - len(written)), SMALLEST_CAPACITY
        while capacity < least:
            capacity *= 2
        capacity = min(capacity, self.data.max_length)
        self.waiting.setdefault(capacity, collections.deque()).append((question, written))

    def _next(self, capacity: int) -> tuple[Question, list[int]] | None:
        """The next question for an engine of this capacity; others that are asked meanwhile have to wait."""
        while not self.waiting[capacity]:
            question = self.ask()
            if question is None:
                return None
            self._put(question, [])
        return self.waiting[capacity].popleft()

    def _answers_of(self, capacity: int) -> Iterator[tuple[Question, list[int]]]:
        """Answers by one engine, until nobody needs its capacity; those that outgrow it wait for the next one."""
        slots = self.data.decode_batch_size
        with jax.set_mesh(self.mesh):
            engine = Engine(
                self.models,
                slots=slots,
                capacity=capacity,
                scheduler=self.scheduler,
                stop_tokens=self.stops,
                max_queue=2 * slots,
                prefill_chunk=64 if capacity <= SMALLEST_CAPACITY else CHUNK,
                prefill_chunks=slots,
                max_stop_tokens=max(len(self.stops), 8),
            )
        live: dict[Request, tuple[Question, list[int]]] = {}
        try:
            while True:
                while len(live) < 2 * slots and (item := self._next(capacity)):
                    live[self._submit(engine, capacity, *item)] = item
                if not live:
                    return
                engine.step()
                for request in [request for request in live if request.done]:
                    question, written = live.pop(request)
                    written = [*written, *request.result().tokens]
                    if self.effort:
                        self.effort.add(request)
                    if written[-1] in self.stops or len(written) == question.room:
                        if self.effort:
                            self.effort.answers += 1
                            self.effort.tokens += len(written)
                        yield question, written
                    else:
                        self._put(question, written)
        finally:
            engine.close()

    def _submit(self, engine: Engine, capacity: int, question: Question, written: list[int]) -> Request:
        prompt, data = [*question.ids, *written], self.data
        return engine.submit(
            prompt,
            max_new_tokens=min(question.room - len(written), capacity - len(prompt)),
            temperature=data.temperature,
            top_p=data.answers.top_p,
            top_k=data.answers.top_k,
            min_p=data.answers.min_p,
            seed=data.seed,
            random_stream=question.conversation.sample_id,
            trace=self.effort is not None,
        )
