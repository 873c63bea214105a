"""Answers from servers: many questions at a time, retries, and what comes back as tokens of the target.

Conversations are independent of each other: each asks its next question as soon as it has the answer before it. Every
answer is in the log when it is used, so that a preparation that was killed asks again only what had no answer. Seeds
belong to questions; who is asked when, and which server answers, decides nothing else.
"""

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from dspark_jax.config import Config, DataConfig, InputError
from dspark_jax.data.answer_log import AnswerLog, Rejected
from dspark_jax.data.chat import encode, turn_end
from dspark_jax.data.endpoint import Endpoint, Refused, Said, Trouble, question_seed
from dspark_jax.data.regenerate import Answered, Conversation, Dialogues, Question
from dspark_jax.tokenizer import ChatTokenizer

COMPARED = 4
"""So many prompts of every server are compared where that takes requests of its own."""

REFUSALS = 8
"""A server that refuses so many questions before it has answered one is not asked further."""

LONGEST_WAIT = 60.0
"""Seconds before a retry at most, unless the server asks for more."""

SILENCE = 10.0
"""Seconds without a line about a server after one about it, unless it rests."""


@dataclasses.dataclass
class _State:
    """How it goes with a server.

    Attributes:
      endpoint: the server.
      most: questions that it is given at a time; halved when it has too many.
      busy: questions that it has now.
      answered: number of answers.
      refused: number of questions that it refused.
      compared: number of prompts that were compared by requests of their own.
      failures: rests in a row.
      until: end of its rest, on the monotonic clock.
      said: when a trouble with it was last said, on that clock.
    """

    endpoint: Endpoint
    most: float
    busy: int = 0
    answered: int = 0
    refused: int = 0
    compared: int = 0
    failures: int = 0
    until: float = 0.0
    said: float = -SILENCE


class Servers:
    """Servers that answer questions; used inside of one event loop.

    Attributes:
      failures: number of tries that gave no answer.
    """

    def __init__(self, endpoints: Sequence[Endpoint], config: DataConfig, say: Callable[[str], None]):
        """`say` is given lines about troubles."""
        self.config, self.settings, self.say = config, config.answers, say
        self.failures = 0
        self._states = [_State(endpoint, config.answers.concurrency) for endpoint in endpoints]
        self._changed = asyncio.Condition()

    async def close(self) -> None:
        """Ends all connections."""
        for state in self._states:
            await state.endpoint.close()

    async def answer(self, question: Question) -> tuple[Endpoint, Said]:
        """What a server says to a question, and which one.

        Raises:
          Rejected: it has no answer.
          InputError: nor will others have.
        """
        last: _State | None = None
        trouble = Trouble("no try")
        for attempt in range(self.settings.retries + 1):
            last = state = await self._free(last)
            try:
                said = await self._ask(state, question)
            except Trouble as error:
                self.failures += 1
                trouble = error
                if attempt < self.settings.retries:
                    await self._after(state, trouble, attempt)
            except Refused as error:
                self._refused(state, error)
            else:
                state.answered += 1
                state.failures, state.most = 0, min(state.most + 1 / state.most, self.settings.concurrency)
                return state.endpoint, said
        if trouble.answers:
            raise Rejected("server", str(trouble))
        assert last is not None
        raise InputError(
            f"{last.endpoint.url}: {trouble}, after {self.settings.retries} retries; when it answers again, run the "
            "same command: answers that are there are kept"
        )

    async def _free(self, last: _State | None) -> _State:
        """The server that has least to do, rather another than the `last` one; waits until there is one."""
        async with self._changed:
            while True:
                now = time.monotonic()
                free = [state for state in self._states if state.until <= now and state.busy < state.most]
                found = min(free, key=lambda state: (state is last, state.busy / state.most), default=None)
                if found is not None:
                    found.busy += 1
                    return found
                rests = [state.until - now for state in self._states if state.until > now]
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(rests, default=None))

    async def _ask(self, state: _State, question: Question) -> Said:
        compare = self.settings.mode == "chat" and state.compared < COMPARED
        state.compared += compare
        try:
            return await state.endpoint.ask(question, question_seed(self.config.seed, question), compare=compare)
        finally:
            state.busy -= 1
            async with self._changed:
                self._changed.notify_all()

    async def _after(self, state: _State, trouble: Trouble, attempt: int) -> None:
        """Waits as long as a trouble asks for; all do where it is the server's."""
        now = time.monotonic()
        if not trouble.rests:
            wait = self._wait(attempt)
            if now - state.said >= SILENCE:
                state.said = now
                self.say(f"answers: {state.endpoint.url}: {trouble}; asking again in {wait:.3g} s")
            await asyncio.sleep(wait)
        elif state.until <= now:  # else others have met with the same trouble
            wait = max(self._wait(state.failures), trouble.wait)
            state.until, state.failures = now + wait, state.failures + 1
            if trouble.limited:
                state.most = max(state.most / 2, 1)
            self.say(f"answers: {state.endpoint.url}: {trouble}; leaving it alone for {wait:.3g} s")

    def _wait(self, failures: int) -> float:
        """Seconds to wait after so many failures before this one."""
        return min(self.settings.retry_wait * 2 ** min(failures, 30), LONGEST_WAIT)

    def _refused(self, state: _State, error: Refused) -> None:
        state.refused += 1
        if state.refused >= REFUSALS and not state.answered:
            raise InputError(
                f"{state.endpoint.url} refuses every question ({error}); see data.answers for what is sent"
            ) from None
        raise Rejected("server", str(error)) from None


class Reader:
    """Makes tokens of what servers say, and checks that they were asked what we ask."""

    def __init__(
        self, tokenizer: ChatTokenizer, stop_tokens: Sequence[int], config: Config, say: Callable[[str], None]
    ):
        """`say` is given lines about prompts."""
        self.tokenizer, self.stop_tokens, self.say = tokenizer, stop_tokens, say
        self.settings, self.rows = config.data.answers, config.target.architecture.vocab_size
        self._said = False

    def tokens(self, question: Question, endpoint: Endpoint, said: Said) -> np.ndarray:
        """[length] int32 ids of an answer, up to its stop token or its room.

        Raises:
          InputError: the server reads other prompts, or its ids are not of this tokenizer.
          Rejected: the text is not all that the target has written.
        """
        self._check_prompt(question, endpoint, said)
        if said.hidden:
            raise Rejected(
                "server", f"the server keeps `{said.hidden}` apart from the text; use data.answers.mode=tokens"
            )
        ids = encode(self.tokenizer, said.text)["input_ids"] if said.ids is None else said.ids
        if not all(0 <= one < self.rows for one in ids):
            raise InputError(
                f"{endpoint.url}: an answer has token {max(ids)}, target.path has {self.rows}; serve this very target"
            )
        end = next((i for i, one in enumerate(ids) if one in self.stop_tokens), None)
        if end is not None:
            ids = ids[: end + 1]
        elif said.stopped:  # most servers keep the token to themselves
            ids = [*ids, self._stop(question)]
        return np.asarray(ids[: question.room], np.int32)

    def _stop(self, question: Question) -> int:
        """The stop token with which the template ends an answer."""
        closing = encode(self.tokenizer, turn_end(self.tokenizer, question.messages, question.conversation.options))
        first = closing["input_ids"][:1]
        return first[0] if first and first[0] in self.stop_tokens else self.stop_tokens[0]

    def _check_prompt(self, question: Question, endpoint: Endpoint, said: Said) -> None:
        """Compares what the server read with what it should have read, as far as it tells."""
        theirs = said.prompt_ids
        if theirs is None and said.prompt_text is not None:
            theirs = encode(self.tokenizer, said.prompt_text)["input_ids"]
        ours = question.ids
        if theirs is not None and theirs != ours:
            at = next(
                (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
            )
            first, second = (self.tokenizer.decode(ids[at : at + 8]) for ids in (ours, theirs))
            what = f"at token {at} ours has {first!r}, its has {second!r}"
        elif theirs is None and said.prompt_length not in (None, len(ours)):
            what = f"ours has {len(ours)} tokens, its has {said.prompt_length}"
        else:
            return
        remedy = "serve it with the tokenizer and chat template of target.path"
        if self.settings.mode == "chat":
            remedy += ", or use data.answers.mode=tokens"
        where = f"the question of {question.conversation.prompt.file}:{question.conversation.prompt.line}"
        line = f"{endpoint.url} reads another prompt than ours: in {where}, {what}; {remedy}"
        if self.settings.check_prompts:
            raise InputError(f"{line} (data.answers.check_prompts=False goes on all the same)")
        if not self._said:
            self._said = True
            self.say(f"warning: {line}")


def ask_servers(
    todo: Sequence[Conversation],
    config: Config,
    dialogues: Dialogues,
    log: AnswerLog,
    on_rejected: Callable[[Conversation, Rejected], None],
    progress: Callable[[int, int], None],
    say: Callable[[str], None],
) -> list[Answered]:
    """Answers all turns of all conversations by the servers of `config.data.answers`.

    Args:
      todo: conversations.
      config: who is asked, and how.
      dialogues: of these conversations, with the target's tokenizer and the ids that end an answer.
      log: answers that are there already are not asked for again.
      on_rejected: called with each conversation that is left out, and why, at the end.
      progress: called with a number of turns that are done, and the number of failures so far.
      say: called with lines for the user.

    Returns:
      The conversations that have an answer, in their order.

    Raises:
      InputError: a server cannot be used, or does not answer; what there is stays in the log.
    """
    endpoints = [Endpoint(url, config.data, dialogues.stop_tokens) for url in config.data.answers.endpoints]
    reader = Reader(dialogues.tokenizer, dialogues.stop_tokens, config, say)

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(_unhandled)
        servers, waiting = Servers(endpoints, config.data, say), iter(todo)

        async def work() -> None:
            for conversation in waiting:
                await _converse(conversation, dialogues, servers, reader, log, progress)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(config.data.answers.concurrency, len(todo))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            await servers.close()

    _run(run())
    return dialogues.result(todo, on_rejected)


async def _converse(
    conversation: Conversation,
    dialogues: Dialogues,
    servers: Servers,
    reader: Reader,
    log: AnswerLog,
    progress: Callable[[int, int], None],
) -> None:
    """Asks the questions of a conversation, one after the other."""
    for turn in range(len(conversation.questions)):
        question = dialogues.question(conversation, turn)
        if question is None:
            return
        try:
            answer = await _answer(question, servers, reader, log)
        except Rejected as error:
            dialogues.fail(question, error)
            progress(1, servers.failures)
            return
        goes_on = dialogues.take(question, answer)
        progress(1, servers.failures)
        if not goes_on:
            return


async def _answer(question: Question, servers: Servers, reader: Reader, log: AnswerLog) -> np.ndarray:
    """The answer in the log, or else a server's, which then is in the log."""
    sample_id, turn = question.conversation.sample_id, question.turn
    if failure := log.failure(sample_id, turn):
        raise failure
    found = log.get(sample_id, turn)
    if found is not None:
        return found
    try:
        endpoint, said = await servers.answer(question)
        answer = reader.tokens(question, endpoint, said)
    except Rejected as error:
        log.put_failure(sample_id, turn, error)
        raise
    log.put(sample_id, turn, answer, text=said.ids is None)
    return answer


def _unhandled(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Says what asyncio says, but nothing of Ctrl-C: that has come out already."""
    if not isinstance(context.get("exception"), KeyboardInterrupt):
        loop.default_exception_handler(context)


def _run(work: Coroutine[None, None, None]) -> None:
    """Runs a coroutine to its end, also in a thread that has an event loop, as notebooks do."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, work).result()
