"""The train command: killed and continued bit for bit, on another mesh or hosts, out of numbers or disk, finished.

The runs that die do so in their own process (tiny_run.py), on one device; the others run here, on eight.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import train
from dspark_jax.config import Config, EvalConfig, InputError, MeshConfig, from_json, to_json
from dspark_jax.data.sources import Sample, write_samples
from dspark_jax.engine import generate
from dspark_jax.engine.models import Models
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.training.checkpoint import Checkpoints, load_drafter
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, state_layout, to_params
from tests.compiling import QUICKLY

ROOT = Path(__file__).resolve().parents[2]
CLOCK = ("tokens_per_second", "seconds_per_step")


def rows(workdir: Path) -> list[dict]:
    """metrics.jsonl without what a clock has measured."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


def assert_close(found: list[dict], expected: list[dict]) -> None:
    """Rows of runs that add in another order."""
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) == set(theirs)
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6, err_msg=name)


def steps_saved(workdir: Path) -> set[str]:
    return {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}


@pytest.fixture(scope="module")
def launch(tmp_path_factory, target_directory, make_tiny_config):
    """(workdir, moment) -> finished process of a run that dies at that moment, or at none."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "tiny.json").write_text(to_json(make_tiny_config(target_directory)))
    (folder / "tiny.py").write_text(
        "from pathlib import Path\nfrom dspark_jax.config import from_json\n\n"
        f"def get_config():\n    return from_json(Path({str(folder / 'tiny.json')!r}).read_text())\n"
    )
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": QUICKLY,  # one device, and little time for compiling
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run(workdir: Path, *moment: str, hosts: int = 1) -> Any:
        script = [sys.executable, str(Path(__file__).with_name("tiny_run.py")), str(folder / "tiny.py"), str(workdir)]
        jobs = [environment | (_slurm(host, hosts) if hosts > 1 else {}) for host in range(hosts)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [subprocess.Popen([*script, *moment], env=job, **pipes) for job in jobs]
        said = [process.communicate(timeout=600) for process in started]
        done = [
            subprocess.CompletedProcess(one.args, one.returncode, *pair)
            for one, pair in zip(started, said, strict=True)
        ]
        return done if hosts > 1 else done[0]

    return run


def _slurm(host: int, hosts: int) -> dict[str, str]:
    """SLURM's variables, which tell `jax.distributed.initialize` what it has to know, for hosts on this machine."""
    described = {"JOB_ID": os.getpid(), "STEP_NODELIST": "localhost", "NTASKS": hosts, "PROCID": host, "LOCALID": host}
    return {f"SLURM_{name}": str(value) for name, value in described.items()}


@pytest.fixture(scope="module")
def uninterrupted(launch, tmp_path_factory):
    """Working directory of a run from beginning to end."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = launch(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.fixture(scope="module")
def killed_once(launch, tmp_path_factory):
    """Working directory of a run that was killed at step 5, two steps after its checkpoint."""
    workdir = tmp_path_factory.mktemp("runs") / "killed"
    assert launch(workdir, "between").returncode == -9
    return workdir


def test_what_a_run_leaves_behind(uninterrupted, config):
    found = rows(uninterrupted)
    assert [row["step"] for row in found] == [2, 3, 4, 6, 8]  # every second step, and at checkpoints
    expected = {"loss", "ce", "l1", "tv", "confidence", "tau_expected", "learning_rate", "grad_norm", "supervised"}
    assert expected | {f"accept@{k}" for k in (1, 2, 3, 4)} <= set(found[0])
    assert np.isfinite([value for row in found for value in row.values()]).all()
    assert found[1]["learning_rate"] == pytest.approx(6e-4 * np.cos(np.pi * 2 / 16) ** 2)  # step 3: two updates before
    assert steps_saved(uninterrupted) == {"6", "8"}
    assert from_json((uninterrupted / "config.json").read_text()) == config
    assert list((uninterrupted / "tensorboard").iterdir())


def test_a_run_killed_three_times_ends_like_one_that_was_not(launch, uninterrupted, killed_once, tmp_path):
    workdir = shutil.copytree(killed_once, tmp_path / "run")
    assert steps_saved(workdir) <= {"3"}
    assert launch(workdir, "during").returncode == -9
    assert steps_saved(workdir) == {"3"}  # step 6 was written and had not got its name
    assert launch(workdir, "after").returncode == -9
    assert steps_saved(workdir) == {"3", "6"}
    done = launch(workdir)
    assert done.returncode == 0, done.stderr
    assert "continuing from step 6" in done.stderr
    assert rows(workdir) == rows(uninterrupted)
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["6", "8"]  # nothing half-written
    mesh = make_mesh(MeshConfig())
    ours, theirs = (to_params(load_drafter(path, mesh)[1]) for path in (workdir, uninterrupted))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


def test_a_run_told_to_stop_keeps_its_steps(launch, uninterrupted, tmp_path):
    """SIGTERM during step 4: a checkpoint between those that were due, and nothing else is different in the end."""
    workdir = tmp_path / "run"
    done = launch(workdir, "told")
    assert done.returncode == 143 and "checkpoints/4 is written, the same command continues" in done.stderr
    assert steps_saved(workdir) == {"3", "4"}
    done = launch(workdir)
    assert done.returncode == 0 and "continuing from step 4" in done.stderr, done.stderr
    assert rows(workdir) == rows(uninterrupted)  # step 4 ends a row anyway
    mesh = make_mesh(MeshConfig())
    ours, theirs = (to_params(load_drafter(path, mesh)[1]) for path in (workdir, uninterrupted))
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value)


@pytest.mark.slow
def test_two_hosts_train_and_decode_as_one(launch, uninterrupted, config, meshes, tmp_path):
    """Each with its own process and device, which are all that it can see; the other one holds half of everything."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted / "data", workdir / "data")
    for done in launch(workdir, "decode", hosts=2):
        assert done.returncode == 0, done.stderr
    assert_close(rows(workdir), rows(uninterrupted))
    one, other = (json.loads((workdir / f"answers{host}.json").read_text()) for host in range(2))
    mesh = meshes["one"]
    models = Models(load_target(config.target, mesh), load_drafter(workdir, mesh)[1])
    expected = [tokens.tolist() for tokens in generate(models, one["prompts"], max_new_tokens=one["budget"]).tokens]
    assert one == other and one["together"] == one["served"] == expected
    assert one["round_cost"] == pytest.approx(1.9) and np.all(np.asarray(one["tokens"]) == one["budget"])
    assert one["refused"].endswith("several hosts would not launch the same rounds; drive it with step()")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_status_2(launch, uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    before = rows(workdir)
    done = launch(workdir, "full")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith(("continuing", "training", "train "))]
    assert len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    assert "the disk is full" in errors[0] and "the checkpoint of step 6 is intact" in errors[0]
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["6"]
    assert launch(workdir).returncode == 0
    assert rows(workdir) == before


@pytest.fixture
def here(monkeypatch):
    """Runs the train command in this process, on all eight devices, with what `tiny_run` has prepared."""
    monkeypatch.setattr(train, "prepare_run", lambda run: None)

    def run(config: Config, workdir: Path) -> None:
        train.train(dataclasses.replace(config, mesh=MeshConfig(2, 2, 2)), workdir)

    return run


@pytest.mark.slow
def test_a_checkpoint_continues_on_another_mesh(here, config, uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    config.train.steps = 8
    here(config, workdir)
    assert_close(rows(workdir), rows(uninterrupted))


def test_a_loss_that_is_not_finite_stops_the_run(here, config, uninterrupted, tmp_path, capsys):
    """From step 6 on with a learning rate that step 7 survives and step 8 does not."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    config.optim.learning_rate = 1e38
    with pytest.raises(InputError) as error:
        here(config, workdir)
    message = str(error.value)
    assert "loss or gradient is not finite at step 8; the last good checkpoint is " in message
    assert "/checkpoints/6; lower optim.learning_rate=1e+38" in message and "\n" not in message
    assert steps_saved(workdir) == {"6"}
    assert rows(workdir)[-1]["step"] == 8 and rows(workdir)[-1]["loss"] is None


@pytest.mark.parametrize(
    ("features", "step", "of_target", "message"),
    [
        ("online", 1, True, "the target's features are not finite at step 1, though its weights are"),
        ("cache", 3, True, "the target's features on disk are not finite at step 3"),
        ("online", 1, False, "loss or gradient is not finite at step 1, before anything is learned"),
    ],
)
def test_what_is_not_finite_is_named(config, features, step, of_target, message):
    """A learning rate is to blame from the second step on only."""
    config.data.features, config.target.dtype, config.drafter.dtype = features, "bfloat16", "bfloat16"
    what, remedy = train.not_finite(config, step, of_target=of_target)
    assert what == message and "learning_rate" not in remedy
    assert ("dtype=bfloat16 to float32, or look at the data" in remedy) == (features == "online")


@pytest.mark.slow
def test_a_target_that_overflows_stops_the_run(here, config, tmp_path, uninterrupted, monkeypatch):
    """All of its weights are finite numbers."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted / "data", workdir / "data")
    load = train.load_target

    def overflowing(*args):
        target = load(*args)
        target.norm.set_value(jnp.full_like(target.norm[...], 3e38))
        return target

    monkeypatch.setattr(train, "load_target", overflowing)
    with pytest.raises(InputError) as error:
        here(config, workdir)
    assert str(error.value) == (
        "the target's features are not finite at step 1, though its weights are; there is no checkpoint yet; "
        "look at the data of that step"
    )


def test_a_finished_run_only_evaluates(here, config, uninterrupted, tmp_path, monkeypatch, capsys):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    evaluated = []
    module = types.SimpleNamespace(evaluate_run=lambda run: evaluated.append(run.workdir))
    monkeypatch.setitem(sys.modules, "dspark_jax.evaluate", module)
    monkeypatch.setattr(train, "check_questions", lambda config: None)
    config.train.evaluate = True
    before = rows(workdir)
    here(config, workdir)
    assert evaluated == [workdir] and rows(workdir) == before
    said = capsys.readouterr().err
    assert f"training is finished: {workdir}/checkpoints/8 is the last of 8 steps; raise train.steps to go on" in said
    assert "continuing" not in said


def test_held_out_prompts_that_cannot_be_asked_are_refused_before_training(config, tmp_path, tiny_target):
    """Hours before they would be."""
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 5000}) + "\n")
    target = dataclasses.replace(config.target, path=str(tiny_target))
    held_out = EvalConfig(prompts=(str(tmp_path / "long.jsonl"),))
    config = dataclasses.replace(config, target=target, eval=held_out, mesh=MeshConfig(2, 2, 2))
    for fields in ({"evaluate": True}, {"evaluate_every": 3}):
        config.train = dataclasses.replace(config.train, **{"evaluate": False, **fields})
        with pytest.raises(InputError, match=r"long.jsonl: none of its prompts can be asked \(1 "):
            train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "data").exists()


def test_fewer_steps_than_are_done_are_refused(here, config, uninterrupted, tmp_path):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    config.train.steps = 5
    with pytest.raises(InputError, match="checkpoints/8: 8 steps are done, and train.steps=5 asks for fewer; give at"):
        here(config, workdir)
    assert from_json((workdir / "config.json").read_text()).train.steps == 8


class Reached(Exception):
    """A step would be compiled now, of this state."""


def test_an_imported_drafter_is_trained_on(here, config, meshes, tmp_path, monkeypatch):
    """Checkpoint 0 gives its parameters to a run of any optimizer, batch size and order of the data."""
    rng = np.random.default_rng(0)
    layout = state_layout(abstract_drafter(config), make_optimizer(config.optim, 1), meshes["one"])
    filled = jax.tree.map(lambda leaf: jax.numpy.asarray(rng.uniform(1, 9, leaf.shape), leaf.dtype), layout)
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        checkpoints.save(0, filled, {})
    tokens = np.arange(12, dtype=np.int32)
    write_samples(tmp_path / "data", [Sample(tokens, np.ones(12, np.uint8), "set", i) for i in range(4)])

    def reached(state, *_):
        raise Reached(state)

    monkeypatch.setattr(train, "make_train_step", lambda *_: types.SimpleNamespace(lower=reached))
    config.optim.kind, config.train.batch_size, config.train.seed = "muon", 4, 9
    with pytest.raises(Reached) as found:
        here(config, tmp_path)
    (state,) = found.value.args
    for name, value in filled.params.items():
        np.testing.assert_array_equal(state.params[name], value, name)
    assert state.step == 0
    fresh = make_optimizer(config.optim, 1).init(state.params)
    for ours, theirs in zip(jax.tree.leaves(state.optimizer), jax.tree.leaves(fresh), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    config.train.init_from = str(tmp_path / "other")
    with pytest.raises(InputError, match="checkpoints/0: train.init_from was '', now .*/other'; resume with the old"):
        here(config, tmp_path)
