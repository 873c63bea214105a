"""Prompt sets: JSONL files in the layouts found in the field, read into one form.

One JSON object per line, with one of these fields:
  {"turns": ["first question", "second question"]}              successive user turns
  {"prompt": "question"}                                        a single user turn
  {"messages": [{"role": "user", "content": "question"}, ...]}  roles system, user, assistant
  {"conversations": [{"from": "human", "value": "question"}, ...]}
"""

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
    """

    messages: tuple[Message, ...]
    prompt_set: str
    file: str
    line: int


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A line that is no prompt: where, why, and its text."""

    file: str
    line: int
    reason: str
    text: str


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
            if not line.strip():
                continue
            if limit and found == limit:
                break
            try:
                messages = _messages(line)
            except ValueError as error:
                malformed = Malformed(str(path), number, str(error), line.decode("utf-8", "replace"))
                if on_malformed is None:
                    raise InputError(f"{path}:{number}: {error}; correct or remove the line") from None
                first = first or malformed
                on_malformed(malformed)
                continue
            prompts.append(Prompt(messages, Path(path).stem, str(path), number))
            found += 1
        if not found:
            why = f"the first line that is not blank ({first.line}): {first.reason}" if first else "the file is empty"
            raise InputError(f"{path}: holds no prompt ({why}); give one JSON object with `turns` per line")
    return prompts


def _messages(line: bytes) -> tuple[Message, ...]:
    """Decodes and checks one line; a ValueError says what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at column {error.colno} ({error.msg})") from None
    except RecursionError:
        raise ValueError("not valid JSON (nested too deeply)") from None
    if not isinstance(record, dict):
        raise ValueError(f"a JSON {type(record).__name__} where an object is needed")
    if "turns" in record:
        pairs = [("user", text) for text in _list(record, "turns")]
    elif "prompt" in record:
        pairs = [("user", record["prompt"])]
    elif "messages" in record:
        pairs = [_pair(entry, "role", "content") for entry in _list(record, "messages")]
    elif "conversations" in record:
        pairs = [_pair(entry, "from", "value") for entry in _list(record, "conversations")]
    else:
        raise ValueError("none of the fields turns, prompt, messages, conversations")
    _check(pairs)
    return tuple({"role": ROLES[role], "content": text} for role, text in pairs)


def _list(record: dict[str, Any], field: str) -> list[Any]:
    value = record[field]
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{field}` must be a list that is not empty")
    return value


def _pair(entry: Any, role: str, text: str) -> tuple[Any, Any]:
    """(role, text) of a message, which may use either naming whatever its list is called."""
    if isinstance(entry, dict):
        for keys in ((role, text), ("role", "content"), ("from", "value")):
            if all(key in entry for key in keys):
                return entry[keys[0]], entry[keys[1]]
    raise ValueError(f"a message must be an object with `{role}` and `{text}`")


def _check(pairs: list[tuple[Any, Any]]) -> None:
    """Refuses conversations that no chat template can render or no model can answer."""
    before = ""
    for role, text in pairs:
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"role {role!r} is unknown; known are {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise ValueError(f"the text of a {role} message is a JSON {type(text).__name__}, not a string")
        # The JSON escape of half a surrogate pair decodes to a string that no tokenizer can encode.
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"the text of a {role} message contains half a surrogate pair")
        role = ROLES[role]
        if role == "user" and not text.strip():
            raise ValueError("a user message is empty")
        if role == "system" and before:
            raise ValueError("a system message that is not the first")
        if role == "assistant" and before != "user":
            raise ValueError("an assistant message that does not follow a user message")
        before = role
    if before == "system":
        raise ValueError("no user message")
