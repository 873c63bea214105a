"""The tables of docs/data.md, row by row: what is trained of a row as text, or why it is set aside."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.config import DataConfig
from dspark_jax.data import chat
from dspark_jax.data.prompts import read_prompts
from dspark_jax.data.samples import Tally, given_samples

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = Path(__file__).parent / "templates"
HEAD = "| what | row | template | thinking | supervised, per sample | set aside |"
UNUSED = "| row | named as not used |"


def table_rows(head: str) -> list[list[str]]:
    """Cells of all rows of the tables with this head."""
    found, inside = [], False
    for line in (ROOT / "docs" / "data.md").read_text("utf-8").splitlines():
        inside = line == head or (inside and line.startswith("|"))
        if inside and line != head and not line.startswith("|---"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            found.append([cell.strip().strip("`").replace("\\|", "|") for cell in cells])
    return found


ROWS = table_rows(HEAD)


def template_of(tokenizer: Any, name: str) -> Any:
    if name != "chatml":
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    return tokenizer


def stretches(tokenizer: Any, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """Supervised text, one string per stretch of supervised tokens."""
    edges = np.flatnonzero(np.diff([0, *mask.tolist(), 0]))
    return [tokenizer.decode(tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def prepared(
    tokenizer: Any, folder: Path, rows: list[Any], **fields: Any
) -> tuple[list[tuple[int, list[str]]], list[dict[str, Any]]]:
    """(sample id, supervised stretches) of all samples, and what was set aside."""
    config = DataConfig(regenerate=False, min_loss_tokens=1, max_prompt_length=350, max_length=900, **fields)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with contextlib.closing(Tally(folder / "rejected.jsonl")) as tally:
        more = {"tokenised": True, "reasoning": config.thinking != "off"}
        prompts = read_prompts([path], on_malformed=tally.malformed, **more)
        samples = list(given_samples(tokenizer, prompts, config, tally))
    found = [(one.sample_id, stretches(tokenizer, one.tokens, one.loss_mask)) for one in samples]
    return found, [json.loads(line) for line in (folder / "rejected.jsonl").read_text("utf-8").splitlines()]


def test_the_tables_are_found() -> None:
    assert len(ROWS) > 60 and len(table_rows(UNUSED)) > 6
    assert {row[2] for row in ROWS} == {"chatml", *(path.stem for path in TEMPLATES.iterdir())}


@pytest.mark.parametrize("row", ROWS, ids=[f"{row[2]}: {row[0]}" for row in ROWS])
def test_a_row_gives_what_the_table_says(tiny_target: Path, tmp_path: Path, row: list[str]) -> None:
    _, record, template, thinking, supervised, aside = row
    tokenizer = template_of(chat.load_tokenizer(tiny_target), template)
    thinking, _, part = thinking.partition(", ")
    plain = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "fine"}]}
    rows = [json.loads(record), plain]
    fields = {"supervised": part} if part else {}  # else the default is what the table shows
    found, rejected = prepared(tokenizer, tmp_path, rows, thinking=thinking, **fields)
    if part == "thinking":  # nothing of the plain one
        rejected.pop()
    else:
        *found, (_, (last,)) = found
        assert last.startswith("fine")
    assert [texts for _, texts in found] == json.loads(supervised or "[]")
    assert [entry["reason"] for entry in rejected] == ([aside] if aside else [])
    assert [number for number, _ in found] == list(range(len(found)))


@pytest.mark.parametrize(("row", "names"), table_rows(UNUSED))
def test_what_is_not_used_of_a_row_is_named(tmp_path: Path, row: str, names: str) -> None:
    (tmp_path / "rows.jsonl").write_text(row)
    (prompt,) = read_prompts([tmp_path / "rows.jsonl"], tokenised=True)
    assert list(prompt.unused) == json.loads(names)
