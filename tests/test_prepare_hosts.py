"""Several hosts prepare as one: as threads with a decoder that is made up, and as processes with the real one."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_jax import hosts as hosts_module
from dspark_jax.config import Config, DataConfig, DrafterConfig, InputError, TargetConfig, resolve
from dspark_jax.data.regenerate import Question
from dspark_jax.data.sources import SampleReader
from dspark_jax.errors import HostLost
from dspark_jax.hosts import Hosts
from dspark_jax.prepare import prepare_samples

ROOT = Path(__file__).resolve().parents[1]
STOP = 294


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path) -> Config:
    """Eleven prompts, some with two turns, one malformed and one too long; two conversations each."""
    prompts = tmp_path / "math.jsonl"
    lines = [json.dumps({"turns": ["how much is " + "one and " * (i % 5) + "one"] * (1 + i % 2)}) for i in range(11)]
    prompts.write_text("\n".join([*lines[:4], "{broken", *lines[4:], json.dumps({"prompt": "x" * 200})]) + "\n")
    return resolve(
        Config(
            name="tiny",
            target=TargetConfig(path=str(tiny_target)),
            drafter=DrafterConfig(num_layers=1, target_layer_ids=(0,), mask_token_id=319),
            data=DataConfig(
                prompts=(str(prompts),),
                max_prompt_length=100,
                max_length=120,
                min_loss_tokens=4,
                decode_batch_size=4,
                repeats=2,
            ),
        )
    )


class Decoder:
    """Answers by sample id only; that of 3 stops at once. May be killed after some questions."""

    def __init__(self, kill_after: int = 10**9):
        self.kill_after, self.asked = kill_after, list[tuple[int, int]]()

    def __call__(self, ask: Callable[[], Question | None]) -> Iterator[tuple[Question, list[int]]]:
        while question := ask():
            if len(self.asked) == self.kill_after:
                raise KeyboardInterrupt
            stream = question.conversation.sample_id
            self.asked.append((stream, question.turn))
            yield question, [STOP] if stream == 3 else [*range(65, 71 + stream), STOP]


def contents(data: Path) -> Any:
    """Everything that a preparation has made, but how long it took. Record files may differ where records do not."""
    reader = SampleReader(data)
    records = [reader._records[number] for number in range(len(reader))]
    plain = [{name: getattr(value, "tolist", lambda v=value: v)() for name, value in one.items()} for one in records]
    report = json.loads((data / "report.json").read_text()) | {"seconds": 0}
    return plain, report, (data / "rejected.jsonl").read_text(), sorted(path.name for path in data.iterdir())


def on_hosts(workdir: Path, decoders: list[Decoder], *configs: Config) -> list[Any]:
    """What preparing gives or raises on each of as many hosts as there are decoders."""
    found: list[Any] = [None] * len(decoders)

    def run(index: int) -> None:
        config = configs[index % len(configs)]
        try:
            hosts = Hosts(workdir, index, len(decoders))
            found[index] = prepare_samples(config, workdir, decoders[index], hosts)
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(decoders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


@pytest.fixture
def alone(config: Config, tmp_path: Path) -> Decoder:
    """What one host asks; its data is in `alone/data`."""
    decoder = Decoder()
    prepare_samples(config, tmp_path / "alone", decoder)
    return decoder


@pytest.mark.parametrize("count", [2, 5])
def test_hosts_make_what_one_makes(config: Config, tmp_path: Path, alone: Decoder, count: int) -> None:
    decoders, run = [Decoder() for _ in range(count)], tmp_path / "run"
    reports = on_hosts(run, decoders, config)
    assert contents(run / "data") == contents(tmp_path / "alone" / "data")
    assert all(report == reports[0] for report in reports) and reports[0]["samples"] == 21
    assert [path.name for path in run.iterdir()] == ["data"]
    shares = [{stream // 2 for stream, _ in decoder.asked} for decoder in decoders]
    assert sorted(sum((decoder.asked for decoder in decoders), [])) == sorted(alone.asked)
    assert all(shares) and sum(map(len, shares)) == 11  # by prompt: both conversations of one are on the same host
    idle = [Decoder() for _ in range(count)]
    assert on_hosts(run, idle, config) == reports and not any(decoder.asked for decoder in idle)


def test_killed_hosts_go_on_with_any_number_of_them(
    config: Config, tmp_path: Path, alone: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked twice, nothing is lost: of two hosts one dies, then of three, then one is alone."""
    monkeypatch.setattr(hosts_module, "BEAT", 0.0)
    run, asked = tmp_path / "run", []
    for kill_after in ([3, 10**9], [10**9, 10**9, 2], [4], [10**9, 10**9]):
        decoders = [Decoder(after) for after in kill_after]
        if len(decoders) > 1:
            found = on_hosts(run, decoders, config)
        else:
            with contextlib.suppress(KeyboardInterrupt):
                prepare_samples(config, run, decoders[0])
        asked += sum((decoder.asked for decoder in decoders), [])
        if min(kill_after) < 10**9:
            assert not (run / "data").exists()
            if len(decoders) > 1:
                dead = kill_after.index(min(kill_after))
                lost = [one for index, one in enumerate(found) if index != dead]
                assert all(isinstance(error, HostLost) for error in lost), found
                assert f"host {dead}: ended before its work was done (KeyboardInterrupt)" in str(lost[0])
    assert sorted(asked) == sorted(alone.asked)
    assert contents(run / "data") == contents(tmp_path / "alone" / "data")
    assert [path.name for path in run.iterdir()] == ["data"]


def test_a_line_that_a_dead_host_was_writing_does_not_count(config: Config, tmp_path: Path, alone: Decoder) -> None:
    run = tmp_path / "run"
    on_hosts(run, [Decoder(), Decoder(), Decoder(2)], config)
    log = run / "data.partial" / "answers-2.jsonl"
    log.write_bytes(log.read_bytes()[:-9])
    assert prepare_samples(config, run, Decoder())["samples"] == 21
    assert contents(run / "data") == contents(tmp_path / "alone" / "data")
    on_hosts(tmp_path / "more", [Decoder(), Decoder(2)], config)
    log = tmp_path / "more" / "data.partial" / "answers-1.jsonl"
    log.write_text("{broken\n" + log.read_text())
    with pytest.raises(InputError, match=r"answers-1\.jsonl:1: damaged; remove the lines"):
        prepare_samples(config, tmp_path / "more", Decoder())


def test_hosts_that_do_not_read_the_same_are_one_line(config: Config, tmp_path: Path) -> None:
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, seed=1))
    found = on_hosts(tmp_path / "run", [Decoder(), Decoder()], config, other)
    assert all(isinstance(error, InputError) for error in found)
    assert str(found[1]) == "host 1 reads another data than host 0; give all hosts the same config, target and files"
    assert str(found[0]) == str(found[1]) and not (tmp_path / "run" / "data").exists()
