"""Rows of the hub's data sets become the prompts of the reference, text for text."""

import json
import re
import types
from pathlib import Path
from typing import Any

import pytest

from dspark_jax import command, prepare
from dspark_jax.benchmarks import BENCHMARKS, DOMAINS, by_domain, paper_tau
from dspark_jax.config import Config, EvalConfig, InputError
from dspark_jax.data import files
from dspark_jax.data.benchmark_prompts import convert, fetch, places
from dspark_jax.data.prompts import read_prompts
from dspark_jax.evaluation.summary import paper_metrics
from dspark_jax.presets import TARGETS, target_like

EXPECTED = Path(__file__).resolve().parents[3] / "shared" / "eval_datasets"
needs_expected = pytest.mark.skipif(not EXPECTED.exists(), reason="no benchmark prompt sets beside this checkout")

REASON = "\nPlease reason step by step, and put your final answer within \\boxed{}."

# Line of the reference's file, and a row of the data set as the hub has it.
RECORDED: dict[str, tuple[int, dict[str, Any]]] = {
    "gsm8k": (
        2,
        {
            "question": "A robe takes 2 bolts of blue fiber and half that much white fiber.  How many bolts in total "
            "does it take?",
            "answer": "It takes 2/2=<<2/2=1>>1 bolt of white fiber\nSo the total amount of fabric is 2+1=<<2+1=3>>3 "
            "bolts of fabric\n#### 3",
        },
    ),
    "math500": (
        4,
        {
            "problem": "How many positive whole-number divisors does 196 have?",
            "solution": "",
            "answer": "9",
            "subject": "Number Theory",
            "level": 3,
            "unique_id": "test/number_theory/572.json",
        },
    ),
    "aime25": (
        1,
        {
            "problem_idx": 1,
            "problem": "Find the sum of all integer bases $b>9$ for which $17_b$ is a divisor of $97_b.$",
            "answer": 70,
            "problem_type": ["Number Theory"],
        },
    ),
    "mbpp": (
        5,
        {
            "source_file": "Benchmark Questions Verification V2.ipynb",
            "task_id": 17,
            "prompt": "Write a function that returns the perimeter of a square given its side length as input.",
            "code": "def square_perimeter(a):\n  perimeter=4*a\n  return perimeter",
            "test_imports": [],
            "test_list": ["assert square_perimeter(10)==40"],
        },
    ),
    "humaneval": (
        3,
        {
            "task_id": "HumanEval/2",
            "prompt": "\n\ndef truncate_number(number: float) -> float:\n"
            '    """ Given a positive floating point number, it can be decomposed into\n'
            "    and integer part (largest integer smaller than given number) and decimals\n"
            "    (leftover part always smaller than 1).\n\n    Return the decimal part of the number.\n"
            '    >>> truncate_number(3.5)\n    0.5\n    """\n',
            "canonical_solution": "    return number % 1.0\n",
            "test": "",
            "entry_point": "truncate_number",
        },
    ),
    "mt-bench": (
        1,
        {
            "category": "writing",
            "prompt": [
                "Compose an engaging travel blog post about a recent trip to Hawaii, highlighting cultural experiences "
                "and must-see attractions.",
                "Rewrite your previous response. Start every sentence with the letter A.",
            ],
            "reference": [],
            "prompt_id": 81,
        },
    ),
    "arena-hard-v2": (
        501,
        {"uid": "0", "category": "creative_writing", "subcategory": "", "prompt": "Genera un poema sobre los ni Gas"},
    ),
}


@needs_expected
@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_row_is_the_reference_s_line(name: str) -> None:
    line, row = RECORDED[name]
    expected = json.loads((EXPECTED / f"{name}.jsonl").read_text("utf-8").split("\n")[line - 1])
    assert BENCHMARKS[name].turns(row) == expected["turns"]


def rows_of(name: str, turns: list[str]) -> dict[str, Any]:
    """The fields that a prompt of the reference was made of."""
    (text, *_) = turns
    if name in ("gsm8k", "math500", "aime25"):
        assert text.endswith(REASON)
        return {"question" if name == "gsm8k" else "problem": text.removesuffix(REASON)}
    if name == "humaneval":
        return {"prompt": text.split("```python\n", 1)[1].removesuffix("\n```")}
    if name == "livecodebench":
        question, answer = text.split("### Question:\n", 1)[1].rsplit("\n\n### Format: ", 1)
        code = answer.split("```python\n", 1)[1].rsplit("\n```\n\n### Answer", 1)[0]
        return {"question_content": question, "starter_code": "" if code == "# YOUR CODE HERE" else code}
    return {"prompt": turns if name == "mt-bench" else text}


@needs_expected
@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "alpaca"])
def test_all_prompts_are_those_of_the_reference(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte for byte: rows are made of the reference's own prompts, with braces and all."""
    expected = (EXPECTED / f"{name}.jsonl").read_bytes()
    turns = [json.loads(line)["turns"] for line in expected.decode().split("\n") if line]
    rows = list(files._table(rows_of(name, one) for one in turns))
    monkeypatch.setattr(files.HubSet, "rows", lambda self: iter(rows))
    fetch({name: tmp_path / "made" / f"{name}.jsonl"})
    assert len(turns) == BENCHMARKS[name].prompts
    assert (tmp_path / "made" / f"{name}.jsonl").read_bytes() == expected
    assert list((tmp_path / "made").iterdir()) == [tmp_path / "made" / f"{name}.jsonl"]


def test_alpaca_s_input_follows_its_instruction() -> None:
    """The reference has no file of it here; this is what its family of benchmarks asks."""
    turns = BENCHMARKS["alpaca"].turns
    assert turns({"instruction": "Add.", "input": "1 and 2"}) == ["Add.\n\nInput:\n1 and 2"]
    assert turns({"instruction": "Say {hello}.", "input": ""}) == ["Say {hello}."]


def test_files_of_a_data_set_are_read_as_files_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def data_file(data_set: str, name: str) -> Path:
        asked.append((data_set, name))
        return tmp_path / name

    monkeypatch.setattr(files, "data_file", data_file)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"prompt": "{name}1"}}\n{{"prompt": "{name}2"}}\n')
    entry = "hub:me/set?file=a.jsonl,b.jsonl"
    prompts = read_prompts([entry])
    assert [(one.line, one.messages[0]["content"]) for one in prompts] == [(1, "a1"), (2, "a2"), (3, "b1"), (4, "b2")]
    assert asked == [("me/set", "a.jsonl"), ("me/set", "b.jsonl")] and prompts[0].prompt_set == "set"
    first = files.content_hashes([entry], "")
    (tmp_path / "b.jsonl").write_text('{"prompt": "c"}\n')
    assert files.content_hashes([entry], "") != first
    with pytest.raises(InputError, match="hub:me/set.*: a file has neither split nor name; leave out one or the other"):
        read_prompts([entry + "&split=test"])


def test_a_set_that_has_changed_is_one_line_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.HubSet, "rows", lambda self: files._table([{"question": "a"}, {"text": "b"}]))
    message = r"^hub:openai/gsm8k\S+: row 2: no field 'question'; this data set has changed$"
    with pytest.raises(InputError, match=message):
        fetch({"gsm8k": tmp_path / "gsm8k.jsonl"})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files.HubSet, "rows", lambda self: files._table(["text"]))
    with pytest.raises(InputError, match="row 1: a JSON str where an object is needed; this data set has changed$"):
        list(convert(BENCHMARKS["gsm8k"]))


def test_a_file_that_is_there_stays_and_another_number_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files.HubSet, "rows", lambda self: files._table([{"question": "a"}]))
    (tmp_path / "mbpp.jsonl").write_text("mine")
    fetch({"mbpp": tmp_path / "mbpp.jsonl", "gsm8k": tmp_path / "gsm8k.jsonl"})
    assert (tmp_path / "mbpp.jsonl").read_text() == "mine"
    assert json.loads((tmp_path / "gsm8k.jsonl").read_text()) == {"turns": ["a" + REASON]}
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"mbpp: {tmp_path / 'mbpp.jsonl'} is there already; remove it to fetch it again"
    assert said[1].endswith("test has 1 prompts now, the paper's had 1319")
    assert said[2] == f"gsm8k: 1 prompts in {tmp_path / 'gsm8k.jsonl'}"


def test_the_config_says_where_they_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert places([], ()) == {name: Path("eval_datasets") / f"{name}.jsonl" for name in BENCHMARKS}
    entries = ("sets/mbpp.jsonl", "other.jsonl", "hub:openai/gsm8k")
    assert places([], entries) == {"mbpp": Path("sets/mbpp.jsonl")}
    assert places(["gsm8k"], entries) == {"gsm8k": Path("eval_datasets/gsm8k.jsonl")}
    with pytest.raises(InputError, match="--benchmarks has 'gsm', which is unknown; use gsm8k, .* or arena-hard-v2"):
        places(["gsm"], ())
    experiment = tmp_path / "x.py"
    experiment.write_text("from dspark_jax.config import Config\ndef get_config(arg=''):\n    return Config()\n")
    for flag, expected in (((), None), (("--benchmarks",), "all"), (("--benchmarks=mbpp, gsm8k",), "mbpp, gsm8k")):
        assert command.parse(["--config", str(experiment), *flag], prepare._define)[2] == {
            "distributed": False,
            "benchmarks": expected,
            "beam": None,
        }
    asked: dict[str, Path] = {}
    monkeypatch.setattr(prepare.benchmark_prompts, "fetch", asked.update)
    config = Config(eval=EvalConfig(prompts=entries))
    assert prepare.prepare(config, tmp_path, benchmarks="all") == {"mbpp": "sets/mbpp.jsonl"}
    assert prepare.prepare(config, tmp_path, benchmarks="mbpp, gsm8k") and list(asked) == ["mbpp", "gsm8k"]


def test_domains_and_figures_are_those_of_the_paper() -> None:
    assert {name: len(members) for name, members in by_domain(dict.fromkeys(BENCHMARKS, 1)).items()} == {
        "math": 3,
        "code": 3,
        "chat": 3,
    }
    assert by_domain({"mine": 1, "mbpp": 2, "aime25": 3}) == {"math": [3], "code": [2]} and DOMAINS[2] == "chat"
    # The paper's own macro averages: DSpark over the others, by Qwen3 target, in %.
    for other, gains in {"eagle3": (30.9, 26.7, 30.0), "dflash": (16.3, 18.4, 18.3)}.items():
        for target, gain in zip(("Qwen/Qwen3-4B", "Qwen/Qwen3-8B", "Qwen/Qwen3-14B"), gains, strict=True):
            ours, theirs = (sum(paper_tau(target, kind).values()) for kind in ("dspark", other))
            assert 100 * (ours / theirs - 1) == pytest.approx(gain, abs=0.1)
    assert paper_tau("Qwen/Qwen3-4B", "mtp") == {} == paper_tau("", "dspark")
    assert all(len(paper_tau(target, kind)) == 9 for target in TARGETS for kind in ("dspark", "dflash", "eagle3"))


def test_the_documents_have_the_same_benchmarks_and_figures() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    rows = re.findall(r"^\| `([\w-]+)` \| (\w+) \| (\d+) \| `(hub:\S+)` \|$", (docs / "data.md").read_text(), re.M)
    known = [(name, one.domain, str(one.prompts), one.source) for name, one in BENCHMARKS.items()]
    assert rows == known
    shown = dict(re.findall(r"^(\S+) +\.\.\. +\.\.\. +(\d\.\d\d)$", (docs / "results.md").read_text(), re.M))
    paper = paper_metrics("Qwen/Qwen3-4B", "dspark", BENCHMARKS)
    assert {name: float(tau) for name, tau in shown.items()} == pytest.approx(
        paper["prompt_sets"] | paper["domains"], abs=0.005
    )


def test_a_target_is_known_by_its_shape() -> None:
    for name, (shape, *_) in TARGETS.items():
        assert target_like(shape) == name
    assert target_like(types.SimpleNamespace(**vars(shape) | {"num_hidden_layers": 3})) == ""
