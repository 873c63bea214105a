"""Figures of a server as Prometheus reads them."""

import asyncio
import bisect
import collections
import time
from collections.abc import Iterator, Sequence

from dspark_jax.engine.request import EngineMetrics, RequestMetrics
from dspark_jax.serve.pool import Pool

WINDOW = 10
"""Seconds that rates are about."""

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_EACH = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_WHOLE = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Histogram:
    """Counts of values up to each of some bounds."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """One more value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Cumulative counts, sum and count."""
        seen = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            seen += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {seen}'
        yield f"{name}_sum{{{labels}}} {self.total:.6f}"
        yield f"{name}_count{{{labels}}} {seen}"


class _Times:
    """Histograms of one model's requests, in seconds."""

    def __init__(self) -> None:
        self.first, self.each, self.whole = Histogram(_FIRST), Histogram(_EACH), Histogram(_WHOLE)


_COUNTERS = {
    "rounds": "Decoding rounds.",
    "tokens": "Tokens handed to requests.",
    "shares": "Decoding rounds, counted once for every request in them.",
    "emitted": "Tokens that rounds gave; over shares, it is the accepted length.",
    "admitted": "Drafts that were verified.",
    "accepted": "Drafts that were accepted.",
    "rows": "Rows that the target computed in rounds.",
    "chunks": "Chunks of prompts that were read.",
    "submitted": "Requests that came into the queue.",
    "refused": "Requests refused because the queue was full.",
    "rejected": "Requests refused as bad input.",
}

Key = tuple[str, str]


class Metrics:
    """What was served, by model and scheduler."""

    def __init__(self, pool: Pool):
        self.pool = pool
        self.responses: collections.Counter[tuple[str, int]] = collections.Counter()
        self._times: dict[str, _Times] = {}
        self._samples: dict[Key, collections.deque[tuple[float, dict[str, int]]]] = {}

    def observe(self, model: str, request: RequestMetrics, tokens: int) -> None:
        """A request that has ended."""
        times = self._times.setdefault(model, _Times())
        if request.first_token_seconds is None or request.total_seconds is None:
            return
        times.first.observe(request.first_token_seconds)
        times.whole.observe(request.total_seconds)
        if tokens > 1:
            times.each.observe((request.total_seconds - request.first_token_seconds) / (tokens - 1))

    async def sample(self) -> None:
        """Notes the engines' totals every second, for ever; rates are differences of them."""
        while True:
            self._note()
            await asyncio.sleep(1.0)

    def _note(self) -> None:
        now = time.monotonic()
        for key, engine in self.pool.engines.items():
            samples = self._samples.setdefault(key, collections.deque(maxlen=WINDOW + 1))
            samples.append((now, _totals(engine.metrics)))

    def rates(self, key: Key) -> dict[str, float]:
        """Of the engine of a model and scheduler, over the last seconds.

        Returns:
          `rounds_per_second`, `tokens_per_second`, `accepted_length` (tokens per round of a request) and `budget`
          (drafts verified in it), all 0 without a round.
        """
        engine, samples = self.pool.engines[key], self._samples.get(key)
        now, totals = time.monotonic(), _totals(engine.metrics)
        then, before = samples[0] if samples else (now, totals)
        seconds = max(now - then, 1e-9)
        change = {name: totals[name] - before[name] for name in totals}
        shares = max(change["shares"], 1)
        return {
            "rounds_per_second": change["rounds"] / seconds if samples else 0.0,
            "tokens_per_second": change["tokens"] / seconds if samples else 0.0,
            "accepted_length": change["emitted"] / shares,
            "budget": change["admitted"] / shares,
        }

    def text(self, *, draining: bool, in_flight: int) -> str:
        """Everything, in Prometheus's text format."""
        engines = sorted(self.pool.engines.items())
        labels = {key: f'model="{_escaped(key[0])}",scheduler="{_escaped(key[1])}"' for key, _ in engines}
        lines = [
            *_family("draining", "gauge", "1 while the server shuts down.", [("", int(draining))]),
            *_family("in_flight", "gauge", "Requests whose response is not complete.", [("", in_flight)]),
        ]
        found = [(f'path="{path}",status="{status}"', count) for (path, status), count in self.responses.items()]
        lines += _family("responses_total", "counter", "Responses by path and status.", found)
        for name, text in _COUNTERS.items():
            values = [(labels[key], getattr(engine.metrics, name)) for key, engine in engines]
            lines += _family(f"{name}_total", "counter", text, values)
        finished = [
            (f'{labels[key]},reason="{reason}"', count)
            for key, engine in engines
            for reason, count in engine.metrics.finished.items()
        ]
        lines += _family("finished_total", "counter", "Requests that have ended, by reason.", finished)
        gauges = {
            "waiting": ("Requests in the queue.", lambda engine: engine.waiting),
            "running": ("Requests in slots.", lambda engine: engine.running),
            "slots": ("Requests that are decoded together at most.", lambda engine: engine.slots),
            "queue_size": ("Requests that may wait.", lambda engine: engine.max_queue),
        }
        for name, (text, read) in gauges.items():
            lines += _family(name, "gauge", text, [(labels[key], read(engine)) for key, engine in engines])
        rates = {key: self.rates(key) for key, _ in engines}
        for name in ("rounds_per_second", "tokens_per_second", "accepted_length", "budget"):
            values = [(labels[key], f"{rates[key][name]:.6g}") for key, _ in engines]
            lines += _family(name, "gauge", f"Over the last {WINDOW} seconds.", values)
        return "\n".join([*lines, *self._histograms()]) + "\n"

    def _histograms(self) -> Iterator[str]:
        for name, field, text in (
            ("time_to_first_token_seconds", "first", "From the queue to the first token."),
            ("time_per_token_seconds", "each", "Of the tokens after the first, mean of a request."),
            ("request_seconds", "whole", "From the queue to the end."),
        ):
            yield f"# HELP dspark_{name} {text}"
            yield f"# TYPE dspark_{name} histogram"
            for model, times in self._times.items():
                yield from getattr(times, field).lines(f"dspark_{name}", f'model="{_escaped(model)}"')


def _totals(metrics: EngineMetrics) -> dict[str, int]:
    return {name: getattr(metrics, name) for name in _COUNTERS}


def _family(name: str, kind: str, text: str, values: Sequence[tuple[str, object]]) -> list[str]:
    """A metric with its values by labels."""
    head = [f"# HELP dspark_{name} {text}", f"# TYPE dspark_{name} {kind}"]
    return head + [
        f"dspark_{name}{{{labels}}} {value}" if labels else f"dspark_{name} {value}" for labels, value in values
    ]


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
