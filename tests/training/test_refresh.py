"""On-policy refresh: prompts that are answered while a drafter is trained, killed and continued bit for bit."""

import dataclasses
import functools
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax import answering, refresh, train
from dspark_jax.config import (
    AnswersConfig,
    Config,
    DataConfig,
    DrafterConfig,
    InputError,
    MeshConfig,
    TargetConfig,
    TrainConfig,
    resolve,
)
from dspark_jax.config_rules import problems
from dspark_jax.data import chat
from dspark_jax.data.growth import GrowingBatches, JoinedSamples
from dspark_jax.data.parts import part_folder, part_of
from dspark_jax.data.pipeline import batches
from dspark_jax.data.prompts import read_prompts
from dspark_jax.data.regenerate import Limits, conversations, regenerate
from dspark_jax.data.sources import Sample, SampleReader, write_samples
from dspark_jax.engine import schedulers
from dspark_jax.engine.models import Models
from dspark_jax.evaluation.comparison_plan import make_plan
from dspark_jax.json_file import write_json
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.training.checkpoint import load_drafter
from dspark_jax.training.state import abstract_drafter, to_params

CLOCK = ("tokens_per_second", "seconds_per_step", "refresh/seconds")
ONE = MeshConfig(1, 1, 1)


@pytest.fixture(scope="module")
def make_config(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    """(fields of data) -> a run of seven steps; eleven prompts in three parts, of which two come with time."""
    prompts = tmp_path_factory.mktemp("prompts") / "math.jsonl"
    lines = [json.dumps({"turns": ["how much is " + "one and " * (i % 3) + str(i)] * (1 + i % 2)}) for i in range(11)]
    prompts.write_text("\n".join([*lines[:4], "{broken", *lines[4:]]) + "\n")

    def make(**data: Any) -> Config:
        fields = {"max_prompt_length": 60, "max_length": 72, "min_loss_tokens": 1, "decode_batch_size": 2}
        return resolve(
            Config(
                name="tiny",
                target=TargetConfig(path=str(tiny_target)),
                drafter=DrafterConfig(
                    num_layers=1, block_size=3, target_layer_ids=(0,), mask_token_id=319, markov_rank=8
                ),
                data=DataConfig(prompts=(str(prompts),), **{**fields, **data}),
                train=TrainConfig(
                    steps=7, batch_size=4, num_anchors=4, log_every=2, checkpoint_every=50, vocab_chunk=16,
                    evaluate=False, refresh_every=3, refresh_parts=3,
                ),
                mesh=ONE,
            )
        )  # fmt: skip

    return make


def run(config: Config, workdir: Path) -> None:
    mesh = make_mesh(ONE, jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        if config.mesh == ONE:
            patch.setattr(Run, "mesh", mesh)
        train.train(config, workdir)


@pytest.fixture(scope="module")
def whole(make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory of a run from beginning to end."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(make_config(), workdir)
    return workdir


def rows(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock has measured."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


def read(folder: Path) -> list[Sample]:
    reader = SampleReader(folder)
    return [reader[i] for i in range(len(reader))]


def assert_same(workdir: Path, whole: Path) -> None:
    """Losses, parameters and samples, bit for bit; nothing half-written."""
    assert rows(workdir) == rows(whole)
    mesh = make_mesh(ONE, jax.devices()[:1])
    ours, theirs = (to_params(load_drafter(path, mesh)[1]) for path in (workdir, whole))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, name)
    for part in (1, 2):
        digests = [
            json.loads((part_folder(path, part) / "report.json").read_text())["digest"] for path in (workdir, whole)
        ]
        assert digests[0] == digests[1]
    assert sorted(path.name for path in (workdir / "refresh").iterdir()) == ["1", "2"]


@pytest.mark.slow
def test_a_run_grows_its_data(make_config: Callable[..., Config], whole: Path) -> None:
    found = rows(whole)
    assert [row["step"] for row in found] == [2, 3, 4, 4, 6, 7, 7]  # also at checkpoints, which precede a refresh
    grown = [row for row in found if "refresh/answers" in row]
    assert [row["step"] for row in grown] == [4, 7]
    folders = [whole / "data", part_folder(whole, 1), part_folder(whole, 2)]
    parts = [read(folder) for folder in folders]
    assert [row["refresh/samples"] for row in grown] == [len(parts[0] + parts[1]), len(sum(parts, []))]
    ids = [one.sample_id for part in parts for one in part]
    assert ids == sorted(set(ids))
    config = make_config()
    tokenizer = chat.load_tokenizer(config.target.path)
    numbers = [
        {tokenizer.decode(one.tokens.tolist()).split("<|im_end|>")[0].split()[-1] for one in part} for part in parts
    ]
    assert numbers == [{str(i) for i in range(part, 11, 3)} for part in range(3)]
    for folder, row in zip(folders[1:], grown, strict=True):
        report = json.loads((folder / "report.json").read_text())
        assert report["sources"]["math"]["prompts"] == report["samples"] and report["step"] == row["step"]
        assert report["refresh"]["tokens"] == row["refresh/tokens"] > 0
        assert 0 < report["refresh"]["drafting_rounds"] <= report["refresh"]["rounds"]
        assert 1 <= row["refresh/accepted_length"] <= 4
        assert report["refresh"]["answers"] >= report["samples"]
    prepared = json.loads((whole / "data" / "report.json").read_text())
    assert prepared["prompts"] == 4 and prepared["rejected"] == {"malformed": 1} and prepared["inputs"]["parts"] == 3


class Killed(BaseException):
    """The process ends now."""


def killed_after(count: int, part: int, monkeypatch: pytest.MonkeyPatch, how: Callable[[], None]) -> None:
    """Arranges for the end of the run when a part has so many answers."""
    make = refresh.make_decoder
    begun = []

    def make_decoder(*args: Any) -> Any:
        begun.append(args)

        def decode(ask: Any) -> Iterator[Any]:
            for number, answer in enumerate(make(*args)(ask)):
                if number == count and len(begun) == part:
                    how()
                yield answer

        return decode

    monkeypatch.setattr(refresh, "make_decoder", make_decoder)


def kill() -> None:
    raise Killed


@pytest.mark.slow
def test_a_run_killed_while_it_answers_ends_like_one_that_was_not(
    make_config: Callable[..., Config], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole / "data", workdir / "data")
    killed_after(1, 2, monkeypatch, kill)
    with pytest.raises(Killed):
        run(make_config(), workdir)
    assert sorted(path.name for path in (workdir / "refresh").iterdir()) == ["1", "2.partial"]
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    monkeypatch.undo()
    # As if it had been killed earlier: the first part is there, and the checkpoint does not know of it.
    shutil.rmtree(workdir / "checkpoints" / "6")
    killed_after(0, 2, monkeypatch, lambda: pytest.fail("a part that is there was answered again"))
    before = (part_folder(workdir, 1) / "report.json").stat().st_mtime_ns
    run(make_config(), workdir)
    assert (part_folder(workdir, 1) / "report.json").stat().st_mtime_ns == before
    assert_same(workdir, whole)


@pytest.mark.slow
def test_sigterm_while_it_answers_ends_the_run(
    make_config: Callable[..., Config], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole / "data", workdir / "data")
    killed_after(1, 1, monkeypatch, functools.partial(os.kill, os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        run(make_config(), workdir)
    assert stop.value.code == 143
    assert "told to stop: the same command continues from the last checkpoint" in capsys.readouterr().err
    monkeypatch.undo()
    run(make_config(), workdir)
    assert_same(workdir, whole)


@pytest.mark.slow
def test_greedy_answers_are_those_of_plain_decoding(
    make_config: Callable[..., Config], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the drafter that the run has trained; and prompts that are held out, or of other parts, are not asked."""
    config, workdir = make_config(temperature=0.0), tmp_path / "run"
    shutil.copytree(whole / "data", workdir / "data")
    mesh = make_mesh(ONE, jax.devices()[:1])
    make = functools.partial(batches, batch_size=2, max_length=72)
    here = Run(config, workdir, mesh)
    data = GrowingBatches(workdir, lambda samples, seed: make(samples, seed=seed), 0)
    drafter, checked = load_drafter(whole, mesh)[1], []
    with jax.set_mesh(mesh):
        target = load_target(config.target, mesh)
        growing = refresh.Refresh(here, target, abstract_drafter(config), data)
        growing.scheduler = schedulers.fixed()
        said, row = growing.run(4, drafter, lambda: checked.append(1))
        plain = answering.make_decoder(config, Models(target), mesh)
        prompts = part_of(read_prompts(config.data.prompts, 0, lambda malformed: None), 1, 3)
        todo = conversations(prompts, 1, start=data.next_id - 4)
        stops, none = (growing.tokenizer.eos_token_id,), lambda *_: None
        answered = regenerate(growing.tokenizer, todo, plain, stops, Limits(60, 72), None, none, none)
    asked = len(answered) + sum(len(one.conversation.questions) == 2 and not one.shortened for one in answered)
    assert said.startswith(f"refresh 1 of 2 before step 4: {asked} answers, {row['refresh/tokens']:.0f} tokens, acc")
    assert "8 samples from now on" in said and len(checked) >= asked == row["refresh/answers"]
    samples = read(part_folder(workdir, 1))
    for one, expected in zip(samples, answered, strict=True):
        answer = expected.answer.tolist()
        assert one.tokens.tolist()[-len(answer) :] == answer or one.tokens.tolist()[-len(answer) - 1 : -1] == answer
    assert [one.sample_id for one in samples] == [one.conversation.sample_id for one in answered]
    assert row["refresh/drafting_rounds"] == row["refresh/rounds"] and row["refresh/accepted_length"] >= 1


@pytest.mark.slow
def test_a_mesh_of_eight_devices_answers_alike(make_config: Callable[..., Config], whole: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(whole / "data", workdir / "data")
    run(dataclasses.replace(make_config(decode_batch_size=4), mesh=MeshConfig(2, 2, 2)), workdir)
    for ours, theirs in zip(rows(workdir)[:2], rows(whole)[:2], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    grown = [[row["refresh/samples"] for row in rows(path) if "refresh/samples" in row] for path in (workdir, whole)]
    assert grown[0] == grown[1] == [8, 11]
    assert len(read(part_folder(workdir, 1))) == 4 and np.isfinite(rows(workdir)[-1]["loss"])


def test_samples_of_another_run_are_refused(make_config: Callable[..., Config], whole: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "7")
    report = part_folder(workdir, 1) / "report.json"
    content = json.loads(report.read_text())
    write_json(report, content | {"digest": "0"})
    with pytest.raises(InputError, match="refresh/1: not the samples that the checkpoint was trained on; put the"):
        run(make_config(), workdir)
    shutil.rmtree(part_folder(workdir, 1))
    with pytest.raises(InputError, match="refresh/1: not the samples that the checkpoint was trained on; put the"):
        run(make_config(), workdir)


def test_what_cannot_be_refreshed_is_refused(
    make_config: Callable[..., Config], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    servers = AnswersConfig(endpoints=("http://localhost:1/v1",))
    for fields in ({"features": "cache"}, {"regenerate": False}, {"answers": servers}):
        other = dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))
        (found,) = problems(other)
        assert found.startswith("train.refresh_every=3 needs data.") and "the target answers in the run itself" in found
    config.train.refresh_parts = 1
    assert list(problems(config)) == [
        "train.refresh_parts=1 leaves nothing to answer in training; use 2 or more, or train.refresh_every=0"
    ]
    config.train.refresh_parts = 4
    with pytest.raises(InputError, match=r"resume with the old data\.\*, train\.refresh_\*, prompts"):
        run(config, shutil.copytree(whole, tmp_path / "run"))
    with pytest.raises(InputError, match="train.refresh_every=3: drafters that answer .* to compare them"):
        make_plan(config, "main")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(
        InputError, match="train.refresh_every=3: the prompts are answered on one host; leave out --dis"
    ):
        refresh.check_refresh(config)


def sample(number: int) -> Sample:
    tokens = np.full(4 + number % 3, number, np.int32)
    return Sample(tokens, np.ones(len(tokens), np.uint8), "set", number)


def write_part(folder: Path, numbers: range) -> None:
    samples = [sample(number) for number in numbers]
    if samples:
        write_samples(folder, samples)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", {"digest": f"digest {numbers}", "samples": len(samples)})


def numbers_of(batch: dict[str, Any]) -> list[int]:
    return batch["tokens"][:, 0].tolist()


@pytest.mark.parametrize("pack", [False, True])
def test_batches_over_growing_data_are_a_function_of_seed_and_parts(tmp_path: Path, pack: bool) -> None:
    make = functools.partial(batches, batch_size=2, max_length=6, pack=pack)
    write_samples(tmp_path / "data", map(sample, range(6)))
    write_part(part_folder(tmp_path, 1), range(6, 6))  # all of its prompts were set aside
    write_part(part_folder(tmp_path, 2), range(6, 10))

    def begin(seed: int = 3) -> GrowingBatches:
        return GrowingBatches(tmp_path, lambda samples, seed: make(samples, seed=seed), seed)

    data = begin()
    plain = make(SampleReader(tmp_path / "data"), seed=3)
    assert [numbers_of(next(data)) for _ in range(7)] == [numbers_of(next(plain)) for _ in range(7)]
    assert (data.parts, data.samples, data.next_id) == (1, 6, 6)
    data.add()
    assert (data.parts, data.samples) == (2, 6)
    with pytest.raises(InputError, match="refresh/3: no samples of this run"):
        for _ in range(2):
            data.add()
    assert (data.parts, data.samples, data.next_id) == (3, 10, 10)
    epoch = [number for _ in range(5) for number in numbers_of(next(data))]
    assert sorted(epoch) == list(range(10))
    state = json.loads(json.dumps(data.get_state()))
    assert state["parts"] == ["digest range(6, 6)", "digest range(6, 10)"]
    following = [numbers_of(next(data)) for _ in range(9)]
    again = begin()
    next(again)
    again.set_state(state)
    assert [numbers_of(next(again)) for _ in range(9)] == following
    other = begin(seed=4)
    other.add()
    other.add()
    assert [number for _ in range(5) for number in numbers_of(next(other))] != epoch


def test_joined_samples_are_one_after_the_other() -> None:
    parts = [[sample(0)], [], [sample(1), sample(2)]]
    joined = JoinedSamples(parts)
    assert [joined[i].sample_id for i in range(len(joined))] == [0, 1, 2]
