"""The prompt sets beside the embedded target: {math,code,chat}.{train,heldout}.jsonl, one {"turns": [...]} per line."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from tests.quickstart.builder.corpus import DOMAINS, SPLITS, Library, conversations, documented
from tests.quickstart.builder.tokenizer import render

SIZES = {"train": 1500, "heldout": 128}
MAX_PROMPT_TOKENS = 120


def prompt_set(tokenizer: Tokenizer, library: Library, domain: str, count: int, seed: int) -> list[tuple[str, ...]]:
    """`count` different prompts (their user turns) of a domain, each turn within `MAX_PROMPT_TOKENS` when rendered."""
    found: dict[tuple[str, ...], None] = {}
    for tried, conversation in enumerate(conversations(domain, documented(library), seed)):
        if tried > 50 * count:
            raise ValueError(
                f"{domain} {library.split}: only {len(found)} of {count} prompts; this CPython has too few items"
            )
        lengths = [
            sum(len(tokenizer.encode(text).ids) for text, _ in render([turn], True)) for turn in conversation.turns
        ]
        if max(lengths) <= MAX_PROMPT_TOKENS:
            found[conversation.turns] = None
        if len(found) == count:
            break
    return list(found)


def write_prompt_sets(tokenizer: Tokenizer, split: dict[str, Library], folder: Path, seed: int) -> None:
    """Writes all six files. The splits share no item, so no held-out prompt is a training prompt."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        for name in SPLITS:
            prompts = prompt_set(tokenizer, split[name], domain, SIZES[name], seed + 77)
            lines = [json.dumps({"turns": list(turns)}) + "\n" for turns in prompts]
            (folder / f"{domain}.{name}.jsonl").write_text("".join(lines), "utf-8")


def read_prompts(path: Path) -> list[list[str]]:
    """The user turns of every line."""
    return [json.loads(line)["turns"] for line in path.read_text("utf-8").splitlines()]
