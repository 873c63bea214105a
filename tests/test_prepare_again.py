"""A second `prepare`: where nothing changed, something did, the first was killed or damaged, or it ran elsewhere."""

import dataclasses
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import pytest

from dspark_jax import evaluate, train
from dspark_jax.buckets.places import working_directory
from dspark_jax.config import Config, InputError
from dspark_jax.data.sources import SampleReader
from dspark_jax.evaluation.setup import open_drafter
from dspark_jax.prepare import prepare, prepare_run
from dspark_jax.run import Run
from dspark_jax.target import loading
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.feature_cache import open_features
from dspark_jax.training.state import TrainState
from tests import fake_bucket
from tests.preparing import Decoder, changed, files, prompts_config


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path) -> Config:
    return prompts_config(tiny_target, tmp_path, decode_batch_size=4)


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
