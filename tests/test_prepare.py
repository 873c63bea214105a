import dataclasses
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dspark_jax import answering
from dspark_jax import prepare as command
from dspark_jax.config import AnswersConfig, Config, DecodeMeshConfig, EvalConfig, InputError, MeshConfig
from dspark_jax.data import chat
from dspark_jax.data.inputs import FIELDS
from dspark_jax.data.sources import SampleReader
from dspark_jax.engine import Models, generate
from dspark_jax.engine.sampling import request_keys
from dspark_jax.prepare import prepare
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from tests.conftest import others_slow
from tests.preparing import STOP, Decoder, changed, files, prompts_config


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path) -> Config:
    return prompts_config(tiny_target, tmp_path, decode_batch_size=4)


def test_prompts_become_samples_and_a_report(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = prepare(config, tmp_path / "run", Decoder())
    data = tmp_path / "run" / "data"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data"]
    assert sorted(path.name for path in data.iterdir()) == ["dspark_samples", "rejected.jsonl", "report.json"]
    assert json.loads((data / "report.json").read_text()) == report
    assert report["rejected"] == {"malformed": 1, "prompt_too_long": 1, "empty_answer": 1}
    assert (report["prompts"], report["samples"]) == (12, 10)
    samples = SampleReader(data)
    assert [samples[i].sample_id for i in range(len(samples))] == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert sum(int(samples[i].loss_mask.sum()) for i in range(10)) == report["loss_tokens"]
    tokenizer = chat.load_tokenizer(config.target.path)
    question = "how much is one and one"
    answer = tokenizer.decode(list(range(65, 72)))
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    assert tokenizer.decode(samples[1].tokens) == text + text
    assert tokenizer.decode(samples[1].tokens[samples[1].loss_mask > 0]) == f"{answer}<|im_end|>\n" * 2
    rejected = [json.loads(line) for line in (data / "rejected.jsonl").read_text().splitlines()]
    assert {(entry["reason"], entry["line"]) for entry in rejected} == {
        ("malformed", 5),
        ("prompt_too_long", 13),
        ("empty_answer", 4),
    }
    assert report["sources"] == {"math": {"prompts": 12, "set_aside": 3}}
    masks = [samples[i].loss_mask for i in range(10)]
    longest = {"prompt": max(int(mask.argmax()) for mask in masks), "answer": max(int(mask.sum()) for mask in masks)}
    assert {name: one["longest"] for name, one in report["lengths"].items()} == longest
    assert all(sum(one["samples"]) == 10 for one in report["lengths"].values())
    assert report["thinking"] == {"samples": 0, "share": 0.0}
    assert report["scripts"] == {"latin": report["prompts"]}
    shown = capsys.readouterr().err
    assert "10 samples (math 10)" in shown and "math 12 3 10 652 186" in " ".join(shown.split())
    assert "set aside in" in shown and "1 malformed line, 1 empty answer, 1 prompt too long" in shown


def test_held_out_prompts_among_the_training_prompts_are_named(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is answered, and again for data that is there when the held-out prompts change."""
    held_out, run = tmp_path / "heldout.jsonl", tmp_path / "run"
    held_out.write_text('{"prompt": "something else"}\n{"prompt": "How much is one and one and one?"}\n{broken\n')
    config.eval = EvalConfig(prompts=(str(held_out),))
    with pytest.raises(KeyboardInterrupt):
        prepare(config, run, Decoder(kill_after=0))
    warning = "warning: the training prompts have 1 of 2 held-out prompts (50.0%): 0 word for word, 1 nearly, e.g. "
    assert f"{warning}{held_out}:2 and {config.data.prompts[0]}:3; what is measured" in capsys.readouterr().err
    report = prepare(config, run, Decoder())
    assert (report["held_out"]["near"], report["held_out"]["sets"]["heldout"]["prompts"]) == (1, 2)
    assert json.loads((run / "data" / "report.json").read_text()) == report
    assert "among the training prompts are 1 of 2 held-out prompts" in capsys.readouterr().err
    before = files(run)
    assert prepare(config, run, Decoder()) == report and files(run) == before
    assert "warning" not in capsys.readouterr().err
    held_out.write_text('{"prompt": "something else"}\n')
    again = prepare(config, run, Decoder())
    assert (again["held_out"]["near"], again["fingerprint"]) == (0, report["fingerprint"])
    assert json.loads((run / "data" / "report.json").read_text()) == again
    held_out.unlink()  # who asks them will refuse
    assert prepare(config, run, Decoder())["samples"] == 10
    assert f"not compared with those of training ({held_out}: cannot be read" in capsys.readouterr().err


def test_given_answers_are_used_as_they_are_without_the_target(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the answer is one"}]
    path.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": messages[:1]}) + "\n")
    decoder = Decoder()
    report = prepare(changed(config, prompts=(str(path),), regenerate=False), tmp_path / "run", decoder)
    assert not decoder.streams and report["samples"] == 1 and report["rejected"] == {"unanswered": 1}
    sample = SampleReader(tmp_path / "run" / "data")[0]
    tokenizer = chat.load_tokenizer(config.target.path)
    assert (sample.tokens.tolist(), sample.loss_mask.tolist()) == chat.tokens_and_mask(tokenizer, messages)
    with pytest.raises(InputError, match="data.repeats=2 needs data.regenerate=True"):
        prepare(changed(config, regenerate=False, repeats=2), tmp_path / "run")


@pytest.mark.parametrize("tensor", others_slow((0, 1, 2), 0))
def test_the_target_answers_each_prompt_by_its_own_key(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: int
) -> None:
    """Through engines of several capacities the answers are those of `generate`, which decodes each in one piece.

    They are on one device (0), or on eight, of which so many share a copy of the weights: two slots for 8 or 4 copies.
    """
    mesh = make_mesh(config.mesh, jax.devices()[:1])  # compiles faster
    if tensor:
        config = dataclasses.replace(config, mesh=MeshConfig(decode=DecodeMeshConfig(tensor=tensor)))
    else:
        monkeypatch.setattr(answering, "decoding_mesh", lambda *_: mesh)
    for name, value in {"SMALLEST_CAPACITY": 32, "LEAST_ROOM": 4}.items():
        monkeypatch.setattr(answering, name, value)
    capacities, engine = [], answering.Engine
    monkeypatch.setattr(
        answering, "Engine", lambda *models, **given: capacities.append(given["capacity"]) or engine(*models, **given)
    )
    path = tmp_path / "prompts.jsonl"
    texts = ["one", "two", "the sum of the numbers", "one", "a"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    settings: dict[str, Any] = {"prompts": (str(path),), "max_prompt_length": 40, "max_length": 64, "seed": 5}
    config = changed(config, **settings, min_loss_tokens=1, decode_batch_size=2)
    prepare(config, tmp_path / "run")
    assert capacities == [32, 64]
    samples, tokenizer = SampleReader(tmp_path / "run" / "data"), chat.load_tokenizer(config.target.path)
    prompts = [chat.prompt_tokens(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    with jax.set_mesh(mesh):
        keys = request_keys(5, jnp.arange(5))
        models = Models(load_target(config.target, mesh))
        whole = generate(models, prompts, max_new_tokens=56, temperature=1.0, stop_tokens=[STOP], keys=keys).tokens
    for i, (prompt, answer) in enumerate(zip(prompts, whole, strict=True)):
        end = min(len(prompt) + len(answer), 64)
        assert samples[i].tokens[:end].tolist() == [*prompt, *answer.tolist()][:64]
    assert whole[0].tolist() != whole[3].tolist()
    assert any(len(prompt) + len(answer) > 32 for prompt, answer in zip(prompts, whole, strict=True))


def test_bad_input_is_one_line_and_leaves_no_data(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"no sample is left of 12 prompts: .*11 too few supervised.*rejected\.jsonl"):
        prepare(changed(config, min_loss_tokens=139), run, lambda ask: ((one, [65, STOP]) for one in iter(ask, None)))
    with pytest.raises(InputError, match=r"nothing\.jsonl: cannot be read"):
        prepare(changed(config, prompts=(str(tmp_path / "nothing.jsonl"),)), run)
    with pytest.raises(InputError, match=r"data\.prompts is empty"):
        prepare(changed(config, prompts=()), run)
    small = dataclasses.replace(config.target.architecture, vocab_size=290)
    target = dataclasses.replace(config.target, architecture=small)
    with pytest.raises(InputError, match="the tokenizer has 295 ids, the model 290 rows"):
        prepare(dataclasses.replace(config, target=target), run, Decoder())
    for failing, message in (
        (full_disk, "No space left on device; make room"),
        (read_only, "file system; make it writable"),
    ):
        monkeypatch.setattr(command, "write_samples", failing)
        with pytest.raises(InputError, match=message):
            prepare(config, run, Decoder())
    assert not (run / "data").exists()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(28, "make room or"), (122, "make room or"), (13, "make it writable or"), (30, "make it writable or")],
)
def test_a_disk_that_takes_nothing_is_one_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number), "here")

    monkeypatch.setattr(command, "write_samples", fail)
    with pytest.raises(InputError, match=f"^here: {os.strerror(number)}; {remedy} choose another --workdir"):
        prepare(config, tmp_path / "run", Decoder())


def test_a_file_in_the_place_of_the_working_directory_is_one_line(config: Config, tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(InputError, match="Not a directory; make it writable or choose another --workdir"):
        prepare(config, tmp_path / "run", Decoder())


@pytest.mark.parametrize("name", ["data", "data.partial", "data.old"])
def test_a_file_in_the_place_of_the_data_is_refused_before_anything_is_decoded(
    config: Config, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=f"{name}: not a directory; remove it, or use another --workdir"):
        prepare(config, tmp_path, lambda *_: pytest.fail("decoded"))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"] == [name]


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_what_is_not_used_of_the_prompts_is_said(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.jsonl"
    lines = [{"prompt": "how much", "turns": ["is one"]}, {"prompt": "two", "id": 1}, {"prompt": "q", "tools": TOOLS}]
    path.write_text("\ufeff" + "\n".join(json.dumps(line) for line in lines) + "\n", "utf-8")
    report = prepare(changed(config, prompts=(str(path),)), tmp_path / "run", Decoder())
    assert report["rejected"] == {"tools": 1} and report["samples"] == 2
    assert report["unused"] == {"prompt beside turns": 1, "id": 1}
    shown = capsys.readouterr().err
    assert "fields of prompts that are not used: `prompt beside turns` of 1, `id` of 1" in shown
    assert "1 with tools that the chat template does not show" in shown


def test_only_what_reads_more_than_before_has_another_fingerprint(config: Config, tmp_path: Path) -> None:
    """Data that was made before there were tools and thinking stays up to date."""
    before = Run(config, tmp_path).data_inputs
    assert before["format"] == 2 and tuple(before["data"]) == FIELDS
    assert Run(changed(config, thinking="on"), tmp_path).data_inputs["data"]["thinking"] == "on"
    assert Run(changed(config, regenerate=False), tmp_path).data_inputs["format"] == 3
    more = (
        {"prompt": "q", "tools": TOOLS},
        {"instruction": "q"},
        {"messages": [{"role": "developer", "content": "q"}]},
    )
    for number, row in enumerate(more):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        assert Run(changed(config, prompts=(str(path),)), tmp_path).data_inputs["format"] == 3


def test_packed_sets_of_a_directory_and_thoughts_become_samples(config: Config, tmp_path: Path) -> None:
    def talk(thoughts: str) -> bytes:
        answer = {"role": "assistant", "content": f"<think>{thoughts}</think>the answer", "reasoning_content": ""}
        return json.dumps({"messages": [{"role": "user", "content": "q"}, answer]}).encode()

    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "a.jsonl.gz").write_bytes(gzip.compress(talk("one")))
    (tmp_path / "sets" / "b.json").write_bytes(b"[" + talk("two") + b"," + talk("three") + b"]")
    ids = {"input_ids": [65, 66, 67, 68], "loss_mask": [0, 1, 1, 1]}
    (tmp_path / "sets" / "c.jsonl").write_text(json.dumps(ids) + "\n" + json.dumps({**ids, "input_ids": [999] * 4}))
    config = changed(config, prompts=(str(tmp_path / "sets"),), regenerate=False, thinking="given", min_loss_tokens=3)
    report = prepare(config, tmp_path / "run")
    assert {name: counts["samples"] for name, counts in report["prompt_sets"].items()} == {"a": 1, "b": 2, "c": 1}
    assert report["rejected"] == {"malformed": 1} and [name for name, _ in report["inputs"]["prompts"]] == [
        "a",
        "b",
        "c",
    ]
    samples, tokenizer = SampleReader(tmp_path / "run" / "data"), chat.load_tokenizer(config.target.path)
    texts = [tokenizer.decode(one.tokens[one.loss_mask > 0]) for one in map(samples.__getitem__, range(4))]
    assert texts[:3] == [f"<think>{word}</think>the answer<|im_end|>\n" for word in ("one", "two", "three")]
    with pytest.raises(InputError, match="holds no prompt; line 1: it is tokenised already"):
        prepare(changed(config, regenerate=True), tmp_path / "again", Decoder())


def test_servers_need_a_package_and_an_answer_of_another_form_is_not_read(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    asking = changed(config, answers=AnswersConfig(endpoints=("http://localhost:1/v1",)))
    with pytest.raises(InputError, match=r"needs the package openai; pip install 'dspark-jax\[answers\]'"):
        prepare(asking, tmp_path / "servers")
    partial = tmp_path / "run" / "data.partial"
    partial.mkdir(parents=True)
    (partial / "inputs.json").write_text(json.dumps({"fingerprint": Run(config, tmp_path).data_fingerprint}))
    (partial / "answers.jsonl").write_text('{"id": 0, "turn": 0, "part": 0, "tokens": [66]}\n')
    decoder = Decoder()
    prepare(config, tmp_path / "run", decoder)
    assert 0 in decoder.streams


def full_disk(*_: object) -> int:
    raise OSError(28, "No space left on device")


def read_only(*_: object) -> int:
    raise OSError(30, "Read-only file system")


def test_the_command_line(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "tiny.py"
    path.write_text(
        "from dspark_jax.config import *\n"
        "def get_config(arg=''):\n"
        f"    return Config(target=TargetConfig(path={config.target.path!r}),\n"
        "        drafter=DrafterConfig(num_layers=1, target_layer_ids=(0,), mask_token_id=319),\n"
        f"        data=DataConfig(prompts=({str(tmp_path / 'none.jsonl')!r},)))\n"
    )
    arguments = [sys.executable, "-m", "dspark_jax.prepare", "--config", str(path), "--workdir", str(tmp_path / "run")]
    # 512 positions are too few for the default length of 4096.
    run = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and run.stderr.startswith("error: data.max_length=4096 exceeds")
    assert not (tmp_path / "run").exists()
