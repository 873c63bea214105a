"""The comparison: what is planned and shared, resuming, one that fails, being stopped, and one real run end to end."""

import dataclasses
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.attached import run_module
from dspark_jax.compare import compare
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
from dspark_jax.evaluation.comparison_plan import make_plan
from dspark_jax.evaluation.comparison_table import method
from dspark_jax.evaluation.rounds import PLAIN
from dspark_jax.kinds import VARIANTS, Variant
from tests.compiling import QUICKLY

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


@pytest.fixture
def undrawn(monkeypatch: Any) -> None:
    """Without figures, which take longer than everything else here."""
    monkeypatch.setattr("dspark_jax.compare._draw", lambda *everything: None)


TAU = {"dspark": 4, "dflash": 3, "eagle3": 2, "mtp": 1}


class Fake:
    """In the place of processes: writes what they would, and keeps what was asked for."""

    def __init__(self, broken: str = "", untimed: str = "", fingerprint: str = "1234"):
        self.calls: list[tuple[str, str]] = []
        self.broken, self.untimed, self.fingerprint = broken, untimed, fingerprint

    def __call__(self, arguments: Any, environment: Any) -> str | None:
        module = arguments[0].removeprefix("dspark_jax.")
        if module == "evaluation.rounds":
            job = json.loads(Path(arguments[1]).read_text())
            self.calls.append((job["task"], ",".join(job["runs"])))
            if job["task"] == "times":
                assert environment == {"NPROC": "1"}
                one = {"seconds": [0.5], "rounds": [100], "tokens": [200]}
                found = {name: one for name in [*job["runs"], PLAIN]} | {
                    name: {"error": "no checkpoint here"} for name in job["runs"] if name == self.untimed
                }
                Path(job["out"]).write_text(json.dumps(found))
            else:
                kind = next(iter(job["runs"])).split("-")[0]
                trained = from_json(next(iter(job["runs"].values()))["config"])
                rounds, tau = np.array([10, 20, 10, 20]), TAU.get(kind, 2) + trained.train.seed
                rates = (np.ones((4, trained.drafter.block_size), int) * n for n in (6, 8, 10))
                counts = Counts(tau * rounds, rounds, *rates)
                np.savez(job["out"], prompt_sets=np.array(["a", "a", "b", "b"]), **vars(counts))
            return None
        workdir = Path(arguments[arguments.index("--workdir") + 1])
        self.calls.append((module, workdir.name if module == "train" else ""))
        if module == "prepare":
            (workdir / "data").mkdir(exist_ok=True)
            (workdir / "data" / "report.json").write_text(json.dumps({"fingerprint": self.fingerprint}))
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
    assert list(make_plan(config, "length").runs) == ["dflash", "dflash-block_size4"]
    assert list(make_plan(config, "depth").runs) == ["dspark", "dflash", "dspark-num_layers2", "dflash-num_layers2"]


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
    assert third.calls[1:] == [("prepare", "")]  # their times are there, with those of others


@pytest.mark.usefixtures("undrawn")
def test_what_is_measured_again(config: Config, tmp_path: Path) -> None:
    """Rounds and times, each when something changed that it depends on; nothing is trained in another way."""
    workdir, heldout = tmp_path / "run", tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps({"prompt": "one"}) + "\n")
    config = dataclasses.replace(
        config,
        compare=CompareConfig(drafters=("dflash",)),
        eval=dataclasses.replace(config.eval, prompts=(str(heldout),)),
    )

    def measured(**changes: Any) -> list[str]:
        fake = Fake()
        compare(
            dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes)),
            workdir,
            studies="main",
            step=fake,
        )
        return [task for task, _ in fake.calls if task in ("rounds", "times")]

    assert measured() == ["rounds", "times"]
    assert measured() == []
    assert measured(bootstrap=60) == []
    assert measured(speed_prompts=2) == ["times"]
    assert measured(max_new_tokens=9) == ["rounds", "times"]
    heldout.write_text(json.dumps({"prompt": "two"}) + "\n")
    assert measured(max_new_tokens=9) == ["rounds", "times"]
    assert measured(max_new_tokens=9) == []


@pytest.mark.usefixtures("undrawn")
def test_speed_is_not_measured_where_no_prompts_are_for_it(config: Config, tmp_path: Path, capsys: Any) -> None:
    untimed, fake = dataclasses.replace(config, eval=dataclasses.replace(config.eval, speed_prompts=0)), Fake()
    compare(untimed, tmp_path / "run", studies="main", step=fake)
    assert "times" not in [task for task, _ in fake.calls]
    report = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert len(report["drafters"]) == 4 and not report["failures"] and report["plain"] is None
    assert not any("round_ms" in entry for entry in report["drafters"].values())
    assert "4.000 (4.000, 4.000)" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_one_that_cannot_be_timed_is_named(config: Config, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        compare(config, tmp_path / "run", studies="main", step=Fake(untimed="mtp"))
    report = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert report["failures"] == {"time per round of mtp": "no checkpoint here"}
    assert "round_ms" in report["drafters"]["dspark"] and "round_ms" not in report["drafters"]["mtp"]


def test_seeds_continue_a_comparison_of_one_seed(config: Config, tmp_path: Path, capsys: Any) -> None:
    """All drafters with one seed, then with the next; figures are means over seeds, times are of the first one's."""
    workdir, kinds = tmp_path / "run", ("dspark", "dflash")
    only = dataclasses.replace(config, compare=CompareConfig(drafters=kinds))
    compare(only, workdir, studies="main", step=Fake())
    before = (workdir / "compare.json").read_text()
    assert "seed" not in before and "over_dspark" not in before and "parameters" not in before
    assert not (workdir / "compare" / "accepted_length.png").exists() and "seed" not in capsys.readouterr().out

    with pytest.raises(SystemExit):
        compare(only, workdir, studies="main", seeds=3, step=Fake(broken="dflash-seed1"))
    again = Fake()
    compare(only, workdir, studies="main", seeds=3, step=again)
    assert again.calls == [("prepare", ""), ("train", "dflash-seed1"), ("rounds", "dflash-seed1")]
    seeds = [from_json((workdir / "drafters" / f"dflash{end}" / "settings.json").read_text()).train.seed for end in ("", "-seed1", "-seed2")]  # fmt: skip # noqa: E501
    assert seeds == [0, 1, 2]

    report = json.loads((workdir / "compare.json").read_text())
    entry = report["drafters"]["dflash"]
    assert report["seeds"] == 3 and entry["tau"] == 4 and entry["tau_by_seed"] == {"0": 3, "1": 4, "2": 5}
    assert entry["prompt_sets"]["a"]["tau_by_seed"] == {"0": 3, "1": 4, "2": 5}
    assert entry["gain_over_dspark"] == pytest.approx(4 / 5 - 1) and entry["round_ms"] == pytest.approx(5.0)
    low, high = entry["gain_over_dspark_ci95"]
    assert -1 / 4 - 1e-9 <= low < 4 / 5 - 1 < high <= -1 / 6 + 1e-9  # as far as single seeds, which are paired
    assert entry["parameters"] < report["drafters"]["dspark"]["parameters"]
    printed = capsys.readouterr()
    assert "2 of the 3 seeds" in printed.out and "over dspark" in printed.out
    assert printed.out.rstrip().endswith(report["method"][-1])
    alone = method(3, only, [report["drafters"]["dspark"]])  # without a column of gains no word of them
    assert [line for line in report["method"] if line not in alone] == [report["method"][-2]]
    assert "compare: 6 trainings (2 drafters x 3 seeds), 5 of them finished" in printed.err
    assert json.loads((workdir / "compare" / "accepted_length.json").read_text())["dspark"]["tau"] == 5

    compare(only, workdir, studies="main", step=again)  # of one seed it says what it said
    assert (workdir / "compare.json").read_text() == before


@pytest.mark.usefixtures("undrawn")
def test_one_that_was_killed_goes_on_run_by_run(config: Config, tmp_path: Path) -> None:
    only, fake = dataclasses.replace(config, compare=CompareConfig(drafters=("dspark", "dflash"))), Fake()

    def killed(arguments: Any, environment: Any) -> str | None:
        if arguments[0] == "dspark_jax.train" and arguments[-1].endswith("dflash-seed1"):
            raise SystemExit(143)
        return fake(arguments, environment)

    with pytest.raises(SystemExit):
        compare(only, tmp_path / "run", studies="main", seeds=2, step=killed)
    report = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert [len(report["drafters"][kind]["tau_by_seed"]) for kind in ("dspark", "dflash")] == [2, 1]
    again = Fake()
    compare(only, tmp_path / "run", studies="main", seeds=2, step=again)
    assert again.calls == [
        ("prepare", ""), ("train", "dflash-seed1"), ("rounds", "dflash-seed1"), ("times", "dspark,dflash"),
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_a_seed_that_failed_is_left_out_and_named(config: Config, tmp_path: Path, capsys: Any) -> None:
    only, fake = dataclasses.replace(config, compare=CompareConfig(drafters=("dspark", "mtp"))), Fake(broken="mtp")
    with pytest.raises(SystemExit):
        compare(only, tmp_path / "run", studies="main", seeds=2, step=fake)
    assert fake.calls[-1] == ("times", "dspark,mtp-seed1")  # the first one of each that can be timed
    report = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert report["drafters"]["mtp"]["tau_by_seed"] == {"1": 2} and "round_ms" in report["drafters"]["mtp"]
    assert report["drafters"]["mtp"]["gain_over_dspark"] == pytest.approx(2 / 5 - 1)  # of the seed that both have
    assert "mtp       failed: it fell over" in capsys.readouterr().out


@pytest.mark.usefixtures("undrawn")
def test_a_further_drafter_is_one_more_name(config: Config, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(VARIANTS, "deeper", Variant("dspark with more layers", drafter={"num_layers": 2}))
    kinds = ("dspark", "fill_in", "dflash2", "deeper")
    more = dataclasses.replace(config, compare=CompareConfig(drafters=kinds))
    compare(more, tmp_path / "run", studies="main", step=Fake())
    assert tuple(json.loads((tmp_path / "run" / "compare.json").read_text())["drafters"]) == kinds
    plan = make_plan(more, "main", 2)
    assert list(plan.runs) == [*kinds, *(f"{kind}-seed1" for kind in kinds)]
    assert plan.runs["deeper-seed1"].drafter.num_layers == 2 and plan.runs["fill_in"].drafter.block_rows == 4
    assert {"dflash2", "fill_in"} <= set(CompareConfig().drafters)


@pytest.mark.usefixtures("undrawn")
def test_seeds_of_one_drafter_have_answered_the_same_prompts(config: Config, tmp_path: Path) -> None:
    """A comparison that ends while it measures again holds no figures of other prompts."""
    only = dataclasses.replace(config, compare=CompareConfig(drafters=("dspark",)))
    compare(only, tmp_path / "run", studies="main", seeds=2, step=Fake())
    other = dataclasses.replace(only, eval=dataclasses.replace(only.eval, limit=3))
    with pytest.raises(SystemExit):
        compare(other, tmp_path / "run", studies="main", seeds=2, step=Fake(broken="dspark-seed1"))
    report = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert report["drafters"]["dspark"]["tau_by_seed"] == {"0": 4}


@pytest.mark.usefixtures("undrawn")
def test_a_study_finds_the_runs_of_another(config: Config, tmp_path: Path) -> None:
    fake, again = Fake(), Fake()
    compare(config, tmp_path / "run", studies="depth", step=fake)
    compare(config, tmp_path / "run", studies="main", step=again)
    assert [name for task, name in again.calls if task == "train"] == ["eagle3", "mtp"]
    report = json.loads((tmp_path / "run" / "compare.json").read_text())
    assert len(report["studies"]["depth"]) == 4 and len(report["drafters"]) == 4
    assert list(report["studies"]) == ["depth"]  # of the lengths nobody has asked for there are but the main runs
    assert all("round_ms" in point for point in report["studies"]["depth"])


@pytest.mark.usefixtures("undrawn")
def test_a_run_trained_in_another_way_is_not_continued(config: Config, tmp_path: Path) -> None:
    workdir, fake = tmp_path / "run", Fake()
    only = dataclasses.replace(config, compare=CompareConfig(drafters=("dflash",)))
    compare(only, workdir, studies="main", step=fake)
    count = len(fake.calls)

    def refused(message: str, **train: Any) -> None:
        with pytest.raises(InputError, match=message):
            other = dataclasses.replace(only, train=dataclasses.replace(only.train, **train))
            compare(other, workdir, studies="main", step=fake)

    refused("drafters/dflash: train.steps was 2, now 3; compare with the old value", steps=3)
    prompts = Path(config.data.prompts[0])
    before = prompts.read_text()
    prompts.write_text(before + json.dumps({"prompt": "one more"}) + "\n")
    refused(r"drafters/dflash: the content of data.prompts changed since it was trained \(sums\); compare with the old")
    origin = workdir / "drafters" / "dflash" / "origin.json"
    kept = json.loads(origin.read_text())
    origin.unlink()  # as older comparisons have none: the report of the data knows as much
    report = {"fingerprint": "1234", "inputs": {"prompts": kept["data.prompts"]}}
    (workdir / "data" / "report.json").write_text(json.dumps(report))
    refused("the content of data.prompts changed")
    prompts.write_text(before)
    assert len(fake.calls) == count
    free = TrainConfig(log_every=5, keep_checkpoints=1, checkpoint_every=9, vocab_chunk=32, accumulate=2)
    free = dataclasses.replace(free, steps=2, batch_size=8, num_anchors=4)
    compare(dataclasses.replace(only, train=free), workdir, studies="main", step=fake)
    assert fake.calls[count:] == [("prepare", "")] and json.loads(origin.read_text()) == kept
    fake.fingerprint = "5678"
    refused("the prepared data .* changed since it was trained")


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_a_checkpoint_may_become_another(config: Config, tmp_path: Path) -> None:
    only = dataclasses.replace(config, compare=CompareConfig(drafters=("dflash",)))
    with pytest.raises(SystemExit):
        compare(only, tmp_path / "run", studies="main", step=Fake(broken="dflash"))
    again = Fake()
    other = dataclasses.replace(only, train=dataclasses.replace(only.train, steps=3))
    compare(other, tmp_path / "run", studies="main", step=again)
    assert ("train", "dflash") in again.calls


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ()}, "eval.prompts is empty"),
        ({"prompts": ("gone.jsonl",)}, "gone.jsonl: cannot be read"),
        ({"prompts": ("a/x.jsonl", "b/x.jsonl")}, "eval.prompts has two files named x"),
        ({"temperatures": ()}, "eval.temperatures is empty"),
    ],
)
def test_what_cannot_be_measured_is_not_trained(
    config: Config, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    fake = Fake()
    with pytest.raises(InputError, match=message):
        compare(dataclasses.replace(config, eval=dataclasses.replace(config.eval, **changes)), tmp_path, step=fake)
    assert not fake.calls


def test_studies_are_tables_and_figures(config: Config, tmp_path: Path, capsys: Any) -> None:
    workdir = tmp_path / "run"
    compare(config, workdir, studies="depth,length", step=Fake())
    report = json.loads((workdir / "compare.json").read_text())
    points = [(p["drafter"], p["depth"], p["tau"]) for p in report["studies"]["depth"]]
    assert points == [("dspark", 1, 4), ("dflash", 1, 3), ("dspark", 2, 4), ("dflash", 2, 3)]
    assert {path.stem for path in (workdir / "compare").glob("*.png")} == {"depth", "length"}
    printed = capsys.readouterr().out
    assert "depth" in printed and "4.000 (4.000, 4.000)" in printed
    first = report["studies"]["depth"][0]
    assert first["gain_over_dflash"] == pytest.approx(1 / 3) and first["gain_over_dflash_ci95"][0] == pytest.approx(
        1 / 3
    )
    assert "gain_over_dflash" not in report["studies"]["depth"][1]
    line = next(line for line in printed.splitlines() if line.startswith("2         dspark"))
    assert "dspark over dflash, depth 1 -> 2: +0.0% (+0.0%, +0.0%)" in printed
    assert line.split()[2:] == ["4.000", "(4.000,", "4.000)", "+33.3%", "(+33.3%,", "+33.3%)", "5.00", "1.00"]


def test_figures_come_after_the_table(config: Config, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("dspark_jax.compare._draw", lambda *everything: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compare(config, tmp_path / "run", studies="main", step=Fake())
    assert "4.000 (4.000, 4.000)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("studies", "changes", "message"),
    [
        ("main,breadth", {}, "'breadth' is unknown; use some of: main,depth,length"),
        ("", {}, "--studies is empty"),
        ("main", {"compare": CompareConfig(drafters=("dspark", "medusa"))}, "drafter kind 'medusa' is unknown"),
        (
            "main",
            {"compare": CompareConfig(drafters=())},
            "compare.drafters is empty; name at least one, or leave 'main'",
        ),
        ("main", {"compare": CompareConfig(drafters=("dspark", "dspark"))}, "compare.drafters=.* one of them twice"),
        ("length", {"compare": CompareConfig(lengths=())}, "compare.lengths is empty"),
        ("depth", {"compare": CompareConfig(depths=(1, 1))}, r"compare.depths=\(1, 1\) has one of them twice"),
        ("depth", {"compare": CompareConfig(depth_drafters=("dspark",), depths=(0,))}, "num_layers=0 must be positive"),
        ("depth", {"compare": CompareConfig(depth_drafters=("eagle3",))}, "depth_drafters has 'eagle3', which always"),
        ("length", {"compare": CompareConfig(length_drafters=("mtp",))}, "length_drafters has 'mtp', which always"),
    ],
)
def test_bad_input(config: Config, studies: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(dataclasses.replace(config, **changes), studies)


def test_at_least_one_seed(config: Config) -> None:
    with pytest.raises(InputError, match="--seeds=0: at least one training of every drafter is needed"):
        make_plan(config, "main", 0)


def test_who_is_told_to_stop_waits_for_the_training(config: Config, tmp_path: Path, monkeypatch: Any) -> None:
    """SIGTERM reaches the process that trains, which takes its time to write a checkpoint."""
    (tmp_path / "slow.py").write_text(
        "import os, pathlib, signal, sys, time\n"
        "def stop(number, frame):\n"
        "    time.sleep(0.3)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # should compare not take it, pytest survives
    try:
        with pytest.raises(SystemExit) as ended:
            compare(config, tmp_path / "run", step=lambda arguments, environment: run_module(["slow"], {}))
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 143 and (tmp_path / "saved").exists()


def test_several_hosts_are_refused(monkeypatch: Any, capsys: Any) -> None:
    argv = ["compare", "--config", str(ROOT / "configs" / "compare_quickstart.py"), "--distributed"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.delitem(sys.modules, "dspark_jax.compare")
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("dspark_jax.compare", run_name="__main__", alter_sys=True)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: --distributed: compare runs on one host; leave the flag out\n"


@pytest.mark.slow
def test_end_to_end(config: Config, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """Real processes, untouched by the eight devices of the tests: one drafter from prompts to the table."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("XLA_FLAGS", QUICKLY)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    only = dataclasses.replace(config, compare=CompareConfig(drafters=("eagle3",)))
    compare(only, tmp_path / "run", studies="main", seeds=2)
    report = json.loads((tmp_path / "run" / "compare.json").read_text())
    entry = report["drafters"]["eagle3"]
    assert 1 <= entry["tau"] <= 4 and entry["round_ms"] > 0 and report["plain"]["round_ms"] > 0
    assert len(entry["prompt_sets"]["sums"]["conditional_acceptance"]) == 3
    assert list(entry["tau_by_seed"]) == ["0", "1"] and entry["tau"] == pytest.approx(
        np.mean(list(entry["tau_by_seed"].values()))
    )
    rows = [
        json.loads((tmp_path / "run" / "drafters" / name / "metrics.jsonl").read_text().splitlines()[0])
        for name in ("eagle3", "eagle3-seed1")
    ]
    assert rows[0]["loss"] != rows[1]["loss"]  # other weights, other order
    printed = capfd.readouterr()
    assert "macro average" in printed.out and "1 of them finished; one takes about" in printed.err
