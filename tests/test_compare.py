"""The comparison: what is planned and shared, resuming, a drafter that fails, numbers, and one real run end to end."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.compare import compare, make_plan, run_module
from dspark_jax.config import (
    CompareConfig,
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    InputError,
    TargetConfig,
    TrainConfig,
    from_json,
    resolve,
)
from dspark_jax.evaluation.acceptance import Counts
from dspark_jax.evaluation.comparison import gain, standing, table
from dspark_jax.evaluation.rounds import PLAIN

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path) -> Config:
    prompts = tmp_path / "sums.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"add {i}"}) + "\n" for i in range(6)))
    return resolve(
        Config(
            name="tiny",
            target=TargetConfig(path=str(tiny_target)),
            drafter=DrafterConfig(num_layers=1, block_size=3, target_layer_ids=(0,), mask_token_id=319, markov_rank=8),
            data=DataConfig(prompts=(str(prompts),), max_prompt_length=64, max_length=96, min_loss_tokens=2),
            train=TrainConfig(steps=2, batch_size=8, num_anchors=4, log_every=1, vocab_chunk=64),
            eval=EvalConfig(
                prompts=(str(prompts),), max_new_tokens=8, batch_size=4, temperatures=(1.0,), speed_prompts=1,
                speed_threads=1, bootstrap=50,
            ),
            compare=CompareConfig(
                drafters=("dspark", "dflash", "eagle3", "mtp"),
                depths=(1, 2),
                lengths=(3, 4),
                length_drafters=("dflash",),
            ),
        )
    )  # fmt: skip


TAU = {"dspark": 4, "dflash": 3, "eagle3": 2, "mtp": 1}


class Fake:
    """In the place of processes: writes what they would, and keeps what was asked for."""

    def __init__(self, broken: str = "", accepted: int = 0):
        self.calls: list[tuple[str, str]] = []
        self.broken = broken

    def __call__(self, arguments: Any, environment: Any) -> str | None:
        module = arguments[0].removeprefix("dspark_jax.")
        if module == "evaluation.rounds":
            job = json.loads(Path(arguments[1]).read_text())
            self.calls.append((job["task"], ",".join(job["runs"])))
            if job["task"] == "times":
                assert environment == {"NPROC": "1", "JAX_PLATFORMS": "cpu"}
                one = {"seconds": [0.5], "rounds": [100], "tokens": [200]}
                Path(job["out"]).write_text(json.dumps({name: one for name in [*job["runs"], PLAIN]}))
            else:
                kind = next(iter(job["runs"])).split("-")[0]
                block = from_json(next(iter(job["runs"].values()))["config"]).drafter.block_size
                rounds = np.array([10, 20, 10, 20])
                counts = Counts(TAU[kind] * rounds, rounds, *(np.ones((4, block), int) * n for n in (6, 8, 10)))
                np.savez(job["out"], prompt_sets=np.array(["a", "a", "b", "b"]), **vars(counts))
            return None
        workdir = Path(arguments[arguments.index("--workdir") + 1])
        self.calls.append((module, workdir.name if module == "train" else ""))
        if module == "prepare":
            (workdir / "data").mkdir(exist_ok=True)
        elif module == "train":
            assert (workdir / "data").resolve() == (workdir.parents[1] / "data").resolve()
        return "it fell over" if workdir.name == self.broken else None


def test_a_plan_shares_runs_of_equal_settings(config: Config) -> None:
    plan = make_plan(config, "main,depth,length")
    assert list(plan.runs) == [
        "dspark", "dflash", "eagle3", "mtp", "dspark-num_layers2", "dflash-num_layers2", "dflash-block_size4",
    ]  # fmt: skip
    assert {(p.kind, p.value, p.run) for p in plan.of("length")} == {
        ("dflash", 3, "dflash"), ("dflash", 4, "dflash-block_size4"),
    }  # fmt: skip
    assert plan.runs["dflash-num_layers2"].drafter.num_layers == 2
    assert plan.runs["mtp"].drafter.target_layer_ids == (1,) and plan.runs["eagle3"].loss.soft_ce == 1.0
    for sub in plan.runs.values():
        assert sub.data == config.data and sub.optim == config.optim and not sub.train.evaluate
        assert sub.train.steps == config.train.steps
    assert list(make_plan(config, "length").runs) == ["dflash-block_size3", "dflash-block_size4"]


def test_one_that_fails_loses_nothing_and_only_it_is_repeated(config: Config, tmp_path: Path, capsys: Any) -> None:
    workdir, fake = tmp_path / "run", Fake(broken="dflash")
    with pytest.raises(SystemExit) as ended:
        compare(config, workdir, studies="main", step=fake)
    assert ended.value.code == 1
    report = json.loads((workdir / "compare.json").read_text())
    assert list(report["drafters"]) == ["dspark", "eagle3", "mtp"]
    assert report["failures"] == {"dflash": "it fell over"}
    assert "dflash" in capsys.readouterr().out
    assert fake.calls[-1] == ("times", "dspark,eagle3,mtp")

    again = Fake()
    compare(config, workdir, studies="main", step=again)
    assert again.calls == [("prepare", ""), ("train", "dflash"), ("rounds", "dflash"), ("times", "dspark,dflash,eagle3,mtp")]  # fmt: skip # noqa: E501
    report = json.loads((workdir / "compare.json").read_text())
    assert list(report["drafters"]) == ["dspark", "dflash", "eagle3", "mtp"] and not report["failures"]
    entry = report["drafters"]["dspark"]
    assert entry["tau"] == 4 and entry["gain_over_dflash"] == pytest.approx(1 / 3)
    assert entry["gain_over_eagle3"] == pytest.approx(1) and "gain_over_dflash" not in report["drafters"]["dflash"]
    assert entry["round_ms"] == pytest.approx(5.0) and entry["speedup"] == 1.0
    names = {"conditional_acceptance_a", "conditional_acceptance_b", "round_time"}
    assert {path.stem for path in (workdir / "compare").glob("*.png")} == names

    third = Fake()
    compare(config, workdir, studies="main", step=third)
    assert third.calls == [("prepare", "")]
    fewer = dataclasses.replace(config, compare=dataclasses.replace(config.compare, drafters=("dspark", "mtp")))
    compare(fewer, workdir, studies="main", step=third)
    assert third.calls[1:] == [("prepare", ""), ("times", "dspark,mtp")]
    other = dataclasses.replace(config, eval=dataclasses.replace(config.eval, max_new_tokens=9))
    compare(other, workdir, studies="main", step=third)
    assert [name for task, name in third.calls if task == "rounds"] == ["dspark", "dflash", "eagle3", "mtp"]


def test_a_run_trained_in_another_way_is_not_continued(config: Config, tmp_path: Path) -> None:
    fake = Fake()
    only = dataclasses.replace(config, compare=CompareConfig(drafters=("dflash",)))
    compare(only, tmp_path / "run", studies="main", step=fake)
    other = dataclasses.replace(only, train=dataclasses.replace(only.train, steps=3))
    count = len(fake.calls)
    with pytest.raises(InputError, match=r"drafters/dflash: train.steps was 2, now 3; compare with the old value"):
        compare(other, tmp_path / "run", studies="main", step=fake)
    assert len(fake.calls) == count


def test_studies_are_tables_and_figures(config: Config, tmp_path: Path, capsys: Any) -> None:
    workdir = tmp_path / "run"
    compare(config, workdir, studies="depth,length", step=Fake())
    report = json.loads((workdir / "compare.json").read_text())
    points = [(p["drafter"], p["depth"], p["tau"]) for p in report["studies"]["depth"]]
    assert points == [("dspark", 1, 4), ("dflash", 1, 3), ("dspark", 2, 4), ("dflash", 2, 3)]
    assert {path.stem for path in (workdir / "compare").glob("*.png")} == {"depth", "length"}
    printed = capsys.readouterr().out
    assert "depth" in printed and "4.000 (4.000, 4.000)" in printed


def test_gains_resample_the_prompts_of_both_alike() -> None:
    """One drafter accepts a fifth more on every prompt: the gain has no spread, though tau has."""
    rng = np.random.default_rng(0)
    rounds = rng.integers(20, 200, 30)
    block = np.ones((30, 2), int)
    names = ["a"] * 20 + ["b"] * 10
    base = rng.integers(100, 500, 30) * 5
    one, other = (standing(names, Counts(t, rounds, block, block, block), 200, 3) for t in (base // 5 * 6, base))
    value, bounds = gain(one, other)
    assert value == pytest.approx(0.2)
    np.testing.assert_allclose(bounds, 0.2, rtol=1e-9)
    assert np.ptp(one.interval) > 0.1
    expected = np.mean([base[:20].sum() / rounds[:20].sum(), base[20:].sum() / rounds[20:].sum()])
    assert other.tau == pytest.approx(expected)


def test_the_table_shows_what_is_missing() -> None:
    entry = {"tau": None, "tau_ci95": [None, None], "prompt_sets": {"a": {"tau": None}}}
    printed = table({"dspark": entry}, {"mtp": "no memory"}, "title")
    assert "mtp" in printed.splitlines()[-1] and "failed: no memory" in printed
    assert "NaN" not in printed and "None" not in printed


@pytest.mark.parametrize(
    ("studies", "changes", "message"),
    [
        ("main,breadth", {}, "'breadth' is unknown; use some of: main,depth,length"),
        ("", {}, "--studies is empty"),
        ("main", {"compare": CompareConfig(drafters=("dspark", "medusa"))}, "drafter kind 'medusa' is unknown"),
        ("depth", {"compare": CompareConfig(depth_drafters=("dspark",), depths=(0,))}, "num_layers=0 must be positive"),
    ],
)
def test_bad_input(config: Config, studies: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(dataclasses.replace(config, **changes), studies)


def test_the_last_words_of_a_process(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "dying.py").write_text("import sys\nprint('error: no bread', file=sys.stderr)\nsys.exit(2)\n")
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert run_module(["dying"], {}) == "no bread (dying, status 2)"
    assert run_module(["killed"], {}) == "killed by signal 9, perhaps for its memory (killed)"


def test_end_to_end(config: Config, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """Real processes, untouched by the eight devices of the tests: one drafter from prompts to the table."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    only = dataclasses.replace(config, compare=CompareConfig(drafters=("eagle3",)))
    compare(only, tmp_path / "run", studies="main")
    report = json.loads((tmp_path / "run" / "compare.json").read_text())
    entry = report["drafters"]["eagle3"]
    assert 1 <= entry["tau"] <= 4 and entry["round_ms"] > 0 and report["plain"]["round_ms"] > 0
    assert len(entry["prompt_sets"]["sums"]["conditional_acceptance"]) == 3
    assert "macro average" in capfd.readouterr().out
