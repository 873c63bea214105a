import json
import re
from pathlib import Path

import pytest

from dspark_jax.config import InputError
from dspark_jax.data.prompts import Malformed, Prompt, read_prompts

EVAL_DATASETS = Path(__file__).resolve().parents[3] / "shared" / "eval_datasets"


def write(path: Path, *records: object) -> Path:
    lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def roles(prompt: Prompt) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in prompt.messages]


def test_every_layout_is_read_into_the_same_form(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "S"}, {"role": "user", "content": "a"}]
    answered = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    path = write(
        tmp_path / "math.train.jsonl",
        {"turns": ["a", "b"]},
        {"prompt": "a", "id": 7},
        b"   ",
        {"messages": asked},
        {"conversations": answered},
        {"conversations": asked},
    )
    prompts = read_prompts([path])
    assert [roles(prompt) for prompt in prompts] == [
        [("user", "a"), ("user", "b")],
        [("user", "a")],
        [("system", "S"), ("user", "a")],
        [("user", "a"), ("assistant", "b"), ("user", "c")],
        [("system", "S"), ("user", "a")],
    ]
    assert [prompt.line for prompt in prompts] == [1, 2, 4, 5, 6]
    assert {prompt.prompt_set for prompt in prompts} == {"math.train"}


BAD = {
    b'{"turns": ["a"': "not valid JSON at column 15 .*; write one whole JSON object on each line$",
    b"What is 1 + 1?": r"not valid JSON at column 1 .*, a line of text belongs in \{\"prompt\": \"...\"\}$",
    b'{"turns": ["caf\xe9"]}': "not UTF-8 at byte 15; save the file as UTF-8 text",
    b'\xff\xfe{\x00"\x00': "not UTF-8 at byte 0; save the file as UTF-8 text",
    b'["a"]': "a JSON list where an object is needed; .*, not in a list",
    b'{"question": "a", "id": 3}': r"none of the fields .* \(it has 'question', 'id'\); rename the one",
    b"{}": r"\(it has none\)",
    b'{"prompt": "a", "tools": [], "prompt": "b"}': "the field 'prompt' is there twice; take one out",
    b'{"prompt": "a", "tools": [{"name": "f", "name": "g"}]}': "the field 'name' is there twice",
    b'{"turns": []}': "must be a list that is not empty; put the user's questions into it",
    b'{"turns": "a"}': "must be a list",
    b'{"messages": {}}': "must be a list that is not empty; put messages into it",
    b'{"turns": ["a", 3]}': "JSON int, not a string; only text",
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}': "JSON int, not a string; only text",
    b'{"prompt": "  "}': "empty; remove the line or write a question",
    b'{"prompt": null}': "JSON NoneType",
    b'{"prompt": "\\ud800"}': "surrogate pair; remove that escape",
    b'{"messages": ["a"]}': "object with `role` and `content`; add what is missing",
    b'{"messages": [{"role": "critic", "content": "a"}]}': "role 'critic' is unknown; use one of human, user",
    b'{"messages": [{"role": "developer", "content": "a"}]}': "no user message; add the question",
    b'{"turns": ["a"], "tools": "f(x)"}': "`tools` is not valid JSON; correct it",
    b'{"turns": ["a"], "tools": [{"type": "function"}]}': '`tools` must be a list of {"type": "function", "function"',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": "c"}]}]}': (
        '`tool_calls` must hold {"name": ..., "arguments": ...}'
    ),
    b'{"messages": [{"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}]}': "only assistants call tools",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "1"}]}': "not follow an assistant's",
    b'{"messages": [{"role": "user", "content": null}]}': "is a JSON NoneType",
    b'{"conversations": [{"from": "human", "value": "a"}, '
    b'{"from": "function_call", "value": {"name": "f", "arguments": 0}}]}': "arguments that are a JSON int; give",
    b'{"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "[]"}]}': "without a call",
    b'{"input_ids": [1, 2], "loss_mask": [0, 1, 1]}': "needs a `loss_mask` with 0 or 1 for each",
    b'{"input_ids": [1, 2]}': "needs a `loss_mask` with 0 or 1 for each",
    b'{"input_ids": [1, -2], "loss_mask": [0, 1]}': "must hold token ids",
    b'{"instruction": "a", "input_ids": [1]}': "both `instruction` and `input_ids`; keep the one",
    b'{"instruction": "a", "history": ["b"]}': "`history` must be a list of",
    b'{"messages": [{"role": "assistant", "content": "a"}]}': "does not follow a user message; remove it",
    b'{"messages": [{"role": "system", "content": "a"}]}': "no user message; add the question",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]}': "not the first; move it",
    b"[" * 100000: "nested too deeply",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items(), ids=range(len(BAD)))
def test_a_malformed_line_is_handed_over_and_the_rest_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, line, {"prompt": "b"})
    malformed: list[Malformed] = []
    prompts = read_prompts([path], on_malformed=malformed.append)
    assert [roles(prompt)[0][1] for prompt in prompts] == ["a", "b"]
    assert [(entry.file, entry.line) for entry in malformed] == [(str(path), 2)]
    assert re.search(reason, malformed[0].reason) and malformed[0].kind == "malformed"
    assert "turns" not in malformed[0].reason or b"turns" in line or "none of the fields" in malformed[0].reason
    assert malformed[0].text == line.decode("utf-8", "replace")


def test_a_malformed_line_is_an_error_where_nobody_takes_it(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, b"{")
    with pytest.raises(InputError, match=r"p\.jsonl:2: not valid JSON"):
        read_prompts([path])


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ({"content": None, "tool_calls": [CALL]}, CALL),
        ({"content": "", "tool_calls": [{"id": "c", **CALL}]}, {"id": "c", **CALL}),
        ({"tool_calls": json.dumps([CALL["function"]])}, CALL),
        ({"tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]}, CALL),
        ({"tool_calls": [{"name": "add", "arguments": "1 + 1"}]}, "1 + 1"),
        ({"content": "so", "function_call": {"name": "add", "arguments": '{"a": 1}'}}, CALL),
    ],
)
def test_calls_of_tools_are_read_into_one_form(tmp_path: Path, message: dict[str, object], call: object) -> None:
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", **message}]
    (prompt,) = read_prompts([write(tmp_path / "p.jsonl", {"messages": talk})])
    (found,) = prompt.messages[1]["tool_calls"]
    assert (found["function"]["arguments"] if isinstance(call, str) else found) == call and not prompt.unused
    assert prompt.messages[1]["content"] == message.get("content")


def test_a_definition_has_one_form_and_lists_may_be_empty(tmp_path: Path) -> None:
    function = {"name": "add", "parameters": {"type": "object"}}
    written = [{"type": "function", "function": function}, {"type": "function", **function}, function]
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": "[]"}]
    rows = [{"prompt": "q", "tools": [one]} for one in written]
    *prompts, none = read_prompts([write(tmp_path / "p.jsonl", *rows, {"messages": talk, "tools": "null"})])
    assert [prompt.tools for prompt in prompts] == [(written[0],)] * 3 and not any(one.unused for one in prompts)
    assert none.tools == () and none.messages[1] == {"role": "assistant", "content": ""}


def test_fields_that_are_not_used_are_named(tmp_path: Path) -> None:
    question = {"role": "user", "content": "a", "name": "Ann", "from": "human", "weight": 0}
    answer = {"role": "assistant", "content": "b", "reasoning_content": "hm", "thinking": "", "tool_calls": None}
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "turns": ["b", "c"], "id": 7, "empty": []},
        {"messages": [question, answer, question], "chat_template_kwargs": {"enable_thinking": True}},
        {"conversations": [{"from": "human", "value": "a"}]},
        {"prompt": "a", "thinking": True},
    )
    both, talk, plain, flag = read_prompts([path])
    assert roles(both) == [("user", "b"), ("user", "c")] and both.unused == ("prompt beside turns", "id")
    assert talk.unused == (
        "chat_template_kwargs",
        "messages[].name",
        "messages[].from",
        "messages[].weight",
        "messages[].reasoning_content",
    )
    assert plain.unused == () and flag.unused == ("thinking",)
    assert [one.reasoning for one in (both, talk, plain, flag)] == ["", "messages[].reasoning_content", "", ""]


def test_byte_order_marks_are_skipped(tmp_path: Path) -> None:
    first, second = b'\xef\xbb\xbf{"prompt": "a"}', b'\xef\xbb\xbf{"prompt": "b"}\r'  # a file appended to another one
    prompts = read_prompts([write(tmp_path / "p.jsonl", first, second, b"\xef\xbb\xbf")])
    assert [roles(prompt)[0][1] for prompt in prompts] == ["a", "b"]


def test_limit_counts_prompts_of_each_file_and_not_lines(tmp_path: Path) -> None:
    first = write(tmp_path / "x.jsonl", b"{", *({"prompt": f"x{i}"} for i in range(5)))
    second = write(tmp_path / "y.jsonl", *({"prompt": f"y{i}"} for i in range(5)))
    prompts = read_prompts([first, second], limit=2, on_malformed=lambda line: None)
    assert [roles(prompt)[0][1] for prompt in prompts] == ["x0", "x1", "y0", "y1"]
    assert len(read_prompts([second], limit=9)) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", r'holds no prompt; the file is empty; write \{"prompt": "..."\} on its lines'),
        (b"\n{\n", "holds no prompt; line 2: not valid JSON .*; write one whole JSON object on each line"),
        (b'{"messages": [{"role": "tool", "content": "a"}]}', "holds no prompt; line 1: a tool's message that does "),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_prompts([path], on_malformed=lambda line: None)


@pytest.mark.skipif(not EVAL_DATASETS.exists(), reason="no benchmark prompt sets beside this checkout")
def test_the_benchmark_prompt_sets_are_read_completely() -> None:
    counts = {"aime25": 30, "arena-hard-v2": 750, "gsm8k": 1319, "humaneval": 164, "livecodebench": 1055}
    counts |= {"math500": 500, "mbpp": 257, "mt-bench": 80}
    for name, count in counts.items():
        path = EVAL_DATASETS / f"{name}.jsonl"
        prompts = read_prompts([path])
        turns = [json.loads(line)["turns"] for line in path.read_text("utf-8").split("\n") if line]
        assert len(prompts) == count
        assert [[text for _, text in roles(prompt)] for prompt in prompts] == turns
        assert {prompt.prompt_set for prompt in prompts} == {name}
