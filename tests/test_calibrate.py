"""End to end: a random drafter for the tiny target is decoded with and calibrated."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from dspark_jax import command
from dspark_jax.calibrate import FEW, _define, _warn_if_few, calibrate
from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    InputError,
    MeshConfig,
    TargetConfig,
    resolve,
)
from dspark_jax.evaluation.calibration import GRID
from dspark_jax.sharding import make_mesh

BLOCK = 3
ONE_DEVICE = MeshConfig(1, 1, 1)


class Run(NamedTuple):
    config: Config
    workdir: Path
    mesh: Any
    written: dict[float, dict[str, Any]]
    printed: str


def prompts(path: Path, start: int, count: int) -> str:
    path.write_text("".join(json.dumps({"prompt": f"say {start + i}", "id": i}) + "\n" for i in range(count)))
    return str(path)


@pytest.fixture(scope="module")
def run(save_untrained: Any, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("calibrate")
    heldout, train = prompts(folder / "heldout.jsonl", 0, 6), prompts(folder / "train.jsonl", 20, 9)
    drafter = DrafterConfig(num_layers=1, block_size=BLOCK, target_layer_ids=(0,), mask_token_id=319, markov_rank=8)
    config = resolve(
        Config(
            name="tiny",
            target=TargetConfig(path=str(tiny_target)),
            drafter=drafter,
            data=DataConfig(prompts=(train,), max_prompt_length=100, max_length=140),
            mesh=ONE_DEVICE,
            eval=EvalConfig(prompts=(heldout,), limit=6, batch_size=4, max_new_tokens=10, temperatures=(0.5,)),
        )
    )
    mesh, workdir = make_mesh(ONE_DEVICE, jax.devices()[:1]), folder / "run"
    save_untrained(config, workdir, mesh)
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        written = calibrate(config, workdir, mesh=mesh, temperatures=["0.5", "1.0"])
    return Run(config, workdir, mesh, written, "\n".join(printed))


def test_the_files_have_the_layout_that_sglang_reads(run: Run):
    assert list(run.written) == [0.5, 1.0]
    for temperature, name in ((1.0, "calibration.json"), (0.5, "calibration_t0.5.json")):
        content = json.loads((run.workdir / name).read_text())
        assert content == run.written[temperature]
        sglang = {"temperatures", "dataset", "num_samples", "ece_before", "ece_after"}
        assert set(content) == sglang | {"bias", "temperatures_with_bias", "step"} and np.isfinite(content["bias"])
        assert content["step"] == 1  # of `save_untrained`
        assert len(content["temperatures"]) == len(content["temperatures_with_bias"]) == BLOCK
        assert all(np.isclose(GRID, value).any() for value in content["temperatures"])
        assert content["dataset"] == "heldout" and content["num_samples"] > 0
        for key in ("ece_before", "ece_after"):
            assert len(content[key]) == BLOCK and all(0 <= value <= 1 for value in content[key])


def test_too_few_rounds_are_said(run: Run, capsys: Any):
    rounds = run.written[1.0]["num_samples"]
    assert rounds < FEW
    warning = f"calibrate: WARNING: fitted on {rounds} rounds only, so the temperatures are mostly chance; name more"
    assert run.printed.count(warning) == 1
    for count in (FEW, FEW - 1):
        _warn_if_few(SimpleNamespace(accepted=range(count)), "train")
        assert ("prompts in data.prompts or raise eval.limit" in capsys.readouterr().err) == (count < FEW)


def test_what_was_measured_is_written_and_printed(run: Run):
    for suffix, title in (("", "tiny, temperature 1"), ("_t0.5", "tiny, temperature 0.5")):
        data = json.loads((run.workdir / f"eval/calibration{suffix}.json").read_text())
        assert f"{title}: fitted on {data['fitted_rounds']} rounds" in run.printed
        written = run.written[float(title.split()[-1])]
        assert written["num_samples"] == data["fitted_rounds"]
        assert written["ece_after"] == data["predictors"]["head+STS"]["prefix"]["ece"]
        assert written["ece_before"] == data["predictors"]["head"]["prefix"]["ece"]
        for name in ("reliability", "reliability_sts", "reliability_bias_sts"):
            assert (run.workdir / f"eval/{name}{suffix}.png").stat().st_size > 5000
            assert (run.workdir / f"eval/{name}{suffix}.json").exists()
    assert not (run.workdir / "eval/rejected.jsonl").exists()
    assert "calibrate: fields of prompts that are not used: `id` of 6" in run.printed


def test_fitted_on_training_prompts(save_untrained: Any, run: Run, tmp_path: Path):
    """Training prompts to fit on, as many as `eval.limit` says, and all held-out rounds to score."""
    save_untrained(run.config, tmp_path, run.mesh)
    written = calibrate(run.config, tmp_path, mesh=run.mesh, temperatures=[1.0], fit_on="train")
    both = json.loads((run.workdir / "eval/calibration.json").read_text())
    data = json.loads((tmp_path / "eval/calibration.json").read_text())
    assert written[1.0]["dataset"] == "train"
    assert data["scored_rounds"] == both["fitted_rounds"] + both["scored_rounds"]


def refused(run: Run, workdir: Path, config: Config | None = None, **arguments: Any) -> str:
    with pytest.raises(InputError) as error:
        calibrate(config or run.config, workdir, mesh=run.mesh, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_one_line(run: Run, tmp_path: Path):
    assert "--temperatures has 'warm'" in refused(run, tmp_path, temperatures=["warm"])
    assert "--temperatures has -1" in refused(run, tmp_path, temperatures=["-1"])
    assert "--temperatures has nan" in refused(run, tmp_path, temperatures=["nan"])
    assert "no checkpoint here" in refused(run, tmp_path)
    settings = dataclasses.replace(run.config.eval, limit=1)
    single = dataclasses.replace(run.config, eval=settings)
    assert "1 prompts gave" in refused(run, run.workdir, single, temperatures=[1.0])
    untrained = dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, prompts=()))
    assert "data.prompts is empty" in refused(run, run.workdir, untrained, fit_on="train")


def test_a_drafter_without_a_head_is_refused(save_untrained: Any, run: Run, tmp_path: Path):
    drafter = dataclasses.replace(run.config.drafter, kind="dflash", markov_rank=0, confidence_head=False)
    config = dataclasses.replace(run.config, drafter=drafter)
    save_untrained(config, tmp_path, run.mesh)
    advice = r"kind 'dflash'\) has no confidence head to calibrate; train one with drafter.kind='dspark', 'dflash2' or"
    assert re.search(advice, refused(run, tmp_path, config))
    assert "drafter.kind is 'dflash' there" in refused(run, tmp_path)
    config.drafter.kind, config.drafter.markov_rank = "dspark", 8
    save_untrained(config, tmp_path / "headless", run.mesh)
    assert "train one with drafter.confidence_head=True" in refused(run, tmp_path / "headless", config)
    assert not (tmp_path / "calibration.json").exists()


def test_the_command(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    with pytest.raises(SystemExit) as status:
        command.run(calibrate, define=_define, argv=["--config", "missing.py", "--temperatures=1.0"])
    assert status.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    command.run(calibrate, define=_define, argv=["--help"])
    shown = capsys.readouterr().out
    assert "python -m dspark_jax.calibrate" in shown and "--temperatures" in shown and "--fit_on" in shown
