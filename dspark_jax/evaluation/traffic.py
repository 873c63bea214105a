"""Open-loop traffic on the real serving engine: requests arrive when they arrive, whether or not others are done.

Arrivals are a Poisson process; prompts are drawn from all prompt sets alike. Every contender (plain decoding, fixed
lengths, schedulers) gets the same requests at the same times. `evaluation.load` replays recorded rounds on the cost
table of any machine; here the clock of this one runs.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from dspark_jax.config import InputError
from dspark_jax.engine import schedulers
from dspark_jax.engine.models import Models
from dspark_jax.engine.request import Request, RequestMetrics
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.engine.serving import Engine, QueueFull
from dspark_jax.evaluation.decoding import Decoder
from dspark_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request of the traffic.

    Attributes:
      seconds: after the beginning.
      prompt: token ids.
      prompt_set: where it comes from.
      seed: of its draws.
    """

    seconds: float
    prompt: Sequence[int]
    prompt_set: str
    seed: int


@dataclasses.dataclass(frozen=True)
class Served:
    """What became of a request.

    Attributes:
      arrival: the request.
      tokens: it was given.
      metrics: its times and counts, or None: the queue was full and it was turned away.
    """

    arrival: Arrival
    tokens: int
    metrics: RequestMetrics | None


@dataclasses.dataclass(frozen=True)
class TrafficPoint:
    """One contender at one rate; NaN where no request was served.

    Attributes:
      offered: requests per second.
      served: number of requests that were.
      refused: number of requests that found the queue full.
      tokens_per_second: of all requests, from the first arrival to the last token.
      per_user: median over requests of the tokens per second after the first token.
      first_token_p50: seconds from arrival to the first token, median.
      first_token_p95: the same, 95th percentile.
      queue_p95: seconds from arrival to a slot, 95th percentile.
      accepted_length: tokens per round; 1 for plain decoding.
      budget: verified tokens per round of a request, the anchor included.
    """

    offered: float
    served: int
    refused: int
    tokens_per_second: float
    per_user: float
    first_token_p50: float
    first_token_p95: float
    queue_p95: float
    accepted_length: float
    budget: float


def poisson_arrivals(
    prompts: Sequence[Sequence[int]], sets: Sequence[str], rate: float, count: int, seed: int
) -> list[Arrival]:
    """`count` requests of a Poisson process of `rate` per second.

    The same seed gives the same requests in the same order at every rate; only the time between them scales.

    Args:
      prompts: token ids.
      sets: prompt set of each prompt; every set is as likely as any other.
      rate: requests per second.
      count: of requests.
      seed: of times and choices.
    """
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(size=count)
    names = sorted(set(sets))
    members = {name: [i for i, one in enumerate(sets) if one == name] for name in names}
    out, now = [], 0.0
    for number in range(count):
        now += float(gaps[number]) / rate
        name = names[rng.integers(len(names))]
        chosen = members[name][rng.integers(len(members[name]))]
        out.append(Arrival(now, prompts[chosen], name, int(rng.integers(2**31 - 1))))
    return out


def drive(
    engine: Engine,
    arrivals: Sequence[Arrival],
    *,
    max_new_tokens: int,
    temperature: float,
    advance: Callable[[int], None] = lambda _: None,
) -> list[Served]:
    """Submits every request at its time to an engine whose thread runs, and waits until all have ended.

    Args:
      engine: started and warmed up.
      arrivals: in the order of their times.
      max_new_tokens: budget of each.
      temperature: of each.
      advance: called with 1 for every request that has been submitted or turned away.
    """
    handles: list[Request | None] = []
    began = time.monotonic()
    for arrival in arrivals:
        wait = began + arrival.seconds - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        try:
            handle = engine.submit(
                arrival.prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=arrival.seed
            )
        except QueueFull:
            handle = None
        handles.append(handle)
        advance(1)
    results = [None if handle is None else handle.result() for handle in handles]
    return [
        Served(arrival, 0, None) if result is None else Served(arrival, len(result.tokens), result.metrics)
        for arrival, result in zip(arrivals, results, strict=True)
    ]


def summarise(served: Sequence[Served], rate: float) -> TrafficPoint:
    """What the users of one run have seen."""
    done = [(one, one.metrics) for one in served if one.metrics is not None]
    first = [metrics.first_token_seconds for _, metrics in done if metrics.first_token_seconds is not None]
    queue = [metrics.queue_seconds for _, metrics in done if metrics.queue_seconds is not None]
    ends = [one.arrival.seconds + metrics.total_seconds for one, metrics in done if metrics.total_seconds is not None]
    speeds = [
        (one.tokens - 1) / (metrics.total_seconds - metrics.first_token_seconds)
        for one, metrics in done
        if one.tokens > 1 and metrics.total_seconds is not None and metrics.first_token_seconds is not None
        if metrics.total_seconds > metrics.first_token_seconds
    ]
    rounds = sum(metrics.rounds for _, metrics in done)
    begun = served[0].arrival.seconds if served else 0.0
    return TrafficPoint(
        offered=rate,
        served=len(done),
        refused=len(served) - len(done),
        tokens_per_second=sum(one.tokens for one, _ in done) / (max(ends) - begun) if ends else float("nan"),
        per_user=_quantile(speeds, 0.5),
        first_token_p50=_quantile(first, 0.5),
        first_token_p95=_quantile(first, 0.95),
        queue_p95=_quantile(queue, 0.95),
        accepted_length=sum(metrics.emitted for _, metrics in done) / rounds if rounds else float("nan"),
        budget=1.0 + sum(metrics.admitted for _, metrics in done) / rounds if rounds else float("nan"),
    )


def traffic_curves(
    contenders: Mapping[str, tuple[Models, Scheduler | None]],
    make_engine: Callable[[Models, Scheduler | None], Engine],
    arrivals: Callable[[float], Sequence[Arrival]],
    rates: Sequence[float],
    *,
    max_new_tokens: int,
    temperature: float,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, list[TrafficPoint]]:
    """Every contender at every rate, each with a fresh engine that has compiled everything before the clock starts.

    Args:
      contenders: (models, scheduler or None) by name.
      make_engine: (models, scheduler) -> an engine that is not started.
      arrivals: requests per second -> the requests, see `poisson_arrivals`.
      rates: requests per second.
      max_new_tokens: budget of each.
      temperature: of each.
      advance: called with the number of requests that have been submitted.
    """
    curves: dict[str, list[TrafficPoint]] = {name: [] for name in contenders}
    for name, (models, scheduler) in contenders.items():
        for rate in rates:
            engine = make_engine(models, scheduler)
            engine.warm_up(greedy=True, sampled=temperature > 0)
            with engine:
                served = drive(
                    engine, arrivals(rate), max_new_tokens=max_new_tokens, temperature=temperature, advance=advance
                )
            curves[name].append(summarise(served, rate))
    return curves


def parse_rates(text: str) -> tuple[float, ...]:
    """Rates in requests per second, e.g. "2,4,8".

    Raises:
      InputError: one of them is no positive number.
    """
    try:
        rates = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        rates = ()
    if not rates or not all(np.isfinite(rate) and rate > 0 for rate in rates):
        raise InputError(f"--traffic={text!r} is no list of rates; give requests per second, e.g. --traffic=2,4,8")
    return rates


def traffic_contenders(
    models: Models, steps_per_second: np.ndarray | None
) -> dict[str, tuple[Models, Scheduler | None]]:
    """(models, scheduler) by name: plain, fixed lengths, and the schedulers that this drafter can feed.

    Args:
      models: of the run.
      steps_per_second: [N + 1] of this machine, for Algorithm 1; None leaves it out.
    """
    size = models.block_size
    out: dict[str, tuple[Models, Scheduler | None]] = {"plain": (models.plain(), None)}
    for length in sorted({min(2, size), size}):
        out[f"fixed {length}"] = (models, schedulers.fixed(length))
    if models.confident:
        out["threshold 0.5"] = (models, schedulers.threshold(0.5))
        if steps_per_second is not None:
            out["early stop"] = (models, schedulers.early_stop(steps_per_second))
    return out


def measure_traffic(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    sets: Sequence[str],
    rates: Sequence[float],
    *,
    slots: int,
    count: int,
    temperature: float,
    steps_per_second: np.ndarray | None = None,
) -> dict[str, list[TrafficPoint]]:
    """`traffic_curves` of a run's models and prompts, with a progress bar.

    Args:
      decoder: with the models.
      prompts: token ids.
      sets: prompt set of each prompt.
      rates: requests per second.
      slots: requests decoded together.
      count: requests at every rate.
      temperature: of all requests.
      steps_per_second: see `traffic_contenders`.
    """
    contenders = traffic_contenders(decoder.models, steps_per_second)
    capacity = max(map(len, prompts)) + decoder.max_new_tokens

    def make_engine(models: Models, scheduler: Scheduler | None) -> Engine:
        return Engine(
            models,
            slots=slots,
            capacity=capacity,
            scheduler=scheduler,
            stop_tokens=decoder.stop_tokens,
            max_queue=max(count, 1),
        )

    def arrivals(rate: float) -> list[Arrival]:
        return poisson_arrivals(prompts, sets, rate, count, decoder.seed)

    with Progress("traffic", len(contenders) * len(rates) * count, unit="request") as progress:
        return traffic_curves(
            contenders,
            make_engine,
            arrivals,
            rates,
            max_new_tokens=decoder.max_new_tokens,
            temperature=temperature,
            advance=progress.advance,
        )


def traffic_table(curves: Mapping[str, Sequence[TrafficPoint]]) -> str:
    """The curves in words for a terminal."""
    title, heads = (
        "open-loop traffic",
        ("req/s", "served", "refused", "tokens/s", "per user", "first p50", "p95", "tau"),
    )
    width = max(len(title), *map(len, curves))
    lines = [f"{title:{width}s} " + " ".join(f"{head:>9s}" for head in (*heads, "verified"))]
    for name, points in curves.items():
        for one in points:
            counts = f"{one.offered:9g} {one.served:9d} {one.refused:9d}"
            speeds = f"{one.tokens_per_second:9.1f} {one.per_user:9.1f}"
            waits = f"{one.first_token_p50:8.2f}s {one.first_token_p95:8.2f}s"
            lines.append(f"{name:{width}s} {counts} {speeds} {waits} {one.accepted_length:9.2f} {one.budget:9.2f}")
    return "\n".join(lines)


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else float("nan")
