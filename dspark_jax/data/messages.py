"""Messages in the forms of OpenAI, ShareGPT and their relatives, read into one form that chat templates take.

A message is {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": text}; where they are given,
an assistant's has "tool_calls" (and then its content may be None) and "reasoning_content", a tool's "tool_call_id"
and "name".
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message in which assistants keep their thoughts."""

THINK_BEGIN, THINK_END = "<think>", "</think>"
"""Before and after an assistant's thoughts, where they are part of the text of its answer."""

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
    if given == "function_call":
        message |= {"content": None, "tool_calls": _calls("the text of a function_call message", text)}
    elif name:
        calls = _calls(f"`{name}`", entry[name])
        message |= {"content": None if text is None else _text(role, text), "tool_calls": calls}
        used.add(name)
    else:
        message["content"] = _text(role, text)
    if role == "tool":
        for name in ("tool_call_id", "name"):
            if not is_empty(entry.get(name)):
                message[name] = check_text(f"`{name}` of a message", entry[name])
                used.add(name)
    if reasoning and role == "assistant":
        thoughts = next((name for name in REASONING if not is_empty(entry.get(name))), "")
        if thoughts:
            message["reasoning_content"] = check_text(f"`{thoughts}` of a message", entry[thoughts])
            used.add(thoughts)
    return message, [name for name in entry if name not in used and not is_empty(entry[name])]


def _keys(entry: Any, usual: tuple[str, str]) -> tuple[str, str]:
    """Names of role and text in a message."""
    if isinstance(entry, dict):
        for role, text in (usual, ("role", "content"), ("from", "value")):
            calls = not is_empty(entry.get("tool_calls")) or not is_empty(entry.get("function_call"))
            if role in entry and (text in entry or calls):
                return role, text
    raise ValueError(f"a message must be an object with `{usual[0]}` and `{usual[1]}`; add what is missing")


def _text(role: str, content: Any) -> str:
    """The text of a message, also of one that is a list of parts: they are joined by line breaks, as servers do it."""
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            if kind not in _TEXT_PARTS:
                raise SetAside("parts", f"a {role} message has a part of type {kind!r}; only text is supported")
            texts.append(part["text"] if isinstance(part, dict) and "text" in part else part)
        return "\n".join(check_text(f"a part of a {role} message", text) for text in texts)
    return check_text(f"the text of a {role} message", content)


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


def _calls(what: str, value: Any) -> list[dict[str, Any]]:
    """Calls of tools in OpenAI's form; arguments become objects where they are one, as templates expect them."""
    value = _parsed(what, value)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(f'{what} must hold {{"name": ..., "arguments": ...}}, also under "function"; correct it')
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                parsed = None
            arguments = parsed if isinstance(parsed, dict) else arguments
        _check_tree(what, arguments)
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments or {}}})
        if not is_empty(call.get("id")):
            calls[-1]["id"] = check_text("`id` of a tool call", call["id"])
    return calls


def read_tools(name: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """Definitions of tools in OpenAI's form.

    Raises:
      ValueError: the field `name` holds something else.
    """
    value = _parsed(f"`{name}`", value)
    tools = []
    for tool in value if isinstance(value, list) else [value]:
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ValueError(
                f'`{name}` must be a list of {{"type": "function", "function": {{"name": ...}}}}; correct it'
            )
        _check_tree(f"`{name}`", function)
        tools.append({"type": "function", "function": function})
    return tuple(tools)


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
