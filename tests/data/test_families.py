"""What is trained of conversations of several turns, token by token, by the templates of four families.

Samples are shown whole: «» surround what is supervised.
"""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.config import DataConfig
from dspark_jax.data import chat
from dspark_jax.data.answer_log import Rejected
from dspark_jax.data.prompts import Prompt
from dspark_jax.data.regenerate import Limits, conversations, regenerate
from dspark_jax.data.samples import Tally, answered_samples, given_samples
from dspark_jax.data.sources import Sample
from dspark_jax.data.thinking import Thinking

TEMPLATES = Path(__file__).parent / "templates"

ASKED = {
    "qwen3": "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
    "gemma4": "<turn>user\na</turn>\n<turn>model\n",
    "deepseek_v3": "<User>a<Assistant>",
    "gpt_oss": "<start>user<message>a<end><start>assistant",
}
AGAIN = {
    "qwen3": "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n",
    "gemma4": "<turn>user\nb</turn>\n<turn>model\n",
    "deepseek_v3": "<User>b<Assistant>",
    "gpt_oss": "<start>user<message>b<end><start>assistant",
}
THINK = {"gemma4": "<turn>system\n<think>\n</turn>\n"}
"""What asks the target to think, in front."""
HISTORY = {
    "qwen3": "one<|im_end|>\n",
    "gemma4": "one</turn>\n",
    "deepseek_v3": "</think>one<eos>",
    "gpt_oss": "<channel>final<message>one<end>",
}
"""The first answer in the prompt of the second."""
EMPTY = {
    "qwen3": "<think>\n\n</think>\n\n",
    "gemma4": "",
    "deepseek_v3": "</think>",
    "gpt_oss": "<channel>final<message>",
}
"""What the template itself writes before an answer without thoughts."""
END = {"qwen3": "<|im_end|>\n", "gemma4": "</turn>\n", "deepseek_v3": "<eos>", "gpt_oss": "<return>"}


def thoughts(name: str, text: str) -> str:
    """As the template writes them."""
    return {
        "qwen3": f"<think>\n{text}\n</think>\n\n",
        "gemma4": f"<channel>thought\n{text}\n</channel>",
        "gpt_oss": f"<channel>analysis<message>{text}<end><start>assistant<channel>final<message>",
    }[name]


def message(text: str, thought: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"reasoning_content": thought} if thought else {})}


def talk(*answers: dict[str, Any]) -> Prompt:
    questions = ({"role": "user", "content": text} for text in "ab")
    messages = [one for pair in zip(questions, answers, strict=True) for one in pair]
    return Prompt(tuple(messages), "set", "set.jsonl", 1)


@pytest.fixture
def tokenizer(tiny_target: Path) -> Any:
    return chat.load_tokenizer(tiny_target)


def shown(tokenizer: Any, sample: Sample) -> str:
    """The whole sample, token by token."""
    tokens, mask = sample.tokens.tolist(), [0, *sample.loss_mask.tolist(), 0]
    edges = {(0, 1): "«", (1, 0): "»"}
    parts = [edges.get((mask[i], mask[i + 1]), "") + tokenizer.decode([token]) for i, token in enumerate(tokens)]
    return "".join(parts) + edges.get((mask[-2], mask[-1]), "")


def given(tokenizer: Any, name: str, prompt: Prompt, folder: Path, **fields: Any) -> tuple[list[str], dict[str, int]]:
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    config = DataConfig(regenerate=False, min_loss_tokens=1, max_prompt_length=400, max_length=900, **fields)
    with contextlib.closing(Tally(folder / "rejected.jsonl")) as tally:
        samples = list(given_samples(tokenizer, [prompt], config, tally))
    for sample in samples:  # ids are those of the text, not only their characters
        assert sample.tokens.tolist() == chat.encode(tokenizer, tokenizer.decode(sample.tokens.tolist()))["input_ids"]
    return [shown(tokenizer, sample) for sample in samples], dict(tally.rejected)


@pytest.mark.parametrize("name", ["qwen3", "gemma4", "gpt_oss"])
@pytest.mark.parametrize("part", ["both", "thinking", "answer"])
def test_thoughts_of_the_turn_that_is_trained(tokenizer: Any, tmp_path: Path, name: str, part: str) -> None:
    def answer(thought: str, text: str) -> str:
        thought, text = thoughts(name, thought), text + END[name]
        return {"both": f"«{thought}{text}»", "thinking": f"«{thought}»{text}", "answer": f"{thought}«{text}»"}[part]

    first = THINK.get(name, "") + ASKED[name]
    expected = [first + answer("hm", "one"), first + HISTORY[name] + AGAIN[name] + answer("so", "two")]
    prompt = talk(message("one", "hm"), message("two", "so"))
    found = given(tokenizer, name, prompt, tmp_path, thinking="given", supervised=part)
    assert found == (expected, {})


def test_thoughts_that_a_template_never_shows_are_set_aside(tokenizer: Any, tmp_path: Path) -> None:
    prompt = talk(message("one", "hm"), message("two", "so"))
    assert given(tokenizer, "deepseek_v3", prompt, tmp_path, thinking="given") == ([], {"reasoning": 1})


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("thinking", ["off", "on"])
def test_answers_without_thoughts(tokenizer: Any, tmp_path: Path, name: str, thinking: str) -> None:
    """An empty think block is never supervised; turns share a sample where the template lets them."""
    first, two = (THINK.get(name, "") if thinking == "on" else "") + ASKED[name], f"{EMPTY[name]}«two{END[name]}»"
    split = [f"{first}{EMPTY[name]}«one{END[name]}»", first + HISTORY[name] + AGAIN[name] + two]
    before = "" if name in ("qwen3", "gemma4") else EMPTY[name]  # of an earlier turn
    together = [f"{first}{before}«one{END[name]}»{AGAIN[name]}{two}"]
    # Qwen3 asked to think renders the first turn in another way while it is the last; GPT-OSS ends it differently.
    expected = split if name == "gpt_oss" or (name, thinking) == ("qwen3", "on") else together
    assert given(tokenizer, name, talk(message("one"), message("two")), tmp_path, thinking=thinking) == (expected, {})


WRITTEN = {
    "qwen3": ("<think>\nhm\n</think>", "\n\none"),
    "gemma4": ("<channel>thought\nhm\n</channel>", "one"),
    "deepseek_v3": ("hm</think>", "one"),  # its prompt has the beginning
    "gpt_oss": ("<channel>analysis<message>hm<end><start>assistant<channel>final<message>", "one"),
}
"""Thoughts and answer of targets that were asked to think."""


def answered(tokenizer: Any, name: str, text: str, folder: Path, **fields: Any) -> tuple[list[str], list[str]]:
    """Samples of two questions that the target answers alike, and why conversations are shorter or set aside."""
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    config = DataConfig(min_loss_tokens=1, max_length=500, **fields)
    prompt = Prompt(tuple({"role": "user", "content": text} for text in "ab"), "set", "set.jsonl", 1)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    why: list[str] = []

    def decode(ask: Any) -> Any:
        for question in iter(ask, None):
            yield question, np.asarray(ids[: question.room])

    def reject(_: Any, error: Rejected) -> None:
        why.append(error.reason)

    todo = conversations([prompt], 1, "", Thinking.of(config))
    with contextlib.closing(Tally(folder / "rejected.jsonl")) as tally:
        stops, limits = (tokenizer.eos_token_id,), Limits(max_prompt_length=400, max_length=500)
        found = regenerate(tokenizer, todo, decode, stops, limits, None, reject, lambda turns: None)
        samples = [shown(tokenizer, one) for one in answered_samples(tokenizer, found, config, tally)]
    return samples, [*why, *(one.shortened for one in found if one.shortened), *tally.rejected]


@pytest.mark.parametrize("name", ["qwen3", "gemma4", "deepseek_v3"])
@pytest.mark.parametrize("part", ["both", "thinking", "answer"])
def test_what_the_target_thought_and_wrote(tokenizer: Any, tmp_path: Path, name: str, part: str) -> None:
    thought, text = WRITTEN[name]
    text += "<|im_end|>"
    tail = "\n" if name == "qwen3" else ""  # templates that close turns otherwise add nothing to this tokenizer's end
    answer = {
        "both": f"«{thought}{text}{tail}»",
        "thinking": f"«{thought}»{text}{tail}",
        "answer": f"{thought}«{text}{tail}»",
    }[part]
    think = "<think>" if name == "deepseek_v3" else ""
    first, history = THINK.get(name, "") + ASKED[name], HISTORY[name]
    expected = [first + think + answer, first + history + AGAIN[name] + think + answer]
    if name == "gemma4":  # the text of an answer loses its end, and its thoughts as the template cuts them
        assert "</channel>" not in expected[1].partition(AGAIN[name])[0]
    found = answered(tokenizer, name, thought + text, tmp_path, thinking="on", supervised=part)
    assert found == (expected, [])


@pytest.mark.parametrize("part", ["both", "thinking", "answer"])
def test_thoughts_that_end_in_control_tokens(tokenizer: Any, tmp_path: Path, part: str) -> None:
    """As GPT-OSS has them: they are told apart, but the text of the answer does not keep them for a second question."""
    marks = ["<channel>", "<message>", "<start>", "<end>", "<return>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    thought, text = WRITTEN["gpt_oss"]
    whole, text = thought + text + "<|im_end|>", text + "<|im_end|>"
    answer = {"both": f"«{whole}»", "thinking": f"«{thought}»{text}", "answer": f"{thought}«{text}»"}[part]
    found, why = answered(tokenizer, "gpt_oss", whole, tmp_path, thinking="on", supervised=part)
    assert found == [ASKED["gpt_oss"] + answer] and len(why) == 1
    assert why[0].startswith("template: turn 2: the answer before it has control tokens")
    call = "<channel>analysis<message>hm<end><start>assistant to=functions.add<channel>commentary<message>{}<|im_end|>"
    found, why = answered(tokenizer, "gpt_oss", call, tmp_path, thinking="on", supervised=part)
    assert (len(found), "reasoning" in why) == ((1, False) if part == "both" else (0, True))


def test_a_target_that_thinks_in_its_own_marks_and_is_cut(tokenizer: Any, tmp_path: Path) -> None:
    text = "<channel>thought\nhm" + " hm" * 300
    (found,), _ = answered(tokenizer, "gemma4", text, tmp_path, thinking="on", supervised="thinking")
    assert "«<channel>thought\nhm" in found and found.endswith("»")
    assert answered(tokenizer, "gemma4", text, tmp_path, thinking="on", supervised="answer")[0] == []
    (found, _), _ = answered(tokenizer, "gemma4", "one<|im_end|>", tmp_path, thinking="on", supervised="answer")
    assert found.endswith("<turn>model\n«one<|im_end|>»")


def test_without_thinking_a_template_that_rewrites_earlier_turns_has_a_sample_per_turn(
    tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<channel>", "<message>", "<return>"]})
    tokenizer.eos_token = "<return>"
    found, why = answered(tokenizer, "gpt_oss", "one<return>", tmp_path)
    first = ASKED["gpt_oss"]
    second = first + HISTORY["gpt_oss"] + AGAIN["gpt_oss"]
    assert (found, why) == ([f"{first}«one<return>»", f"{second}«one<return>»"], [])
