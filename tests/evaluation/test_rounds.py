"""Measuring the runs of a comparison: one that cannot be used is named, and loses nothing of the others."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dspark_jax import jobs
from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    InputError,
    TargetArchitecture,
    TargetConfig,
    resolve,
    to_json,
)
from dspark_jax.evaluation import rounds
from dspark_jax.evaluation.acceptance import Counts
from dspark_jax.run import Run


def test_a_run_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    whole = SimpleNamespace(models=SimpleNamespace(target="the target"))

    def open_decoder(run: Run, *, target: Any) -> Any:
        assert run.workdir.name != "c" or target == whole.models.target  # loaded once
        if run.workdir.name == "b":
            raise InputError("no checkpoint here")
        return whole

    monkeypatch.setattr(rounds, "open_decoder", open_decoder)
    engines, errors = rounds._open_all({name: Run(Config(), tmp_path / name) for name in "abc"})
    assert list(engines) == ["a", "c"] and errors == {"b": {"error": "no checkpoint here"}}
    with pytest.raises(InputError, match="b: no checkpoint here"):
        rounds._open_all({"b": Run(Config(), tmp_path / "b")})


def small_config() -> Config:
    arch = TargetArchitecture("qwen3", 40, 16, 3, 4, 2, 8, 24, 1e-6, 1e4, False, 64)
    drafter, data = (
        DrafterConfig("dspark", 2, 3, (0, 1), 39, 4, True, True),
        DataConfig(max_length=64, max_prompt_length=16),
    )
    return resolve(Config(target=TargetConfig(architecture=arch), drafter=drafter, data=data))


def test_what_fails_in_a_process_is_one_line(tmp_path: Path, capsys: Any) -> None:
    job = {
        "task": "rounds",
        "out": str(tmp_path / "out.npz"),
        "runs": {"a": {"config": to_json(small_config()), "workdir": "a"}},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    with pytest.raises(SystemExit) as ended:
        jobs.do(rounds.work, tmp_path / "job.json")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "\nerror: " in f"\n{said}" and "a/checkpoints: no checkpoint here" in said


def test_what_a_comparison_leaves_out_is_said(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "how much", "id": 1}\nnonsense\n')
    decoder, config = SimpleNamespace(tokenizer=None, max_new_tokens=1), Config(eval=EvalConfig(prompts=(str(file),)))
    counts = SimpleNamespace(grouped=lambda owners, count: Counts(*(np.ones((1, 2), int) for _ in range(5))))
    monkeypatch.setattr(rounds, "decoding_run", lambda run: run)
    monkeypatch.setattr(rounds, "open_decoder", lambda *_: decoder)
    monkeypatch.setattr("dspark_jax.evaluation.setup.first_requests", lambda _, todo, *__: (todo, None))
    monkeypatch.setattr(rounds, "answer", lambda *_, **__: (SimpleNamespace(owners=[0]), None))
    monkeypatch.setattr(rounds, "count_rounds", lambda _: counts)
    rounds.measure_rounds(Run(config, tmp_path), tmp_path / "rounds.npz")
    said = capsys.readouterr().err.splitlines()
    assert said == ["measure: set aside: 1 malformed line", "measure: fields of prompts that are not used: `id` of 1"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"text"])
def test_damaged_rounds_are_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rounds.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"rounds.npz: damaged .*; remove it, it will be measured again"):
        rounds.read_rounds(tmp_path / "rounds.npz")
