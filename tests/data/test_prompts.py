import json
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
    b'{"turns": ["a"': "not valid JSON",
    b'{"turns": ["caf\xe9"]}': "not UTF-8 at byte 15",
    b'["a"]': "a JSON list",
    b'{"question": "a"}': "none of the fields",
    b'{"turns": []}': "not empty",
    b'{"turns": "a"}': "must be a list",
    b'{"turns": ["a", 3]}': "JSON int",
    b'{"prompt": "  "}': "empty",
    b'{"prompt": null}': "JSON NoneType",
    b'{"prompt": "\\ud800"}': "surrogate",
    b'{"messages": ["a"]}': "object with `role`",
    b'{"messages": [{"role": "tool", "content": "a"}]}': "role 'tool'",
    b'{"messages": [{"role": "assistant", "content": "a"}]}': "does not follow a user",
    b'{"messages": [{"role": "system", "content": "a"}]}': "no user message",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]}': "not the first",
    b"[" * 100000: "nested too deeply",
}


@pytest.mark.parametrize(("line", "reason"), BAD.items(), ids=range(len(BAD)))
def test_a_malformed_line_is_handed_over_and_the_rest_is_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, line, {"prompt": "b"})
    malformed: list[Malformed] = []
    prompts = read_prompts([path], on_malformed=malformed.append)
    assert [roles(prompt)[0][1] for prompt in prompts] == ["a", "b"]
    assert [(entry.file, entry.line) for entry in malformed] == [(str(path), 2)]
    assert reason in malformed[0].reason
    assert malformed[0].text == line.decode("utf-8", "replace")


def test_a_malformed_line_is_an_error_where_nobody_takes_it(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, b"{")
    with pytest.raises(InputError, match=r"p\.jsonl:2: not valid JSON"):
        read_prompts([path])


def test_limit_counts_prompts_of_each_file_and_not_lines(tmp_path: Path) -> None:
    first = write(tmp_path / "x.jsonl", b"{", *({"prompt": f"x{i}"} for i in range(5)))
    second = write(tmp_path / "y.jsonl", *({"prompt": f"y{i}"} for i in range(5)))
    prompts = read_prompts([first, second], limit=2, on_malformed=lambda line: None)
    assert [roles(prompt)[0][1] for prompt in prompts] == ["x0", "x1", "y0", "y1"]
    assert len(read_prompts([second], limit=9)) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"", "holds no prompt"), (b"\n{\n", r"holds no prompt \(.*\(2\): not valid JSON")],
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
