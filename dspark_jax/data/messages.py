"""Messages in the forms of OpenAI, ShareGPT and their relatives, read into one form that chat templates take.

A message is {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": text}; where they are given,
an assistant's has "tool_calls" (and then its content may be None) and "reasoning_content", a tool's "tool_call_id"
and "name".
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message in which assistants keep their thoughts."""

THINK_BEGIN, THINK_END = "<think>", "</think>"
"""Before and after an assistant's thoughts, where they are part of the text of its answer."""

_NO_THOUGHTS = re.compile(rf"\s*{THINK_BEGIN}\s*{THINK_END}\s*")
"""The block that templates put before an answer without thoughts."""

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
"""Roles as templates know them. The text of a function_call is the call."""

_ENTRY = ("type", "function")
"""Fields of a call and of a definition beside the function's own."""

_TEXT_PARTS = ("text", "input_text", "output_text")


class SetAside(ValueError):
    """A row that is right and cannot be used: `kind` is the reason that is counted."""

    def __init__(self, kind: str, detail: str):
        super().__init__(detail)
        self.kind = kind


def is_empty(value: Any) -> bool:
    """Whether a field says nothing, so that nothing is lost without it."""
    return value is None or value in ("", [], {})


def read_message(entry: Any, keys: tuple[str, str], reasoning: bool = False) -> tuple[Message, list[str]]:
    """A message, and the names of its fields that are not used.

    Args:
      entry: the message, which may use either naming of role and text whatever its list is called.
      keys: the usual names of role and text.
      reasoning: keep an assistant's thoughts.

    Raises:
      ValueError: says what is wrong with it and what to do.
    """
    role_key, text_key = _keys(entry, keys)
    given, text = entry[role_key], entry.get(text_key)
    if not isinstance(given, str) or given not in ROLES:
        raise ValueError(f"role {given!r} is unknown; use one of {', '.join(ROLES)}")
    role, used = ROLES[given], {role_key, text_key}
    message: dict[str, Any] = {"role": role}
    name = next((name for name in ("tool_calls", "function_call") if not is_empty(entry.get(name))), "")
    if name and role != "assistant":
        raise ValueError(f"`{name}` of a {given} message; only assistants call tools, take it out")
    unused: list[str] = []
    calls: list[dict[str, Any]] = []
    if given == "function_call":
        calls = _calls("the text of a function_call message", text_key, text, unused)
        if not calls:
            raise ValueError("a function_call message without a call; take it out")
    elif name:
        calls = _calls(f"`{name}`", name, entry[name], unused)
        used.add(name)
    if given == "function_call" or (text is None and role == "assistant"):
        message["content"] = None if calls else ""  # it has only called, or has not answered
    else:
        message["content"] = _text(role, text_key, text, unused)
    if calls:
        message["tool_calls"] = calls
    if role == "assistant" and message["content"] and (block := _NO_THOUGHTS.match(message["content"])):
        message["content"] = message["content"][block.end() :]  # the template writes it
    if role == "tool":
        for name in ("tool_call_id", "name"):
            if not is_empty(entry.get(name)):
                message[name] = check_text(f"`{name}` of a message", entry[name])
                used.add(name)
    if reasoning and role == "assistant":
        thoughts = next((name for name in REASONING if not is_empty(entry.get(name))), "")
        if thoughts:
            message["reasoning_content"] = check_text(f"`{thoughts}` of a message", entry[thoughts])
            message["content"] = _without_thoughts(message["content"], message["reasoning_content"])
            used.add(thoughts)
    return message, [*(name for name in entry if name not in used and not is_empty(entry[name])), *unused]


def _without_thoughts(content: str | None, thoughts: str) -> str | None:
    """The text of an assistant whose thoughts are given beside it, and may be in the text as well."""
    inside, end, answer = (content or "").rpartition(THINK_END)
    if not end:
        return content
    if inside.strip().removeprefix(THINK_BEGIN).strip() != thoughts.strip():
        raise ValueError("the text of a message has other thoughts than the field beside it; take one of them out")
    return answer.lstrip()


def _keys(entry: Any, usual: tuple[str, str]) -> tuple[str, str]:
    """Names of role and text in a message."""
    if isinstance(entry, dict):
        for role, text in (usual, ("role", "content"), ("from", "value")):
            calls = not is_empty(entry.get("tool_calls")) or not is_empty(entry.get("function_call"))
            if role in entry and (text in entry or calls):
                return role, text
    raise ValueError(f"a message must be an object with `{usual[0]}` and `{usual[1]}`; add what is missing")


def _text(role: str, name: str, content: Any, unused: list[str]) -> str:
    """The text of a message, also of one that is a list of parts: they are joined by line breaks, as servers do it.

    Fields of parts that are not used are added to `unused`, after `name`, the field that has the parts.
    """
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind not in _TEXT_PARTS:
                raise SetAside("parts", f"a message ({role}) has a part of type {kind!r}; only text is supported")
            if isinstance(part, dict):
                unused += _others(f"{name}[]", part, ("type", "text"))
            texts.append(part["text"] if isinstance(part, dict) and "text" in part else part)
        return "\n".join(check_text(f"a part of a message ({role})", text) for text in texts)
    return check_text(f"the text of a message ({role})", content)


def _others(where: str, value: Mapping[str, Any], used: Sequence[str]) -> list[str]:
    """Names of the fields of an object inside of a row that are not used."""
    return [f"{where}.{name}" for name in value if name not in used and not is_empty(value[name])]


def check_text(what: str, text: Any) -> str:
    """`text`, if it is a string that tokenizers can encode.

    Raises:
      ValueError: it is not.
    """
    if not isinstance(text, str):
        raise ValueError(f"{what} is a JSON {type(text).__name__}, not a string; only text is supported")
    # The JSON escape of half a surrogate pair decodes to a string that no tokenizer can encode.
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise ValueError(f"{what} contains half a surrogate pair; remove that escape")
    return text


def has_answered(message: Message) -> bool:
    """Whether an assistant has said something, or called a tool, after its thoughts."""
    _, end, answer = (message["content"] or "").rpartition(THINK_END)
    cut = not end and answer.lstrip().startswith(THINK_BEGIN)
    return bool(message.get("tool_calls")) or not (cut or not answer.strip())


def has_thoughts(message: Message) -> bool:
    """Whether an assistant thought before it answered."""
    thinks = bool(message.get("reasoning_content")) or THINK_END in (message["content"] or "")
    return thinks and message["role"] == "assistant"


def has_tools(messages: Sequence[Message]) -> bool:
    """Whether a conversation has roles or calls that many templates do not know."""
    return any(one["role"] in ("tool", "developer") or bool(one.get("tool_calls")) for one in messages)


def _parsed(what: str, value: Any) -> Any:
    """A value that may also be JSON in a string, as tables keep it."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"{what} is not valid JSON; correct it") from None
    return value


def _functions(what: str, value: Any, form: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The entries of a list of calls or definitions (or a single one), and in each the object with a name.

    That is the entry itself where it has no `function`. `what` and `form`: which field it is, and what it must be.
    """
    value = _parsed(what, value)
    for entry in value if isinstance(value, list) else [] if value is None else [value]:
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f"{what} must {form}; correct it")
        _check_tree(what, function)
        yield entry, function


def _calls(what: str, name: str, value: Any, unused: list[str]) -> list[dict[str, Any]]:
    """Calls of tools in OpenAI's form; arguments become objects where they are one, as templates expect them.

    What is not used of them is added to `unused`, after the field's `name`.
    """
    where = name if name == "function_call" else f"{name}[]"
    calls = []
    for call, function in _functions(what, value, 'hold {"name": ..., "arguments": ...}, also under "function"'):
        field = "arguments" if "arguments" in function or "parameters" not in function else "parameters"
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": {}}})
        calls[-1]["function"]["arguments"] = _arguments(what, function.get(field))
        if not is_empty(call.get("id")):
            calls[-1]["id"] = check_text("`id` of a tool call", call["id"])
        if call is not function:
            unused += _others(f"{where}.function", function, ("name", field))
        unused += _others(where, call, (*_ENTRY, "id", *(("name", field) if call is function else ())))
    return calls


def _arguments(what: str, arguments: Any) -> Any:
    """Those of a call: an object, or the text of what is none (a target may have written that)."""
    if arguments is None or arguments == "":
        return {}
    if not isinstance(arguments, str | dict):
        kind = type(arguments).__name__
        raise ValueError(f"{what} has arguments that are a JSON {kind}; give an object, or its JSON as text")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    return arguments


def read_tools(name: str, value: Any) -> tuple[tuple[Mapping[str, Any], ...], list[str]]:
    """Definitions of tools in OpenAI's form, and the names of their fields that are not used.

    Raises:
      ValueError: the field `name` holds something else.
    """
    tools, unused = [], list[str]()
    form = 'be a list of {"type": "function", "function": {"name": ...}}'
    for tool, function in _functions(f"`{name}`", value, form):
        if tool is function:  # the type is not the function's
            function = {key: one for key, one in tool.items() if key != "type"}
        else:
            unused += _others(f"{name}[]", tool, _ENTRY)
        tools.append({"type": "function", "function": function})
    return tuple(tools), unused


def _check_tree(what: str, value: Any) -> None:
    """Refuses half surrogate pairs anywhere in a JSON value."""
    check_text(what, json.dumps(value, ensure_ascii=False))


def check_order(messages: Sequence[Message]) -> None:
    """Refuses conversations that no chat template can render or no model can answer.

    Raises:
      ValueError: says what is wrong and what to do.
    """
    before = ""
    for message in messages:
        role = message["role"]
        if role == "user" and not message["content"].strip():
            raise ValueError("a user message is empty; remove the line or write a question")
        if role == "system" and before:
            raise ValueError("a system message that is not the first; move it to the front")
        if role == "developer" and before not in ("", "system"):
            raise ValueError("a developer message that is not the first; move it to the front")
        if role == "assistant" and before not in ("user", "tool"):
            raise ValueError("an assistant message that does not follow a user message; remove it or join the two")
        if role == "tool" and before not in ("assistant", "tool"):
            raise ValueError("a tool's message that does not follow an assistant's; add the call, or take it out")
        before = role
    if before in ("system", "developer"):
        raise ValueError("no user message; add the question")
