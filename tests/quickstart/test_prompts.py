"""The shipped prompt files."""

import pytest
from tokenizers import Tokenizer

from tests.quickstart.builder.corpus import DOMAINS, SPLITS
from tests.quickstart.builder.prompt_sets import MAX_PROMPT_TOKENS, SIZES, read_prompts
from tests.quickstart.builder.tokenizer import render


@pytest.mark.parametrize("split_name", SPLITS)
@pytest.mark.parametrize("domain", DOMAINS)
def test_sizes_and_lengths(prompt_folder, target_folder, domain, split_name):
    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    prompts = read_prompts(prompt_folder / f"{domain}.{split_name}.jsonl")
    assert len(prompts) == SIZES[split_name]
    assert len({tuple(turns) for turns in prompts}) == len(prompts)
    for turns in prompts:
        assert turns and all(isinstance(turn, str) and turn.strip() for turn in turns)
        for turn in turns:
            assert sum(len(tokenizer.encode(text).ids) for text, _ in render([turn], True)) <= MAX_PROMPT_TOKENS


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_heldout_prompt_is_a_train_prompt(prompt_folder, domain):
    train, held = (read_prompts(prompt_folder / f"{domain}.{name}.jsonl") for name in ("train", "heldout"))
    assert not {turns[0] for turns in train} & {turns[0] for turns in held}


def test_files_are_small(prompt_folder):
    assert sum(file.stat().st_size for file in prompt_folder.iterdir()) < 1.5e6
