"""Answers for training by a server that answers, killed twice, and by continuous batching against static batches.

    python -m tests.benchmarks.answers --prompts 1000
    python -m tests.benchmarks.answers --prompts 1000 --endpoint http://127.0.0.1:8080/v1 --temperature 0

`prepare` asks a server for the answers to the quickstart's prompts: once undisturbed, once killed (SIGKILL) after a
third and interrupted (SIGINT) after two thirds of them. The samples must be the same, and nothing asked twice but what
was on its way at a kill. The server is the engine of this package behind the tests' server, or the one of `--endpoint`,
which must have the embedded target (`tests/servers/http_llama_cpp.py` starts llama.cpp's).

Then the target answers the first questions here, in turns: by the engine, whose slots are filled again as answers end,
and in static batches of as many. The best of `--repeats` counts, so that compiling does not.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from dspark_jax.answering import Effort, make_decoder
from dspark_jax.command import load_config
from dspark_jax.config import AnswersConfig, Config, MeshConfig, resolve, to_json
from dspark_jax.data.chat import load_tokenizer, prompt_tokens, stop_tokens
from dspark_jax.data.prompts import read_prompts
from dspark_jax.data.regenerate import Question, conversations
from dspark_jax.data.sources import SampleReader
from dspark_jax.engine import Models, generate
from dspark_jax.engine.serving import Engine
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from tests.data.openai_server import Behaviour, OpenAIServer

ROOT = Path(__file__).resolve().parents[2]


def quickstart(prompts: int, temperature: float) -> Config:
    """The config, with so many prompts of each set that there are `prompts` or a few more."""
    config = load_config("quickstart")
    config.data.limit = -(-prompts // len(config.data.prompts))
    config.data.temperature, config.data.min_loss_tokens = temperature, 1
    return resolve(config)


@contextlib.contextmanager
def engine_server(config: Config, models: Models, mesh: Any) -> Iterator[OpenAIServer]:
    """Our own engine behind a server."""
    tokenizer = load_tokenizer(config.target.path)
    slots, stops = config.data.decode_batch_size, stop_tokens(config.target.path, tokenizer)
    with jax.set_mesh(mesh):
        engine = Engine(
            models, slots=slots, capacity=config.data.max_length, stop_tokens=stops, max_queue=256, prefill_chunks=slots
        )
        engine.warm_up()

    def answer(prompt: Any, body: dict[str, Any]) -> Sequence[int]:
        room, temperature = body["max_tokens"], body["temperature"]
        return (
            engine.submit(prompt, max_new_tokens=room, temperature=temperature, seed=body["seed"], block=True)
            .result()
            .tokens
        )

    with engine:
        server = OpenAIServer(tokenizer, Behaviour(answer))
        try:
            yield server
        finally:
            server.close()


def prepared(config: Config, workdir: Path, kills: tuple[signal.Signals, ...] = ()) -> tuple[list[Any], float]:
    """The samples of a preparation in a process of its own, killed so often on its way, and seconds that it took."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(config))
    command = [sys.executable, "-m", "dspark_jax.prepare", "--config", str(workdir / "config.json")]
    command += ["--workdir", str(workdir)]
    log, began = workdir / "data.partial" / "answers.jsonl", time.perf_counter()
    prompts = config.data.limit * len(config.data.prompts)
    for number, kill in enumerate([*kills, None], start=1):
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
        )
        if kill is not None:
            while not (log.exists() and log.read_bytes().count(b"\n") * (len(kills) + 1) >= number * prompts):
                assert process.poll() is None, process.stderr and process.stderr.read().decode()
                time.sleep(0.05)
            process.send_signal(kill)
        said = process.communicate()[1].decode()
        assert process.returncode == {None: 0, signal.SIGKILL: -9, signal.SIGINT: 130}[kill], said
    seconds, reader = time.perf_counter() - began, SampleReader(workdir / "data")
    samples = [reader[i] for i in range(len(reader))]
    return [(one.sample_id, one.tokens.tolist(), one.loss_mask.tolist()) for one in samples], seconds


def killed_twice(config: Config, server: OpenAIServer | None) -> dict[str, Any]:
    """What an undisturbed preparation and one that is killed twice have made."""
    with tempfile.TemporaryDirectory() as folder:
        whole, seconds = prepared(config, Path(folder, "whole"))
        asked = dict(server.answered) if server else {}
        if server:
            server.answered.clear()
        found, _ = prepared(config, Path(folder, "killed"), (signal.SIGKILL, signal.SIGINT))
    by_id = {number: one for number, *one in whole}
    numbers = [number for number, *_ in found]
    result: dict[str, Any] = {
        "samples": len(found),
        "lost": len(set(by_id) - set(numbers)),
        "doubled": len(numbers) - len(set(numbers)),
        "same": sum(by_id.get(number) == one for number, *one in found),
        "samples_per_second": len(whole) / seconds,
    }
    if server:
        again = {key: count - 1 for key, count in server.answered.items() if count > 1}
        result |= {"asked_again": sum(again.values()), "same_questions": set(asked) == set(server.answered)}
    return result


def throughput(config: Config, models: Models, mesh: Any, prompts: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of the first questions' answers, both ways."""
    tokenizer, data = load_tokenizer(config.target.path), config.data
    stops = stop_tokens(config.target.path, tokenizer)
    read = read_prompts(data.prompts, -(-prompts // len(data.prompts)), lambda line: None)
    first = [(one, one.opening + one.questions[:1]) for one in conversations(read, 1)]
    asked = [prompt_tokens(tokenizer, messages) for _, messages in first]
    room = data.max_length - max(map(len, asked))
    questions = [Question(one, 0, said, ids, room) for (one, said), ids in zip(first, asked, strict=True)]
    best: dict[str, float] = {}
    tokens: dict[str, int] = {}

    def continuous() -> int:
        effort = Effort()
        waiting = iter(questions)
        for _ in make_decoder(config, models, mesh, effort=effort)(lambda: next(waiting, None)):
            pass
        return effort.tokens

    def static() -> int:
        with jax.set_mesh(mesh):
            found = generate(
                models,
                asked,
                max_new_tokens=room,
                temperature=data.temperature,
                stop_tokens=stops,
                batch_size=data.decode_batch_size,
                seed=data.seed,
            )
        return sum(map(len, found.tokens))

    for _ in range(repeats):
        for name, run in {"continuous": continuous, "static": static}.items():
            began = time.perf_counter()
            tokens[name] = run()
            best[name] = max(best.get(name, 0.0), tokens[name] / (time.perf_counter() - began))
    return {"questions": len(questions), "tokens": tokens, "tokens_per_second": best}


def main() -> None:
    """Prints both results as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--endpoint", help="a server with the embedded target; default: our own engine")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--speed_prompts", type=int, default=240, help="for the comparison of batches; 0: without it")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    config = quickstart(arguments.prompts, arguments.temperature)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    models = Models(load_target(config.target, mesh))
    with contextlib.ExitStack() as stack:
        server = None if arguments.endpoint else stack.enter_context(engine_server(config, models, mesh))
        answers = AnswersConfig(endpoints=(server.url if server else arguments.endpoint,))
        asking = dataclasses.replace(config, data=dataclasses.replace(config.data, answers=answers))
        print(json.dumps({"server": "our engine" if server else arguments.endpoint} | killed_twice(asking, server)))
    if arguments.speed_prompts:
        print(json.dumps(throughput(config, models, mesh, arguments.speed_prompts, arguments.repeats)))


if __name__ == "__main__":
    main()
