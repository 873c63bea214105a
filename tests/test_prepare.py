import dataclasses
import gzip
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from dspark_jax import (
    answering,
    evaluate,
    train,
)
from dspark_jax import prepare as command
from dspark_jax.buckets.places import working_directory
from dspark_jax.config import (
    AnswersConfig,
    Config,
    DecodeMeshConfig,
    EvalConfig,
    InputError,
    MeshConfig,
)
from dspark_jax.data import chat
from dspark_jax.data.inputs import FIELDS
from dspark_jax.data.sources import SampleReader
from dspark_jax.engine import Models, generate
from dspark_jax.engine.sampling import request_keys
from dspark_jax.evaluation.setup import open_drafter
from dspark_jax.prepare import prepare, prepare_run
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.target import loading
from dspark_jax.target.loading import load_target
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.feature_cache import open_features
from dspark_jax.training.state import TrainState
from tests import fake_bucket
from tests.conftest import others_slow
from tests.preparing import STOP, Decoder, prompts_config


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path) -> Config:
    return prompts_config(tiny_target, tmp_path, decode_batch_size=4)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_feature_cache_of_something_else_is_refused_before_anything_is_touched(
    config: Config, tmp_path: Path
) -> None:
    """Other samples, of which the cache would be, are not prepared first either."""
    config = changed(config, features="cache", regenerate=False, prompts=(str(tmp_path / "given.jsonl"),))
    config.train = dataclasses.replace(config.train, batch_size=8, evaluate=False)
    talk = [{"role": "user", "content": "how much is one"}, {"role": "assistant", "content": "one is one " * 3}]
    (tmp_path / "given.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    prepare(config, tmp_path / "run")
    before = files(tmp_path / "run")
    assert "features/manifest.json" in before
    others = {
        r"target\.dtype auto, needed is bfloat16": dataclasses.replace(
            config, target=dataclasses.replace(config.target, dtype="bfloat16")
        ),
        r"data\.feature_dtype int8, needed is bfloat16": changed(config, feature_dtype="bfloat16"),
        r"data\.features jax, needed is torch": changed(config, features="torch"),
        r"samples \(data\.\*\) \w+, needed is \w+": changed(config, min_loss_tokens=5),
    }
    for run, (message, other) in itertools.product((prepare, train.train), others.items()):
        with pytest.raises(InputError, match=f"run/features: made with {message}; go back to the old settings, remove"):
            run(other, tmp_path / "run")
        assert files(tmp_path / "run") == before


def test_a_preparation_in_a_bucket_goes_on_elsewhere(
    config: Config, tmp_path: Path, bucket: Callable[[], None], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(config, tmp_path / "run", whole := Decoder())
    fake_bucket.put("bucket/math.jsonl", Path(config.data.prompts[0]).read_bytes())
    config, run = changed(config, prompts=("gs://bucket/math.jsonl",)), Path("gs://bucket/run")
    first, second, third = Decoder(kill_after=6), Decoder(), Decoder()
    with pytest.raises(KeyboardInterrupt), working_directory(run, "prepare") as folder:
        prepare(config, folder, first)
    bucket()
    with working_directory(run, "prepare") as folder:
        report = prepare(config, folder, second)
        assert "6 answers are there already" in capsys.readouterr().err
        expected = {name: content for name, content in files(tmp_path / "run" / "data").items() if "json" not in name}
        assert expected and expected.items() <= files(folder / "data").items()
    assert len(first.streams) == 6 and sorted(first.streams + second.streams) == sorted(whole.streams)
    left = {name.split("/")[2] for name in fake_bucket.objects() if name.startswith("bucket/run/")}
    assert left == {"data", "manifests"}
    bucket()
    with working_directory(run, "prepare") as folder:
        assert prepare(config, folder, third) == report and not third.streams


def test_a_feature_cache_in_a_bucket_is_opened_elsewhere(
    config: Config, tmp_path: Path, bucket: Callable[[], None]
) -> None:
    talk = [{"role": "user", "content": "how much is one"}, {"role": "assistant", "content": "one is one " * 3}]
    fake_bucket.put("bucket/given.jsonl", (json.dumps({"messages": talk}) + "\n").encode())
    config = changed(config, features="cache", regenerate=False, prompts=("gs://bucket/given.jsonl",))
    with working_directory(Path("gs://bucket/run"), "prepare") as folder:
        prepare(config, folder)
        made = files(folder / "features")
    bucket()
    with working_directory(Path("gs://bucket/run"), "train") as folder:
        assert set(files(folder / "features")) == {"manifest.json"}
        assert len(open_features(Run(config, folder))) == 1
        assert files(folder / "features") == made and "shard-00000.array_record" in made


def changed(config: Config, **fields: Any) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


@pytest.fixture
def fingerprints(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the files of the target were hashed, by function, whoever asked for it."""
    counts: Counter[str] = Counter()
    for name in ("fingerprint", "tokenizer_fingerprint"):
        original = getattr(loading, name)

        def counted(directory: str, name: str = name, original: Callable[[str], str] = original) -> str:
            counts[name] += 1
            return original(directory)

        for module in [module for key, module in sys.modules.items() if key.startswith("dspark_jax")]:
            if getattr(module, name, None) is original:
                monkeypatch.setattr(module, name, counted)
    return counts


def test_a_command_hashes_the_target_once(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fingerprints: Counter[str]
) -> None:
    """`prepare` with a feature cache; `train`, which prepares, notes the target in checkpoints and loads one."""
    once, config = {"fingerprint": 1, "tokenizer_fingerprint": 1}, changed(config, features="cache")
    monkeypatch.setattr("dspark_jax.training.feature_cache.write_features", lambda *_, **__: None)
    prepare(config, tmp_path, Decoder())
    assert fingerprints == once

    def fit(run: Run, checkpoints: Checkpoints) -> None:
        checkpoints.save(1, TrainState(jnp.int32(1), {"x": jnp.zeros(2)}, {}), {})

    def evaluate_run(run: Run) -> None:
        with pytest.raises(ZeroDivisionError):
            open_drafter(run)

    monkeypatch.setattr(train, "fit", fit)
    monkeypatch.setattr(train, "check_questions", lambda config: None)
    monkeypatch.setattr(evaluate, "evaluate_run", evaluate_run)
    # The target has been compared when the drafter's shape is asked for.
    monkeypatch.setattr("dspark_jax.training.checkpoint.abstract_drafter", lambda config: 1 // 0)
    config.train = dataclasses.replace(config.train, batch_size=8)
    fingerprints.clear()
    train.train(config, tmp_path)
    assert fingerprints == once
    monkeypatch.setattr(train, "fit", lambda *_: None)
    fingerprints.clear()
    train.train(config, tmp_path)  # goes on from a checkpoint that states its data
    assert fingerprints == once


def test_what_was_prepared_is_looked_at_again(config: Config, tmp_path: Path) -> None:
    """A command that prepares data notes what it has made, not what lay there when it began."""
    run = Run(config, tmp_path)
    assert run.prepared_fingerprint is None
    prepare_run(run, Decoder())
    assert run.prepared_fingerprint == run.data_fingerprint
    other = Run(changed(config, temperature=0.5), tmp_path)
    assert other.prepared_fingerprint != other.data_fingerprint
    prepare_run(other, Decoder())
    assert run.prepared_fingerprint == other.data_fingerprint != run.data_fingerprint


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


def test_unchanged_inputs_are_skipped_and_changed_ones_are_named(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first = prepare(config, run, Decoder())
    before = files(run)
    capsys.readouterr()
    idle = Decoder()
    same = changed(config, decode_batch_size=9, workers=3)
    assert prepare(same, run, idle) == first and not idle.streams and files(run) == before
    assert capsys.readouterr().err == f"data: 10 samples in {run / 'data'} are up to date\n"

    again = prepare(changed(config, temperature=0.5), run, Decoder())
    assert again["fingerprint"] != first["fingerprint"] == Run(same, run).data_fingerprint
    assert "preparing again, data.temperature=0.5, was 1.0" in capsys.readouterr().err
    with Path(config.data.prompts[0]).open("a") as file:
        file.write('{"prompt": "more"}\n')
    assert prepare(changed(config, temperature=0.5), run, Decoder())["samples"] == 11
    assert "preparing again, the prompts changed" in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == ["data"]


def test_a_killed_preparation_continues_and_ends_with_the_same_samples(config: Config, tmp_path: Path) -> None:
    whole = Decoder()
    prepare(config, tmp_path / "whole", whole)
    streams = []
    for kill_after in (1, 2, 0, 10**9):
        decoder = Decoder(kill_after)
        if kill_after < 10**9:
            with pytest.raises(KeyboardInterrupt):
                prepare(config, tmp_path / "killed", decoder)
            assert not (tmp_path / "killed" / "data").exists()
        else:
            prepare(config, tmp_path / "killed", decoder)
        streams += decoder.streams
    assert streams == whole.streams
    expected, found = tmp_path / "whole" / "data", tmp_path / "killed" / "data"
    assert (found / "rejected.jsonl").read_text() == (expected / "rejected.jsonl").read_text()
    reports = [json.loads((path / "report.json").read_text()) | {"seconds": 0} for path in (expected, found)]
    assert reports[0] == reports[1]
    # ArrayRecord files of equal records need not be equal byte for byte.
    a, b = SampleReader(expected), SampleReader(found)
    for i in range(len(a)):
        assert (a[i].sample_id, a[i].tokens.tolist()) == (b[i].sample_id, b[i].tokens.tolist())
        assert a[i].loss_mask.tolist() == b[i].loss_mask.tolist()


def test_a_kill_before_or_between_the_last_renames_loses_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    prepare(config, run, Decoder())
    config = changed(config, seed=1)

    def killed(self: Path, target: Path) -> None:
        if target.name == "data":
            raise KeyboardInterrupt
        rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, run, Decoder())
    monkeypatch.undo()
    assert sorted(path.name for path in run.iterdir()) == ["data.old", "data.partial"]
    idle = Decoder()
    assert prepare(config, run, idle)["inputs"]["data"]["seed"] == 1
    assert not idle.streams and sorted(path.name for path in run.iterdir()) == ["data"]


def test_answers_to_other_inputs_are_not_continued_with(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(config, tmp_path, Decoder(kill_after=2))
    decoder = Decoder()
    prepare(changed(config, seed=1), tmp_path, decoder)
    assert len(decoder.streams) == 15  # eleven first turns, four second ones
    assert "the inputs have changed since the preparation that did not end" in capsys.readouterr().err


def test_samples_that_have_gone_are_made_again(config: Config, tmp_path: Path) -> None:
    prepare(config, tmp_path, Decoder())
    next((tmp_path / "data").rglob("dataset_info.json")).unlink()
    prepare(config, tmp_path, Decoder())
    assert len(SampleReader(tmp_path / "data")) == 10


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


def test_damaged_data_is_made_again_and_said(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(config, tmp_path, Decoder())
    (shard,) = (tmp_path / "data").rglob("*.array_record*")
    shard.write_bytes(shard.read_bytes()[:65536])
    prepare(config, tmp_path, Decoder())
    shown = capsys.readouterr().err
    assert f"data: {shard}: damaged (" in shown and "remove" not in shown
    assert len(SampleReader(tmp_path / "data")) == 10
    (tmp_path / "data" / "report.json").write_text("{")
    with pytest.raises(InputError, match=r"data/report\.json:1: not valid JSON .*; remove it and run again"):
        prepare(config, tmp_path, Decoder())
    (tmp_path / "data" / "report.json").unlink()
    (tmp_path / "data" / "report.json").mkdir()
    with pytest.raises(InputError, match=r"data/report\.json: cannot be read .*; remove it and run again"):
        prepare(config, tmp_path, Decoder())


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
