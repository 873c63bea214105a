import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.config import InputError
from dspark_jax.data import chat

# What Qwen3's template does with answers: a thinking block before the last one only, and thoughts cut from the others.
QWEN3 = (
    "{%- for m in messages %}"
    "{%- if m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\\n' }}{%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{{- m.content.split('</think>')[-1].lstrip('\\n') + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
LONG = "der Äther 👩‍🚀 sums the numbers\n\n  12 + 3 = 15\n"


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> Any:
    return chat.load_tokenizer(tiny_target)


@pytest.fixture
def qwen3(tiny_target: Path) -> Any:
    tokenizer = chat.load_tokenizer(tiny_target)
    tokenizer.chat_template = QWEN3
    return tokenizer


def messages(*texts: str, system: str = "") -> list[dict[str, str]]:
    out = [{"role": "system", "content": system}] if system else []
    return out + [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), texts)]


CONVERSATIONS = [
    messages("a", "b"),
    messages("hello", LONG, "and the sum?", "the answer\nis 3"),
    messages(LONG, "x", "<|im_start|>assistant\nthe answer", "assistant\n", "user", LONG, system="the system"),
    messages("a", "b", "a", "b", "a", "b", "b", "a"),
    messages("repeat", "", "the answer", " leading space "),
]


def supervised(tokenizer: Any, conversation: list[dict[str, str]]) -> tuple[list[int], list[int], str, str]:
    """ids, mask, supervised text, unsupervised text."""
    ids, mask = chat.tokens_and_mask(tokenizer, conversation)
    return (
        ids,
        mask,
        tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False),
        tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if not m], skip_special_tokens=False),
    )


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_the_mask_of_chatml_is_that_of_a_loop_over_pieces(tokenizer: Any, conversation: list[dict[str, str]]) -> None:
    # ChatML written out by hand; these texts have no token that spans two pieces, so each is tokenised alone.
    ids, mask = [], []
    for message in conversation:
        answer = message["role"] == "assistant"
        head, body = f"<|im_start|>{message['role']}\n", message["content"] + "<|im_end|>"
        for piece, on in ((head, 0), (body, answer), ("\n", answer)):
            tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
            ids += tokens
            mask += [int(on)] * len(tokens)
    assert chat.tokens_and_mask(tokenizer, conversation) == (ids, mask)
    answers = "".join(m["content"] + "<|im_end|>\n" for m in conversation if m["role"] == "assistant")
    assert supervised(tokenizer, conversation)[2] == answers


@pytest.mark.parametrize("conversation", [*CONVERSATIONS, messages("q", "\n\nthe answer", "\n", "\n")])
def test_every_token_is_on_the_side_of_its_first_character(tokenizer: Any, conversation: list[dict[str, str]]) -> None:
    # An independent walk over characters: which turn is character c in?
    sides: list[int] = []
    text = ""
    for message in conversation:
        answer = message["role"] == "assistant"
        for piece, on in ((f"<|im_start|>{message['role']}\n", 0), (message["content"] + "<|im_end|>\n", int(answer))):
            text += piece
            sides += [on] * len(piece)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, mask = chat.tokens_and_mask(tokenizer, conversation)
    assert ids == encoded["input_ids"]
    assert mask == [sides[start] for start, _ in encoded["offset_mapping"]]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_a_thinking_block_before_the_last_answer_is_the_templates(
    qwen3: Any, conversation: list[dict[str, str]]
) -> None:
    _, _, answers, rest = supervised(qwen3, conversation)
    wanted = [m["content"].lstrip("\n") + "<|im_end|>\n" for m in conversation if m["role"] == "assistant"]
    assert answers == "".join(wanted)
    assert rest.count("<think>\n\n</think>\n\n") == 1 and rest.endswith("<think>\n\n</think>\n\n")


def test_thoughts_that_the_template_cuts_from_earlier_answers_are_not_supervised(qwen3: Any) -> None:
    conversation = messages("q", "<think>\nhm\n</think>\n\nyes", "q", "no")
    assert supervised(qwen3, conversation)[2] == "yes<|im_end|>\nno<|im_end|>\n"


def test_the_generation_prompt_is_not_supervised_and_history_is(tokenizer: Any) -> None:
    conversation = messages("a", "b", "c")
    ids, mask = chat.tokens_and_mask(tokenizer, conversation, generation_prompt=True)
    assert ids == chat.prompt_tokens(tokenizer, conversation)
    head = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert ids[-len(head) :] == head and not any(mask[-len(head) :])
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "b<|im_end|>\n"


def test_a_generated_answer_keeps_its_ids_and_gets_the_end_of_the_template(tokenizer: Any) -> None:
    conversation = messages("q", "first", "again")
    stop = tokenizer.eos_token_id
    # Byte by byte, as the tokenizer itself would not split it.
    answer = [tokenizer.convert_tokens_to_ids(c) for c in "the"] + [stop]
    assert tokenizer("the", add_special_tokens=False)["input_ids"] != answer[:-1]
    ids, mask = chat.answered_tokens(tokenizer, conversation, answer)
    prompt = chat.prompt_tokens(tokenizer, conversation)
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert ids == prompt + answer + newline
    assert mask[len(prompt) :] == [1] * 5
    assert tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m]) == "first<|im_end|>\nthe<|im_end|>\n"
    assert chat.answer_text(tokenizer, answer) == "the"


def test_a_generated_answer_split_as_the_tokenizer_does_equals_the_given_answer(tokenizer: Any) -> None:
    conversation = messages("q", LONG, "again", LONG)
    answer = tokenizer(LONG + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert chat.answered_tokens(tokenizer, conversation[:-1], answer) == chat.tokens_and_mask(tokenizer, conversation)


def test_an_answer_without_its_stop_token_is_left_open(tokenizer: Any) -> None:
    answer = tokenizer("the answer", add_special_tokens=False)["input_ids"]
    ids, mask = chat.answered_tokens(tokenizer, messages("q"), answer)
    assert ids[-len(answer) :] == answer and mask[-len(answer) :] == [1] * len(answer)
    other_stop = [*answer, tokenizer.pad_token_id]
    assert chat.answered_tokens(tokenizer, messages("q"), other_stop)[0][-len(other_stop) :] == other_stop


def test_a_template_that_drops_earlier_turns_is_refused(qwen3: Any) -> None:
    qwen3.chat_template = "{{ messages[-1].role }}: {{ messages[-1].content }}\n"
    with pytest.raises(chat.ChatError, match="message 2: the chat template does not show this assistant turn"):
        chat.tokens_and_mask(qwen3, messages("a", "b", "c", "d"))
    qwen3.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(chat.ChatError, match=r"refuses the roles user, assistant \(no system role\)"):
        chat.tokens_and_mask(qwen3, messages("a", "b"))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("'a' + 1", "TypeError: can only concatenate str"),
        ("messages[0].content.index('#')", "ValueError: substring not found"),
        ("1 // 0", "ZeroDivisionError"),
        ("range(1000000)", "OverflowError"),
    ],
)
def test_a_template_that_fails_is_said_in_one_line(qwen3: Any, expression: str, message: str) -> None:
    qwen3.chat_template = f"{{{{ {expression} }}}}"
    with pytest.raises(chat.ChatError, match=rf"fails on the roles user \({message}.*\); correct the template"):
        chat.prompt_tokens(qwen3, messages("a"))


def test_a_template_that_is_none_concerns_no_single_conversation(qwen3: Any) -> None:
    qwen3.chat_template = "a\n{% if %}"
    with pytest.raises(InputError, match="not valid: line 2: Expected an expression") as error:
        chat.prompt_tokens(qwen3, messages("a"))
    assert not isinstance(error.value, chat.ChatError)


def test_a_think_block_that_the_template_shows_apart_is_named(qwen3: Any) -> None:
    """As Qwen3's own does with the last answer. Answering again is no way to think: it is asked for without."""
    thoughts = "m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content else ''"
    qwen3.chat_template = QWEN3.replace("'<think>\\n\\n</think>", f"'<think>\\n' + ({thoughts}) + '\\n</think>", 1)
    assert "hm" in chat.render(qwen3, messages("q", "<think>\nhm\n</think>\n\nyes"))
    with pytest.raises(chat.ReasoningError, match="message 2: has a think block.* answers itself, without thinking"):
        chat.tokens_and_mask(qwen3, messages("q", "<think>\nhm\n</think>\n\nyes"))


def test_text_that_no_tokenizer_can_encode_is_refused(tokenizer: Any) -> None:
    """A system prompt of a config file, for instance."""
    with pytest.raises(InputError, match="the conversation is not UTF-8: it has the byte 0xe9 as its character"):
        chat.prompt_tokens(tokenizer, messages("a", system="caf\udce9"))


def test_a_system_prompt_is_put_in_front_only_where_there_is_none() -> None:
    plain, own = messages("a"), messages("a", system="mine")
    assert chat.with_system(plain, "S") == ({"role": "system", "content": "S"}, *plain)
    assert chat.with_system(own, "S") == tuple(own)
    assert chat.with_system(plain, "") == tuple(plain)


def test_stop_tokens_are_those_of_the_generation_config_and_the_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    eos = tokenizer.eos_token_id
    assert chat.stop_tokens(tmp_path, tokenizer) == (eos,)
    config = tmp_path / "generation_config.json"
    for content, ids in (('{"eos_token_id": [3, 5]}', {3, 5, eos}), ('{"eos_token_id": 4}', {4, eos}), ("{}", {eos})):
        config.write_text(content)
        assert chat.stop_tokens(tmp_path, tokenizer) == tuple(sorted(ids))
    config.write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json:1: not valid JSON"):
        chat.stop_tokens(tmp_path, tokenizer)


@pytest.mark.parametrize("ids", ['"<|im_end|>"', "[3, null]", "-1", "1.5", "true", "{}", "1e30"])
def test_stop_tokens_that_are_no_ids_are_refused(tmp_path: Path, tokenizer: Any, ids: str) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ids}}}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id .*; a token id or a list of them"):
        chat.stop_tokens(tmp_path, tokenizer)


def test_a_directory_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no usable tokenizer"):
        chat.load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no usable tokenizer"):
        chat.load_tokenizer(tmp_path / "nowhere")


def copy_with(tiny_target: Path, folder: Path, **settings: Any) -> Path:
    """The tokenizer of `tiny_target` with other settings."""
    shutil.copy(tiny_target / "tokenizer.json", folder)
    stated = json.loads((tiny_target / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(stated | settings))
    return folder


def test_several_chat_templates_need_one_for_default(tiny_target: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}]
    path = copy_with(tiny_target, tmp_path, chat_template=named)
    with pytest.raises(InputError, match="has the chat templates 'tool_use', 'rag' and none for default; name the one"):
        chat.load_tokenizer(path)
    copy_with(tiny_target, tmp_path, chat_template=[*named, {"name": "default", "template": "a"}])
    assert chat.render(chat.load_tokenizer(path), messages("q")) == "a"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat_template": 5}, "chat_template is 5; text in Jinja's language is needed"),
        ({"chat_template": [1]}, r"no usable tokenizer \(TypeError"),
        ({"eos_token": 3}, r"no usable tokenizer \(TypeError: Special token eos_token"),
        ({"model_max_length": "x"}, r"no usable tokenizer \(TypeError"),
    ],
)
def test_a_tokenizer_with_settings_of_another_type_is_refused(
    tiny_target: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        chat.load_tokenizer(copy_with(tiny_target, tmp_path, **settings))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff", b'{"model": {"type": "none"}}'])
def test_a_damaged_tokenizer_is_one_line(tiny_target: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (copy_with(tiny_target, tmp_path) / name).write_bytes(content)
    with pytest.raises(InputError, match=r"^[^\n]*no (usable tokenizer|chat template)[^\n]*$"):
        chat.load_tokenizer(tmp_path)
