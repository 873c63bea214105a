"""Exact enumeration of a whole round of two requests: the joint output distribution is the targets', to 1e-6.

Every pair of drafted blocks is weighted by its exact probability, scheduled by the engine's `schedule`, and judged by
the engine's acceptance and residual probabilities; tokens after the round's own are the target's. The same sum over
wrong schedulers and wrong residuals must exceed the tolerance, or it would prove nothing.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine import estimator, schedulers
from dspark_jax.engine.estimator import EstimateSettings
from dspark_jax.engine.sampling import Requests, Uniforms
from dspark_jax.engine.schedulers import History, Scheduler
from dspark_jax.engine.schedulers.lagged import admitted_by_capacity
from dspark_jax.engine.schedulers.survival import survival
from dspark_jax.engine.verify import judge
from dspark_jax.ops.sampling import Sampling, distribution, token_probabilities, words
from dspark_jax.ops.speculative_verify import acceptance_probabilities
from dspark_jax.ops.speculative_verify.xla import next_distribution

TOLERANCE = 1e-6  # of the total variation; float32 rounding gives about 2e-7
Lengths = Callable[[np.ndarray, np.ndarray], np.ndarray]  # (tokens, confidence) [N, 2, G] -> lengths [N, 2]

KINDS = {
    "prefix": lambda prefix: prefix,  # an autoregressive drafter: what it says depends on all drafts before
    "markov": lambda prefix: (len(prefix), prefix[-1:]),  # position and previous token, as DSpark's heads
    "block": len,  # position alone, as DFlash
}
CONFIDENCES = (-1.5, 0.3, 1.0, 40.0)  # few values, so that survivals tie; sigmoid(40) is exactly 1


class Request:
    """Logits of target and drafter, and confidences, after every prefix of up to G drafts."""

    def __init__(self, kind: str, vocab: int, size: int, seed: int):
        rng = np.random.default_rng(seed)
        prefixes = [p for k in range(size + 1) for p in itertools.product(range(vocab), repeat=k)]
        target = {p: 1.5 * rng.normal(size=vocab) for p in prefixes}
        drafts = {KINDS[kind](p): 1.5 * rng.normal(size=vocab) for p in prefixes}
        confidence = {KINDS[kind](p): rng.choice(CONFIDENCES) for p in prefixes}
        confidence[KINDS[kind](())] = CONFIDENCES[-1]  # the first drafts of two requests tie
        for i, p in enumerate(prefixes):  # some drafts are all but impossible for the target, some rows agree
            if i % 4 == 1:
                target[p][rng.integers(vocab)] = -60.0
            if i % 4 == 2:
                target[p] = drafts[KINDS[kind](p)]
        self.vocab, self.size = vocab, size
        self.paths = np.asarray(list(itertools.product(range(vocab), repeat=size)), np.int32)
        self.target = self.rows(target, size + 1)
        self.draft = self.rows({p: drafts[KINDS[kind](p)] for p in prefixes}, size)
        self.confidence = self.rows({p: confidence[KINDS[kind](p)] for p in prefixes}, size)

    def rows(self, table: dict[Any, Any], count: int) -> np.ndarray:
        """[V^G, count, ...]: the table at every path's prefixes of length 0..count-1."""
        return np.asarray([[table[tuple(path[:k].tolist())] for k in range(count)] for path in self.paths], np.float32)


@jax.jit
def rule(target: jax.Array, draft: jax.Array, scored: jax.Array, tokens: jax.Array, sampling: Sampling) -> Any:
    """The engine's probabilities for paths [P]: of drawing [P, G], of accepting [P, G], of the next token [P, G+1, V]
    after a rejection and at the end of the verified drafts, and the target's own [P, G+1, V].

    `draft` is what is drawn from, `scored` what the engine is told; they differ in mutations alone.
    """
    paths, size = tokens.shape
    p, q = (token_probabilities(logits, tokens, sampling) for logits in (scored, target[:, :size]))
    accepted = jnp.tile(jnp.repeat(jnp.arange(size + 1), 2), paths)  # every n, once rejected and once complete
    repeated = [jnp.repeat(array, 2 * (size + 1), axis=0) for array in (target, scored)]
    lengths = accepted + jnp.tile(jnp.asarray([1, 0]), paths * (size + 1))
    settings = sampling.take(jnp.repeat(jnp.arange(paths), 2 * (size + 1)))
    following = next_distribution(*repeated, accepted, lengths, settings).reshape(paths, size + 1, 2, -1)
    drawn = token_probabilities(draft, tokens, sampling)
    own = distribution(target, sampling)
    return drawn, acceptance_probabilities(p, q), following[:, :, 0], following[:, :, 1], own


class Outcomes:
    """What a request's round gives for every drafted path and every number of verified drafts.

    Attributes:
      probability: [P] of each path.
      made: [P, G + 1, V^(G+1)] distribution of the next G + 1 tokens, by path and scheduled length.
      truth: [V^(G+1)] the target's.
    """

    def __init__(self, request: Request, sampling: Sampling, mutate: Callable[..., Any] = rule):
        vocab, size, paths = request.vocab, request.size, request.paths
        sampling = sampling.take(jnp.zeros(len(paths), jnp.int32))
        arrays = mutate(request.target, request.draft, request.draft, paths, sampling)
        drawn, accept, rejected, complete, own = (np.asarray(array, np.float64) for array in arrays)
        tails: dict[tuple[int, ...], np.ndarray] = {}  # [V, V^(G-k)] of the target after a prefix of k
        for k in range(size, -1, -1):
            for index, path in enumerate(paths):
                prefix = tuple(path[:k].tolist())
                if prefix not in tails:
                    behind = [tails[(*prefix, v)].reshape(-1) if k < size else np.ones(1) for v in range(vocab)]
                    tails[prefix] = own[index, k][:, None] * np.stack(behind)
        self.probability = drawn.prod(axis=1)
        self.truth = tails[()].reshape(-1)
        self.made = np.zeros((len(paths), size + 1, len(self.truth)))
        for index, path in enumerate(paths):
            reached, before = 1.0, np.zeros((vocab,) * (size + 1))
            for n in range(size + 1):
                prefix = tuple(path[:n].tolist())
                behind = tails[prefix] / np.maximum(own[index, n], 1e-300)[:, None]
                if n < size and not (own[index, n] > 0).all():  # a filtered token: what follows it is never needed
                    behind = np.where(own[index, n][:, None] > 0, behind, 1.0 / vocab ** (size - n))
                ended = before.copy()
                ended[prefix] += reached * (complete[index, n][:, None] * behind).reshape(ended[prefix].shape)
                self.made[index, n] = ended.reshape(-1)
                if n < size:
                    miss = reached * (1 - accept[index, n])
                    before[prefix] += miss * (rejected[index, n][:, None] * behind).reshape(before[prefix].shape)
                    reached *= accept[index, n]


def pairs(requests: list[Request]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All pairs of paths: indices [N, 2], tokens [N, 2, G], confidences [N, 2, G]."""
    index = np.asarray(list(itertools.product(*(range(len(request.paths)) for request in requests))))

    def both(name: str) -> np.ndarray:
        return np.stack([getattr(request, name)[index[:, r]] for r, request in enumerate(requests)], axis=1)

    return index, both("paths"), both("confidence")


def joint(requests: list[Request], outcomes: list[Outcomes], lengths: Lengths) -> np.ndarray:
    """Joint distribution [V^(G+1), V^(G+1)] of both requests' next G + 1 tokens."""
    index, tokens, confidence = pairs(requests)
    scheduled = lengths(tokens, confidence)
    made = [out.made[index[:, r], scheduled[:, r]] for r, out in enumerate(outcomes)]
    weights = outcomes[0].probability[index[:, 0]] * outcomes[1].probability[index[:, 1]]
    return np.einsum("ni,nj->ij", made[0] * weights[:, None], made[1], optimize=True)


def variation(requests: list[Request], outcomes: list[Outcomes], lengths: Lengths) -> float:
    """Total variation between what the round gives and the product of the two targets."""
    truth = outcomes[0].truth[:, None] * outcomes[1].truth
    return 0.5 * float(np.abs(joint(requests, outcomes, lengths) - truth).sum())


@jax.jit
def scheduled_lengths(
    scheduler: Scheduler, tokens: jax.Array, confidence: jax.Array, active: jax.Array, history: Any
) -> Any:
    """The engine's `schedule` for N rounds [N, 2, G] at once."""

    def one(tokens: jax.Array, confidence: jax.Array) -> jax.Array:
        proposal = Proposal(tokens, jnp.zeros((*tokens.shape, 0)), confidence)
        lengths = scheduler.schedule(proposal, active, history)[0]
        return jnp.where(scheduler.drafts_now(history, active), lengths, 0)  # without drafts none is verified

    return jax.vmap(one)(tokens, confidence)


def by(scheduler: Scheduler, history: Any = None, active: tuple[bool, bool] = (True, True)) -> Lengths:
    """The lengths of the engine's scheduler."""
    return lambda tokens, confidence: np.asarray(
        scheduled_lengths(scheduler, tokens, confidence, jnp.asarray(active), history)
    )


def settings(one: tuple[float, int, float, float], two: tuple[float, int, float, float]) -> list[Sampling]:
    """Temperature, top-k, top-p and min-p of both requests, all given, so that one executable serves them all."""
    kinds = (jnp.float32, jnp.int32, jnp.float32, jnp.float32)
    return [Sampling(*(jnp.asarray([v], t) for v, t in zip(row, kinds, strict=True))) for row in (one, two)]


PLAIN, TOP_K, TOP_P, MIN_P = (1.0, 0, 1.0, 0.0), (0.6, 2, 1.0, 0.0), (1.0, 0, 0.7, 0.0), (1.0, 0, 1.0, 0.25)
GREEDY, ALL = (0.0, 0, 1.0, 0.0), (1.3, 2, 0.9, 0.1)
SAMPLINGS = {
    "unfiltered": [Sampling(jnp.asarray([1.0])), Sampling(jnp.asarray([0.6]))],
    "top-k": settings(TOP_K, TOP_K),
    "top-p": settings(TOP_P, TOP_P),
    "min-p": settings(MIN_P, MIN_P),
    "greedy": settings(GREEDY, GREEDY),
    "greedy beside top-p": settings(GREEDY, TOP_P),
    "top-k beside plain": settings(TOP_K, PLAIN),
    "all": settings(ALL, MIN_P),
}
TABLE = [9.0, 9.0, 5.0, 3.9, 3.3, 3.0, 2.6, 2.4, 1.6, 1.4]  # jagged: a token is cheap here and dear there
STEEP = [1.0, 1.0, 1.0, 0.8, 0.62, 0.56, 0.5, 0.4, 0.3, 0.3]


def all_rules(size: int) -> dict[str, Lengths]:
    """Every rule with several parameters."""
    # Every field is given to every rule, so that those of one name share an executable.
    free = {"minimum": [0, 0], "maximum": [size, size], "temperatures": np.ones(size)}
    heat = np.linspace(0.7, 2.0, size)
    prior = np.linspace(0.9, 0.3, size)
    late = schedulers.lagged(TABLE, prior, **free)
    bounded = schedulers.lagged(TABLE, prior, **free | {"minimum": [1, 0], "maximum": [size, size - 1]})
    alive = np.cumprod(np.random.default_rng(3).uniform(0.5, 1, (2, 2, size)), axis=-1)
    old = History(jnp.asarray(alive, jnp.float32))
    online = EstimateSettings(strength=1.5)
    estimate = online.start(2, size)
    for accepted in ([size, 0], [1, 1], [size - 1, 0]):
        proposed = jnp.full(2, size)
        estimate = estimator.update(estimate, proposed, jnp.asarray(accepted), jnp.ones(2, bool))
    learnt = History(old.survival, estimate, jnp.int32(0), jnp.float32(99))
    adaptive = functools.partial(schedulers.adaptive, online=online, **free)
    return {
        "fixed": by(schedulers.fixed()),
        "fixed 1": by(schedulers.fixed(1)),
        "threshold": by(schedulers.threshold(0.4, **free)),
        "early stop": by(schedulers.early_stop(TABLE, **free)),
        "early stop, steep": by(schedulers.early_stop(STEEP, **free)),
        "early stop, bounded": by(schedulers.early_stop(STEEP, **free | {"minimum": [0, 1]})),
        "early stop, scaled": by(schedulers.early_stop(TABLE, **free | {"temperatures": heat})),
        "online threshold": by(schedulers.threshold(0.4, online=online, **free), learnt),
        "online early stop": by(schedulers.early_stop(STEEP, online=online, **free), learnt),
        "online lagged": by(schedulers.lagged(TABLE, prior, online=online, **free), learnt),
        "adaptive": by(adaptive(TABLE, 4.0), learnt),
        "adaptive, plain": by(adaptive(TABLE, 99.0), learnt),
        "adaptive, trying": by(adaptive(TABLE, 99.0), dataclasses.replace(learnt, idle=jnp.int32(32))),
        "early stop, shifted": by(schedulers.early_stop(TABLE, bias=-0.6, **free | {"temperatures": heat})),
        "lagged, prior": by(late, late.start(2, size)),
        "lagged": by(late, old),
        "lagged, capacities": by(schedulers.lagged(TABLE, prior, capacities=(4, 6), **free), old),
        "lagged, bounded": by(bounded, old),
    }


@functools.cache
def requests_of(kind: str, vocab: int, size: int) -> list[Request]:
    return [Request(kind, vocab, size, seed) for seed in (1, 2)]


CASES = [(3, 3, name) for name in SAMPLINGS] + [(2, 4, "top-p"), (6, 2, "all")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("vocab", "size", "sampling"), CASES)
def test_output_distribution_is_the_targets(kind: str, vocab: int, size: int, sampling: str) -> None:
    requests = requests_of(kind, vocab, size)
    outcomes = [Outcomes(request, one) for request, one in zip(requests, SAMPLINGS[sampling], strict=True)]
    for name, lengths in all_rules(size).items():
        assert variation(requests, outcomes, lengths) < TOLERANCE, name


def test_the_schedulers_under_enumeration_do_schedule() -> None:
    """Lengths vary with the drafts, and under the batch rules with those of the other request."""
    requests = requests_of("prefix", 3, 3)
    index, tokens, confidence = pairs(requests)
    for name, lengths in all_rules(3).items():
        chosen = lengths(tokens, confidence)
        assert ((chosen >= 0) & (chosen <= 3)).all()
        if name.startswith(("online", "adaptive")):  # the same whatever was drafted in this round
            assert (chosen == chosen[0]).all(), name
            wanted = {"adaptive, plain": [0, 0], "adaptive, trying": [3, 3]}.get(name)
            assert chosen[0].tolist() == wanted if wanted else 0 < chosen[0].sum() < 6, (name, chosen[0])
            continue
        assert len(np.unique(chosen)) > 1 or name.startswith("fixed"), name
        first = [set(chosen[index[:, 0] == path, 0].tolist()) for path in range(27)]
        assert (max(map(len, first)) > 1) == name.startswith(("early", "lagged")), name


def appendix_a() -> tuple[list[Request], list[Outcomes]]:
    """The paper's counterexample as the first request; the second one is finished."""
    requests = [Request("prefix", 2, 2, seed) for seed in (0, 1)]
    one = requests[0]
    one.target[:], one.draft[:] = np.log([0.7, 0.3]), np.log([0.5, 0.5])
    one.confidence[:, 0] = np.log(0.8 / 0.2)
    one.confidence[:, 1] = np.where(one.paths[:, 0] == 0, np.log(0.9 / 0.1), -80.0)
    return requests, [Outcomes(request, Sampling(jnp.ones(1))) for request in requests]


A_TABLE = [0.0, 1.0, 0.5, 0.45]


def naive(tokens: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Global argmax of tau * SPS over this round's own survivals: what must not be done (one active request)."""
    alive = np.asarray(survival(jnp.asarray(confidence[:, 0])), np.float64)
    tau = 1 + np.cumsum(np.pad(alive, ((0, 0), (1, 0))), axis=1)
    best = np.argmax(tau * np.asarray(A_TABLE[1:]), axis=1)
    return np.stack([best, np.zeros_like(best)], axis=1)


@pytest.mark.parametrize("rule_name", ("naive", "early stop", "lagged"))
def test_appendix_a(rule_name: str) -> None:
    requests, outcomes = appendix_a()
    alone = (True, False)
    old = History(jnp.asarray(np.stack([[[0.8, 0.72], [1, 1]]] * 2), jnp.float32))
    rules = {
        "naive": (naive, 0.85),
        "early stop": (by(schedulers.early_stop(A_TABLE), None, alone), 0.70),
        "lagged": (by(schedulers.lagged(A_TABLE, [0.5, 0.5]), old, alone), 0.70),
    }
    lengths, expected = rules[rule_name]
    first = joint(requests, outcomes, lengths).sum(axis=1).reshape(2, -1).sum(axis=1)
    np.testing.assert_allclose(first, [expected, 1 - expected], atol=1e-6)


def peeking(tokens: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """Verifies draft k only where it is token 0, so far."""
    return np.cumprod(tokens == 0, axis=2).sum(axis=2)


ONE_DRAFT = schedulers.lagged([0.0, 0.0, 0.0, 9.0, 0.0], [1.0, 1.0, 1.0])  # room for one draft of two requests


def smaller_token_first(tokens: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """As `ONE_DRAFT` where the first drafts tie, but the one with the smaller token is admitted."""
    first = tokens[:, 1, 0] < tokens[:, 0, 0]
    return np.stack([~first, first], axis=1).astype(int)


@pytest.mark.parametrize("kind", KINDS)
def test_the_enumeration_sees_a_scheduler_that_peeks_or_breaks_ties_by_value(kind: str) -> None:
    requests = requests_of(kind, 3, 3)
    outcomes = [Outcomes(request, one) for request, one in zip(requests, SAMPLINGS["unfiltered"], strict=True)]
    assert variation(requests, outcomes, peeking) > 1e-2
    _, tokens, confidence = pairs(requests)
    ours = by(ONE_DRAFT, ONE_DRAFT.start(2, 3))
    assert (ours(tokens, confidence) == [1, 0]).all()
    assert variation(requests, outcomes, ours) < TOLERANCE
    assert variation(requests, outcomes, smaller_token_first) > 1e-4


DIP = [9.0, 9.0, 5.0, 3.2, 2.45, 2.1, 1.95, 1.6, 1.4, 1.2]  # up to three drafts never pay, four may


@pytest.mark.parametrize("kind", KINDS)
def test_the_enumeration_sees_the_production_rule_on_confidences_of_now(kind: str) -> None:
    """`lagged` with this round's survivals as the old ones is appendix A's global argmax: legal only where confidences
    do not depend on drafts."""
    requests = requests_of(kind, 3, 3)
    outcomes = [Outcomes(request, one) for request, one in zip(requests, SAMPLINGS["unfiltered"], strict=True)]
    table, active = jnp.asarray(DIP), jnp.ones(2, bool)

    def live_argmax(tokens: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        alive = jnp.cumprod(jax.nn.sigmoid(jnp.asarray(confidence)), axis=2)
        return np.asarray(jax.jit(jax.vmap(lambda a: admitted_by_capacity(a, a, table, active)))(alive))

    assert variation(requests, outcomes, by(schedulers.early_stop(DIP))) < TOLERANCE
    biased = variation(requests, outcomes, live_argmax)
    assert biased < TOLERANCE if kind == "block" else biased > 1e-2


def residual_of_the_row_before(target: Any, draft: Any, scored: Any, tokens: Any, sampling: Sampling) -> Any:
    """`rule` with the residual against the drafter's previous row."""
    right = rule(target, draft, scored, tokens, sampling)
    wrong = rule(target, draft, np.roll(scored, 1, axis=1), tokens, sampling)
    return *right[:2], wrong[2], *right[3:]


def drawn_without_filters(target: Any, draft: Any, scored: Any, tokens: Any, sampling: Sampling) -> Any:
    """`rule` with drafts from the plain softmax, scored by the filtered one (trap 24)."""
    plain = rule(target, draft, scored, tokens, Sampling(sampling.temperature))
    return plain[0], *rule(target, draft, scored, tokens, sampling)[1:]


@pytest.mark.parametrize("mutate", (residual_of_the_row_before, drawn_without_filters))
def test_the_enumeration_sees_a_wrong_residual_and_a_wrong_draw(mutate: Callable[..., Any]) -> None:
    requests = requests_of("prefix", 3, 3)
    for scheduler in (schedulers.fixed(), schedulers.early_stop(TABLE)):
        right, wrong = (
            [Outcomes(request, one, change) for request, one in zip(requests, SAMPLINGS["top-k"], strict=True)]
            for change in (rule, mutate)
        )
        assert variation(requests, right, by(scheduler)) < TOLERANCE
        assert variation(requests, wrong, by(scheduler)) > 1e-3


@pytest.mark.parametrize("sampling", ("unfiltered", "all", "greedy"))
def test_judge_follows_the_enumerated_probabilities(sampling: str) -> None:
    """It accepts below the enumerated probability and not above, and draws next tokens in the enumerated shares."""
    request = requests_of("prefix", 3, 3)[0]
    paths, size = request.paths.shape
    setting = SAMPLINGS[sampling][0].take(jnp.zeros(paths, jnp.int32))
    _, accept, rejected, complete, _ = (
        np.asarray(array) for array in rule(request.target, request.draft, request.draft, request.paths, setting)
    )
    proposal = Proposal(jnp.asarray(request.paths), jnp.asarray(request.draft), None)
    grid = (np.arange(64, dtype=np.float32) + 0.5) / 64
    # One call for all n: row (path, n) accepts n drafts and rejects draft n, both by a narrow margin.
    below, above = accept * np.float32(1 - 1e-4), accept * np.float32(1 + 1e-4) + np.float32(1e-7)
    uniform = np.stack([np.where(np.arange(size) < n, below, above) for n in range(size)], axis=1)

    @functools.partial(jax.jit, static_argnames="greedy")
    def verdicts(accepting: jax.Array, lengths: jax.Array, greedy: bool = False) -> Any:
        def one(u: jax.Array) -> Any:
            drawn = Uniforms(words(accepting), words(accepting), words(jnp.full(paths, u)))
            chosen = Sampling(setting.temperature, greedy=True) if greedy else setting
            return judge(jnp.asarray(request.target), proposal, lengths, Requests(drawn, chosen, jnp.asarray([-1])))

        return jax.vmap(one)(grid)

    for n, length in [(0, 0), (0, 1), (0, 3), (1, 1), (1, 3), (2, 2), (2, 3), (3, 3)]:
        accepting = jnp.asarray(uniform[:, n] if n < size else below)
        verdict = verdicts(accepting, jnp.full(paths, length))
        possible = (accept[:, :n] > 1e-12).all(axis=1) & ((n == length) | (accept[:, min(n, size - 1)] < 0.999))
        assert (np.asarray(verdict.accepted)[:, possible] == n).all()
        expected = rejected[:, n] if n < length else complete[:, n]
        shares = np.stack([(np.asarray(verdict.next_token) == v).mean(axis=0) for v in range(request.vocab)], axis=1)
        np.testing.assert_allclose(shares[possible], expected[possible], atol=1.01 / 64)
        if sampling == "greedy":
            static = verdicts(accepting, jnp.full(paths, length), greedy=True)
            np.testing.assert_array_equal(static.accepted[:, possible], verdict.accepted[:, possible])
            np.testing.assert_array_equal(static.next_token[:, possible], verdict.next_token[:, possible])
