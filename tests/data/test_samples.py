import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.config import DataConfig
from dspark_jax.data import chat
from dspark_jax.data.prompts import Malformed, Prompt
from dspark_jax.data.regenerate import Answered, conversations
from dspark_jax.data.samples import Tally, answered_samples, describe, given_samples


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> Any:
    return chat.load_tokenizer(tiny_target)


def prompt(*texts: str, line: int = 1, roles: tuple[str, ...] = ("user", "assistant")) -> Prompt:
    messages = tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))
    return Prompt(messages, f"set{line % 2}", "set.jsonl", line)


def test_given_answers_are_kept_or_set_aside_with_a_reason(tokenizer: Any, tmp_path: Path) -> None:
    prompts = [
        prompt("q", "the answer is the sum of the numbers", line=1),
        prompt("q", line=2),
        prompt("q", " \n", line=3),
        prompt("long " * 40, "a", line=4),
        prompt("q", "yes", line=5),
        prompt("q", "number " * 60, line=6),
    ]
    config = DataConfig(regenerate=False, max_prompt_length=60, max_length=70, min_loss_tokens=8, system_prompt="S")
    path = tmp_path / "rejected.jsonl"
    with contextlib.closing(Tally(path)) as tally:
        tally.malformed(Malformed("set.jsonl", 9, "not valid JSON", "{é"))
        kept = list(given_samples(tokenizer, prompts, config, tally))
        report = tally.report()
    assert [sample.sample_id for sample in kept] == [0, 5]
    messages = chat.with_system(prompts[0].messages, "S")
    assert (kept[0].tokens.tolist(), kept[0].loss_mask.tolist()) == chat.tokens_and_mask(tokenizer, messages)
    assert len(kept[1].tokens) == len(kept[1].loss_mask) == 70 and kept[1].loss_mask[-1] == 1
    assert report["samples"] == 2 and report["cut_answers"] == 1
    assert report["tokens"] == len(kept[0].tokens) + 70
    assert report["loss_tokens"] == int(sum(sample.loss_mask.sum() for sample in kept))
    assert {name: counts["samples"] for name, counts in report["prompt_sets"].items()} == {"set1": 1, "set0": 1}
    rejected = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [(entry["line"], entry["reason"]) for entry in rejected] == [
        (9, "malformed"),
        (2, "unanswered"),
        (3, "empty_answer"),
        (4, "prompt_too_long"),
        (5, "too_few_loss_tokens"),
    ]
    assert rejected[0]["text"] == "{é" and rejected[1]["messages"] == [{"role": "user", "content": "q"}]
    assert sum(report["rejected"].values()) == 5
    assert describe(report["rejected"]).startswith("1 malformed line, 1 without an answer, 1 empty answer")


def test_generated_answers_keep_their_ids_and_other_splits_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    stop = tokenizer.eos_token_id
    usual = [*tokenizer("the answer is the sum", add_special_tokens=False)["input_ids"], stop]
    letters = [*(tokenizer.convert_tokens_to_ids(c) for c in "theanswer"), stop]
    answered = []
    todo = conversations([prompt("a"), prompt("b"), prompt("c")], repeats=1)
    for conversation, ids in zip(todo, (usual, letters, letters[:-1]), strict=True):
        cut = ids[-1] != stop
        answered.append(Answered(conversation, conversation.questions, np.asarray(ids, np.int32), cut))
    config = DataConfig(max_prompt_length=60, max_length=70, min_loss_tokens=4)
    with contextlib.closing(Tally(tmp_path / "rejected.jsonl")) as tally:
        kept = list(answered_samples(tokenizer, answered, config, tally))
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for sample, item, tail in zip(kept, answered, (newline, newline, []), strict=True):
        ids = [*item.answer.tolist(), *tail]
        assert sample.tokens.tolist() == chat.prompt_tokens(tokenizer, item.messages) + ids
        assert sample.loss_mask.sum() == len(ids) and sample.loss_mask[-len(ids) :].all()
    assert dict(tally.counts) == {"cut_answers": 1, "shortened": 0, "split_differently": 1, "thoughts_cut": 0}


def test_a_template_that_refuses_a_conversation_sets_it_aside(tiny_target: Path, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_target)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    with contextlib.closing(Tally(tmp_path / "rejected.jsonl")) as tally:
        config = DataConfig(regenerate=False, min_loss_tokens=1)
        assert not list(given_samples(tokenizer, [prompt("a", "b", "c", "d")], config, tally))
    assert dict(tally.rejected) == {"template": 1}


def test_reasoning_is_set_aside_and_what_is_not_used_is_counted(tokenizer: Any, tmp_path: Path) -> None:
    answer = "the answer is the sum of the numbers"
    thoughtful, plain = prompt("q", answer, line=1), prompt("q", answer, line=2)
    thoughtful = dataclasses.replace(thoughtful, unused=("id", "messages[].reasoning_content"))
    plain = dataclasses.replace(plain, unused=("id", "prompt beside turns"))
    path = tmp_path / "rejected.jsonl"
    with contextlib.closing(Tally(path)) as tally:
        tally.malformed(Malformed("set.jsonl", 9, "a message has `tool_calls`", "{}", "tools"))
        tally.read([thoughtful, plain])
        kept = list(given_samples(tokenizer, [thoughtful, plain], DataConfig(min_loss_tokens=1), tally))
        report = tally.report()
    assert [sample.sample_id for sample in kept] == [1]
    assert report["rejected"] == {"tools": 1, "reasoning": 1}
    assert report["unused"] == {"id": 2, "messages[].reasoning_content": 1, "prompt beside turns": 1}
    assert describe(report["rejected"]) == "1 with tools that the chat template does not show, 1 with reasoning"
    detail = json.loads(path.read_text().splitlines()[1])["detail"]
    assert "it has `messages[].reasoning_content`" in detail and "answers itself, without thinking" in detail


def test_thoughts_that_the_template_leaves_out_are_counted(tiny_target: Path, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_target)
    thoughtful = prompt("q", "<think>\nhm\n</think>\n\nyes", "q", "no")
    config = DataConfig(regenerate=False, min_loss_tokens=1)
    with contextlib.closing(Tally(tmp_path / "rejected.jsonl")) as tally:
        assert list(given_samples(tokenizer, [thoughtful], config, tally)) and tally.counts["thoughts_cut"] == 0
        cut = "(m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content)"
        tokenizer.chat_template = f"{{% for m in messages %}}{{{{ m.role + '\\n' + {cut} + '\\n' }}}}{{% endfor %}}"
        assert list(given_samples(tokenizer, [thoughtful], config, tally)) and tally.counts["thoughts_cut"] == 1


def test_a_think_block_that_cannot_be_told_apart_counts_as_reasoning(tiny_target: Path, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_target)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ('*' if '</think>' in m.content else '+') + m.content }}{% endfor %}"
    )
    with contextlib.closing(Tally(tmp_path / "rejected.jsonl")) as tally:
        config = DataConfig(regenerate=False, min_loss_tokens=1)
        assert not list(given_samples(tokenizer, [prompt("a", "<think>b</think>c")], config, tally))
    assert dict(tally.rejected) == {"reasoning": 1}
