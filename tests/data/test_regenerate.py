import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.config import InputError
from dspark_jax.data import chat
from dspark_jax.data.prompts import Prompt
from dspark_jax.data.regenerate import (
    Answered,
    AnswerLog,
    Conversation,
    Decode,
    Limits,
    Question,
    Rejected,
    conversations,
    regenerate,
)

LIMITS = Limits(max_prompt_length=60, max_length=90)


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> Any:
    return chat.load_tokenizer(tiny_target)


def prompt(*turns: str, line: int = 1) -> Prompt:
    return Prompt(tuple({"role": "user", "content": turn} for turn in turns), "set", "set.jsonl", line)


class Decoder:
    """Answers with `text`, of the prompt's text and the sample id only; counts what it is asked.

    Two questions at a time, the later one first.
    """

    def __init__(self, tokenizer: Any, text: Callable[[str, int], str]):
        self.tokenizer, self.text = tokenizer, text
        self.asked: list[tuple[int, int]] = []
        self.fail_after = 10**9

    def __call__(self, ask: Callable[[], Question | None]) -> Iterator[tuple[Question, list[int]]]:
        live: list[Question] = []
        while True:
            while len(live) < 2 and (question := ask()):
                live.append(question)
            if not live:
                return
            if len(self.asked) == self.fail_after:
                raise KeyboardInterrupt
            question = live.pop()
            self.asked.append((question.conversation.sample_id, question.turn))
            text = self.text(self.tokenizer.decode(question.ids), question.conversation.sample_id)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            yield question, tokens[: question.room]


def run(
    tokenizer: Any, todo: list[Conversation], decode: Decode, path: Path, limits: Limits = LIMITS
) -> tuple[list[Answered], dict[int, Rejected], int]:
    rejected: dict[int, Rejected] = {}
    advanced: list[int] = []

    def on_rejected(conversation: Conversation, error: Rejected) -> None:
        rejected[conversation.sample_id] = error

    with contextlib.closing(AnswerLog(path)) as log:
        stops = (tokenizer.eos_token_id,)
        answered = regenerate(tokenizer, todo, decode, stops, limits, log, on_rejected, advanced.append)
    return answered, rejected, sum(advanced)


def test_turns_are_answered_one_after_the_other_with_the_answers_before_them(tokenizer: Any, tmp_path: Path) -> None:
    todo = conversations([prompt("a", "b"), prompt("c"), prompt("d", "e", "f")], repeats=2, system_prompt="S")
    assert [conversation.sample_id for conversation in todo] == [0, 1, 2, 3, 4, 5]
    limits = Limits(max_prompt_length=200, max_length=260)
    decode = Decoder(tokenizer, lambda text, stream: f"{stream}:{text.count('assistant')}<|im_end|>")
    answered, rejected, advanced = run(tokenizer, todo, decode, tmp_path / "log", limits)
    assert not rejected and advanced == 12 == len(decode.asked)
    assert [item.conversation.sample_id for item in answered] == list(range(6))
    texts = [[message["content"] for message in item.messages] for item in answered]
    assert texts[1] == ["S", "a", "1:1", "b"] and texts[2] == ["S", "c"]
    assert texts[5] == ["S", "d", "5:1", "e", "5:2", "f"]
    assert chat.answer_text(tokenizer, answered[5].answer.tolist()) == "5:3"
    assert not any(item.cut or item.shortened for item in answered)


def test_given_answers_are_left_out_and_asked_again(tokenizer: Any) -> None:
    given = Prompt(
        tuple({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "x"), ("user", "b"))), "s", "f", 1
    )
    (conversation,) = conversations([given], repeats=1)
    assert [message["content"] for message in conversation.questions] == ["a", "b"]


def test_what_cannot_be_answered_is_rejected_with_its_reason(tokenizer: Any, tmp_path: Path) -> None:
    todo = conversations([prompt("fine"), prompt("empty"), prompt("long " * 40), prompt("nothing at all")], repeats=1)
    stop = "<|im_end|>"
    texts = {"empty": stop, "nothing": ""}
    decode = Decoder(tokenizer, lambda text, _: next((v for k, v in texts.items() if k in text), "ok" + stop))
    answered, rejected, advanced = run(tokenizer, todo, decode, tmp_path / "log")
    assert [item.conversation.sample_id for item in answered] == [0]
    assert {i: error.reason for i, error in rejected.items()} == {
        1: "empty_answer",
        2: "prompt_too_long",
        3: "empty_answer",
    }
    assert "data.max_prompt_length=60" in str(rejected[2])
    assert advanced == 4


def test_a_conversation_ends_before_a_turn_that_cannot_be_answered(tokenizer: Any, tmp_path: Path) -> None:
    todo = conversations([prompt("one", "empty", "x"), prompt("one", "long " * 40), prompt("cut", "y", "z")], repeats=1)
    stop = "<|im_end|>"
    texts = {"empty": stop, "cut": "the answer " * 90}
    decode = Decoder(tokenizer, lambda text, _: next((v for k, v in texts.items() if k in text), "ok" + stop))
    answered, rejected, advanced = run(tokenizer, todo, decode, tmp_path / "log")
    assert not rejected and advanced == 8
    assert [len(item.messages) for item in answered] == [1, 1, 1]
    assert [item.shortened.split(":")[0] for item in answered] == ["empty_answer", "prompt_too_long", "prompt_too_long"]
    assert [item.cut for item in answered] == [False, False, True]
    prompt_length = len(chat.prompt_tokens(tokenizer, answered[2].messages))
    assert prompt_length + len(answered[2].answer) == LIMITS.max_length


def test_a_killed_run_asks_only_what_had_no_answer(tokenizer: Any, tmp_path: Path) -> None:
    todo = conversations([prompt("x" * (i % 7), *["y"] * (i % 3), line=i) for i in range(1, 12)], repeats=2)
    limits = Limits(max_prompt_length=200, max_length=260)

    def text(seen: str, stream: int) -> str:
        return f"{stream} {len(seen)}<|im_end|>"

    whole = Decoder(tokenizer, text)
    expected = run(tokenizer, todo, whole, tmp_path / "whole", limits)
    path, asked = tmp_path / "log", []
    for fail_after in (2, 0, 1, 3, 10**9):
        decode = Decoder(tokenizer, text)
        decode.fail_after = fail_after
        if fail_after < 10**9:
            with pytest.raises(KeyboardInterrupt):
                run(tokenizer, todo, decode, path, limits)
            with path.open("ab") as file:
                file.write(b'{"id": 3, "turn": 1, "tok')  # killed while it was writing
        else:
            found = run(tokenizer, todo, decode, path, limits)
        asked += decode.asked
    assert len(asked) == len(set(asked)) and set(asked) == set(whole.asked)
    assert found[2] == expected[2]
    for a, b in zip(found[0], expected[0], strict=True):
        assert (a.conversation, a.messages, a.answer.tolist()) == (b.conversation, b.messages, b.answer.tolist())
    run(tokenizer, todo, lambda ask: pytest.fail("everything is answered"), path, limits)


def test_an_answer_may_have_a_limit_of_its_own(tokenizer: Any, tmp_path: Path) -> None:
    decode = Decoder(tokenizer, lambda text, stream: "x " * (9 - stream) + "<|im_end|>")
    todo = conversations([prompt("a"), prompt("b", "c"), prompt("d")], repeats=3)
    answered, _, _ = run(tokenizer, todo, decode, tmp_path / "log", Limits(60, 90, 8))
    assert [len(item.answer) for item in answered] == [8, 8, 8, 8, 8, 8, 7, 5, 3]
    assert [item.cut for item in answered] == [True] * 6 + [False] * 3
    assert [bool(item.shortened) for item in answered] == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("line", ["{", "[]", '{"id": 1}', '{"id": 1, "turn": 0, "tokens": ["a"]}'])
def test_a_damaged_line_of_the_log_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "log").write_text(f'{{"id": 1, "turn": 0, "tokens": [3]}}\n{line}\n')
    with pytest.raises(InputError, match="log:2: damaged; remove the lines from it on and run again"):
        AnswerLog(tmp_path / "log")
