"""Chunks of conversations give what all of them give in one piece."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.config import DataConfig, InputError
from dspark_jax.data import chat, chunks
from dspark_jax.data.chunks import make_chunk, merge_chunks, read_chunk, read_settings, write_chunks
from dspark_jax.data.prompts import Malformed, Prompt, read_prompts
from dspark_jax.data.regenerate import Answered, conversations
from dspark_jax.data.samples import Tally, answered_samples, given_samples
from dspark_jax.data.thinking import Thinking

TEMPLATES = Path(__file__).parent / "templates"


@pytest.fixture
def tokenizer(tiny_target: Path) -> Any:
    """With a template that drops earlier thoughts: conversations with them have a sample per turn."""
    found = chat.load_tokenizer(tiny_target)
    found.chat_template = (TEMPLATES / "gemma4.jinja").read_text("utf-8")
    return found


def talks(folder: Path) -> list[Prompt]:
    """Of two sets: with thoughts in two turns (two samples), without, with a line end of Unicode, too short."""
    rows = []
    for number in range(12):
        thoughts = {} if number % 3 else {"reasoning_content": "hm \u2028 so"}
        answers = ["the answer is one\u2028 two", "yes, it is two"] if number % 4 else ["the answer is one", ""]
        if number % 5 == 4:
            answers = ["y", "z"]
        turns = [
            {"role": "user", "content": "how\u2028much?"},
            {"role": "assistant", "content": answers[0], **thoughts},
        ]
        turns += [{"role": "user", "content": "and?"}, {"role": "assistant", "content": answers[1], **thoughts}]
        rows.append(json.dumps({"messages": turns, "id": number}, ensure_ascii=False))
    for name, part in {"one.jsonl": rows[:7], "two.jsonl": rows[7:]}.items():
        (folder / name).write_text("\n".join(part) + "\n", "utf-8")
    return read_prompts([folder / "one.jsonl", folder / "two.jsonl"], reasoning=True)


def answered(prompts: Sequence[Prompt]) -> list[Answered]:
    """One answer each, of different lengths; some conversations are left out, as those that were rejected."""
    found = []
    for item in conversations(prompts, 1, thinking=Thinking("given")):
        if item.sample_id % 5 != 2:
            ids = np.arange(65, 70 + item.sample_id, dtype=np.int32)
            found.append(Answered(item, tuple(item.questions[:1]), ids, item.sample_id % 2 == 0))
    return found


def settings(regenerate: bool) -> DataConfig:
    return DataConfig(
        regenerate=regenerate, thinking="given", min_loss_tokens=20, max_prompt_length=300, max_length=600
    )


def plain(samples: Sequence[Any]) -> list[Any]:
    return [(one.sample_id, one.prompt_set, one.tokens.tolist(), one.loss_mask.tolist()) for one in samples]


@pytest.mark.parametrize("regenerate", [False, True], ids=["given answers", "answers of the target"])
@pytest.mark.parametrize("size", [1, 5, 100])
def test_chunks_give_what_one_piece_gives(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, regenerate: bool, size: int
) -> None:
    """Samples and their ids, what was set aside byte for byte, and the report with the order of its entries."""
    monkeypatch.setattr(chunks, "SIZE", size)
    prompts, config, folder = talks(tmp_path), settings(regenerate), tmp_path / "chunks"
    items: Any = answered(prompts) if regenerate else prompts
    paths = [tmp_path / name for name in ("whole.jsonl", "parts.jsonl")]
    with contextlib.closing(Tally(paths[0])) as whole, contextlib.closing(Tally(paths[1])) as parts:
        for tally in (whole, parts):
            tally.malformed(Malformed("two.jsonl", 9, "not valid JSON", "{é"))
            tally.read(prompts)
        make: Any = answered_samples if regenerate else given_samples
        expected = list(make(tokenizer, items, config, whole))
        names = write_chunks(folder, tokenizer, config, items)
        for name in reversed(names):  # in any order
            make_chunk(folder, name, read_settings(folder))
        moves = merge_chunks(folder, names, parts)
        found = [one for name, move in zip(names, moves, strict=True) for one in read_chunk(folder, name, move)]
    assert plain(found) == plain(expected) and whole.further == parts.further and (whole.further > 0) != regenerate
    assert json.dumps(parts.report()) == json.dumps(whole.report())
    assert paths[0].read_bytes() == paths[1].read_bytes() and paths[0].read_bytes().count(b"\n") > 1


def test_chunks_that_are_done_are_not_made_again(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "SIZE", 5)
    prompts, config, folder = talks(tmp_path), settings(False), tmp_path / "chunks"
    names = write_chunks(folder, tokenizer, config, prompts)
    make_chunk(folder, names[0], read_settings(folder))
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert write_chunks(folder, tokenizer, config, prompts) == names
    make_chunk(folder, names[0], ("unused", "unused"))  # type: ignore[arg-type]
    after = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    kept = {name for name in before if after[name] == before[name]}
    assert kept == {f"{names[0]}.{kind}" for kind in ("todo", "samples", "made")}


def test_an_error_of_the_template_is_the_users(tokenizer: Any, tmp_path: Path) -> None:
    """A worker does not fail over it: Beam would try again, and bury the line."""
    prompts, folder = talks(tmp_path), tmp_path / "chunks"
    tokenizer.chat_template = "{% for %}"
    (name,) = write_chunks(folder, tokenizer, settings(False), prompts)
    make_chunk(folder, name, read_settings(folder))
    with (
        contextlib.closing(Tally(tmp_path / "rejected.jsonl")) as tally,
        pytest.raises(InputError, match="the chat template is not valid: line 1"),
    ):
        merge_chunks(folder, [name], tally)
