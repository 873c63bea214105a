"""The embedded tokenizer, as transformers loads it from the shipped directory."""

import pytest
from transformers import AutoConfig, AutoTokenizer

from tests.quickstart.builder.tokenizer import SPECIALS, USED_SIZE, VOCAB_SIZE, render


@pytest.fixture(scope="module")
def tokenizer(target_folder):
    return AutoTokenizer.from_pretrained(target_folder, local_files_only=True)


@pytest.mark.parametrize(
    "text",
    [
        "What is 1234 + 5?",
        "def f(x):\n    return {'a': [x, 1.5]}\n\n\n\tpass  # tabs and   spaces ",
        "Grüße, 東京 — naïve 🙂\r\n",
        "",
        " leading and trailing \n",
    ],
)
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_are_single_digits(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("1234567890 + 42"))
    digits = [piece for piece in pieces if any(c.isdigit() for c in piece)]
    assert digits == list("1234567890") + list("42")


def test_specials_are_single_ids_and_last(tokenizer):
    ids = [tokenizer.encode(text) for text in SPECIALS]
    assert ids == [[USED_SIZE - 3], [USED_SIZE - 2], [USED_SIZE - 1]]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"


def test_last_rows_are_unused(tokenizer, target_folder):
    config = AutoConfig.from_pretrained(target_folder, local_files_only=True)
    assert config.vocab_size == VOCAB_SIZE == 4096
    assert len(tokenizer) == USED_SIZE
    assert max(tokenizer.get_vocab().values()) == USED_SIZE - 1
    assert config.eos_token_id == tokenizer.eos_token_id and config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("generate", [False, True])
def test_template_is_plain_chatml(tokenizer, generate):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi\n"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "  2 + 2?"},
    ]
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    expected += "<|im_start|>assistant\n" if generate else ""
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate) == expected


def test_template_adds_no_system_prompt(tokenizer):
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n"


def test_training_saw_what_the_template_renders(tokenizer):
    turns = ["What is 7 + 8?", "7 + 8 = 15.\nThe answer is 15.", "```python\ndef f():\n```", "```python\nx\n```"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert [i for text, _ in render(turns) for i in tokenizer.encode(text)] == ids
    answers = "".join(text for text, is_answer in render(turns) if is_answer)
    assert answers == turns[1] + "<|im_end|>" + turns[3] + "<|im_end|>"
