"""Conversations with tools or thoughts: as samples of what the target saw and wrote, turn by turn.

Templates show an assistant's thoughts in the turn that is being written and drop them from earlier ones. So every turn
is rendered as the last one, as the target saw it. Turns that the next turn's rendering begins with share its sample;
where it does not, the turn is a sample of its own, and in later ones it is history that is not supervised.

What an assistant wrote begins where the prompt ended, and after what the template itself puts before an answer without
thoughts (Qwen3's empty think block). Everything that the data has must show up in the text; a conversation of which
the template leaves something out is refused, but for thoughts of earlier turns.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dspark_jax.data.chat import (
    PROBE,
    ChatError,
    Options,
    ReasoningError,
    after_stop,
    masked_tokens,
    prompt_tokens,
    render,
)
from dspark_jax.data.messages import THINK_BEGIN, THINK_END, Message, has_thoughts
from dspark_jax.tokenizer import ChatTokenizer

SUPERVISED = ("both", "thinking", "answer")
"""Which of an assistant's tokens are trained: all that it wrote, only its thoughts, or only what comes after them."""


_THOUGHTS = PROBE.replace("answer", "thoughts")
"""Replaces thoughts, as `PROBE` does an answer."""


class ToolsError(ChatError):
    """A template that leaves out definitions, calls or results of tools."""

    reason = "tools"


def samples_of_turns(
    tokenizer: ChatTokenizer, messages: Sequence[Message], options: Options, supervised: str = "both"
) -> list[tuple[list[int], list[int]]]:
    """Ids and loss masks of a conversation, in one sample or several.

    Args:
      tokenizer: of the target.
      messages: of the whole conversation.
      options: of the template.
      supervised: one of `SUPERVISED`.

    Raises:
      ChatError: the template refuses the conversation, or leaves some of it out; its `reason` says what.
    """
    messages = renderable(tokenizer, messages, options)
    found: list[tuple[str, list[tuple[int, int]]]] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        text, start = _turn(tokenizer, messages[: i + 1], options)
        end = len(text)
        if supervised != "both" and has_thoughts(message):
            answer = _answer_start(tokenizer, messages[: i + 1], text, options)
            start, end = (start, answer) if supervised == "thinking" else (answer, end)
        elif supervised == "thinking":
            end = start
        before, spans = found[-1] if found else ("", [])
        if found and text.startswith(before):
            found[-1] = (text, [*spans, (start, end)])
        else:
            found.append((text, [(start, end)]))
    return [masked_tokens(tokenizer, text, spans) for text, spans in found]


def _turn(tokenizer: ChatTokenizer, messages: Sequence[Message], options: Options) -> tuple[str, int]:
    """The text of a conversation that ends in an assistant's turn, and where in it the assistant begins."""
    *asked, message = messages
    text = render(tokenizer, messages, options=options)
    prompt = render(tokenizer, asked, generation_prompt=True, options=options)
    empty = _before_answer(tokenizer, [*asked, {"role": "assistant", "content": PROBE}], options)
    starts = [len(before) for before in (prompt, empty) if before is not None and text.startswith(before)]
    if not starts or PROBE in text:
        raise (ReasoningError if has_thoughts(message) else ChatError)(
            f"message {len(messages)}: the chat template does not show this assistant turn as it asks for it; "
            "use data.regenerate=True or another data.thinking"
        )
    return text, max(starts)


def _answer_start(tokenizer: ChatTokenizer, messages: Sequence[Message], text: str, options: Options) -> int:
    """Where in the text of a conversation the answer of its last message begins, after its thoughts."""
    *asked, message = messages
    before = _before_answer(tokenizer, [*asked, _with_answer(message, PROBE)], options)
    if before is None or not text.startswith(before):
        raise ReasoningError(f"message {len(messages)}: its thoughts cannot be told from its answer; train both")
    return len(before)


def samples_of_answers(
    tokenizer: ChatTokenizer,
    answered: Sequence[tuple[Sequence[Message], Sequence[int]]],
    options: Options,
    supervised: str = "both",
) -> list[tuple[list[int], list[int]]]:
    """The same for turns that the target has just answered, with the very ids that it generated.

    Args:
      tokenizer: of the target.
      answered: what was asked (up to a user's message) and the answer, of every turn.
      options: of the template.
      supervised: one of `SUPERVISED`.
    """
    found: list[tuple[list[int], list[int]]] = []
    for messages, answer in answered:
        prompt = prompt_tokens(tokenizer, messages, options)
        tail = after_stop(tokenizer, messages, answer, options)
        thoughts = 0
        if supervised != "both" and options.thinking:
            thoughts = _thoughts_length(tokenizer, prompt, answer, *_thought_marks(tokenizer, messages, options))
        on = [int(supervised == "both" or (i < thoughts) == (supervised == "thinking")) for i in range(len(answer))]
        on += [int(supervised != "thinking")] * len(tail)
        ids, mask = [*prompt, *answer, *tail], [*([0] * len(prompt)), *on]
        before = found[-1][0] if found else []
        if found and ids[: len(before)] == before:
            found[-1] = (ids, [*found[-1][1], *mask[len(before) :]])
        else:
            found.append((ids, mask))
    return found


def _thought_marks(tokenizer: ChatTokenizer, messages: Sequence[Message], options: Options) -> tuple[str, str]:
    """What stands before the thoughts of an answer to `messages`, and between them and the answer.

    As the template writes it, without white space at its ends; of a template that shows no thoughts, the usual.
    """
    prompt = render(tokenizer, messages, generation_prompt=True, options=options)
    answer: Message = {"role": "assistant", "content": PROBE, "reasoning_content": _THOUGHTS}
    before, found, rest = render(tokenizer, [*messages, answer], options=options).partition(_THOUGHTS)
    between, also_found, _ = rest.partition(PROBE)
    if not (found and also_found and between.strip() and before.startswith(prompt)):
        return THINK_BEGIN, THINK_END
    return before[len(prompt) :].strip() or THINK_BEGIN, between.strip()


def _thoughts_length(
    tokenizer: ChatTokenizer, prompt: Sequence[int], answer: Sequence[int], begin: str, end: str
) -> int:
    """Number of ids of an answer that are its thoughts, with the mark `end` after them; 0 if it has none."""

    def text(ids: Sequence[int]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    if end not in text(answer):
        # An answer that was cut while the target thought, or that it gave without thinking.
        if begin not in text([*prompt[-8:], *answer]):
            return 0
        if has_control_tokens(tokenizer, answer):
            raise ReasoningError("its thoughts, which end in another way, cannot be told from its answer; train both")
        return len(answer)
    fewest, most = 1, len(answer)
    while fewest < most:  # the shortest beginning that has the mark
        middle = (fewest + most) // 2
        fewest, most = (fewest, middle) if end in text(answer[:middle]) else (middle + 1, most)
    return fewest


def has_control_tokens(tokenizer: ChatTokenizer, answer: Sequence[int]) -> bool:
    """Whether an answer has special tokens before its last one, which its text does not keep."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return any(one in special for one in answer[:-1])


def _before_answer(tokenizer: ChatTokenizer, messages: Sequence[Message], options: Options) -> str | None:
    """The text before a probe that is the content of the last message; None if it is not shown."""
    before, found, _ = render(tokenizer, messages, options=options).partition(PROBE)
    return before if found else None


def _with_answer(message: Message, answer: str) -> Message:
    """A message with its thoughts and another answer."""
    thoughts, end, _ = (message["content"] or "").rpartition(THINK_END)
    separator = "\n\n" if end else ""
    return {**message, "content": thoughts + end + separator + answer}


def renderable(tokenizer: ChatTokenizer, messages: Sequence[Message], options: Options) -> list[Message]:
    """The conversation in a form that the template takes and shows completely.

    Templates differ in whether arguments of a call are an object or its JSON, in whether an answer that is only a call
    has no content or an empty one, and in whether they take thoughts apart from the text or leave the text as it is.

    Raises:
      ChatError: there is none.
    """
    found: ChatError | None = None
    for form in _forms(messages):
        try:
            render(tokenizer, form, options=options)
            for end, message in enumerate(form, start=1):
                if message["role"] == "assistant" or end == len(form):
                    _check_shown(tokenizer, form[:end], options)
        except ChatError as error:
            # What is left out says more than that another form is refused.
            if found is None or _TELLING.index(type(error)) > _TELLING.index(type(found)):
                found = error
        else:
            return list(form)
    assert found is not None
    raise found


_TELLING = (ChatError, ReasoningError, ToolsError)
"""Kinds of errors of which the later ones say more."""


def _forms(messages: Sequence[Message]) -> Iterator[list[Message]]:
    calls = (False, True) if any(message.get("tool_calls") for message in messages) else (False,)
    thinks = (True, False) if any(map(_thoughts_inside, messages)) else (False,)
    for apart, as_text, other_content in itertools.product(thinks, calls, calls):
        yield [_form(message, apart, as_text, other_content) for message in messages]


def shows_thoughts(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> bool:
    """Whether a conversation has thoughts in the text of an answer, and the template a place of its own for them."""
    if not any(map(_thoughts_inside, messages)):
        return False
    question = {"role": "user", "content": "?"}
    answer = {"role": "assistant", "content": PROBE, "reasoning_content": _THOUGHTS}
    return _THOUGHTS in render(tokenizer, [question, answer])


def _thoughts_inside(message: Message) -> tuple[str, str] | None:
    """Thoughts and answer of an assistant whose text begins with its thoughts."""
    content = message["content"] or ""
    thoughts, end, answer = content.partition(THINK_END)
    thoughts = thoughts.strip().removeprefix(THINK_BEGIN)
    if message["role"] != "assistant" or not end or THINK_END in answer or THINK_BEGIN in thoughts + answer:
        return None
    return thoughts.strip(), answer.lstrip()


def _form(message: Message, apart: bool, as_text: bool, other_content: bool) -> Message:
    inside = _thoughts_inside(message) if apart and not message.get("reasoning_content") else None
    if inside and inside[0]:
        message = {**message, "reasoning_content": inside[0], "content": inside[1]}
    if not message.get("tool_calls"):
        return message
    calls = message["tool_calls"]
    if as_text:
        calls = [{**call, "function": {**call["function"], "arguments": _json(call)}} for call in calls]
    content = message["content"]
    if other_content and not content:
        content = "" if content is None else None
    return {**message, "tool_calls": calls, "content": content}


def _json(call: Any) -> str:
    arguments = call["function"]["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _tool_name(tool: Mapping[str, Any]) -> str:
    return f"the tool {tool['function']['name']!r}"


class _Marks:
    """Words that stand for parts of a conversation, and what each stands for."""

    def __init__(self) -> None:
        self.parts: dict[str, tuple[type[ChatError], str]] = {}

    def of(self, error: type[ChatError], what: str, form: str = "{}") -> str:
        """A new word; with `form`, how it must look in what is rendered."""
        mark = f"dsmark{len(self.parts)}x"
        self.parts[form.format(mark)] = (error, what)
        return mark


def _check_shown(tokenizer: ChatTokenizer, messages: Sequence[Message], options: Options) -> None:
    """Refuses a conversation if its template leaves out a part of it: all parts are replaced and looked for.

    Thoughts are looked for in the last message only, and templates that cut a text (thoughts from content) may.
    """
    marks = _Marks()
    tools = tuple(
        {**tool, "function": {**tool["function"], "name": marks.of(ToolsError, _tool_name(tool))}}
        for tool in options.tools
    )
    marked = [
        _marked(message, f"message {i}", i == len(messages), marks) for i, message in enumerate(messages, start=1)
    ]
    text = render(tokenizer, marked, options=Options(options.thinking, tools))
    for mark, (error, what) in marks.parts.items():
        if mark not in text:
            raise error(f"the chat template leaves out {what}; take it out, or use a template that shows it")


def _marked(message: Message, where: str, last: bool, marks: _Marks) -> Message:
    role, content = message["role"], message["content"]
    error = ToolsError if role == "tool" or message.get("tool_calls") else ChatError
    out = dict(message)
    if content:
        thoughts, end, answer = content.rpartition(THINK_END) if role == "assistant" else ("", "", content)
        out["content"] = marks.of(error, f"the {role}'s text of {where}") if answer.strip() else answer
        if end:
            # There may be several blocks, with text between them.
            pieces = re.split(f"({THINK_BEGIN}|{THINK_END})", thoughts)
            for i in range(0, len(pieces), 2):
                if pieces[i].strip():
                    mark = marks.of(ReasoningError, f"the thoughts of {where}") if last else "thoughts"
                    pieces[i] = f"\n{mark}\n"
            out["content"] = "".join(pieces) + f"{THINK_END}\n\n{out['content']}"
    if message.get("reasoning_content") and last:
        out["reasoning_content"] = marks.of(ReasoningError, f"the thoughts of {where}")
    if message.get("tool_calls"):
        out["tool_calls"] = [_marked_call(call, where, marks) for call in message["tool_calls"]]
    return out


def _marked_call(call: Any, where: str, marks: _Marks) -> dict[str, Any]:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    function = {**call["function"], "name": marks.of(ToolsError, f"the call of {name!r} in {where}")}
    if arguments:
        what = f"the arguments of {name!r} in {where}"
        if isinstance(arguments, str):  # a template that writes JSON would quote it again
            mark = marks.of(ToolsError, f"{what} as they are", '{{"{}"')
            function["arguments"] = json.dumps({mark: mark})
        else:
            mark = marks.of(ToolsError, what)
            function["arguments"] = {mark: mark}
    return {**call, "function": function}
