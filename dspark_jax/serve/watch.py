"""Requests to be watched round by round: what there is to choose from, and how one is asked. No HTTP is in here."""

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspark_jax.config import InputError
from dspark_jax.data.samples import Tally
from dspark_jax.engine.request import Request
from dspark_jax.engine.schedulers import SCHEDULERS
from dspark_jax.engine.serving import Engine
from dspark_jax.evaluation.measured_costs import shown_costs
from dspark_jax.evaluation.setup import first_questions
from dspark_jax.kinds import KINDS
from dspark_jax.ops.sampling import GREEDY_BELOW
from dspark_jax.serve.pool import PLAIN, Member, Pool
from dspark_jax.serve.rounds import Event, events, token_text

MOST_USERS = 64
"""Background users."""

MOST_TOKENS = 512
"""Of an answer that is watched."""

PROMPTS = 24
"""Prompts of a domain that can be chosen."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request to be watched.

    Attributes:
      model: a name of the pool.
      scheduler: one of `SCHEDULERS`.
      prompt: the user's message, or None for one of the held-out prompts.
      domain: a prompt set.
      index: of its prompt.
      temperature: 0 is greedy.
      seed: of what is drawn.
      max_tokens: longest answer.
    """

    model: str
    scheduler: str
    prompt: str | None = None
    domain: str = ""
    index: int = 0
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = 96

    @property
    def greedy(self) -> bool:
        """Whether it is decoded as if the temperature were 0."""
        return self.temperature < GREEDY_BELOW


@dataclasses.dataclass(frozen=True)
class Question:
    """A held-out prompt: the text of its first message of the user, and its ids."""

    text: str
    ids: list[int]


class Watch:
    """Asks the models of a pool."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self.text_of = token_text(pool.tokenizer)
        self._compiled: set[tuple[str, str, bool]] = set()
        self._compiling = threading.Lock()

    @functools.cached_property
    def questions(self) -> dict[str, list[Question]]:
        """Held-out prompts by domain, the name of their set without `.heldout`; none where they cannot be read."""
        pool, config = self.pool, self.pool.config
        found: dict[str, list[Question]] = {}
        with contextlib.closing(Tally(Path(os.devnull))) as tally:
            try:
                asked, first = first_questions(config, pool.tokenizer, 1, tally, config.eval.prompts, PROMPTS)
            except InputError:  # the files were elsewhere; one's own text can still be asked
                return {}
        for conversation, request in zip(asked, first.items, strict=True):
            domain = conversation.prompt.prompt_set.removesuffix(".heldout")
            if len(request.prompt) < pool.sizes.capacity:
                text = str(conversation.questions[0]["content"])
                found.setdefault(domain, []).append(Question(text, request.prompt))
        return found

    def state(self) -> dict[str, Any]:
        """What there is to choose from, as JSON."""
        pool = self.pool
        return {
            "models": [_described(pool.member(name)) for name in pool.names],
            "default": pool.default,
            "plain": PLAIN,
            "domains": {name: [one.text for one in questions] for name, questions in self.questions.items()},
            "schedulers": list(SCHEDULERS),
            "scheduler": pool.sizes.scheduler,
            "slots": pool.sizes.slots,
            "device": pool.device,
            "costs": shown_costs(),
            "limits": {"users": MOST_USERS, "max_tokens": min(MOST_TOKENS, pool.sizes.capacity - 1)},
        }

    def ids(self, ask: Ask) -> list[int]:
        """The prompt of a request.

        Raises:
          InputError: there is no such prompt, or it is empty.
        """
        if ask.prompt is not None:
            if not ask.prompt.strip():
                raise InputError("prompt is empty; write something")
            return self.pool.prompt([{"role": "user", "content": ask.prompt}])
        questions = self.questions.get(ask.domain)
        if questions is None:
            known = ", ".join(self.questions) or "none: the files of eval.prompts cannot be read here"
            raise InputError(f"domain={ask.domain!r} is not known (there are {known}); give prompt, a text")
        if not 0 <= ask.index < len(questions):
            raise InputError(f"index={ask.index}: {ask.domain} has prompts 0 to {len(questions) - 1}; choose one")
        return questions[ask.index].ids

    def ready(self, ask: Ask) -> bool:
        """Whether everything that it needs has been compiled."""
        return (ask.model, ask.scheduler, ask.greedy) in self._compiled

    def engine(self, ask: Ask) -> Engine:
        """The engine for a request, with what it needs compiled, so that no round's time has that in it.

        Raises:
          InputError, EngineClosed: see `Pool.engine`.
        """
        engine = self.pool.engine(ask.model, ask.scheduler)
        with self._compiling:
            if not self.ready(ask):
                some = self.pool.prompt([{"role": "user", "content": "Hello."}])
                engine.submit(some, max_new_tokens=3, temperature=ask.temperature, block=True).result()
                self._compiled.add((ask.model, ask.scheduler, ask.greedy))
        return engine

    def submit(self, ask: Ask) -> Request:
        """Queues a request.

        Raises:
          InputError: the prompt, a name or a setting is wrong, or the two are too long for the engine.
          QueueFull, EngineClosed, EngineFailed: see `Engine.submit`.
        """
        ids = self.ids(ask)
        settings = {"temperature": ask.temperature, "seed": ask.seed, "max_new_tokens": ask.max_tokens}
        return self.engine(ask).submit(ids, trace=True, **settings)

    def events(self, request: Request) -> Iterator[Event]:
        """`rounds.events` of a request."""
        return events(request, self.text_of)


def _described(member: Member) -> dict[str, Any]:
    models = member.models
    usable = [name for name, rule in SCHEDULERS.items() if models.confident or not rule.reads_confidence]
    return {
        "name": member.name,
        "kind": member.kind,
        "about": KINDS[member.kind].description if member.kind in KINDS else "the target alone",
        "block_size": models.block_size,
        "confident": models.confident,
        "schedulers": usable if models.drafts else ["fixed"],
    }
