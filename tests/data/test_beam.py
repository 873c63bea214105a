"""Apache Beam on its direct runner makes the records that the local path makes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tensorflow_datasets.core.utils import shard_utils

from dspark_jax import prepare as command
from dspark_jax.config import Config, InputError
from dspark_jax.data import chunks
from dspark_jax.data.sources import SampleReader
from dspark_jax.prepare import prepare
from tests.preparing import Decoder, prompts_config


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path) -> Config:
    return prompts_config(tiny_target, tmp_path, prompts=40)


def given(config: Config, folder: Path) -> Config:
    """The same with answers in the files, some of them too short."""
    talk = [{"role": "user", "content": "how much?"}, {"role": "assistant", "content": "one and one is two"}]
    rows = [{"messages": talk * (1 + i % 3)} if i % 4 else {"messages": [talk[0]]} for i in range(30)]
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.prompts, config.data.regenerate = (str(folder / "a.jsonl"), str(folder / "b.jsonl")), False
    return config


def contents(data: Path) -> Any:
    """Serialised records in their order, number of shards, report, and what was set aside."""
    reader = SampleReader(data)
    source = reader._records.data_source  # TFDS parses what this gives
    records = source.__getitems__(range(len(reader)))
    report = json.loads((data / "report.json").read_text()) | {"seconds": 0}
    shards = len(list((data / "dspark_samples" / "1.0.0").glob("*.array_record*")))
    return records, shards, json.dumps(report), (data / "rejected.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answers", "shards", "options"),
    [
        ("of the target", 1, ""),
        ("of the target", 4, ""),
        ("given", 4, ""),
        ("given", 1, "--direct_num_workers=2 --direct_running_mode=multi_processing"),
    ],
)
def test_the_same_records_as_the_local_path(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: str, shards: int, options: str
) -> None:
    """Byte for byte and in the same order, also where other processes do the work."""
    pytest.importorskip("apache_beam")
    monkeypatch.setattr(chunks, "SIZE", 7)
    if shards > 1:
        monkeypatch.setattr(shard_utils.ShardConfig, "min_shard_size", 1500)
    config = given(config, tmp_path) if answers == "given" else config
    report = prepare(config, tmp_path / "local", Decoder())
    assert prepare(config, tmp_path / "beam", Decoder(), beam=options) | {"seconds": 0} == report | {"seconds": 0}
    local, beam = contents(tmp_path / "local" / "data"), contents(tmp_path / "beam" / "data")
    assert all(isinstance(record, bytes) for record in local[0]) and local == beam
    assert local[1] == shards and len(local[0]) == report["samples"] > 30
    names = [path.name for path in (tmp_path / "beam" / "data").iterdir()]
    assert sorted(names) == ["dspark_samples", "rejected.jsonl", "report.json"]


@pytest.mark.slow
def test_a_killed_pipeline_goes_on_and_no_sample_is_one_line(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("apache_beam")
    from dspark_jax.data import beam

    monkeypatch.setattr(chunks, "SIZE", 20)
    config, made = given(config, tmp_path), []

    def killed(folder: Path, name: str, settings: Any) -> None:
        if made:
            raise KeyboardInterrupt
        made.append(name)
        chunks.make_chunk(folder, name, settings)

    monkeypatch.setattr(beam, "make_chunk", killed)
    with pytest.raises((KeyboardInterrupt, RuntimeError)):
        prepare(config, tmp_path / "run", beam="")
    done = list((tmp_path / "run" / "data.partial" / "chunks").glob("*.made"))
    assert [path.stem for path in done] == made
    before = done[0].stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.setattr(chunks, "SIZE", 20)
    seen = []
    monkeypatch.setattr(
        beam, "merge_chunks", lambda *given: seen.append(done[0].stat().st_mtime_ns) or chunks.merge_chunks(*given)
    )
    prepare(config, tmp_path / "run", beam="")
    prepare(config, tmp_path / "local")
    assert seen == [before]
    assert contents(tmp_path / "run" / "data") == contents(tmp_path / "local" / "data")
    monkeypatch.undo()
    config.data.min_loss_tokens = 139
    with pytest.raises(InputError, match="no sample is left of 60 prompts: 16 without an answer, 44 too few"):
        prepare(config, tmp_path / "none", beam="")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--runner=Nowhere", "Unexpected pipeline runner: Nowhere"),
        ("--direct_num_wrokers=2", "DirectRunner has no option --direct_num_wrokers"),
        ("--runner=DataflowRunner", "Missing required option: project"),
        ("--temp_location='a", "No closing quotation; write options as on a command line"),
    ],
)
def test_options_are_checked_before_anything_is_answered(
    config: Config, tmp_path: Path, options: str, message: str
) -> None:
    pytest.importorskip("apache_beam")
    with pytest.raises(InputError, match=f"^--beam.*{message}"):
        prepare(config, tmp_path / "run", lambda ask: pytest.fail("answered"), beam=options)
    assert not (tmp_path / "run").exists()


def test_it_needs_a_package_and_a_flag_takes_options(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspark_jax.command import parse

    file = tmp_path / "c.py"
    file.write_text("from dspark_jax.config import Config\n\n\ndef get_config():\n    return Config()\n")
    for argument, value in {"--beam": "", "--beam=--runner=FlinkRunner --x=1": "--runner=FlinkRunner --x=1"}.items():
        assert parse(["--config", str(file), argument], command._define)[2]["beam"] == value
    assert parse(["--config", str(file)], command._define)[2]["beam"] is None
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "dspark_jax.data.beam", raising=False)
    with pytest.raises(InputError, match=r"--beam needs the package apache-beam; pip install 'dspark-jax\[beam\]'"):
        prepare(config, tmp_path / "run", beam="")
