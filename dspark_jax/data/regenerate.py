"""Answers by the target: conversations are answered turn by turn, in batches, by a decoder that is passed in.

A drafter must learn what its own target says, so prompts are answered by the target even where a data set brings
answers along (paper, section 4). Decoding itself is not here: `prepare` passes a function that decodes a batch.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from dspark_jax.data.answer_log import AnswerLog, Rejected
from dspark_jax.data.chat import PLAIN, ChatError, Options, answer_text, prompt_tokens, with_system
from dspark_jax.data.messages import has_tools
from dspark_jax.data.prompts import Message, Prompt
from dspark_jax.data.turns import has_control_tokens, renderable
from dspark_jax.tokenizer import ChatTokenizer

Decode = Callable[[Sequence[Sequence[int]], Sequence[int], int], Sequence[Sequence[int] | np.ndarray]]
"""(prompt ids of a batch, a random stream number per prompt, most new tokens) -> new ids, a stop token included."""

SMALLEST_GROUP = 64
"""Prompts up to this many tokens are decoded together."""

FIRST_PART = 64
"""Answers are decoded in parts of at most so many tokens, twice as many, four times as many, ..."""


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
      before: the turn before it, where the target thinks.
    """

    conversation: Conversation
    messages: tuple[Message, ...]
    answer: np.ndarray
    cut: bool
    shortened: str = ""
    before: "Answered | None" = None


@dataclasses.dataclass(frozen=True)
class Limits:
    """What bounds an answer, in tokens: of a prompt, of prompt and answer, of the target; and how many at a time.

    `max_new_tokens` bounds the answer itself; 0 leaves it what `max_length` leaves it.
    """

    max_prompt_length: int
    max_length: int
    max_positions: int
    batch_size: int
    max_new_tokens: int = 0


def options_of(prompt: Prompt, thinking: str) -> Options:
    """Options of the chat template for a prompt; `thinking` is `data.thinking`."""
    return Options(thinking == "on" or (thinking == "given" and prompt.thinks), prompt.tools)


def conversations(
    prompts: Sequence[Prompt], repeats: int, system_prompt: str = "", thinking: str = "off"
) -> list[Conversation]:
    """`repeats` conversations per prompt, numbered in order. Answers that prompts bring along are left out.

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
            out.append(Conversation(len(out), prompt, tuple(asked[:first]), tuple(asked[first:tool]), options, ends))
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
        before = self._done.get(conversation.sample_id) if conversation.options.thinking else None
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
    log: AnswerLog,
    on_rejected: Callable[[Conversation, Rejected], None],
    progress: Callable[[int], None],
) -> list[Answered]:
    """Answers all turns of all conversations: the first turn of each, then the second ones, and so on.

    Batches are planned from all conversations, decoded or not, so that a preparation that was killed continues with
    the very batches it would have had. What becomes of a turn that cannot be answered says `Dialogues`.

    Args:
      tokenizer: of the target.
      todo: conversations.
      decode: answers a batch.
      stop_tokens: ids that end an answer.
      limits: see there.
      log: answers that are there already are not decoded again.
      on_rejected: called with each conversation that is left out, and why.
      progress: called with a number of user turns that are done, answered or given up.

    Returns:
      The conversations that have an answer, in their order.
    """
    dialogues = Dialogues(tokenizer, stop_tokens, limits, progress)
    active, turn = list(todo), 0
    while active:
        asked = [question for one in active if (question := dialogues.question(one, turn))]
        answers = _answer_all(asked, turn, decode, stop_tokens, limits, log, progress)
        active = [one.conversation for one in asked if dialogues.take(one, answers[one.conversation.sample_id])]
        turn += 1
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


def _answer_all(
    questions: Sequence[Question],
    turn: int,
    decode: Decode,
    stop_tokens: Sequence[int],
    limits: Limits,
    log: AnswerLog,
    progress: Callable[[int], None],
) -> dict[int, np.ndarray]:
    """Answers to the questions of one turn, by sample id, up to their stop token or as long as they may be.

    A batch decodes until its last row has ended, and few answers are as long as the longest. So answers are decoded in
    parts: those that have not ended are put into new batches, and go on from what they have. The draws of a stream
    depend on the position only, so an answer is the same in parts as in one piece.
    """
    pending, part = {one.conversation.sample_id: one.ids for one in questions}, 0
    ends = {one.conversation.sample_id: len(one.ids) + one.room for one in questions}
    answers = {sample_id: np.zeros(0, np.int32) for sample_id in pending}
    while pending:
        going_on = {}
        for batch, most in plan_batches(pending, limits, FIRST_PART << part):
            if any(log.get(sample_id, turn, part) is None for sample_id in batch):
                decoded = decode([pending[sample_id] for sample_id in batch], batch, most)
                room = [ends[sample_id] - len(pending[sample_id]) for sample_id in batch]
                log.put(turn, part, {i: ids[:fits] for i, ids, fits in zip(batch, decoded, room, strict=True)})
            for sample_id in batch:
                tokens = log.get(sample_id, turn, part)
                assert tokens is not None
                answers[sample_id] = np.concatenate([answers[sample_id], tokens])
                ids = [*pending[sample_id], *tokens.tolist()]
                if len(tokens) and ids[-1] not in stop_tokens and len(ids) < ends[sample_id]:
                    going_on[sample_id] = ids
            progress(sum(sample_id not in going_on for sample_id in batch))
        pending, part = going_on, part + 1
    return answers


def plan_batches(prompts: Mapping[int, Sequence[int]], limits: Limits, part: int) -> Iterator[tuple[list[int], int]]:
    """Batches of prompts, as (sample ids, most new tokens), so that few shapes occur: each costs a compilation.

    Prompts are grouped by length (up to 64 tokens, 128, 256, ...), and a group is dealt out like cards from longest to
    shortest: its batches are equally large to within one and their longest prompts nearly equally long. All batches of
    a group share one budget: `part` tokens, or a smaller power of two where no answer of the group has room for more.
    """
    groups: dict[int, list[int]] = {}
    for sample_id, ids in prompts.items():
        group = max(len(ids) - 1, SMALLEST_GROUP - 1).bit_length()
        groups.setdefault(group, []).append(sample_id)
    for _, members in sorted(groups.items()):
        members.sort(key=lambda sample_id: (-len(prompts[sample_id]), sample_id))
        longest, shortest = len(prompts[members[0]]), len(prompts[members[-1]])
        most = min(part, 1 << (limits.max_length - shortest - 1).bit_length())
        if limits.max_positions:
            most = min(most, limits.max_positions - longest)
        count = -(-len(members) // limits.batch_size)
        for first in range(count):
            yield members[first::count], most
