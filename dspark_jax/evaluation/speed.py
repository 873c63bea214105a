"""Speed of decoding at batch 1: plain, drafting always, and drafting where it pays; here or with fewer CPU threads.

XLA on a CPU splits every product over its threads, of which it starts as many as there are processors. For a model of
a few million parameters handing work over costs more than it saves (measured on two cores, 5.8 M parameters: a round
takes 3.4 ms with two threads and 2.3 ms with one), and the number is fixed when a process starts. Hence
`eval.speed_threads`: this module is also a program that measures and writes what it found.
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dspark_jax import jobs
from dspark_jax.config import InputError, from_json, to_json
from dspark_jax.engine import schedulers
from dspark_jax.engine.generate import Prompts, decode, decode_shape, padded_stops
from dspark_jax.engine.result import DecodeResult
from dspark_jax.engine.sampling import fold_keys, request_keys, request_sampling
from dspark_jax.evaluation.decoding import Decoder, Request, Requests
from dspark_jax.evaluation.setup import open_decoder
from dspark_jax.run import Run
from dspark_jax.training.best import NEWEST


@dataclasses.dataclass(frozen=True)
class Speed:
    """Decoding one request at a time, in three ways, which are the columns.

    0 is plain, 1 drafts in every round, and 2 in those that promise to gain by it (`schedulers.adaptive`).

    Attributes:
      tokens: [N, 3] new tokens.
      seconds: [N, 3], prefill included.
      round_cost: time of a round with drafts over that of a plain one, as column 2 was told.
    """

    tokens: np.ndarray
    seconds: np.ndarray
    round_cost: float


def measure_speed(
    decoder: Decoder, requests: Requests, temperature: float, advance: Callable[[int], None] | None = None
) -> Speed:
    """Decodes every request in all ways in turn, so that they see the same state of the machine.

    Compilation happens in a first decoding of each kind that is not counted, and the weights get their form before it.
    What a round with drafts costs is measured on the first request, which is decoded once more for it.
    """
    ways = (decoder.models.plain(), decoder.models)
    decoders = [dataclasses.replace(decoder, models=models.for_decoding(batch_size=1)) for models in ways]

    def run(number: int, column: int, round_cost: float = 2.0) -> tuple[float, DecodeResult]:
        confident = decoder.models.confident
        scheduler = schedulers.adaptive(1 / round_cost, confident=confident) if column == 2 else None
        one, started = requests.take([number]), time.perf_counter()
        speculative = bool(column)
        result = decoders[column > 0].decode(
            one, temperature, speculative=speculative, batch_size=1, scheduler=scheduler
        )
        return time.perf_counter() - started, result

    for column in range(3):
        run(0, column)
    plain, drafting = (_seconds_per_round(one, requests, temperature) for one in decoders)
    # Hosts that were told different costs would not run the same rounds.
    cost = float(multihost_utils.broadcast_one_to_all(drafting / plain))
    tokens, seconds = np.zeros((len(requests.items), 3)), np.zeros((len(requests.items), 3))
    for number in range(len(requests.items)):
        for column in range(3):
            seconds[number, column], result = run(number, column, cost)
            tokens[number, column] = len(result.tokens[0])
        if advance is not None:
            advance(1)
    return Speed(tokens, seconds, cost)


def _seconds_per_round(decoder: Decoder, requests: Requests, temperature: float, repeats: int = 3) -> float:
    """Seconds of a round at batch 1, by decoding the first request to its end and, for comparison, not at all.

    The executable is that of `Decoder.decode`: jit takes arrays of NumPy, of one device and of a mesh for different
    things, so every argument is made in the same way as there.
    """
    prompt, width = requests.items[0].prompt, requests.width
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(prompt)] = prompt
    length = np.asarray([len(prompt)], np.int32)
    keys = fold_keys(request_keys(0, jnp.zeros(1, jnp.int32)), jnp.zeros(1, jnp.int32))
    sampling = request_sampling(1, temperature=temperature)
    stops = padded_stops([-1] * len(decoder.stop_tokens))  # nothing ends it early
    shape = decode_shape(width, decoder.max_new_tokens, decoder.models, trace=False)

    def run(new_tokens: int) -> tuple[float, int]:
        limits, started = length + np.int32(new_tokens), time.perf_counter()
        prompts = Prompts(tokens, length, limits, keys)
        state, _ = decode(decoder.models, prompts, sampling, stops, schedulers.fixed(), shape=shape)
        rounds = int(jax.device_get(state.rounds)[0])
        return time.perf_counter() - started, rounds

    start, _ = min(run(1) for _ in range(repeats))
    whole, rounds = min(run(decoder.max_new_tokens) for _ in range(repeats))
    return max(whole - start, 1e-9) / max(rounds, 1)


def measure_speed_in_process(
    run: Run,
    requests: Requests,
    temperatures: Sequence[float],
    threads: int,
    *,
    step: int | None = None,
) -> list[Speed]:
    """`measure_speed` at every temperature, in a process whose XLA has `threads` CPU threads.

    Args:
      run: what is measured.
      requests: what to decode.
      temperatures: one result for each.
      threads: at least 1.
      step: of the checkpoint that is measured; None: the newest one.

    Raises:
      InputError: that process refused its input, or was killed.
      RuntimeError: it failed; its last words are in the message.
    """
    job = {
        "config": to_json(run.config),
        "workdir": str(run.workdir.resolve()),
        "width": requests.width,
        "requests": [dataclasses.asdict(item) for item in requests.items],
        "temperatures": list(temperatures),
        "checkpoint": NEWEST if step is None else str(step),
    }
    ended = jobs.run("dspark_jax.evaluation.speed", job, {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"})
    if ended.status == -signal.SIGKILL:
        raise InputError(
            f"eval.speed_threads={threads}: the process that measures speed was killed, perhaps for its memory; "
            "lower eval.max_new_tokens, or measure in this process with eval.speed_threads=0"
        )
    if ended.status:
        raise RuntimeError(f"measuring speed in a process of its own failed: {ended.said.strip()[-2000:]}")
    return [
        Speed(np.asarray(one["tokens"], np.int64), np.asarray(one["seconds"]), one["round_cost"])
        for one in ended.result["speeds"]
    ]


def work(job: dict[str, Any]) -> dict[str, Any]:
    """A job of `measure_speed_in_process`: by temperature the fields of `Speed`."""
    run = Run(from_json(job["config"]), Path(job["workdir"]))
    requests = Requests([Request(**item) for item in job["requests"]], job["width"])
    decoder = open_decoder(run, checkpoint=job["checkpoint"])
    with jax.set_mesh(run.mesh):
        speeds = [measure_speed(decoder, requests, temperature) for temperature in job["temperatures"]]
    return {"speeds": [vars(one) for one in speeds]}


if __name__ == "__main__":
    jobs.do(work)
