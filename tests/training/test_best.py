"""Measured checkpoints: the best one is kept, known and named; training is the same with and without measuring."""

import dataclasses
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax import train
from dspark_jax.config import Config, EvalConfig, InputError, MeshConfig, TargetConfig, resolve
from dspark_jax.data.sources import Sample, write_samples
from dspark_jax.evaluation.setup import check_prompt_files
from dspark_jax.metrics import Ratio
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.training.best import HeldOut, best_step
from dspark_jax.training.checkpoint import Checkpoints, load_drafter, load_step, saved_config
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import TrainState, init_state, to_params
from dspark_jax.training.step import FINITE, StepMetrics

CLOCK = ("tokens_per_second", "seconds_per_step")


def test_the_best_is_the_highest_of_what_can_be_compared():
    assert best_step({}) is None
    mine, other = (lambda tau: HeldOut(tau, "mine")), HeldOut(9.0, "other")
    assert best_step({1: mine(2.0), 2: mine(3.0), 3: mine(2.5)}) == 2
    assert best_step({1: mine(3.0), 2: mine(3.0)}) == 2
    assert best_step({1: other, 2: mine(2.0), 3: mine(1.0)}) == 2  # what is asked now decides
    assert best_step({1: mine(2.0), 2: mine(1.0), 3: other}) == 3


@pytest.fixture(scope="module")
def measured(make_tiny_config, target_directory, meshes, tmp_path_factory) -> tuple[Config, Path, Any]:
    """Five checkpoints of which two are kept, and the best, the first one; each has its step in its parameters."""
    config, workdir = make_tiny_config(target_directory), tmp_path_factory.mktemp("measured")
    state = init_state(config, make_optimizer(config.optim, 1), meshes["one"])
    for steps in ((1, 2), (3, 4, 5)):  # a run, and one that goes on
        with Checkpoints(Run(config, workdir)) as checkpoints:
            for step in steps:
                params = jax.tree.map(lambda leaf, step=step: leaf * 0 + step, state.params)
                tau = {1: 2.5, 2: 2.0, 4: 2.25}.get(step)
                found = None if tau is None else HeldOut(tau, "asked")
                checkpoints.save(step, dataclasses.replace(state, params=params), {}, found)
            assert checkpoints.best() == 1
    return config, workdir, state


def test_the_best_is_kept_beside_the_newest(measured):
    _, workdir, _ = measured
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "4", "5"]


@pytest.mark.parametrize(("name", "step"), [("newest", 5), ("best", 1), ("4", 4)])
def test_a_checkpoint_is_named_in_one_way(measured, meshes, name, step):
    config, workdir, _ = measured
    found, _, drafter = load_step(Run(config, workdir, meshes["one"]), name)
    assert found == step
    assert all((np.asarray(leaf) == step).all() for leaf in to_params(drafter).values())
    assert saved_config(workdir, name) == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("3", r"^--checkpoint=3: \S+/checkpoints has no such step, but 1, 4, 5; use one of them$"),
        ("last", "^--checkpoint=last: names no checkpoint; use newest, best or a step, e.g. 500$"),
        ("-1", "^--checkpoint=-1: names no checkpoint"),
    ],
)
def test_what_names_no_checkpoint_is_refused(measured, meshes, name, message):
    with pytest.raises(InputError, match=message):
        load_step(Run(measured[0], measured[1], meshes["one"]), name)


def test_a_best_that_is_damaged_or_never_was_is_refused(measured, meshes, tmp_path):
    workdir = shutil.copytree(measured[1], tmp_path / "run")
    (workdir / "checkpoints/1/params/manifest.ocdbt").write_bytes(b"")
    with pytest.raises(InputError, match=r"checkpoints/1.* put it back from a copy, or use another --checkpoint$"):
        load_drafter(workdir, meshes["one"], checkpoint="best")
    for step in (1, 4):
        shutil.rmtree(workdir / "checkpoints" / str(step))
    with pytest.raises(InputError, match=r"^--checkpoint=best: none of \S+ was measured on held-out prompts \(train.e"):
        load_drafter(workdir, meshes["one"], checkpoint="best")


@pytest.fixture
def run_config(config: Config, tiny_target: Path, tmp_path: Path) -> Config:
    """A tiny run whose target has a tokenizer, and two sets of held-out prompts."""
    for name in ("math", "chat"):
        lines = [json.dumps({"prompt": f"{name} {'and one ' * number}"}) for number in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    prompts = tuple(str(tmp_path / f"{name}.jsonl") for name in ("math", "chat"))
    return dataclasses.replace(
        config,
        target=TargetConfig(path=str(tiny_target)),
        data=dataclasses.replace(config.data, max_prompt_length=100, max_length=140),
        train=dataclasses.replace(config.train, evaluate_limit=2, evaluate_tokens=6, keep_checkpoints=1),
        mesh=MeshConfig(2, 2, 2),
        eval=EvalConfig(prompts=prompts, batch_size=4, max_new_tokens=40),
    )


@pytest.fixture
def fit(monkeypatch):
    """(config, workdir, fields of `train`) runs the train command here, on random samples; returns the config."""
    monkeypatch.setattr(train, "prepare_run", lambda run: None)
    # Its target has no chat template.
    files_alone = lambda config: check_prompt_files(config.eval.prompts, "eval.prompts")  # noqa: E731
    monkeypatch.setattr(train, "check_questions", files_alone)

    def run(config: Config, workdir: Path, **fields: Any) -> Config:
        config = resolve(dataclasses.replace(config, train=dataclasses.replace(config.train, **fields)))
        if not (workdir / "data").exists():
            tokens = np.random.default_rng(0).integers(0, 290, (9, 24)).astype(np.int32)
            mask = (np.arange(24) >= 3).astype(np.uint8)
            write_samples(workdir / "data", [Sample(row, mask, "random", i) for i, row in enumerate(tokens)])
        train.train(config, workdir)
        return config

    return run


def rows(workdir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock has measured."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


def one_more(state: TrainState, *_: Any) -> tuple[TrainState, StepMetrics]:
    """A step without a model: all parameters grow by 1."""
    params = {name: value + 1 for name, value in state.params.items()}
    ratios = {"tokens": Ratio(1.0, 1.0), "loss": Ratio(np.float32(2), np.float32(1))}
    return dataclasses.replace(state, step=state.step + 1, params=params), StepMetrics(ratios, FINITE, FINITE)


def test_a_run_keeps_the_best_of_what_it_measures(config, fit, meshes, tmp_path, monkeypatch, capsys):
    """Steps 3, 6 and 8 are measured, with the parameters that are then saved."""
    taus, seen = {3: 2.0, 6: 3.0, 8: 1.0}, []

    class Fake:
        def __init__(self, *_, **__):
            seen.append({})

        def measure(self, drafter: Any) -> Any:
            step = next(step for step in taus if step > max(seen[-1], default=first))
            seen[-1][step] = jax.device_get(to_params(drafter))
            return {"heldout/tau": taus[step]}, HeldOut(taus[step], "asked")

    monkeypatch.setattr(train, "HeldOutPrompts", Fake)
    monkeypatch.setattr("dspark_jax.run.make_mesh", lambda _: meshes["one"])
    compiled = types.SimpleNamespace(compile=lambda: one_more)
    monkeypatch.setattr(train, "make_train_step", lambda *_: types.SimpleNamespace(lower=lambda *_: compiled))
    config.eval.prompts, first = ("heldout.jsonl",), 0
    fit(config, tmp_path, evaluate_every=3, keep_checkpoints=1)
    found = rows(tmp_path)
    assert [row for row in found if "heldout/tau" in row] == [{"step": k, "heldout/tau": v} for k, v in taus.items()]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]
    for name in ("best", "8"):
        step, _, drafter = load_step(Run(config, tmp_path, meshes["one"]), name)
        for path, value in to_params(drafter).items():
            np.testing.assert_array_equal(seen[0][step][path], value)
    assert "/checkpoints/6 with tau 3.000; --checkpoint best takes it" in capsys.readouterr().err

    shutil.rmtree(tmp_path / "checkpoints/8")  # as if it had been killed
    first = 6
    fit(config, tmp_path, evaluate_every=3, keep_checkpoints=1)
    assert rows(tmp_path) == found and list(seen[1]) == [8]
    assert load_step(Run(config, tmp_path, meshes["one"]), "best")[0] == 6


@pytest.mark.slow
def test_a_run_that_measures_itself_is_the_same_run(run_config, fit, tmp_path):
    """On a mesh of eight devices; killed after its second checkpoint, too."""
    plain, gated = tmp_path / "plain", tmp_path / "gated"
    fit(run_config, plain)
    config = fit(run_config, gated, evaluate_every=3, keep_checkpoints=2)
    found = [row for row in rows(gated) if "heldout/tau" in row]
    assert [row["step"] for row in found] == [3, 6, 8]
    assert [row for row in rows(gated) if "loss" in row] == rows(plain)
    mesh = make_mesh(config.mesh)
    ours, theirs = (to_params(load_drafter(path, mesh)[1]) for path in (gated, plain))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)
    best = max(found, key=lambda row: (row["heldout/tau"], row["step"]))
    assert load_step(Run(config, gated, mesh), "best")[0] == best["step"]
    shutil.rmtree(gated / "checkpoints/8")
    before = rows(gated)
    fit(run_config, gated, evaluate_every=3, keep_checkpoints=2)
    assert rows(gated) == before


def test_what_cannot_be_measured_is_refused_before_anything_runs(config, run_config, fit, tmp_path):
    with pytest.raises(InputError, match="train.evaluate_every=4 is no multiple of train.checkpoint_every=3; what is"):
        fit(run_config, tmp_path / "run", evaluate_every=4)
    run_config.eval = dataclasses.replace(run_config.eval, prompts=())
    with pytest.raises(InputError, match="eval.prompts is empty"):
        fit(run_config, tmp_path / "run", evaluate_every=3)


def test_weights_and_biases_gets_the_rows_if_it_is_asked_for(tmp_path, monkeypatch):
    from dspark_jax.progress import MetricsWriter, check_wandb

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"train.wandb_project=mine: needs the package wandb; pip install wandb"):
        check_wandb("mine")
    check_wandb("")
    calls: list[Any] = []

    class Run:
        id = "abc"

        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finished")

    class Error(Exception):
        pass

    def init(**options: Any) -> Run:
        calls.append(options)
        if options["project"] == "closed":
            raise Error("no access\nto it")
        return Run()

    package = types.ModuleType("wandb")
    package.__dict__.update(init=init, Error=Error, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", package)
    check_wandb("mine")
    with MetricsWriter(tmp_path, wandb_project="mine", name="tiny") as writer:
        writer.write(1, {"loss": 2.0})
    expected = {"project": "mine", "name": "tiny", "dir": str(tmp_path), "resume": "allow"}
    assert calls == [{**expected, "id": None}, (1, {"loss": 2.0}), "finished"]
    with MetricsWriter(tmp_path, start=1, wandb_project="mine", name="tiny"):
        pass
    assert calls[3] == {**expected, "id": "abc"}  # the run there goes on
    with pytest.raises(
        InputError, match=r"^train.wandb_project=closed: no access to it; correct it, or leave it empty"
    ):
        MetricsWriter(tmp_path, wandb_project="closed")
