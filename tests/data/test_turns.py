"""Thinking and tools beyond the tables of docs/data.md: answers by the target, prompts, and several samples."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.config import Config, DataConfig, TargetArchitecture, TargetConfig
from dspark_jax.config_rules import problems
from dspark_jax.data import chat
from dspark_jax.data.chat import Options
from dspark_jax.data.prompts import Prompt
from dspark_jax.data.regenerate import AnswerLog, Limits, Rejected, conversations, next_prompt, regenerate
from dspark_jax.data.samples import Tally, answered_samples, given_samples
from dspark_jax.data.thinking import Thinking
from dspark_jax.data.turns import ToolsError, has_control_tokens, samples_of_turns
from dspark_jax.evaluation.decoding import Decoder

TEMPLATES = Path(__file__).parent / "templates"
LIMITS = Limits(max_prompt_length=300, max_length=500)
TOOLS = ({"type": "function", "function": {"name": "add", "parameters": {}}},)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
THINK = Options(thinking=True)


@pytest.fixture
def tokenizer(tiny_target: Path) -> Any:
    return with_template(chat.load_tokenizer(tiny_target), "qwen3")


def with_template(tokenizer: Any, name: str) -> Any:
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    return tokenizer


def talk(*texts: str) -> tuple[dict[str, Any], ...]:
    return tuple({"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts))


def prompt(*messages: dict[str, Any], **fields: Any) -> Prompt:
    return Prompt(messages, "set", "set.jsonl", 1, **fields)


def answers(tokenizer: Any, prompts: list[Prompt], texts: Sequence[str], config: DataConfig, folder: Path) -> Any:
    """Samples and tally where the target's answer of turn i is `texts[i]`."""
    rejected: list[Rejected] = []

    def decode(ask: Any) -> Any:
        for question in iter(ask, None):
            ids = tokenizer(texts[question.turn], add_special_tokens=False)["input_ids"]
            yield question, ids[: question.room]

    todo = conversations(prompts, 1, config.system_prompt, Thinking.of(config))
    with (
        contextlib.closing(AnswerLog(folder / "answers.jsonl")) as log,
        contextlib.closing(Tally(folder / "rejected.jsonl")) as tally,
    ):
        stops, done = (tokenizer.eos_token_id,), lambda turns: None
        answered = regenerate(
            tokenizer, todo, decode, stops, LIMITS, log, lambda one, error: rejected.append(error), done
        )
        assert not rejected
        return list(answered_samples(tokenizer, answered, config, tally)), tally, answered


def supervised(tokenizer: Any, sample: Any) -> str:
    return tokenizer.decode(sample.tokens[sample.loss_mask > 0])


def test_a_target_that_thinks_is_trained_on_every_turn_as_it_wrote_it(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["<think>\nhm\n</think>\n\none<|im_end|>", "<think>\nso\n</think>\n\ntwo<|im_end|>", "three<|im_end|>"]
    config = DataConfig(min_loss_tokens=1, max_length=500, thinking="on")
    asked = [prompt(*talk("a", "", "b", "", "c"))] * 2
    both, tally, answered = answers(tokenizer, asked, texts, config, tmp_path)
    samples = both[:3]
    assert [supervised(tokenizer, sample) for sample in samples] == [text + "\n" for text in texts]
    assert [sample.sample_id for sample in both] == [0, 1, 2, 3, 4, 5] and not tally.rejected
    whole = [tokenizer.decode(sample.tokens) for sample in samples]
    assert "hm" not in whole[1] and "<|im_start|>assistant\none<|im_end|>" in whole[1]
    asked = [item.messages for item in (answered[0].before.before, answered[0].before, answered[0])]
    for messages, sample in zip(asked, samples, strict=True):
        # The very ids that the target saw, and evaluation asks with the same.
        ids = chat.prompt_tokens(tokenizer, messages, THINK)
        assert sample.tokens[: len(ids)].tolist() == ids and not sample.loss_mask[: len(ids)].any()
        assert ids != chat.prompt_tokens(tokenizer, messages)
    (again,) = conversations([answered[0].conversation.prompt], 1, "", Thinking("on"))
    assert next_prompt(tokenizer, again, asked[1][:-1], 1)[1] == chat.prompt_tokens(tokenizer, asked[1], THINK)


def test_turns_that_stay_as_they_were_written_share_a_sample(tiny_target: Path, tmp_path: Path) -> None:
    tokenizer = chat.load_tokenizer(tiny_target)
    texts = ["<think>\nhm\n</think>\n\none<|im_end|>", "two<|im_end|>"]
    config = DataConfig(min_loss_tokens=1, max_length=500, thinking="on")
    (sample,), _, _ = answers(tokenizer, [prompt(*talk("a", "", "b"))], texts, config, tmp_path)
    assert supervised(tokenizer, sample) == "".join(text + "\n" for text in texts)


@pytest.mark.parametrize(
    ("part", "text", "wanted"),
    [
        ("thinking", "<think>\nhm\n</think>\n\none<|im_end|>", "<think>\nhm\n</think>"),
        ("answer", "<think>\nhm\n</think>\n\none<|im_end|>", "\n\none<|im_end|>\n"),
        ("answer", "one<|im_end|>", "one<|im_end|>\n"),
        ("thinking", "<think>\nhm" + " hm" * 300, "<think>\nhm"),
        ("thinking", "one<|im_end|>", None),
        ("answer", "<think>\nhm" + " hm" * 300, None),
    ],
)
def test_a_part_of_what_the_target_wrote_is_trained(
    tokenizer: Any, tmp_path: Path, part: str, text: str, wanted: str | None
) -> None:
    config = DataConfig(min_loss_tokens=1, max_length=500, thinking="on", supervised=part)
    samples, tally, _ = answers(tokenizer, [prompt(*talk("a"))], [text] * 9, config, tmp_path)
    if wanted is None:
        assert not samples and dict(tally.rejected) == {"too_few_loss_tokens": 1}
    else:
        assert supervised(tokenizer, samples[0]).startswith(wanted)
        assert len(supervised(tokenizer, samples[0])) == len(wanted) or "hm hm" in text


def test_evaluation_asks_a_text_as_it_asks_prompts(tokenizer: Any) -> None:
    models: Any = None
    for thinking in (False, True):
        decoder = Decoder(models, tokenizer, (1,), 8, 1, 0, system_prompt="S", thinking=thinking)
        (asked,) = conversations([prompt(*talk("a"))], 1, "S", Thinking("on" if thinking else "off"))
        assert decoder.prompt("a") == next_prompt(tokenizer, asked, asked.opening, 0)[1]
        assert tokenizer.decode(decoder.prompt("a")).endswith("assistant\n" if thinking else "</think>\n\n")


def test_given_asks_to_think_where_the_answers_of_the_file_do(tokenizer: Any) -> None:
    thoughtful = prompt(*talk("a", "<think>\nhm\n</think>\n\none"))
    named = prompt(*talk("a", "one"), unused=("messages[].reasoning_content",))
    plain = prompt(*talk("a", "one"))
    modes = {mode: conversations([thoughtful, named, plain], 1, "", Thinking(mode)) for mode in ("off", "on", "given")}
    found = {mode: [one.options.thinking for one in talks] for mode, talks in modes.items()}
    assert found == {"off": [False] * 3, "on": [True] * 3, "given": [True, True, False]}


def test_an_answer_with_control_tokens_ends_its_conversation(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["<|im_start|>one<|im_end|>", "two<|im_end|>"]
    config = DataConfig(min_loss_tokens=1, max_length=500, thinking="on")
    asked = [prompt(*talk("a", "", "b"))]
    (sample,), tally, (answered,) = answers(tokenizer, asked, texts, config, tmp_path)
    assert supervised(tokenizer, sample) == texts[0] + "\n" and tally.counts["shortened"] == 1
    assert answered.shortened.startswith("template: turn 2: the answer before it has control tokens")
    assert not has_control_tokens(tokenizer, [1, 2, tokenizer.eos_token_id])
    (tmp_path / "answers.jsonl").unlink()
    (sample,), tally, _ = answers(tokenizer, asked, texts, DataConfig(min_loss_tokens=1, max_length=500), tmp_path)
    assert supervised(tokenizer, sample).endswith("two<|im_end|>\n")  # without thinking as ever


def test_the_target_answers_until_a_tool_would(tokenizer: Any, tmp_path: Path) -> None:
    result = {"role": "tool", "content": "3"}
    asked = prompt(
        *talk("a", "b", "c"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, result, tools=TOOLS
    )
    (conversation,) = conversations([asked], 1, "S")
    assert [one["content"] for one in conversation.questions] == ["a", "c"]
    texts = ["one<|im_end|>", '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>']
    config = DataConfig(min_loss_tokens=1, max_length=500, system_prompt="S")
    (sample,), tally, (answered,) = answers(tokenizer, [asked], texts, config, tmp_path)
    assert supervised(tokenizer, sample) == "".join(text + "\n" for text in texts)
    assert "<tools>" in tokenizer.decode(sample.tokens) and tally.counts["shortened"] == 1
    assert answered.shortened.startswith("tools: what comes next is a tool's answer")
    tokenizer.chat_template = tokenizer.chat_template.replace("tool | tojson", "'a tool'")
    with pytest.raises(ToolsError, match="leaves out the tool 'add'; take it out, or use a template that shows it"):
        next_prompt(tokenizer, conversation, conversation.opening, 0)


def test_samples_of_a_conversation_have_ids_of_their_own(tokenizer: Any, tmp_path: Path) -> None:
    def thoughtful(text: str) -> dict[str, Any]:
        return {"role": "assistant", "content": text, "reasoning_content": "hm"}

    user = {"role": "user", "content": "q"}
    prompts = [
        prompt(user, thoughtful("one"), user, thoughtful("two")),
        prompt(user),
        prompt(user, thoughtful("x"), user, thoughtful("four is the answer")),
    ]
    config = DataConfig(regenerate=False, max_length=500, thinking="given")
    with contextlib.closing(Tally(tmp_path / "rejected.jsonl")) as tally:
        kept = list(given_samples(tokenizer, prompts, dataclasses.replace(config, min_loss_tokens=28), tally))
        assert dict(tally.rejected) == {"too_few_loss_tokens": 3, "unanswered": 1}
        assert len(kept) == 1 and "four" in supervised(tokenizer, kept[0])
    with contextlib.closing(Tally(tmp_path / "rejected.jsonl")) as tally:
        kept = list(given_samples(tokenizer, prompts, dataclasses.replace(config, min_loss_tokens=1), tally))
        assert [sample.sample_id for sample in kept] == [0, 1, 3, 4]


@pytest.mark.parametrize("template", ["qwen3", "gemma4", "deepseek_v3", "gpt_oss"])
@pytest.mark.parametrize("options", [Options(), THINK, Options(tools=TOOLS), Options(True, TOOLS)])
def test_every_sample_begins_with_the_prompt_that_the_target_saw(
    tokenizer: Any, template: str, options: Options
) -> None:
    """Token by token: what is supervised of a turn is what follows the template's own prompt for it."""
    with_template(tokenizer, template)
    called = [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    messages = [*talk("a", "one", "b"), *(called if options.tools else talk("", "two")[1:])]
    found = samples_of_turns(tokenizer, messages, options)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    assert sum(int(np.diff([0, *mask]).clip(0).sum()) for _, mask in found) == len(turns)
    asked = chat.render(tokenizer, messages[:1], True, options)
    ids, mask = found[0]
    before = tokenizer.decode(ids[: mask.index(1)])
    # DeepSeek's template has no answer without thoughts after a prompt to think, and Gemma 4's shows no empty thoughts.
    if (template, options.thinking) not in (("deepseek_v3", True), ("gemma4", False)):
        assert before.startswith(asked)
    # What else comes before an answer without thoughts is the template's.
    extra = {("qwen3", True): "<think>\n\n</think>\n\n"}.get((template, options.thinking), "")
    if template in ("qwen3", "gemma4") and before.startswith(asked):
        assert before == asked + extra
    for ids, mask in found:
        assert mask[-1] == 1 and len(ids) == len(mask)


def test_ids_of_calls_and_results_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ' ' + (m.content or '') }}"
        "{% if m.tool_call_id %}{{ m.tool_call_id + m.name }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ c.id + c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}{{ ';' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c7", **CALL}]}
    result = {"role": "tool", "content": "3", "tool_call_id": "c7", "name": "add"}
    talked = [{"role": "user", "content": "a"}, call, result, {"role": "assistant", "content": "three"}]
    ((ids, mask),) = samples_of_turns(tokenizer, talked, Options())
    assert tokenizer.decode(ids) == 'user a;assistant c7add{"a": 1};tool 3c7add;assistant three;'
    trained = [one for one, on in zip(ids, mask, strict=True) if on]
    assert tokenizer.decode(trained) == 'c7add{"a": 1};three;'


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thinking": "maybe"}, "data.thinking='maybe' is unknown; use off, on, given or mixed"),
        ({"supervised": "all"}, "data.supervised='all' is unknown; use both, thinking or answer"),
        ({"supervised": "thinking"}, "with data.thinking='off' leaves nothing to train; set data.thinking='on'"),
        (
            {"supervised": "thinking", "thinking": "mixed"},
            "with data.thinking='mixed' leaves nothing to train of the prompts that are asked without; set",
        ),
        ({"regenerate": False, "thinking": "mixed"}, "data.thinking='mixed' needs data.regenerate=True: answers of"),
        ({"thinking": "mixed", "thinking_share": 1.5}, "data.thinking_share=1.5 must be from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tiny_target: Path, fields: dict[str, Any], message: str) -> None:
    target = TargetConfig(path=str(tiny_target), architecture=TargetArchitecture.from_hf(tiny_target))
    found = list(problems(Config(target=target, data=DataConfig(**fields))))
    assert any(message in one for one in found), found


def test_data_sets_of_the_hub_are_no_paths(tiny_target: Path) -> None:
    target = TargetConfig(path=str(tiny_target), architecture=TargetArchitecture.from_hf(tiny_target))
    for entry, refused in (
        ("hub:a/b?split=test", False),
        ("gs://bucket/a.jsonl", False),
        ("az://bucket/a.jsonl", True),
    ):
        found = [one for one in problems(Config(target=target, data=DataConfig(prompts=(entry,)))) if "prompts" in one]
        assert bool(found) == refused
