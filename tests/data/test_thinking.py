"""A share of the prompts is asked with thinking: which ones, what is trained of them, how evaluation asks."""

import contextlib
import dataclasses
import json
import os
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.config import Config, DataConfig, DrafterConfig, TargetConfig, resolve
from dspark_jax.data import chat
from dspark_jax.data.chat import Options
from dspark_jax.data.prompts import Prompt, read_prompts
from dspark_jax.data.regenerate import conversations
from dspark_jax.data.samples import Tally
from dspark_jax.data.sources import SampleReader
from dspark_jax.data.thinking import Thinking
from dspark_jax.evaluation.acceptance import Counts
from dspark_jax.evaluation.decoding import Decoder, Requests
from dspark_jax.evaluation.setup import read_questions
from dspark_jax.evaluation.summary import Measured, tau_rows
from dspark_jax.prepare import prepare
from dspark_jax.run import Run

TEMPLATES = Path(__file__).parent / "templates"


def prompt(*texts: str, line: int = 1, **fields: Any) -> Prompt:
    return Prompt(tuple({"role": "user", "content": text} for text in texts), "set", "set.jsonl", line, **fields)


def test_which_prompts_think_follows_from_their_text_and_the_seed_alone() -> None:
    prompts = [prompt(f"question {i}", "and?", line=i) for i in range(1000)]
    rule = Thinking("mixed", 0.3, seed=5)
    chosen = [rule.asks(one) for one in prompts]
    assert abs(np.mean(chosen) - 0.3) < 0.05
    # Known answers: another version or machine must choose alike.
    assert [rule.asks(prompt(text)) for text in ("a", "b", "c", "d", "é")] == [False, False, False, True, False]
    answered = {"role": "assistant", "content": "an answer"}
    for one, thinks in zip(prompts[:50], chosen, strict=False):
        moved = dataclasses.replace(one, file="other.jsonl", line=one.line + 7, prompt_set="other", tools=({"a": 1},))
        given = dataclasses.replace(one, messages=(one.messages[0], answered, one.messages[1]))
        assert rule.asks(moved) == rule.asks(given) == thinks
    talks = conversations(prompts[::-1], 2, "be brief", rule)
    assert [one.options.thinking for one in talks] == [thinks for thinks in chosen[::-1] for _ in range(2)]
    more = [Thinking("mixed", 0.6, seed=5).asks(one) for one in prompts]
    assert all(more[i] for i, thinks in enumerate(chosen) if thinks) and 0.5 < np.mean(more) < 0.7
    other = [Thinking("mixed", 0.3, seed=6).asks(one) for one in prompts]
    assert 0.03 < np.mean(np.logical_and(chosen, other)) < 0.16  # independent of the first: 0.09
    assert {Thinking("mixed", share).asks(one) for one in prompts for share in (0.0,)} == {False}
    assert {Thinking("mixed", share).asks(one) for one in prompts for share in (1.0,)} == {True}


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path) -> Config:
    """The tiny target with a template that thinks, and prompts of which half do."""
    target = tmp_path / "target"
    target.mkdir()
    for file in tiny_target.iterdir():
        (target / file.name).symlink_to(file)
    (target / "tokenizer_config.json").unlink()
    stated = json.loads((tiny_target / "tokenizer_config.json").read_text())
    stated["chat_template"] = (TEMPLATES / "qwen3.jinja").read_text("utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(stated))
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"turns": [f"q {i}", "and?"]}) + "\n" for i in range(20)))
    data = DataConfig(prompts=(str(file),), max_prompt_length=100, max_length=140, min_loss_tokens=2)
    drafter = DrafterConfig(num_layers=1, target_layer_ids=(0,), mask_token_id=319)
    data.thinking, data.thinking_share = "mixed", 0.4
    return resolve(Config(name="tiny", target=TargetConfig(path=str(target)), drafter=drafter, data=data))


def test_a_share_is_asked_and_trained_with_thinking_and_evaluation_asks_alike(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = chat.load_tokenizer(config.target.path)
    written = {thinks: "<think>\nhm\n</think>\n\nfine<|im_end|>" if thinks else "fine<|im_end|>" for thinks in (0, 1)}

    def decode(ask: Any) -> Any:
        for question in iter(ask, None):
            text = written[question.conversation.options.thinking]
            yield question, tokenizer(text, add_special_tokens=False)["input_ids"]

    report = prepare(config, tmp_path / "run", decode)
    prompts = read_prompts(config.data.prompts)
    rule = Thinking.of(config.data)
    count = sum(map(rule.asks, prompts))
    assert 2 <= count <= 14
    shares = {"asked_share": 0.4, "prompts": count, "prompts_share": count / 20}
    # One sample per turn with thinking, as the template drops earlier thoughts; one per conversation without.
    assert report["thinking"] == {"samples": 2 * count, "share": 2 * count / (20 + count), **shares}
    line = f"with thinking ({count} prompts, {count / 20:.1%}; data.thinking_share=0.4)"
    assert line in capsys.readouterr().err

    # The same files held out: their first questions are those that training's samples begin with.
    models: Any = types.SimpleNamespace(arch=config.target.architecture)
    decoder = Decoder(models, tokenizer, (1,), 8, 1, 0)
    with contextlib.closing(Tally(Path(os.devnull))) as tally:
        talks, first = read_questions(config, decoder, tally, config.data.prompts, 0)
    asked = [item.prompt for item in first.items]
    assert [one.options.thinking for one in talks] == list(map(rule.asks, prompts))
    reader = SampleReader(tmp_path / "run" / "data")
    samples = [reader[i] for i in range(len(reader))]
    starts = {tuple(one.tokens[: int(one.loss_mask.argmax())].tolist()) for one in samples}
    supervised = {tokenizer.decode(one.tokens[one.loss_mask > 0].tolist()) for one in samples}
    assert supervised == {written[1] + "\n", (written[0] + "\n") * 2}
    for talk, ids in zip(talks, asked, strict=True):
        empty = chat.render(tokenizer, talk.questions[:1], True, Options(False)).endswith("<think>\n\n</think>\n\n")
        assert empty and tokenizer.decode(ids).endswith("assistant\n") == talk.options.thinking
        # Without thinking, the second turn's rendering shows the first one without its empty block.
        assert not talk.options.thinking or tuple(ids) in starts


def test_the_share_counts_for_the_data_only_where_it_is_used(config: Config) -> None:
    def fields(**changes: Any) -> dict[str, Any]:
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
        return Run(other, Path("run")).data_inputs["data"]

    assert fields()["thinking_share"] == 0.4 and fields(thinking_share=0.5)["thinking_share"] == 0.5
    assert "thinking_share" not in fields(thinking="on")


def measured(thinks: list[bool], tokens: list[float], rounds: list[float], sets: list[str]) -> Measured:
    talks = [
        dataclasses.replace(
            conversations([dataclasses.replace(prompt("q"), prompt_set=name)], 1)[0], options=Options(t)
        )
        for t, name in zip(thinks, sets, strict=True)
    ]
    zeros = np.zeros((len(talks), 2))
    counts = Counts(tokens=np.asarray(tokens), rounds=np.asarray(rounds), accepted=zeros, reached=zeros, proposed=zeros)
    return Measured(1.0, talks, Requests([], 1), None, counts, None, None)  # pyright: ignore[reportArgumentType]


def test_figures_of_both_ways_are_means_over_the_prompt_sets() -> None:
    found = measured([True, False, True, False], [8, 6, 3, 2], [2, 3, 1, 2], ["a", "a", "b", "b"])
    ways = {name: [one.tau for one in sets] for name, sets in found.by_way(0, 0).items()}
    assert ways == {"with thinking": [4.0, 3.0], "without thinking": [2.0, 1.0]}
    alike = measured([True, True], [8, 6], [2, 3], ["a", "a"])
    assert alike.by_way(0, 0) == {}
    rows = tau_rows({"prompt_sets": {"a": 1}, "domains": {}, "ways": dict.fromkeys(ways)})
    assert rows == [
        ("prompt_sets", "a"),
        ("ways", "with thinking"),
        ("ways", "without thinking"),
        ("", "macro average"),
    ]
