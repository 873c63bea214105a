import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    Rejected,
    conversations,
    plan_batches,
    regenerate,
)

LIMITS = Limits(max_prompt_length=60, max_length=90, max_positions=512, batch_size=3)


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> Any:
    return chat.load_tokenizer(tiny_target)


def prompt(*turns: str, line: int = 1) -> Prompt:
    return Prompt(tuple({"role": "user", "content": turn} for turn in turns), "set", "set.jsonl", line)


class Decoder:
    """Answers with `text`, of the prompt's own stream and text only; counts what it is asked."""

    def __init__(self, tokenizer: Any, text: Callable[[str, int], str]):
        self.tokenizer, self.text = tokenizer, text
        self.calls: list[tuple[list[int], int]] = []
        self.fail_after = 10**9

    def __call__(self, prompts: Sequence[Sequence[int]], streams: Sequence[int], most: int) -> list[np.ndarray]:
        if len(self.calls) == self.fail_after:
            raise KeyboardInterrupt
        self.calls.append((list(streams), most))
        answers = []
        for ids, stream in zip(prompts, streams, strict=True):
            text = self.text(self.tokenizer.decode(ids), stream)
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            answers.append(np.asarray(tokens[:most], np.int32))
        return answers


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
    limits = Limits(max_prompt_length=200, max_length=260, max_positions=512, batch_size=4)
    decode = Decoder(tokenizer, lambda text, stream: f"{stream}:{text.count('assistant')}<|im_end|>")
    answered, rejected, advanced = run(tokenizer, todo, decode, tmp_path / "log", limits)
    assert not rejected and advanced == 12 == sum(len(streams) for streams, _ in decode.calls)
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


def test_a_killed_run_continues_with_the_same_batches_and_the_same_answers(tokenizer: Any, tmp_path: Path) -> None:
    todo = conversations([prompt("x" * (i % 7), *["y"] * (i % 3), line=i) for i in range(1, 12)], repeats=2)
    limits = Limits(max_prompt_length=200, max_length=260, max_positions=512, batch_size=4)

    def text(seen: str, stream: int) -> str:
        return f"{stream} {len(seen)}<|im_end|>"

    whole = Decoder(tokenizer, text)
    expected = run(tokenizer, todo, whole, tmp_path / "whole", limits)
    path, calls = tmp_path / "log", []
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
        calls += decode.calls
    assert calls == whole.calls
    assert found[2] == expected[2]
    for a, b in zip(found[0], expected[0], strict=True):
        assert (a.conversation, a.messages, a.answer.tolist()) == (b.conversation, b.messages, b.answer.tolist())


def test_long_answers_are_decoded_in_parts_that_go_on_where_they_stopped(tokenizer: Any, tmp_path: Path) -> None:
    todo = conversations([prompt("a" * i, line=i) for i in range(1, 9)], repeats=1)
    limits = Limits(max_prompt_length=40, max_length=540, max_positions=0, batch_size=3)
    begin = [len(chat.prompt_tokens(tokenizer, conversation.questions)) for conversation in todo]
    lengths = [1, 63, 64, 65, 191, 192, 193, 1000]
    whole = [[*np.random.default_rng(i).integers(3, 200, n - 1), tokenizer.eos_token_id] for i, n in enumerate(lengths)]
    budgets: list[set[int]] = []

    def decode(prompts: Sequence[Sequence[int]], streams: Sequence[int], most: int) -> list[list[int]]:
        for ids, stream in zip(prompts, streams, strict=True):
            assert list(ids[begin[stream] :]) == whole[stream][: len(ids) - begin[stream]]
        if not budgets or budgets[-1] != {most}:
            budgets.append({most})
        return [whole[i][len(ids) - begin[i] :][:most] for i, ids in zip(streams, prompts, strict=True)]

    answered, rejected, advanced = run(tokenizer, todo, decode, tmp_path / "log", limits)
    assert list(rejected) == [0] and advanced == 8  # only its stop token
    for item in answered:
        i = item.conversation.sample_id
        assert item.answer.tolist() == whole[i][: 540 - begin[i]]
        assert item.cut == (i == 7)
    assert [most for (most,) in budgets] == [64, 128, 256, 128]


def test_batches_have_few_shapes_and_room_for_every_answer() -> None:
    rng = np.random.default_rng(0)
    prompts = {i: [0] * int(length) for i, length in enumerate(rng.integers(1, 300, 500))}
    limits = Limits(max_prompt_length=300, max_length=310, max_positions=0, batch_size=32)
    batches = list(plan_batches(prompts, limits, 128))
    assert sorted(i for batch, _ in batches for i in batch) == list(range(500))
    assert max(len(batch) for batch, _ in batches) <= 32
    for batch, most in batches:
        assert most in (16, 32, 64, 128)
        assert most == 128 or all(len(prompts[i]) + most >= 310 for i in batch)
    groups: dict[int, list[int]] = {}
    for batch, _ in batches:
        (group,) = {max(6, (len(prompts[i]) - 1).bit_length()) for i in batch}
        groups.setdefault(group, []).append(len(batch))
    assert sorted(groups) == [6, 7, 8, 9]  # up to 64, 128, 256, 512 tokens
    assert all(max(sizes) - min(sizes) <= 1 for sizes in groups.values())


def test_no_batch_asks_for_more_positions_than_the_target_has() -> None:
    prompts = {i: [0] * length for i, length in enumerate((3, 40, 64, 65, 100, 110))}
    limits = Limits(max_prompt_length=110, max_length=128, max_positions=128, batch_size=8)
    for batch, most in plan_batches(prompts, limits, 64):
        assert most >= 1 and max(len(prompts[i]) for i in batch) + most <= 128


def test_a_damaged_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"id": 1, "turn": 0, "part": 0, "tokens": [3]}\n{"id": 2}\n')
    with pytest.raises(InputError, match=r"answers.jsonl:2: no answer; remove this line, it will be decoded again"):
        AnswerLog(path)
