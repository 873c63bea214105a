"""Throughput and speed per user under load, replayed from recorded rounds against any cost table.

One CPU is no accelerator: what a scheduler is worth where the target's step time saturates is found by replaying what
drafts were accepted, and what had been predicted, with step times from a table.

The model: R users in a closed loop, each with one request at a time, dealt from the recorded ones: all of them come
once, in a random order, before any comes again, so that a single user's speed is not that of some prompts. A step
verifies the anchor and the scheduled drafts of every request and lasts as long as the table says for that many tokens.
A request that is given l drafts in a recorded round with a accepted ones commits min(a, l) + 1 tokens and goes on with
its next recorded round; it ends when it has committed as many tokens as it had, and starts over with its first round
should it run out of them. This is exact for plain decoding and for verifying everything. For a scheduler it takes
rounds of a request as exchangeable, although a cut round leaves the next one to start at another token. Runs of the
embedded target that really cut their drafts (confidence thresholds 0.3 to 0.7) committed between 0.95 and 1.05 times
the tokens per round that its recorded rounds predict. Prefill costs nothing here.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.engine.estimator import empty_estimate, restart, survival, update
from dspark_jax.engine.schedulers.early_stop import admitted_until_stop
from dspark_jax.engine.schedulers.lagged import admitted_by_capacity
from dspark_jax.evaluation.predictors import CALIBRATED, HEAD, ONLINE, SHIFTED, Calibration
from dspark_jax.evaluation.traces import Traces

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
"""Users that are simulated."""

THRESHOLD = 0.5
"""Confidence below which the threshold rule, which does not know the load, verifies nothing."""

LAG = 2
"""Rounds after which `lagged` knows confidences."""

_WIDTHS = (16, 64, 256)  # arrays of requests are padded to one of these, so that few executables are compiled


class Costs(Protocol):
    """What rounds cost on a device."""

    @property
    def name(self) -> str:
        """What it was measured on."""
        ...

    @property
    def about(self) -> str:
        """How it was measured, and what it says nothing about, if that is known."""
        ...

    @property
    def invented(self) -> bool:
        """Whether it is the shape of an accelerator and not the times of one."""
        ...

    def covers(self, users: int, rows: int) -> bool:
        """Whether it has rounds of so many requests, with `rows` each in the verified batch and without drafts."""
        ...

    def at(self, users: int) -> "CostTable":
        """Costs of rounds of so many requests."""
        ...


@dataclasses.dataclass(frozen=True)
class CostTable:
    """Steps per second of a server against the tokens in its verification batch.

    Attributes:
      name: what it was measured on.
      steps_per_second: [N + 1] for 0..N tokens; the entry of 0 is never used.
      draft_seconds: what drafting adds to a step. Plain decoding does not spend it. 0 where the table includes it.
      plain: [M + 1] steps per second of rounds without drafts, where they were measured separately.
      invented: whether it is the shape of an accelerator and not the times of one.
      about: how it was measured, and what it says nothing about, if that is known.
    """

    name: str
    steps_per_second: np.ndarray
    draft_seconds: float = 0.0
    plain: np.ndarray | None = None
    invented: bool = False
    about: str = ""

    @property
    def most_tokens(self) -> int:
        """N."""
        return len(self.steps_per_second) - 1

    @property
    def speculative(self) -> np.ndarray:
        """[N + 1] steps per second with drafting; what a scheduler reads."""
        return 1.0 / (1.0 / self.steps_per_second + self.draft_seconds)

    @property
    def without_drafts(self) -> np.ndarray:
        """Steps per second of plain decoding, by the number of requests."""
        return self.steps_per_second if self.plain is None else self.plain

    def covers(self, users: int, rows: int) -> bool:
        """See `Costs`."""
        return users * rows <= self.most_tokens and users < len(self.without_drafts)

    def at(self, users: int) -> "CostTable":
        """See `Costs`; the number of requests does not matter."""
        del users
        return self


def saturating(tokens: int, *, knee: int = 256, steps_per_second: float = 50.0, draft_share: float = 0.0) -> CostTable:
    """The shape of an accelerator: flat while reading the weights dominates, then time in proportion to the tokens.

    Args:
      tokens: N.
      knee: tokens from which compute is the bottleneck.
      steps_per_second: below the knee.
      draft_share: drafting time as a share of a step below the knee.
    """
    batch = np.arange(tokens + 1)
    name = f"saturating accelerator: {steps_per_second:g} steps/s up to {knee} tokens, then time in proportion"
    name += f", drafting {draft_share:.0%} of a step" if draft_share else ""
    rates = steps_per_second / np.maximum(1.0, batch / knee)
    return CostTable(name, rates, draft_share / steps_per_second, invented=True)


def read_cost_table(path: Path) -> CostTable:
    """Reads a table in SGLang's layout (`sample_batch_tokens`, `sample_steps_per_sec`, `max_batch_tokens`).

    As there, a batch between two samples costs what the smaller one does. Rounds without drafts may be given beside it
    (`plain_batch_tokens`, `plain_steps_per_sec`).

    Raises:
      InputError: the file cannot be read, or is not such a table.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        rates = _rates(path, content, "sample", content.get("max_batch_tokens"))
        plain = _rates(path, content, "plain", None) if "plain_batch_tokens" in content else None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); name a cost table") from None
    except InputError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(
            f"{path}: no cost table ({type(error).__name__}: {error}); it needs sample_batch_tokens and "
            "sample_steps_per_sec of equal length, as `profile` writes them"
        ) from None
    return CostTable(path.name, rates, plain=plain)


def _rates(path: Path, content: Mapping[str, Any], kind: str, most: Any) -> np.ndarray:
    """Steps per second [N + 1] for 0..N tokens from the samples of one kind; N is the last of them without `most`."""
    samples = [int(tokens) for tokens in content[f"{kind}_batch_tokens"]]
    rates = np.asarray(content[f"{kind}_steps_per_sec"], np.float64)
    most = samples[-1] if most is None else int(most)
    if rates.shape != (len(samples),) or samples != sorted(set(samples)) or samples[0] < 1 or most < samples[0]:
        raise InputError(
            f"{path}: {kind}_batch_tokens must ascend from 1 or more, with one {kind}_steps_per_sec each, and "
            f"max_batch_tokens={most} must not be below the first; measure it again"
        )
    if not (np.isfinite(rates).all() and (rates > 0).all()):
        raise InputError(f"{path}: {kind}_steps_per_sec must be positive numbers; measure it again")
    index = np.searchsorted(samples, np.arange(most + 1), side="right") - 1
    return rates[np.maximum(index, 0)]


Policy = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], Any]
"""(live [B, G], old [B, G], steps_per_second [N + 1], active [B]) -> lengths [B]; see `engine.schedulers`."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to choose verification lengths.

    Attributes:
      policy: the scheduler.
      predicted: [R, G] survival that it reads, or None: it reads the running estimate of what it has verified itself.
      drafts: whether it needs drafts; plain decoding does not.
    """

    policy: Policy
    predicted: np.ndarray | None
    drafts: bool = True


@dataclasses.dataclass(frozen=True)
class LoadPoint:
    """What R users get.

    Attributes:
      concurrency: R.
      tokens_per_second: of all users.
      per_user: tokens per second of one.
      budget: tokens per request and step in the verification batch, the anchor included.
      accepted_length: tokens that a request commits per step.
    """

    concurrency: int
    tokens_per_second: float
    per_user: float
    budget: float
    accepted_length: float


def fixed_policy(length: int) -> Policy:
    """Verifies `length` drafts of every request."""
    return lambda live, old, steps_per_second, active: np.where(active, length, 0)


def threshold_policy(minimum: float) -> Policy:
    """Verifies the drafts before the first one whose predicted conditional acceptance is below `minimum`."""

    def lengths(live: np.ndarray, old: np.ndarray, steps_per_second: np.ndarray, active: np.ndarray) -> np.ndarray:
        before = np.concatenate([np.ones_like(live[:, :1]), live[:, :-1]], axis=1)
        kept = np.cumprod(live >= minimum * before, axis=1).sum(axis=1)
        return np.where(active, kept, 0)

    return lengths


def contenders(calibration: Calibration) -> dict[str, Contender]:
    """Fixed lengths 0, 2 and G, Algorithm 1 with every predictor that there is, and with the best one the other rules.

    The names begin with the rule: plain, fixed, threshold, early stop, lagged. The last two know the load.
    """
    traces = calibration.traces
    none = np.zeros((len(traces.accepted), traces.block_size))
    lengths = {"plain": 0, "fixed 2": min(2, traces.block_size), f"fixed {traces.block_size}": traces.block_size}
    found = {name: Contender(fixed_policy(length), none, length > 0) for name, length in lengths.items()}
    best = SHIFTED if SHIFTED in calibration.predictors else ONLINE
    for name in (HEAD, CALIBRATED, SHIFTED, ONLINE):
        if name in calibration.predictors:
            predicted = None if name == ONLINE else calibration.predictors[name].survival
            found[f"early stop, {name}"] = Contender(_early_stop, predicted)
    predicted = None if best == ONLINE else calibration.predictors[best].survival
    found[f"lagged, {best}"] = Contender(_lagged, predicted)
    found[f"threshold {THRESHOLD}, {best}"] = Contender(threshold_policy(THRESHOLD), predicted)
    return found


def load_curves(
    calibration: Calibration,
    costs: Costs,
    *,
    concurrencies: Sequence[int] = CONCURRENCIES,
    steps: int = 0,
    seed: int = 0,
    advance: Callable[[int], None] | None = None,
) -> dict[str, list[LoadPoint]]:
    """All contenders at all concurrencies that the table covers with every draft verified.

    Args:
      calibration: the traces that are replayed, and what was predicted on them.
      costs: of rounds.
      concurrencies: users, at most 256.
      steps: see `replay`.
      seed: see `replay`.
      advance: called with 1 after each contender.
    """
    width = calibration.traces.block_size + 1
    covered = [users for users in concurrencies if costs.covers(users, width)]
    curves = {}
    for name, contender in contenders(calibration).items():
        curves[name] = [
            replay(calibration.traces, contender, costs.at(users), users, steps=steps, seed=seed) for users in covered
        ]
        if advance is not None:
            advance(1)
    return curves


def load_data(curves: Mapping[str, Sequence[LoadPoint]], costs: Costs, block_size: int) -> dict[str, Any]:
    """Curves as columns, and for every scheduler that knows the load its least ratio to plain decoding, and its ratio
    to verifying everything with the fewest and with the most users."""
    names = [field.name for field in dataclasses.fields(LoadPoint)]
    columns = {line: {name: [getattr(p, name) for p in points] for name in names} for line, points in curves.items()}
    speeds = {line: np.asarray(values["tokens_per_second"]) for line, values in columns.items()}
    checks = {}
    for line, speed in speeds.items():
        if line.startswith(("early stop", "lagged")) and len(speed):
            to_fixed = speed / speeds[f"fixed {block_size}"]
            checks[line] = {
                "least_ratio_to_plain": float((speed / speeds["plain"]).min()),
                "ratio_to_fixed_at_fewest_users": float(to_fixed[0]),
                "least_ratio_to_fixed": float(to_fixed.min()),
                "ratio_to_fixed_at_most_users": float(to_fixed[-1]),
            }
    said = {"cost_table": costs.name, "about": costs.about, "invented": costs.invented}
    return {**said, "curves": columns, "checks": checks}


def load_table(data: Mapping[str, Any]) -> str:
    """What `evaluate` prints of `load_data`: tokens per second of all users, then the budgets."""
    curves = data["curves"]
    users = next(iter(curves.values()))["concurrency"]
    width = max(len(name) for name in curves)
    lines = [f"load, replayed on {data['cost_table']}"]
    for title, key, form in (("tokens/s, users:", "tokens_per_second", "7.0f"), ("budget, users:", "budget", "7.2f")):
        lines.append(f"{title:{width}} " + "".join(f"{n:7d}" for n in users))
        lines += [f"{name:{width}} " + "".join(format(v, form) for v in row[key]) for name, row in curves.items()]
    lines += [
        f"{name}: at least {row['least_ratio_to_plain']:.3f} of plain decoding, {row['least_ratio_to_fixed']:.3f} "
        f"of verifying everything, {row['ratio_to_fixed_at_most_users']:.2f} times that with {users[-1]} users"
        for name, row in data["checks"].items()
    ]
    return "\n".join(lines)


@jax.jit
def _early_stop(live: Any, old: Any, steps_per_second: Any, active: Any) -> jax.Array:
    return admitted_until_stop(live, steps_per_second, active, 0, live.shape[1])


@jax.jit
def _lagged(live: Any, old: Any, steps_per_second: Any, active: Any) -> jax.Array:
    return admitted_by_capacity(live, old, steps_per_second, active, 0, live.shape[1])


def replay(
    traces: Traces, contender: Contender, table: CostTable, concurrency: int, *, steps: int = 0, seed: int = 0
) -> LoadPoint:
    """Simulates R users with one contender; see the module's docstring.

    Args:
      traces: recorded rounds; requests without any are left out.
      contender: chooses the lengths.
      table: covers R * (G + 1) tokens.
      concurrency: R, at most 256.
      steps: that are measured, after a quarter as many that are not; 0 = as many as give 8192 rounds, 96 to 4096.
      seed: of the requests' order, which is the same for every contender as far as they come to be asked.
    """
    steps = steps or int(np.clip(8192 // concurrency, 96, 4096))
    warm_up = steps // 4
    rates = table.speculative if contender.drafts else table.without_drafts
    scheduled = rates.astype(np.float32)
    users = Users(traces, concurrency, np.random.default_rng(seed))
    forecasts = Forecasts(traces, contender.predicted, concurrency)
    seconds = tokens = verified = 0.0
    for step in range(warm_up + steps):
        live, old = forecasts.before(users)
        active = forecasts.padded(np.ones(concurrency, bool))
        lengths = np.asarray(contender.policy(live, old, scheduled, active))[:concurrency]
        batch = concurrency + int(lengths.sum())
        forecasts.after(users, lengths)
        committed = users.step(lengths)
        if step >= warm_up:
            seconds += 1.0 / float(rates[batch])
            tokens += committed
            verified += batch
    rounds = steps * concurrency
    rate = tokens / seconds
    return LoadPoint(concurrency, rate, rate / concurrency, verified / rounds, tokens / rounds)


class Users:
    """R users and how far their requests are."""

    def __init__(self, traces: Traces, concurrency: int, rng: np.random.Generator):
        """Everybody starts somewhere in a request, so that they do not end together."""
        bounds = traces.rounds_of
        pool = np.flatnonzero(np.diff(bounds))
        assert len(pool), "no request has a round"
        self.traces, self.rng, self.pool = traces, rng, pool
        self.first, self.end = bounds[:-1], bounds[1:]
        self.total = np.add.reduceat(np.append(traces.emitted, 0), bounds[:-1])
        self.dealt = self.pool[:0]
        self.request = self.deal(concurrency)
        lengths = self.end[self.request] - self.first[self.request]
        self.round = self.first[self.request] + rng.integers(0, lengths)
        done = np.concatenate([[0], np.cumsum(traces.emitted)])
        self.remaining = self.total[self.request] - (done[self.round] - done[self.first[self.request]])
        self.fresh = np.ones(concurrency, bool)

    def deal(self, count: int) -> np.ndarray:
        """The next requests [count]: every one of the pool before any comes again."""
        while len(self.dealt) < count:
            self.dealt = np.concatenate([self.dealt, self.rng.permutation(self.pool)])
        taken, self.dealt = self.dealt[:count], self.dealt[count:]
        return taken

    def step(self, lengths: np.ndarray) -> int:
        """Commits what the lengths [R] allow and returns the number of tokens; ended requests are replaced."""
        accepted = np.minimum(self.traces.accepted[self.round], lengths)
        committed = np.minimum(accepted + 1, self.remaining)
        self.remaining = self.remaining - committed
        following = self.round + 1
        self.round = np.where(following == self.end[self.request], self.first[self.request], following)
        self.fresh = self.remaining <= 0
        if self.fresh.any():
            started = self.deal(int(self.fresh.sum()))
            self.request[self.fresh] = started
            self.round[self.fresh] = self.first[started]
            self.remaining[self.fresh] = self.total[started]
        return int(committed.sum())


class Forecasts:
    """Survival that a scheduler sees, live and `LAG` rounds old, in arrays padded to one of a few widths."""

    def __init__(self, traces: Traces, predicted: np.ndarray | None, concurrency: int):
        """`predicted` [R, G] of the recorded rounds, or None for the running estimate."""
        self.traces, self.predicted = traces, predicted
        self.width = next((width for width in _WIDTHS if width >= concurrency), concurrency)
        self.estimate = empty_estimate(self.width, traces.block_size) if predicted is None else None
        # A request that has just started has no old forecast: it counts as average, as the running estimate has it.
        self.average = np.zeros(traces.block_size) if predicted is None else predicted.mean(axis=0)
        self.recent: list[np.ndarray] = []

    def padded(self, values: np.ndarray) -> np.ndarray:
        """[R, ...] -> [width, ...], zeros at the end."""
        return np.concatenate([values, np.zeros((self.width - len(values), *values.shape[1:]), values.dtype)])

    def before(self, users: Users) -> tuple[np.ndarray, np.ndarray]:
        """Live and old forecasts [width, G] float32 for the coming round."""
        if self.predicted is None:
            assert self.estimate is not None
            self.estimate = _restart(self.estimate, self.padded(users.fresh))
            live = np.asarray(_survival(self.estimate))
        else:
            live = self.padded(self.predicted[users.round].astype(np.float32))
        started = self.padded(users.fresh)
        for row in self.recent:
            row[started] = live[started] if self.predicted is None else self.average
        old = self.recent[0] if len(self.recent) == LAG else live
        self.recent = [*self.recent, live.copy()][-LAG:]
        return live, old

    def after(self, users: Users, lengths: np.ndarray) -> None:
        """Learns what the round has shown; call it before the users go on."""
        if self.estimate is not None:
            proposed = np.minimum(lengths, self.traces.proposed[users.round])
            accepted = np.minimum(lengths, self.traces.accepted[users.round])
            active = np.ones(len(lengths), bool)
            self.estimate = _update(self.estimate, *map(self.padded, (proposed, accepted, active)))


_update, _restart, _survival = jax.jit(update), jax.jit(restart), jax.jit(survival)
