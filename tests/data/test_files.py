import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.data import files
from dspark_jax.data.files import content_hashes, prompt_files, set_name
from dspark_jax.data.prompts import Malformed, read_prompts
from dspark_jax.errors import InputError
from dspark_jax.presets import released

RECORDS = [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 2}]
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
ARRAY = b"\xef\xbb\xbf\n" + json.dumps(RECORDS, indent=2).encode()


def questions(path: str | Path, **options: Any) -> list[str]:
    return [prompt.messages[0]["content"] for prompt in read_prompts([path], **options)]


def parquet() -> bytes:
    pyarrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    table.write_table(pyarrow.Table.from_pylist(RECORDS), sink)
    return sink.getvalue().to_pybytes()


STORED = {
    "lines": lambda: LINES,
    "list": lambda: ARRAY,
    "parquet": parquet,
    "gzip": lambda: gzip.compress(LINES) + gzip.compress(LINES.replace(b'"a"', b'"c"')),
    "gzipped list": lambda: gzip.compress(ARRAY),
    "zstd": lambda: pytest.importorskip("zstandard").ZstdCompressor().compress(LINES),
}


@pytest.mark.parametrize("kind", STORED)
def test_a_file_is_read_by_its_content_whatever_its_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "set.txt"
    path.write_bytes(STORED[kind]())
    assert questions(path)[:2] == ["a", "b"] and len(questions(path)) == (4 if kind == "gzip" else 2)
    assert questions(path, limit=1) == ["a"]
    assert [prompt.line for prompt in read_prompts([path])][:2] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(LINES)[:-9], "set: damaged gzip data .*; get it again"),
        (b"\x1f\x8bno", "set: damaged gzip data"),
        (b"PAR1" + bytes(40), "set: damaged parquet data"),
        (
            ARRAY[:-1],
            r"begins as a JSON list, but is none \(.*\); correct it, or write one JSON object on each",
        ),
        (
            json.dumps({"data": RECORDS}, indent=1).encode(),
            r"one JSON object over several lines \('data'\); write",
        ),
        (b'[{"prompt": "a", "prompt": "b"}]', "is none .the field 'prompt' is there twice"),
        (json.dumps(RECORDS[0], indent=1).encode(), r"set: one JSON object over several lines \('prompt', 'id'\)"),
    ],
    ids=["gzip cut short", "gzip", "parquet", "list cut short", "object", "twice", "question"],
)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "set").write_bytes(content)
    with pytest.raises(InputError, match=message):
        questions(tmp_path / "set", on_malformed=lambda line: None)


def test_of_a_list_what_is_no_object_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "set").write_bytes(json.dumps(["x", *RECORDS]).encode())
    aside: list[Malformed] = []
    assert questions(tmp_path / "set", on_malformed=aside.append) == ["a", "b"]
    assert aside[0].line == 1 and aside[0].text == '"x"' and "a JSON str where an object" in aside[0].reason
    # Lines of which the first one happens to be a list are lines.
    (tmp_path / "set").write_bytes(b'["x"]\n' + LINES)
    assert questions(tmp_path / "set", on_malformed=aside.append) == ["a", "b"] and aside[1].line == 1


@pytest.mark.parametrize(
    ("content", "package"), [(b"PAR1", "pyarrow"), (b"\x28\xb5\x2f\xfd", "zstandard"), (None, "datasets")]
)
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, package: str
) -> None:
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "set").write_bytes(content or b"")
    with pytest.raises(InputError, match=f"needs the package {package}; pip install {package}$"):
        questions(tmp_path / "set" if content else "hub:a/b")


def test_directories_and_patterns_stand_for_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        "b.jsonl",
        "a.json.gz",
        "deep.json/c.parquet",
        "README.md",
        ".hidden.jsonl",
        ".git/d.jsonl",
        "list[1].json",
    ]
    for name in names:
        Path("sets", name).parent.mkdir(parents=True, exist_ok=True)
        Path("sets", name).write_bytes(LINES)
    everything = ["sets/a.json.gz", "sets/b.jsonl", "sets/deep.json/c.parquet", "sets/list[1].json"]
    assert prompt_files(["sets"]) == everything
    assert prompt_files(["sets/b.jsonl", "sets/*.gz"]) == ["sets/b.jsonl", "sets/a.json.gz"]
    assert prompt_files(["sets/**/*.parquet"]) == ["sets/deep.json/c.parquet"]
    assert prompt_files(["sets/list[1].json", "hub:a/b"]) == ["sets/list[1].json", "hub:a/b"]
    assert questions("sets/[ab]*") == ["a", "b"] * 2
    assert [name for name, _ in content_hashes(["sets"], "data.prompts")] == ["a", "b", "c", "list[1]"]
    with pytest.raises(InputError, match="an entry of the prompts is empty; name a file, or leave it out"):
        prompt_files(["sets", ""])
    with pytest.raises(InputError, match=r"sets/\.git/none\*: no file matches this pattern; correct it"):
        prompt_files(["sets/.git/none*"])
    Path("empty").mkdir()
    with pytest.raises(InputError, match=r"empty: a directory without prompt files \(\*\.jsonl, .*\); add one"):
        questions("empty")


def test_sets_are_named_after_their_files() -> None:
    names = {
        "x/math.train.jsonl": "math.train",
        "x/math.jsonl.zst": "math",
        "x/train-00001-of-00012.parquet": "train",
        "hub:openai/gsm8k?split=test": "gsm8k",
        "plain": "plain",
    }
    assert {file: set_name(file) for file in names} == names


class HubSet(list):
    """What the package `datasets` gives."""

    column_names = ("id", "question", "talk")

    def __init__(self, cache: Path):
        super().__init__([{"id": 1, "question": "a", "talk": [{"role": "user", "content": "c"}]}])
        self.cache_files = [{"filename": str(cache)}]


class Stream:
    """A data set that is read as it comes, and that does not know its columns."""

    column_names = None

    def __iter__(self) -> Any:
        yield from ({"question": text} for text in "ab")
        pytest.fail("a row was downloaded that nobody asked for")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A package `datasets` that knows the set a/b; returns the list of its calls."""
    (tmp_path / "cache.arrow").write_bytes(b"1")
    calls: list[Any] = []

    def load_dataset(path: str, name: str | None, *, split: str, **more: bool) -> Any:
        calls.append((path, name, split, *more))
        if more:
            return Stream()
        if path != "a/b":
            raise ValueError("no such\ndata set")
        return HubSet(tmp_path / "cache.arrow")

    package = types.ModuleType("datasets")
    package.__dict__.update(
        load_dataset=load_dataset,
        exceptions=types.SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {})),
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    return calls


def test_a_data_set_of_the_hub_is_read(hub: list[Any], tmp_path: Path) -> None:
    entry = "hub:a/b?split=test&name=main&column=question"
    (prompt,) = read_prompts([entry])
    assert prompt.messages == ({"role": "user", "content": "a"},) and hub == [("a/b", "main", "test")]
    assert (prompt.prompt_set, prompt.file, prompt.line, prompt.unused) == ("b", entry, 1, ("id", "talk"))
    assert questions("hub:a/b?column=talk") == ["c"] and hub[-1] == ("a/b", None, "train")
    (one,), (other,) = (content_hashes([name], "") for name in (entry, "hub:a/b?column=talk"))
    assert one[0] == "b" and one != other
    (tmp_path / "cache.arrow").write_bytes(b"2")
    assert content_hashes([entry], "") != [one]


def test_the_paper_s_training_set_has_a_name(hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = released("qwen3_4b", "Qwen/Qwen3-4B", "").data.prompts
    with pytest.raises(InputError, match="hub:mlabonne/open-perfectblend: cannot be loaded"):
        read_prompts(named)
    assert hub == [("mlabonne/open-perfectblend", None, "train")] and set_name(prompt_files(named)[0]) == named[0]
    Path(named[0]).write_bytes(LINES)
    assert questions(named[0]) == ["a", "b"]


def test_a_data_set_of_the_hub_is_streamed(hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    entry, commits = "hub:a/b?column=question&streaming=true", iter(["one", "one", "two"])
    assert questions(entry, limit=2) == ["a", "b"] and hub == [("a/b", None, "train", "streaming")]
    monkeypatch.setattr(files, "data_set_commit", lambda path: next(commits))
    first, again, other = (content_hashes([entry], "") for _ in range(3))
    assert first == again != other and len(hub) == 1


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("hub:a/b?streaming=yes", "streaming=yes; write streaming=true, or leave it out"),
        ("hub:a/b?file=a.jsonl&streaming=true", "a file is not streamed; leave out one or the other"),
        ("hub:", "hub:: names no data set; write hub:OWNER/NAME"),
        ("hub:a/b?spilt=test", "unknown spilt; write hub:OWNER/NAME"),
        ("hub:a/c", r"hub:a/c: cannot be loaded \(no such data set\); correct it, or give a local file"),
        ("hub:a/b?column=x", "it has no column 'x', but id, question, talk; correct it"),
        ("hub:a/b", r"none of the fields .* \(it has 'id', 'question', 'talk'\)"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_one_line(hub: list[Any], entry: str, message: str) -> None:
    del hub
    with pytest.raises(InputError, match=message):
        questions(entry)
