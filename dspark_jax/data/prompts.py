"""Prompt sets: JSONL files in the layouts found in the field, read into one form.

One JSON object per line, with one of these fields:
  {"turns": ["first question", "second question"]}              successive user turns
  {"prompt": "question"}                                        a single user turn
  {"messages": [{"role": "user", "content": "question"}, ...]}  roles system, user, assistant
  {"conversations": [{"from": "human", "value": "question"}, ...]}

A byte order mark before a line is skipped. Conversations with tools are not read yet: what they mean is in
fields that nothing here renders. Fields that are not used are named with the prompt.
"""

import codecs
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dspark_jax.config import InputError

Message = Mapping[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}."""

LISTS = ("turns", "prompt", "messages", "conversations")
"""Fields of a line that hold the conversation; the first one of them that is there is taken."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message in which assistants keep their thoughts."""

TOOLS = ("tools", "functions", "tool_calls", "function_call")
"""Fields of a line or of a message without which a conversation with tools is another one."""

TOOL_ROLES = ("tool", "function", "function_call", "observation")

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation to be answered, or one that is answered already (it then ends in an assistant message).

    Attributes:
      messages: an optional system message, then user messages. A user message without an assistant message after it
        waits for an answer, so successive user messages are successive turns.
      prompt_set: stem of the file name; results are reported per set.
      file: path of the file, as given.
      line: 1-based line number.
      unused: fields of the line and of its messages that are not used, e.g. "id", "prompt beside turns" or
        "messages[].reasoning_content".
    """

    messages: tuple[Message, ...]
    prompt_set: str
    file: str
    line: int
    unused: tuple[str, ...] = ()

    @property
    def reasoning(self) -> str:
        """The unused field that holds an assistant's thoughts; '' if there is none."""
        return next((name for name in self.unused if "[]." in name and name.rpartition(".")[2] in REASONING), "")


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A line that is no prompt: where, why and what to do, its text, and the kind of reason that is counted."""

    file: str
    line: int
    reason: str
    text: str
    kind: str = "malformed"


class _ToolsError(ValueError):
    """A conversation with tools."""


def content_hashes(files: Iterable[str], field: str) -> list[list[str]]:
    """Prompt set and hash of the content of every file, in their order.

    Raises:
      InputError: a file that the config's `field` names cannot be read.
    """
    found = []
    for file in files:
        try:
            found.append([Path(file).stem, hashlib.sha256(Path(file).read_bytes()).hexdigest()[:32]])
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}); correct {field}") from None
    return found


def read_prompts(
    paths: Iterable[str | os.PathLike[str]],
    limit: int = 0,
    on_malformed: Callable[[Malformed], None] | None = None,
) -> list[Prompt]:
    """Reads prompt files, in the order given.

    Args:
      paths: JSONL files in the layouts of this module's docstring. Blank lines are skipped.
      limit: use at most so many prompts of each file; 0 = all.
      on_malformed: called with every line that is not a prompt, which is then left out. Without it such a line is an
        error, so that none is dropped silently.

    Raises:
      InputError: a file cannot be read or holds no prompt at all; a malformed line without `on_malformed`.
    """
    prompts = []
    for path in paths:
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); give a JSONL file of prompts") from None
        found, first = 0, None
        for number, line in enumerate(content.splitlines(), start=1):
            line = line.removeprefix(codecs.BOM_UTF8)  # also of a file that was appended to another one
            if not line.strip():
                continue
            if limit and found == limit:
                break
            try:
                messages, unused = _read(line)
            except ValueError as error:
                kind = "tools" if isinstance(error, _ToolsError) else "malformed"
                malformed = Malformed(str(path), number, str(error), line.decode("utf-8", "replace"), kind)
                if on_malformed is None:
                    raise InputError(f"{path}:{number}: {error}") from None
                first = first or malformed
                on_malformed(malformed)
                continue
            prompts.append(Prompt(messages, Path(path).stem, str(path), number, unused))
            found += 1
        if not found:
            why = f"line {first.line}: {first.reason}" if first else f"the file is empty; write {_EXAMPLE} on its lines"
            raise InputError(f"{path}: holds no prompt; {why}")
    return prompts


_NO_TOOLS = "conversations with tools are not supported yet, leave them out"
_EXAMPLE = '{"prompt": "..."}'


def _read(line: bytes) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """Messages and unused fields of a line; a ValueError says what is wrong with it and what to do."""
    record = _decode(line)
    _refuse_tools(record, "the line")
    field = next((name for name in LISTS if name in record), None)
    if field is None:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"none of the fields {', '.join(LISTS)} (it has {names}); rename the one with the question")
    others = [name for name, value in record.items() if name != field and not _empty(value)]
    unused = [f"{name} beside {field}" if name in LISTS else name for name in others]
    if field == "turns":
        pairs = [("user", text) for text in _list(record, field)]
    elif field == "prompt":
        pairs = [("user", record[field])]
    else:
        pairs = []
        for entry in _list(record, field):
            keys = _keys(entry, *(("from", "value") if field == "conversations" else ("role", "content")))
            pairs.append((entry[keys[0]], entry[keys[1]]))
            unused += [f"{field}[].{name}" for name in entry if name not in keys and not _empty(entry[name])]
    _check(pairs)
    return tuple({"role": ROLES[role], "content": text} for role, text in pairs), tuple(dict.fromkeys(unused))


def _decode(line: bytes) -> dict[str, Any]:
    """The JSON object of a line."""
    whole = "write one whole JSON object on each line"
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; save the file as UTF-8 text") from None
    except json.JSONDecodeError as error:
        text = "" if line.lstrip()[:1] in b"{[" else f", a line of text belongs in {_EXAMPLE}"
        raise ValueError(f"not valid JSON at column {error.colno} ({error.msg}); {whole}{text}") from None
    except RecursionError:
        raise ValueError(f"not valid JSON (nested too deeply); {whole}") from None
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ValueError(f"a JSON {kind} where an object is needed; {whole}, e.g. {_EXAMPLE}, not in a list")
    return record


def _empty(value: Any) -> bool:
    """Whether a field says nothing, so that nothing is lost without it."""
    return value is None or value in ("", [], {})


def _refuse_tools(holder: dict[str, Any], where: str) -> None:
    """Refuses a line or message that has a field of `TOOLS`."""
    for name in TOOLS:
        if not _empty(holder.get(name)):
            raise _ToolsError(f"{where} has `{name}`; {_NO_TOOLS}")


def _list(record: dict[str, Any], field: str) -> list[Any]:
    value = record[field]
    if not isinstance(value, list) or not value:
        what = "the user's questions" if field == "turns" else "messages"
        raise ValueError(f"`{field}` must be a list that is not empty; put {what} into it")
    return value


def _keys(entry: Any, role: str, text: str) -> tuple[str, str]:
    """Names of role and text in a message, which may use either naming whatever its list is called."""
    if isinstance(entry, dict):
        _refuse_tools(entry, "a message")
        for keys in ((role, text), ("role", "content"), ("from", "value")):
            if all(key in entry for key in keys):
                return keys
    raise ValueError(f"a message must be an object with `{role}` and `{text}`; add what is missing")


def _check(pairs: list[tuple[Any, Any]]) -> None:
    """Refuses conversations that no chat template can render or no model can answer."""
    before = ""
    for role, text in pairs:
        if role in TOOL_ROLES:
            raise _ToolsError(
                f"a message of role {role!r}; conversations with tools are not supported yet, take them out"
            )
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"role {role!r} is unknown; use one of {', '.join(ROLES)}")
        if not isinstance(text, str):
            kind = type(text).__name__
            raise ValueError(f"the text of a {role} message is a JSON {kind}, not a string; only text is supported")
        # The JSON escape of half a surrogate pair decodes to a string that no tokenizer can encode.
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"the text of a {role} message contains half a surrogate pair; remove that escape")
        role = ROLES[role]
        if role == "user" and not text.strip():
            raise ValueError("a user message is empty; remove the line or write a question")
        if role == "system" and before:
            raise ValueError("a system message that is not the first; move it to the front")
        if role == "assistant" and before != "user":
            raise ValueError("an assistant message that does not follow a user message; remove it or join the two")
        before = role
    if before == "system":
        raise ValueError("no user message; add the question")
