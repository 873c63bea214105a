"""Prompt sets: the files and hub data sets that a config names, read into conversations.

`files` takes files apart into rows, `layouts` reads a row, `messages` a message. Fields that are not used are named
with the prompt.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dspark_jax.config import InputError
from dspark_jax.data.files import EXAMPLE, Row, content_hashes, prompt_files, rows, set_name
from dspark_jax.data.layouts import Read, read_row
from dspark_jax.data.messages import REASONING, Message, SetAside, has_thoughts

__all__ = ["Malformed", "Message", "Prompt", "content_hashes", "prompt_files", "read_prompts", "set_name"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A conversation to be answered, or one that is answered already (it then ends in an assistant message).

    Attributes:
      messages: an optional system message, then user messages. A user message without an assistant message after it
        waits for an answer, so successive user messages are successive turns. None if there are `tokens`.
      prompt_set: stem of the file name; results are reported per set.
      file: path of the file, as given.
      line: 1-based line or row number.
      unused: fields of the line and of its messages that are not used, e.g. "id", "prompt beside turns" or
        "messages[].reasoning_content".
      tools: definitions of the functions that the assistant may call.
      tokens: (ids, loss mask) of a row that is tokenised already.
    """

    messages: tuple[Message, ...]
    prompt_set: str
    file: str
    line: int
    unused: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    tokens: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def reasoning(self) -> str:
        """The unused field that holds an assistant's thoughts; '' if there is none."""
        fields = [f"{layout}[].{name}" for layout in ("messages", "conversations") for name in REASONING]
        return next((name for name in self.unused if name in fields), "")

    @property
    def thinks(self) -> bool:
        """Whether its assistant thinks before an answer."""
        return bool(self.reasoning) or any(map(has_thoughts, self.messages))


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A line that is no prompt: where, why and what to do, its text, and the kind of reason that is counted."""

    file: str
    line: int
    reason: str
    text: str
    kind: str = "malformed"


def read_prompts(
    paths: Iterable[str | os.PathLike[str]],
    limit: int = 0,
    on_malformed: Callable[[Malformed], None] | None = None,
    *,
    tokenised: bool = False,
    reasoning: bool = False,
) -> list[Prompt]:
    """Reads prompt files, in the order given.

    Args:
      paths: files, directories, patterns and hub data sets; see `files`.
      limit: use at most so many prompts of each file; 0 = all.
      on_malformed: called with every line that is not a prompt, which is then left out. Without it such a line is an
        error, so that none is dropped silently.
      tokenised: take rows that are tokens already; else they are set aside.
      reasoning: keep assistants' thoughts with their messages.

    Raises:
      InputError: a file cannot be read or holds no prompt at all; a malformed line without `on_malformed`.
    """
    prompts = []
    for file in prompt_files(paths):
        name, found, first = set_name(file), 0, None
        for row in rows(file):
            try:
                read = _read(row, tokenised, reasoning)
            except ValueError as error:
                kind = error.kind if isinstance(error, SetAside) else "malformed"
                malformed = Malformed(file, row.number, str(error), row.text, kind)
                if on_malformed is None:
                    raise InputError(f"{file}:{row.number}: {error}") from None
                first = first or malformed
                on_malformed(malformed)
                continue
            prompts.append(Prompt(read.messages, name, file, row.number, read.unused, read.tools, read.tokens))
            found += 1
            if found == limit:  # 0 is none; a row more might have to be downloaded
                break
        if not found:
            why = f"line {first.line}: {first.reason}" if first else f"the file is empty; write {EXAMPLE} on its lines"
            raise InputError(f"{file}: holds no prompt; {why}")
    return prompts


def _read(row: Row, tokenised: bool, reasoning: bool) -> Read:
    """What a row says; a ValueError says what is wrong with it and what to do."""
    if row.record is None:
        raise ValueError(row.error)
    read = read_row(row.record, reasoning)
    if read.tokens is not None and not tokenised:
        raise SetAside(
            "tokenised",
            "it is tokenised already, and a question is needed as text; train on it with data.regenerate=False",
        )
    return read
