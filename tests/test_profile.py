"""The profile of an untrained drafter: what it writes is read by the schedulers; what it cannot measure it says."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax import command
from dspark_jax.config import Config, DataConfig, DrafterConfig, InputError, MeshConfig, TargetConfig, resolve
from dspark_jax.engine import Models, cost, schedulers
from dspark_jax.evaluation.load import read_cost_table
from dspark_jax.profile import _define, cost_table, profile, rungs
from dspark_jax.sharding import make_mesh

BLOCK = 3


@pytest.fixture(scope="module")
def written(save_untrained: Any, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    workdir, one = tmp_path_factory.mktemp("profile"), MeshConfig(1, 1, 1)
    drafter = DrafterConfig(num_layers=1, block_size=BLOCK, target_layer_ids=(0,), mask_token_id=319, markov_rank=8)
    data, target = DataConfig(max_prompt_length=100, max_length=140), TargetConfig(path=str(tiny_target))
    config = resolve(Config(name="tiny", target=target, drafter=drafter, data=data, mesh=one))
    mesh = make_mesh(one, jax.devices()[:1])
    save_untrained(config, workdir, mesh)
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *text, **_: printed.append(" ".join(map(str, text))))
        tables = profile(config, workdir, mesh=mesh, slots=["2", "1"], contexts=[16], rounds=2)
    return config, workdir, mesh, tables, "\n".join(printed)


def test_the_tables_are_in_the_layout_that_is_read(written: Any) -> None:
    _, workdir, _, tables, printed = written
    for slots, name in ((2, "cost_table.json"), (1, "cost_table_s1.json")):
        content = json.loads((workdir / name).read_text())
        assert content == tables[slots]
        sizes = {2: [1, 2, 3, 4, 5, 8], 1: [1, 2, 3, 4]}[slots]
        assert content["sample_batch_tokens"] == sizes and content["max_batch_tokens"] == 4 * slots
        assert content["engine"] == "dspark_jax" and content["device"] == "1 x cpu"
        read = read_cost_table(workdir / name)
        assert read.most_tokens == 4 * slots and read.plain is not None
        assert read.steps_per_second[3 * slots] == pytest.approx(content["sample_steps_per_sec"][-1])
        assert read.plain.tolist() == [content["plain_steps_per_sec"][0]] * (slots + 1)
    assert "milliseconds per round at 16 tokens" in printed and "4 verified" in printed
    data = json.loads((workdir / "eval/cost.json").read_text())
    assert (workdir / "eval/cost.png").stat().st_size > 5000 and "2 slots" in json.dumps(data)


def test_every_shape_is_timed_once_and_each_does_what_it_says(written: Any, monkeypatch: Any) -> None:
    """Rounds with drafts commit at least a token per active request from where they always begin."""
    config, workdir, mesh, *_ = written
    seen = []
    monkeypatch.setattr("dspark_jax.profile.round_seconds", lambda *args, **_: seen.append(args[1]) or 0.25)
    tables = profile(config, workdir, mesh=mesh, slots=[3, 3], contexts=[8, 12])
    assert [(one.slots, one.context, one.tokens) for one in seen] == [
        (3, context, tokens) for context in (8, 12) for tokens in (0, 2, 3, 6, 12)
    ]
    assert tables[3]["sample_steps_per_sec"] == [4.0] * 7 and tables[3]["plain_steps_per_sec"] == [4.0]


def test_rounds_without_and_with_drafts_begin_where_they_should(models_of: Any) -> None:
    for drafts, sizes in ((False, ()), (True, (2, 4)), (True, ())):
        state = cost.decoding_state(models_of, schedulers.fixed(), 2, 2, 9)
        ran = cost._rounds(models_of, state, schedulers.fixed(), np.int32(3), drafts=drafts, sizes=sizes)
        assert (ran[:, :9] == state.tokens[:, :9]).all() and (ran[:, 9] != state.tokens[:, 9]).any()


@pytest.fixture(scope="module")
def models_of(written: Any) -> Any:
    from dspark_jax.target.loading import load_target
    from dspark_jax.training.checkpoint import load_drafter

    config, workdir, mesh, *_ = written
    return Models(load_target(config.target, mesh), load_drafter(workdir, mesh, config.target)[1])


def test_what_is_measured_are_the_sizes_of_the_engine() -> None:
    assert rungs(8) == (1, 2, 4, 8) and rungs(6) == (1, 2, 3, 6) and rungs(2) == (1, 2) and rungs(24) == (3, 6, 12, 24)
    rows = [{"slots": 1, "context": 4, "tokens": t, "milliseconds": 2.0} for t in (0, 1, 2)]
    assert cost_table(rows, 1, 4)["sample_steps_per_sec"] == [500.0, 500.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": ["0"]}, "--slots has '0'"),
        ({"slots": []}, "--slots is empty"),
        ({"contexts": ["many"]}, "--contexts has 'many'"),
        ({"contexts": [1000]}, "exceeds the target's 512 positions"),
        ({"rounds": 0}, "--rounds=0"),
    ],
)
def test_bad_input_is_one_line(written: Any, options: dict[str, Any], message: str) -> None:
    config, workdir, mesh, *_ = written
    with pytest.raises(InputError, match=message) as error:
        profile(config, workdir, mesh=mesh, **options)
    assert "\n" not in str(error.value)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        command.run(profile, define=_define, argv=["--config", "missing.py"])
    assert status.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    command.run(profile, define=_define, argv=["--help"])
    shown = capsys.readouterr().out
    assert "python -m dspark_jax.profile" in shown and "--slots" in shown and "--contexts" in shown
