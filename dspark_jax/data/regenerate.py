"""Answers by the target: conversations are answered turn by turn, by a decoder that is passed in.

A drafter must learn what its own target says, so prompts are answered by the target even where a data set brings
answers along (paper, section 4). Decoding itself is not here: `prepare` passes a function that answers questions.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dspark_jax.config import DataConfig
from dspark_jax.data.answer_log import AnswerLog, Rejected
from dspark_jax.data.chat import PLAIN, ChatError, Options, answer_text, prompt_tokens, with_system
from dspark_jax.data.messages import has_tools
from dspark_jax.data.prompts import Message, Prompt
from dspark_jax.data.thinking import NEVER, Thinking
from dspark_jax.data.turns import has_control_tokens, renderable
from dspark_jax.tokenizer import ChatTokenizer


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A prompt to be answered.

    Attributes:
      sample_id: unique; also the random stream of its answers, so they do not depend on which others are decoded.
      prompt: where it comes from.
      opening: the system or developer message, or nothing.
      questions: user messages, one per turn.
      options: of the chat template.
      ends: why it ends before its last message, or ''.
    """

    sample_id: int
    prompt: Prompt
    opening: tuple[Message, ...]
    questions: tuple[Message, ...]
    options: Options = PLAIN
    ends: str = ""


@dataclasses.dataclass(frozen=True)
class Answered:
    """A conversation with its answers.

    Attributes:
      conversation: what was asked.
      messages: what the newest answer answers: the opening, then user, assistant, ..., user.
      answer: [length] int32 ids of the newest answer, with its stop token.
      cut: the newest answer ran into the length limit.
      shortened: why later turns are missing, or ''.
      before: the turn before it.
    """

    conversation: Conversation
    messages: tuple[Message, ...]
    answer: np.ndarray
    cut: bool
    shortened: str = ""
    before: "Answered | None" = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """Most tokens of a prompt, of prompt and answer, and of an answer; 0 leaves that what `max_length` leaves it."""

    max_prompt_length: int
    max_length: int
    max_new_tokens: int = 0

    @classmethod
    def of(cls, data: DataConfig) -> "Limits":
        """Those of a config."""
        return cls(data.max_prompt_length, data.max_length, data.answers.max_new_tokens)


def options_of(prompt: Prompt, thinking: Thinking) -> Options:
    """Options of the chat template for a prompt."""
    return Options(thinking.asks(prompt), prompt.tools)


def conversations(
    prompts: Sequence[Prompt], repeats: int, system_prompt: str = "", thinking: Thinking = NEVER, start: int = 0
) -> list[Conversation]:
    """`repeats` conversations per prompt, numbered in order from `start`.

    Answers that prompts bring along are left out.
    A conversation ends before the first result of a tool: the target may have called another one.
    """
    out = []
    for prompt in prompts:
        asked = [message for message in with_system(prompt.messages, system_prompt) if message["role"] != "assistant"]
        tool = next((i for i, message in enumerate(asked) if message["role"] == "tool"), len(asked))
        ends = "tools: what comes next is a tool's answer to another call" if tool < len(asked) else ""
        first = next(i for i, message in enumerate(asked) if message["role"] == "user")
        options = options_of(prompt, thinking)
        for _ in range(repeats):
            out.append(
                Conversation(start + len(out), prompt, tuple(asked[:first]), tuple(asked[first:tool]), options, ends)
            )
    return out


@dataclasses.dataclass(frozen=True)
class Question:
    """What is to be answered next in a conversation.

    Attributes:
      conversation: it belongs to.
      turn: number of its user's turns before it.
      messages: up to the user's message that is answered.
      ids: token ids of the prompt.
      room: most tokens of the answer.
    """

    conversation: Conversation
    turn: int
    messages: tuple[Message, ...]
    ids: list[int]
    room: int


Decode = Callable[[Callable[[], Question | None]], Iterator[tuple[Question, Sequence[int]]]]
"""Answers questions: it is given a function that gives the next one, and yields each with its answer, in any order.

Answers are ids up to a stop token, or as many as the question has room for. That function gives None if there is none
now; when an answer has been yielded there may be one again.
"""


class Dialogues:
    """How far conversations have come, whoever answers and in whatever order.

    A conversation whose first turn cannot be answered is rejected. One whose later turn cannot (its prompt has become
    too long, its answer is empty, or the turn before ran into the length limit) ends before it; `shortened` says so.
    """

    def __init__(
        self, tokenizer: ChatTokenizer, stop_tokens: Sequence[int], limits: Limits, progress: Callable[[int], None]
    ):
        """Args: see `regenerate`."""
        self.tokenizer, self.stop_tokens, self.limits, self.progress = tokenizer, stop_tokens, limits, progress
        self._done: dict[int, Answered] = {}
        self._rejected: dict[int, tuple[Conversation, Rejected]] = {}

    def question(self, conversation: Conversation, turn: int) -> Question | None:
        """The question of a turn; None if it cannot be asked: then the conversation has ended."""
        before, limits = self._done.get(conversation.sample_id), self.limits
        try:
            messages, ids = _next_question(self.tokenizer, conversation, turn, before, limits)
        except Rejected as error:
            self._end(conversation, error, len(conversation.questions) - turn)
            return None
        room = limits.max_length - len(ids)
        return Question(conversation, turn, messages, ids, min(room, limits.max_new_tokens or room))

    def take(self, question: Question, answer: np.ndarray) -> bool:
        """Adds the answer to a question, [length] ids up to its stop token or its room; whether there is a next turn.

        The turn itself is not reported to `progress`, those that are given up are.
        """
        conversation, turn = question.conversation, question.turn
        left = len(conversation.questions) - turn - 1
        stopped = len(answer) > 0 and int(answer[-1]) in self.stop_tokens
        if len(answer) == stopped:
            self._end(conversation, Rejected("empty_answer", f"turn {turn + 1}: the target stops at once"), left)
            return False
        before = self._done.get(conversation.sample_id)
        shortened = "" if left else conversation.ends
        self._done[conversation.sample_id] = Answered(
            conversation, question.messages, answer, not stopped, shortened, before
        )
        return left > 0

    def fail(self, question: Question, error: Rejected) -> None:
        """Ends a conversation before a question that has no answer; not reported to `progress` is the turn itself."""
        turn = question.turn + 1
        left = len(question.conversation.questions) - turn
        self._end(question.conversation, Rejected(error.reason, f"turn {turn}: {error}"), left)

    def _end(self, conversation: Conversation, error: Rejected, turns: int) -> None:
        if conversation.sample_id in self._done:
            before = self._done[conversation.sample_id]
            self._done[conversation.sample_id] = dataclasses.replace(before, shortened=f"{error.reason}: {error}")
        else:
            self._rejected[conversation.sample_id] = conversation, error
        self.progress(turns)

    def result(
        self, todo: Sequence[Conversation], on_rejected: Callable[[Conversation, Rejected], None]
    ) -> list[Answered]:
        """The conversations that have an answer, in the order of `todo`; the others are reported, in that order too."""
        for conversation in todo:
            if conversation.sample_id in self._rejected:
                on_rejected(*self._rejected[conversation.sample_id])
        return [self._done[conversation.sample_id] for conversation in todo if conversation.sample_id in self._done]


def regenerate(
    tokenizer: ChatTokenizer,
    todo: Sequence[Conversation],
    decode: Decode,
    stop_tokens: Sequence[int],
    limits: Limits,
    log: AnswerLog | None,
    on_rejected: Callable[[Conversation, Rejected], None],
    progress: Callable[[int], None],
) -> list[Answered]:
    """Answers all turns of all conversations; each goes on as soon as its turn before is answered.

    What becomes of a turn that cannot be answered says `Dialogues`.

    Args:
      tokenizer: of the target.
      todo: conversations.
      decode: answers questions; not called if there are none.
      stop_tokens: ids that end an answer.
      limits: see there.
      log: answers that are there already are not decoded again; None keeps no log.
      on_rejected: called with each conversation that is left out, and why, at the end.
      progress: called with a number of user turns that are done, answered or given up.

    Returns:
      The conversations that have an answer, in their order.
    """
    dialogues = Dialogues(tokenizer, stop_tokens, limits, progress)
    unasked, later = iter(todo), collections.deque[tuple[Conversation, int]]()

    def take(question: Question, answer: np.ndarray) -> None:
        if dialogues.take(question, answer):
            later.append((question.conversation, question.turn + 1))
        progress(1)

    def ask() -> Question | None:
        while True:
            conversation, turn = later.popleft() if later else (next(unasked, None), 0)
            if conversation is None:
                return None
            question = dialogues.question(conversation, turn)
            if question is None:
                continue
            found = None if log is None else log.get(conversation.sample_id, turn)
            if found is None:
                return question
            take(question, found)

    first = ask()
    if first is not None:
        ready = [first]
        for question, tokens in decode(lambda: ready.pop() if ready else ask()):
            answer = np.asarray(tokens, np.int32)
            if log is not None:
                log.put(question.conversation.sample_id, question.turn, answer)
            take(question, answer)
    return dialogues.result(todo, on_rejected)


def next_prompt(
    tokenizer: ChatTokenizer, conversation: Conversation, history: Sequence[Message], turn: int
) -> tuple[tuple[Message, ...], list[int]]:
    """Messages up to the question of `turn`, and their prompt ids; `history` is what comes before it.

    Raises:
      ChatError: the template cannot render them, or leaves tools out.
    """
    messages, options = (*history, conversation.questions[turn]), conversation.options
    if options.tools or has_tools(messages):
        messages = tuple(renderable(tokenizer, messages, options))
    return messages, prompt_tokens(tokenizer, messages, options)


def _next_question(
    tokenizer: ChatTokenizer, conversation: Conversation, turn: int, before: Answered | None, limits: Limits
) -> tuple[tuple[Message, ...], list[int]]:
    """Messages up to the question of `turn`, and their prompt ids; Rejected if it cannot be asked."""
    messages, options = conversation.opening, conversation.options
    if before is not None:
        if before.cut:
            raise Rejected("prompt_too_long", f"turn {turn + 1}: the answer before it ran into the length limit")
        if options != PLAIN and has_control_tokens(tokenizer, before.answer.tolist()):
            raise Rejected(
                "template", f"turn {turn + 1}: the answer before it has control tokens that text does not keep"
            )
        messages = (*before.messages, {"role": "assistant", "content": answer_text(tokenizer, before.answer.tolist())})
    try:
        messages, ids = next_prompt(tokenizer, conversation, messages, turn)
    except ChatError as error:
        raise Rejected(error.reason, str(error)) from None
    if len(ids) > limits.max_prompt_length:
        raise Rejected(
            "prompt_too_long", f"turn {turn + 1}: {len(ids)} tokens, data.max_prompt_length={limits.max_prompt_length}"
        )
    return messages, ids
