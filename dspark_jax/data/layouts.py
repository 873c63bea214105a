"""Rows to conversations: the layouts found in the field, read into one form.

  {"turns": ["first question", "second question"]}              successive user turns
  {"prompt": "question"}                                        a single user turn
  {"messages": [{"role": "user", "content": "question"}, ...]}  OpenAI's chat format, with tools
  {"conversations": [{"from": "human", "value": "question"}, ...]}  ShareGPT
  {"instruction": "...", "input": "...", "output": "..."}       Alpaca
  {"input_ids": [1, 2, ...], "loss_mask": [0, 1, ...]}          tokens, of the target's own tokenizer

`LAYOUTS` has one entry per layout. A row may have fields of several; the first one in the table is taken, and the
others are named among the fields that are not used.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dspark_jax.data.messages import Message, check_order, is_empty, read_message, read_tools


@dataclasses.dataclass(frozen=True)
class Read:
    """What a row says.

    Attributes:
      messages: of the conversation; none if it is `tokens`.
      tools: definitions of functions, in OpenAI's form.
      tokens: (ids, loss mask) of a row that is tokenised already.
      unused: fields of the row and its messages that are not used.
    """

    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    tokens: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    unused: tuple[str, ...] = ()


def read_row(record: dict[str, Any], reasoning: bool = False) -> Read:
    """The conversation of a row.

    Args:
      record: the row.
      reasoning: keep assistants' thoughts with their messages; else the fields that hold them are not used.

    Raises:
      ValueError: says what is wrong with the row and what to do; `SetAside` if it is no mistake.
    """
    layout = next((one for one in LAYOUTS if one in record), None)
    if layout is None:
        names = ", ".join(map(repr, list(record)[:8])) or "none"
        raise ValueError(f"none of the fields {', '.join(LAYOUTS)} (it has {names}); rename the one with the question")
    companions, read = LAYOUTS[layout]
    if layout == "instruction" and "input_ids" in record:
        raise ValueError("both `instruction` and `input_ids`; keep the one that is meant")
    used = {layout, *companions}
    tools: tuple[Mapping[str, Any], ...] = ()
    inside: list[str] = []
    if layout != "input_ids":
        name = next((name for name in ("tools", "functions") if not is_empty(record.get(name))), "")
        tools, inside = read_tools(name, record[name]) if name else ((), [])
        used.add(name)
    others = [name for name, value in record.items() if name not in used and not is_empty(value)]
    unused = [f"{name} beside {layout}" if name in LAYOUTS else name for name in others]
    found = read(record, reasoning)
    if found.tokens is None:
        check_order(found.messages)
    return dataclasses.replace(found, tools=tools, unused=tuple(dict.fromkeys([*unused, *inside, *found.unused])))


def _list(record: dict[str, Any], field: str) -> list[Any]:
    value = record[field]
    if not isinstance(value, list) or not value:
        what = {"turns": "the user's questions", "input_ids": "token ids"}.get(field, "messages")
        raise ValueError(f"`{field}` must be a list that is not empty; put {what} into it")
    return value


def _said(role: str, text: Any) -> Message:
    return read_message({"role": role, "content": text}, ("role", "content"))[0]


def _turns(record: dict[str, Any], reasoning: bool) -> Read:
    del reasoning  # nobody has answered
    return Read(tuple(_said("user", text) for text in _list(record, "turns")))


def _prompt(record: dict[str, Any], reasoning: bool) -> Read:
    del reasoning
    return Read((_said("user", record["prompt"]),))


def _chat(field: str, keys: tuple[str, str]) -> Callable[[dict[str, Any], bool], Read]:
    def read(record: dict[str, Any], reasoning: bool) -> Read:
        messages, unused = [], []
        for entry in _list(record, field):
            message, others = read_message(entry, keys, reasoning)
            messages.append(message)
            unused += [f"{field}[].{name}" for name in others]
        return Read(tuple(messages), unused=tuple(unused))

    return read


def _alpaca(record: dict[str, Any], reasoning: bool) -> Read:
    """Instruction and input are the question, joined by a line break; `history` holds earlier questions and answers."""
    del reasoning
    messages = [_said("system", record["system"])] if not is_empty(record.get("system")) else []
    for pair in record.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("`history` must be a list of [question, answer]; correct it")
        messages += [_said("user", pair[0]), _said("assistant", pair[1])]
    question = _said("user", record["instruction"])
    if not is_empty(record.get("input")):
        question = {"role": "user", "content": f"{question['content']}\n{_said('user', record['input'])['content']}"}
    messages.append(question)
    if not is_empty(record.get("output")):
        messages.append(_said("assistant", record["output"]))
    return Read(tuple(messages))


def _tokens(record: dict[str, Any], reasoning: bool) -> Read:
    del reasoning
    ids, mask = _list(record, "input_ids"), record.get("loss_mask")
    if not all(type(one) is int and 0 <= one < 2**31 for one in ids):
        raise ValueError("`input_ids` must hold token ids; correct them")
    if not isinstance(mask, list) or len(mask) != len(ids) or not all(one in (0, 1) for one in mask):
        raise ValueError("`input_ids` needs a `loss_mask` with 0 or 1 for each of its ids; add it or correct it")
    return Read(tokens=(tuple(ids), tuple(map(int, mask))))


LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[dict[str, Any], bool], Read]]] = {
    "turns": ((), _turns),
    "prompt": ((), _prompt),
    "messages": ((), _chat("messages", ("role", "content"))),
    "conversations": ((), _chat("conversations", ("from", "value"))),
    "instruction": (("input", "output", "system", "history"), _alpaca),
    "input_ids": (("loss_mask",), _tokens),
}
"""Field by which a layout is known, further fields that it uses, and what reads it."""
