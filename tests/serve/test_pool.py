"""Several drafters of one target, and the command that serves them."""

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import openai
import pytest

from dspark_jax.buckets.places import reading
from dspark_jax.config import Config, InputError, MeshConfig, to_json
from dspark_jax.engine.models import Models
from dspark_jax.engine.serving import EngineClosed
from dspark_jax.run import Run
from dspark_jax.serve import __main__ as main
from dspark_jax.serve.pool import Member, Pool, Sizes
from dspark_jax.serve.server import bind
from dspark_jax.sharding import make_mesh

ROOT = Path(__file__).resolve().parents[2]


def addresses(tree: Any) -> list[int]:
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def two_runs(served_config: Config, save_untrained: Callable[..., None], tmp_path_factory: Any) -> list[Path]:
    """Working directories of two runs."""
    folder, mesh = tmp_path_factory.mktemp("runs"), make_mesh(MeshConfig(), jax.devices()[:1])
    for name in "ab":
        save_untrained(served_config, folder / name, mesh)
    return [folder / name for name in "ab"]


def test_runs_of_one_target_share_its_weights(served_config: Config, two_runs: list[Path]) -> None:
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    run, sizes = Run(served_config, two_runs[0], one), Sizes(slots=2, capacity=64)
    with Pool.open(run, sizes, drafters={"first": two_runs[0], "second": two_runs[1]}) as pool:
        assert pool.names == ("first", "second", "plain") and pool.default == "first"
        assert [pool.member(name).kind for name in pool.names] == ["dspark", "dspark", "plain"]
        assert [pool.member(name).step for name in pool.names] == [1, 1, None]
        engines = [pool.engine(name) for name in pool.names]
        shared = addresses(pool.models("first").target)
        for engine, name in zip(engines, pool.names, strict=True):
            assert addresses(engine._batch._models.target) == addresses(pool.models(name).target) == shared
        assert pool.engine("second") is engines[1] and set(pool.engines) == {(name, "fixed") for name in pool.names}
        assert pool.engine("first", "threshold") is not engines[0]
        assert pool.engine("plain", "threshold") is engines[2]  # nothing to schedule
        with pytest.raises(InputError, match="model='third' is unknown; use first, second or plain"):
            pool.engine("third")
        with pytest.raises(InputError, match="scheduler='best' is unknown"):
            pool.engine("first", "best")
    with pytest.raises(EngineClosed):
        pool.engine("first")


def test_a_run_is_served_by_the_name_of_its_config(served_config: Config, two_runs: list[Path]) -> None:
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    sizes = Sizes(slots=2, capacity=64)
    assert Pool.open(Run(served_config, two_runs[0], one), sizes).names == ("tiny", "plain")
    assert Pool.open(Run(served_config, Path("nowhere"), one), sizes, drafters={}).names == ("plain",)


def test_a_drafter_may_lie_in_a_bucket(
    served_config: Config, save_untrained: Callable[..., None], bucket: Callable[[], None]
) -> None:
    far, one = Path("gs://bucket/runs"), make_mesh(MeshConfig(), jax.devices()[:1])
    save_untrained(served_config, reading(far), one)
    bucket()  # another machine
    pool = Pool.open(Run(served_config, Path("nowhere"), one), Sizes(slots=2, capacity=64), drafters={"far": far})
    assert pool.names == ("far", "plain") and pool.member("far").step == 1


def test_what_a_pool_refuses(
    members: list[Member], served_config: Config, two_runs: list[Path], make_pool: Callable[..., Pool]
) -> None:
    run, sizes = Run(served_config, two_runs[0], make_mesh(MeshConfig(), jax.devices()[:1])), Sizes(capacity=64)
    with pytest.raises(InputError, match=r"--drafter a=nowhere: no checkpoint there; name the directory"):
        Pool.open(run, sizes, drafters={"a": Path("nowhere")})
    with pytest.raises(InputError, match=r"--drafter plain=.*choose another name"):
        Pool.open(run, sizes, drafters={"plain": two_runs[0]})
    with pytest.raises(InputError, match="nowhere/checkpoints: no checkpoint here; train first"):
        Pool.open(Run(served_config, Path("nowhere"), run.mesh), sizes)
    with pytest.raises(InputError, match="tiny, tiny, plain: two have one name"):
        Pool([members[0], members[0]], served_config, make_pool().tokenizer, sizes)
    with pytest.raises(InputError, match="scheduler='best' is unknown"):
        make_pool(scheduler="best")


def test_what_the_command_refuses(served_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(message: str, **options: Any) -> None:
        with pytest.raises(InputError, match=message):
            main.serve(served_config, tmp_path, port=0, **options)

    refused("--drafter x: a name and a working directory are needed", drafter=["x"])
    refused("--drafter a=c: there is a a already", drafter=["a=b", "a=c"])
    refused("--plain serves the target alone", plain=True, drafter=["a=b"])
    refused("--max_body=0 is out of range; use 1 or more", max_body=0)
    refused("--drain_seconds=-1 is out of range", drain_seconds=-1.0)
    refused("the API key has characters", api_key="schlüssel")
    refused("no checkpoint here; train first, or point --workdir at a trained run")
    refused("slots=0 is out of range", slots=0)
    refused("--host nowhere.invalid --port 0: .*; use another address", host="nowhere.invalid")
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(InputError, match="Address already in use; use another address"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match="--port 70000 is no port"):
        bind("127.0.0.1", 70000)
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else there(name))
    refused(r"serve needs uvicorn; pip install 'dspark-jax\[serve\]'")


def test_models_in_their_decoding_form_are_not_copied(members: list[Member]) -> None:
    models = members[0].models
    assert addresses(models.for_decoding(batch_size=3)) == addresses(models)
    assert addresses(Models(models.target).for_decoding(batch_size=3)) == addresses(models.target)


def started(config: Config, workdir: Path, tmp_path: Path, *flags: str) -> tuple[subprocess.Popen[str], str, list[str]]:
    """The command in a process of its own, its URL, and its lines so far (a thread reads on)."""
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    command = [sys.executable, "-m", "dspark_jax.serve", "--config", str(file), "--workdir", str(workdir), "--port=0"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, *flags], stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path)
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"at (http://\S+)", line):
            threading.Thread(target=lambda: lines.extend(process.stderr or ()), daemon=True).start()
            return process, found[1], lines
    raise AssertionError("".join(lines))


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_signals_drain_a_process(served_config: Config, two_runs: list[Path], tmp_path: Path, number: int) -> None:
    """The first one finishes what is running and refuses the rest; nothing is lost."""
    flags = ("--slots=2", "--capacity=256", "--nowarm_up", "--api_key=secret")
    process, url, lines = started(served_config, two_runs[0], tmp_path, *flags)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    wanted: dict[str, Any] = {"model": "tiny", "prompt": "sum", "max_tokens": 200, "temperature": 1.5}
    streams = [client.completions.create(**wanted, seed=seed, stream=True) for seed in range(6)]
    next(iter(streams[0]))
    process.send_signal(number)
    with pytest.raises(openai.APIStatusError) as refused:
        for _ in range(1000):
            client.completions.create(**(wanted | {"max_tokens": 1}))
    assert refused.value.status_code == 503
    for stream in streams:
        assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
    assert process.wait(60) == (0 if number == signal.SIGTERM else 130)
    assert "draining: " in "".join(lines) and "Traceback" not in "".join(lines)


@pytest.mark.slow
def test_a_second_signal_closes_a_process(served_config: Config, two_runs: list[Path], tmp_path: Path) -> None:
    process, url, lines = started(served_config, two_runs[0], tmp_path, "--slots=1", "--capacity=512", "--nowarm_up")
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
    stream = client.completions.create(model="plain", prompt="sum", max_tokens=500, temperature=3.0, stream=True, n=8)
    next(iter(stream))
    process.send_signal(signal.SIGTERM)
    while not any("draining: " in line for line in lines):  # two that wait at a time are one
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(openai.APIError, match="closed before the answer was complete"):
        list(stream)
    assert process.wait(60) == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
