"""Several hosts prepare as one: as threads with a decoder that is made up, and as processes with the real one."""

import collections
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_jax import hosts as hosts_module
from dspark_jax import prepare
from dspark_jax.config import Config, InputError, to_json
from dspark_jax.data import chat
from dspark_jax.data.sources import SampleReader
from dspark_jax.errors import AGAIN, HostLost
from dspark_jax.hosts import Hosts
from dspark_jax.prepare import prepare_run
from dspark_jax.run import Run
from tests.compiling import QUICKLY
from tests.data.openai_server import Behaviour, OpenAIServer, by_seed
from tests.preparing import STOP, Decoder, changed, prompts_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path) -> Config:
    """Two conversations of each prompt."""
    return prompts_config(tiny_target, tmp_path, max_prompt_length=100, max_length=120, decode_batch_size=4, repeats=2)


def contents(data: Path) -> Any:
    """Everything that a preparation has made, but how long it took. Record files may differ where records do not."""
    reader = SampleReader(data)
    records = [reader._records[number] for number in range(len(reader))]
    plain = [{name: getattr(value, "tolist", lambda v=value: v)() for name, value in one.items()} for one in records]
    report = json.loads((data / "report.json").read_text()) | {"seconds": 0}
    return plain, report, (data / "rejected.jsonl").read_text(), sorted(path.name for path in data.iterdir())


def on_hosts(
    workdir: Path, decoders: list[Decoder], *configs: Config, ended: Callable[[], None] | None = None
) -> list[Any]:
    """What preparing gives or raises on each of as many hosts as there are decoders."""
    found: list[Any] = [None] * len(decoders)

    def run(index: int) -> None:
        config = configs[index % len(configs)]
        try:
            hosts = Hosts(workdir, index, len(decoders))
            found[index] = prepare_run(Run(config, workdir), decoders[index], hosts=hosts)
            if ended:
                ended()
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
    prepare_run(Run(config, tmp_path / "alone"), decoder)
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


def test_one_host_writes_the_features_and_the_others_wait(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, written = changed(config, features="cache"), []

    def prepare_features(run: Run) -> None:
        assert (run.data_folder / "report.json").exists()
        threading.Event().wait(0.3)
        written.append(run.workdir.name)
        if run.workdir.name == "broken":
            raise InputError("the target is damaged")

    monkeypatch.setattr(prepare, "prepare_features", prepare_features)
    run = tmp_path / "run"
    ends: list[list[str]] = []
    reports = on_hosts(run, [Decoder(), Decoder()], config, ended=lambda: ends.append(list(written)))
    assert reports[0]["samples"] == 21 and reports[1] == reports[0] and ends == [["run"]] * 2
    errors = on_hosts(tmp_path / "broken", [Decoder(), Decoder()], config)
    assert [str(error) for error in errors] == ["the target is damaged", "host 0: the target is damaged"]
    assert written == ["run", "broken"]


def test_killed_hosts_go_on_with_any_number_of_them(
    config: Config, tmp_path: Path, alone: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is asked twice, nothing is lost: of two hosts one dies, then of three, then one is alone.

    How far the others come until they see that one is dead is chance: so few answers that one always dies.
    """
    monkeypatch.setattr(hosts_module, "BEAT", 0.0)
    run, asked = tmp_path / "run", []
    for kill_after in ([3, 10**9], [10**9, 10**9, 1], [0], [10**9, 10**9]):
        decoders = [Decoder(after) for after in kill_after]
        if len(decoders) > 1:
            found = on_hosts(run, decoders, config)
        else:
            with contextlib.suppress(KeyboardInterrupt):
                prepare_run(Run(config, run), decoders[0])
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
    assert prepare_run(Run(config, run), Decoder())["samples"] == 21
    assert contents(run / "data") == contents(tmp_path / "alone" / "data")
    on_hosts(tmp_path / "more", [Decoder(), Decoder(2)], config)
    log = tmp_path / "more" / "data.partial" / "answers-1.jsonl"
    log.write_text("{broken\n" + log.read_text())
    with pytest.raises(InputError, match=r"answers-1\.jsonl:1: damaged; remove the lines"):
        prepare_run(Run(config, tmp_path / "more"), Decoder())


def test_hosts_that_do_not_read_the_same_are_one_line(config: Config, tmp_path: Path) -> None:
    other = changed(config, seed=1)
    found = on_hosts(tmp_path / "run", [Decoder(), Decoder()], config, other)
    assert all(isinstance(error, InputError) for error in found)
    assert str(found[1]) == "host 1 reads another data than host 0; give all hosts the same config, target and files"
    assert str(found[0]) == str(found[1]) and not (tmp_path / "run" / "data").exists()


@pytest.fixture
def launch(config: Config, tmp_path: Path) -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """Runs the command on so many hosts: processes of one device, which SLURM's variables describe."""
    file = tmp_path / "tiny.json"
    file.write_text(to_json(config))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICKLY}
    script = [sys.executable, str(Path(__file__).with_name("prepare_host.py"))]

    def run(workdir: Path, kill_after: list[int], *more: list[str]) -> list[subprocess.CompletedProcess[str]]:
        started = []
        for host, after in enumerate(kill_after):
            arguments = [str(after), "--config", str(file), "--workdir", str(workdir), *more[host % len(more)]]
            described = {"JOB_ID": os.getpid(), "STEP_NODELIST": "localhost", "LOCALID": host}
            described |= {"NTASKS": len(kill_after), "PROCID": host}
            slurm = {f"SLURM_{name}": str(value) for name, value in described.items()} if len(kill_after) > 1 else {}
            arguments += ["--distributed"] if slurm else []
            pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen([*script, *arguments], env=environment | slurm, **pipes))
        said = [process.communicate(timeout=250) for process in started]
        return [
            subprocess.CompletedProcess(one.args, one.returncode, *pair)
            for one, pair in zip(started, said, strict=True)
        ]

    return run


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a process says beside its progress and Gloo's greeting."""
    ordinary = ("prepare ", "data: ", "features", "[Gloo]")
    return [line for line in done.stderr.splitlines() if not line.startswith(ordinary)]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["own engine", "servers"])
def test_two_processes_prepare_as_one(
    launch: Callable[..., Any], config: Config, tmp_path: Path, by: str, tiny_target: Path
) -> None:
    """One is killed in the middle, the other ends with one line, and both started again lose and double nothing."""
    run, alone, more = tmp_path / "run", tmp_path / "alone", ["--config.data.temperature=0.0"]
    with contextlib.ExitStack() as stack:
        server = None
        if by == "own engine":
            more += ["--config.data.features=cache"]
        else:
            server = OpenAIServer(chat.load_tokenizer(tiny_target), Behaviour(by_seed(STOP, 0.02)))
            stack.callback(server.close)
            more += [f"--config.data.answers.endpoints=('{server.url}',)", "--config.data.answers.concurrency=4"]
        (whole,) = launch(alone, [0], more)
        assert whole.returncode == 0, whole.stderr
        asked = dict(server.answered) if server else {}
        if server:
            server.answered.clear()
        left, killed = launch(run, [0, 3], more)
        assert (left.returncode, killed.returncode) == (AGAIN, -9), left.stderr
        assert errors(left) == [
            "error: host 1 has shown no sign of life for 5 s; start the same command on all hosts again, it goes on "
            "with what is there"
        ]
        before = {path: path.read_bytes() for path in (run / "data.partial").glob("answers*")}
        assert len(before) == 2 and not (run / "data").exists() and not (run / "lock.json").exists()
        for done in launch(run, [0, 0], more):
            assert done.returncode == 0, done.stderr
        assert contents(run / "data") == contents(alone / "data")
        assert {path.name for path in run.iterdir()} == ({"data"} if server else {"data", "features"})
        if not server:
            made = [{path.name: path.read_bytes() for path in (one / "features").iterdir()} for one in (run, alone)]
            assert made[0] == made[1] and len(made[0]) >= 3
        if server:  # in flight at a kill were as many questions as it has at a time
            again = sum((server.answered - collections.Counter(asked)).values())
            assert set(server.answered) == set(asked) and again <= 2 and server.most <= 4


@pytest.mark.slow
def test_a_host_that_cannot_go_on_ends_all_with_one_line(launch: Callable[..., Any], tmp_path: Path) -> None:
    for other, why in {
        f"--config.data.prompts=('{tmp_path / 'none.jsonl'}',)": "none.jsonl: cannot be read",
        "--config.data.max_length=9999": "data.max_length=9999 exceeds",
    }.items():
        found = launch(tmp_path / "run", [0, 0], [], [other])
        assert [done.returncode for done in found] == [2, 2], found
        assert all(len(errors(done)) == 1 for done in found) and why in errors(found[1])[0], found
        assert "host 1" in errors(found[0])[0] and not (tmp_path / "run" / "data").exists()
