"""A mask token that is a part of texts gets a warning, which names one that is not."""

import dataclasses

import pytest
from transformers import AutoTokenizer

from dspark_jax import prepare
from dspark_jax.config import Config, DrafterConfig, TargetArchitecture, TargetConfig
from dspark_jax.data.inputs import digest
from dspark_jax.data.mask_token import mask_warning
from dspark_jax.run import Run


@pytest.fixture(scope="module")
def tokenizer(tiny_target):
    """Of 303 ids, the last three special; 320 rows."""
    return AutoTokenizer.from_pretrained(tiny_target)


def test_an_ordinary_word_or_a_marker_of_the_template_is_no_mask(tokenizer):
    last = max(tokenizer.get_vocab().values())
    word = tokenizer.encode("answer")[0]
    warning = mask_warning(tokenizer, word, 320)
    assert f"mask_token_id={word}" in warning and "is an ordinary token" in warning and f"e.g. {last + 1}" in warning
    for marker in ("<|im_start|>", "<|im_end|>"):
        assert "the chat template puts into conversations" in mask_warning(
            tokenizer, tokenizer.convert_tokens_to_ids(marker), 320
        )
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert f"e.g. {end}" in mask_warning(tokenizer, word, last + 1)  # no row is left over, a special token is


def test_tokens_that_no_text_has_are_masks(tokenizer):
    last = max(tokenizer.get_vocab().values())
    for mask in (last + 1, 319, tokenizer.convert_tokens_to_ids("<|endoftext|>")):
        assert mask_warning(tokenizer, mask, 320) == ""


@pytest.mark.parametrize(("kind", "mask", "warns"), [("dspark", 280, True), ("dspark", 319, False), ("mtp", 0, False)])
def test_prepare_says_so_even_if_its_data_is_there(tiny_target, tmp_path, capsys, monkeypatch, kind, mask, warns):
    config = Config(target=TargetConfig(str(tiny_target), architecture=TargetArchitecture.from_hf(tiny_target)))
    config = dataclasses.replace(config, drafter=DrafterConfig(kind=kind, mask_token_id=mask))
    monkeypatch.setattr("dspark_jax.run.read_inputs", lambda *_: {"data": {}})
    found = {"fingerprint": digest({"data": {}}), "samples": 3}
    monkeypatch.setattr(prepare, "read_ours", lambda path: found)
    monkeypatch.setattr(prepare, "_complete", lambda final, samples: True)
    assert prepare.prepare_run(Run(config, tmp_path)) == found
    said = capsys.readouterr().err
    assert ("warning: drafter.mask_token_id=280" in said) == warns and ("warning" in said) == warns
