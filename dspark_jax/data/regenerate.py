"""Answers by the target: conversations are answered turn by turn, in batches, by a decoder that is passed in.

A drafter must learn what its own target says, so prompts are answered by the target even where a data set brings
answers along (paper, section 4). Decoding itself is not here: `prepare` passes a function that decodes a batch.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dspark_jax.config import InputError
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


class Rejected(Exception):
    """A conversation that gives no training sample: `reason` is a word that is counted, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


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
    """What bounds an answer, in tokens: of a prompt, of prompt and answer, of the target; and how many at a time."""

    max_prompt_length: int
    max_length: int
    max_positions: int
    batch_size: int


class AnswerLog:
    """Answers decoded so far, in a JSONL file that survives a killed preparation.

    One line per part of an answer: {"id": sample id, "turn": 0, "part": 0, "tokens": [...]}. A line that was being
    written when the process died does not count, and is overwritten.
    """

    def __init__(self, path: Path):
        """Reads what is there and opens the file for more.

        Raises:
          InputError: a whole line of it is damaged.
        """
        self._parts: dict[tuple[int, int, int], np.ndarray] = {}
        self._file = path.open("a+b")
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._parts[entry["id"], entry["turn"], entry["part"]] = np.asarray(entry["tokens"], np.int32)
            except (ValueError, TypeError, LookupError, OverflowError):
                self._file.close()
                raise InputError(f"{path}:{number}: damaged; remove the lines from it on and run again") from None
            end += len(line)
        self._file.truncate(end)

    def __len__(self) -> int:
        """Number of answers, begun or finished."""
        return sum(part == 0 for _, _, part in self._parts)

    def get(self, sample_id: int, turn: int, part: int) -> np.ndarray | None:
        """Ids of a part of an answer, or None."""
        return self._parts.get((sample_id, turn, part))

    def put(self, turn: int, part: int, answers: Mapping[int, Sequence[int] | np.ndarray]) -> None:
        """Adds a part of the answers of a batch, by sample id; they are in the file when this returns."""
        lines = []
        for sample_id, answer in answers.items():
            tokens = self._parts[sample_id, turn, part] = np.asarray(answer, np.int32)
            lines.append(json.dumps({"id": sample_id, "turn": turn, "part": part, "tokens": tokens.tolist()}) + "\n")
        self._file.write("".join(lines).encode())
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


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

    A conversation whose first turn cannot be answered is rejected. One whose later turn cannot (its prompt has become
    too long, its answer is empty, or the turn before ran into the length limit) ends before it; `shortened` says so.
    Batches are planned from all conversations, decoded or not, so that a preparation that was killed continues with
    the very batches it would have had.

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
    done: dict[int, Answered] = {}

    def give_up(conversation: Conversation, error: Rejected, turns: int) -> None:
        if conversation.sample_id in done:
            before = done[conversation.sample_id]
            done[conversation.sample_id] = dataclasses.replace(before, shortened=f"{error.reason}: {error}")
        else:
            on_rejected(conversation, error)
        progress(turns)

    active, turn = list(todo), 0
    while active:
        asked: dict[int, tuple[Message, ...]] = {}
        prompts: dict[int, list[int]] = {}
        for conversation in active:
            try:
                messages, ids = _next_question(tokenizer, conversation, turn, done.get(conversation.sample_id), limits)
            except Rejected as error:
                give_up(conversation, error, len(conversation.questions) - turn)
            else:
                asked[conversation.sample_id], prompts[conversation.sample_id] = messages, ids
        answers = _answer_all(prompts, turn, decode, stop_tokens, limits, log, progress)
        following = []
        for conversation in active:
            if conversation.sample_id not in asked:
                continue
            answer, left = answers[conversation.sample_id], len(conversation.questions) - turn - 1
            stopped = len(answer) > 0 and int(answer[-1]) in stop_tokens
            if len(answer) == stopped:
                give_up(conversation, Rejected("empty_answer", f"turn {turn + 1}: the target stops at once"), left)
                continue
            messages = asked[conversation.sample_id]
            before = done.get(conversation.sample_id) if conversation.options.thinking else None
            shortened = "" if left else conversation.ends
            done[conversation.sample_id] = Answered(conversation, messages, answer, not stopped, shortened, before)
            following += [conversation] if left else []
        active, turn = following, turn + 1
    return [done[conversation.sample_id] for conversation in todo if conversation.sample_id in done]


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
    prompts: Mapping[int, list[int]],
    turn: int,
    decode: Decode,
    stop_tokens: Sequence[int],
    limits: Limits,
    log: AnswerLog,
    progress: Callable[[int], None],
) -> dict[int, np.ndarray]:
    """Answers to the prompts of one turn, by sample id, up to their stop token or to `max_length`.

    A batch decodes until its last row has ended, and few answers are as long as the longest. So answers are decoded in
    parts: those that have not ended are put into new batches, and go on from what they have. The draws of a stream
    depend on the position only, so an answer is the same in parts as in one piece.
    """
    answers = {sample_id: np.zeros(0, np.int32) for sample_id in prompts}
    pending, part = dict(prompts), 0
    while pending:
        going_on = {}
        for batch, most in plan_batches(pending, limits, FIRST_PART << part):
            if any(log.get(sample_id, turn, part) is None for sample_id in batch):
                decoded = decode([pending[sample_id] for sample_id in batch], batch, most)
                room = [limits.max_length - len(pending[sample_id]) for sample_id in batch]
                log.put(turn, part, {i: ids[:fits] for i, ids, fits in zip(batch, decoded, room, strict=True)})
            for sample_id in batch:
                tokens = log.get(sample_id, turn, part)
                assert tokens is not None
                answers[sample_id] = np.concatenate([answers[sample_id], tokens])
                ids = [*pending[sample_id], *tokens.tolist()]
                if len(tokens) and ids[-1] not in stop_tokens and len(ids) < limits.max_length:
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
