"""Serving: whatever else is running, a request's tokens are those of `generate`; nothing is lost; errors are clear."""

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import DrafterConfig, InputError, MeshConfig, TargetArchitecture
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import batch as batch_module
from dspark_jax.engine import generate, schedulers
from dspark_jax.engine.estimator import EstimateSettings
from dspark_jax.engine.models import Models
from dspark_jax.engine.request import Request
from dspark_jax.engine.sampling import request_keys
from dspark_jax.engine.serving import Engine, EngineClosed, EngineFailed, QueueFull
from dspark_jax.engine.slots import Chunk, Mode, open_slots, prefill_chunk, serve_round
from dspark_jax.sharding import make_mesh
from dspark_jax.target.model import Target
from tests.conftest import others_slow

VOCAB, SIZE, SLOTS, CAPACITY, CHUNK = 32, 3, 3, 50, 8


@pytest.fixture(scope="module")
def target() -> Target:
    """A random Qwen3 of two layers."""
    arch = TargetArchitecture("qwen3", VOCAB, 16, 2, 2, 1, 8, 32, 1e-6, 1e4, True, 128)
    return Target(arch, rngs=nnx.Rngs(2), scale=0.3)


@pytest.fixture(scope="module")
def drafter(target: Target) -> Any:
    """A random DSpark of one layer: it is rarely right, and its cache is the real thing."""
    config = DrafterConfig("dspark", 1, SIZE, (0,), VOCAB - 1, 8, True, True)
    return make_drafter(target.arch, config, rngs=nnx.Rngs(1), dtype=jnp.float32)


@pytest.fixture(scope="module")
def serve(target: Target, drafter: Any, byte_tokenizer: Any) -> Any:
    """Engines that share their executables."""

    def make(**options: Any) -> Engine:
        sizes: dict[str, Any] = {"slots": SLOTS, "capacity": CAPACITY, "prefill_chunk": CHUNK, "max_stop_tokens": 4}
        return Engine(Models(target, drafter), **(sizes | {"tokenizer": byte_tokenizer} | options))

    return make


def asks(count: int, seed: int, sampled: bool = True) -> list[dict[str, Any]]:
    """Random requests: prompts of one token, of whole chunks, and the longest (its last chunk is mostly padding)."""
    rng = np.random.default_rng(seed)
    lengths = [1, CHUNK, CAPACITY - 1, 2 * CHUNK, CHUNK + 1, *rng.integers(1, 27, count)][:count]
    found = []
    for number, length in enumerate(lengths):
        heat = float(rng.choice([0.0, 0.8, 1.2])) if sampled else 0.0
        budget = 1 if number == 2 else int(rng.integers(1, 24))
        found.append(
            {"prompt": rng.integers(0, VOCAB, length).tolist(), "max_new_tokens": budget, "temperature": heat}
            | {
                "seed": int(rng.integers(0, 2**31)),
                "random_stream": number % 3,
                "top_p": float(rng.choice([1.0, 0.9])) if heat else 1.0,
            }
        )
    return found


@pytest.fixture(scope="module")
def reference(target: Target, drafter: Any) -> Any:
    """Decodes requests with `generate`, to the largest budget; a shorter one is a prefix of that."""

    def decode(requests: list[dict[str, Any]], stop_tokens: Sequence[int] = ()) -> list[list[int]]:
        settings = {name: [one[name] for one in requests] for name in ("temperature", "top_p")}
        keys = jnp.stack([request_keys(one["seed"], jnp.array([one["random_stream"]]))[0] for one in requests])
        prompts = [one["prompt"] for one in requests]
        options: dict[str, Any] = {"max_new_tokens": 24, "prompt_width": CAPACITY, "batch_size": 8}
        result = generate(Models(target, drafter), prompts, keys=keys, stop_tokens=stop_tokens, **settings, **options)
        pairs = zip(result.tokens, requests, strict=True)
        return [tokens[: one["max_new_tokens"]].tolist() for tokens, one in pairs]

    return decode


def drive(engine: Engine) -> None:
    while engine.step():
        pass


@pytest.mark.parametrize("chunks", others_slow((1, 3), 3))
def test_a_request_is_decoded_as_if_alone(serve: Any, reference: Any, chunks: int) -> None:
    """Random arrivals and cancellations over three slots that are used again and again; greedy and sampled."""
    requests, rng = asks(24, seed=0), np.random.default_rng(1)
    expected = reference(requests, stop_tokens=[5])
    engine = serve(stop_tokens=[5], prefill_chunks=chunks)
    handles: list[Request] = []
    cancelled: set[int] = set()
    read: list[int] = []
    while len(handles) < len(requests) or any(not one.done for one in handles):
        for _ in range(rng.integers(0, 3)):
            if len(handles) < len(requests):
                handles.append(engine.submit(**requests[len(handles)]))
        if handles and rng.random() < 0.15:
            number = int(rng.integers(0, len(handles)))
            if handles[number].cancel():
                cancelled.add(number)
        before = engine.metrics.chunks
        engine.step()
        read.append(engine.metrics.chunks - before)
    assert max(read) == chunks
    assert 2 <= len(cancelled) <= 12
    reasons = collections.Counter()
    for number, (handle, tokens) in enumerate(zip(handles, expected, strict=True)):
        result = handle.result()
        reasons[result.finish_reason] += 1
        if number in cancelled:
            assert result.finish_reason == "cancelled"
            assert list(result.tokens) == tokens[: len(result.tokens)]
            continue
        assert list(result.tokens) == tokens
        assert result.finish_reason == ("stop" if tokens[-1] == 5 else "length")
        assert result.metrics.rounds <= len(tokens) - 1 <= result.metrics.emitted
        assert 0 <= result.metrics.queue_seconds <= result.metrics.first_token_seconds <= result.metrics.total_seconds
    assert reasons["stop"] and reasons["length"]
    assert engine.metrics.finished == dict.fromkeys(engine.metrics.finished, 0) | reasons
    assert engine.metrics.tokens == sum(len(one.result().tokens) for one in handles)


def test_the_lagged_scheduler_changes_no_greedy_answer(serve: Any, reference: Any) -> None:
    requests = asks(9, seed=3, sampled=False)
    table = 9.0 / np.maximum(1.0, np.arange(13) / 5)
    engine = serve(scheduler=schedulers.lagged(table, [0.8, 0.5, 0.1], capacities=(4, 7, 12)))
    handles = [engine.submit(**one, trace=True) for one in requests]
    drive(engine)
    assert [list(one.result().tokens) for one in handles] == reference(requests)
    rounds = [piece.round for one in handles for piece in one.pieces if piece.round is not None]
    assert len({one.admitted for one in rounds}) > 1  # it does schedule
    assert all(one.accepted <= one.admitted <= SIZE and len(one.drafted) == SIZE for one in rounds)
    assert sum(one.accepted for one in rounds) == engine.metrics.accepted


@pytest.mark.slow
def test_rounds_without_drafts_change_no_greedy_answer(serve: Any, reference: Any) -> None:
    """Slots decide together; a drafter that is rarely right is asked rarely, and knows what happened meanwhile."""
    requests = asks(9, seed=3, sampled=False)
    engine = serve(scheduler=schedulers.adaptive(1 / 1.8, probe=5, trial_share=np.inf))
    handles = [engine.submit(**one, trace=True) for one in requests]
    drive(engine)
    assert [list(one.result().tokens) for one in handles] == reference(requests)
    rounds = [piece.round for one in handles for piece in one.pieces if piece.round is not None]
    assert {(len(one.drafted), one.admitted) for one in rounds} == {(0, 0), (SIZE, SIZE)}
    assert all(one.confidence is not None and len(one.confidence) == len(one.drafted) for one in rounds)
    assert sum(not one.drafted for one in rounds) > len(rounds) / 2


@pytest.mark.parametrize("name", ("fixed", "lagged"))
def test_flat_verification_in_sizes(serve: Any, reference: Any, name: str) -> None:
    """The tokens are those of whole rounds, and nothing is compiled once the engine is warm."""
    table = 9.0 / np.maximum(1.0, np.arange(13) / 4)
    scheduler = {"fixed": schedulers.fixed(), "lagged": schedulers.lagged(table, [0.8, 0.5, 0.1])}[name]
    requests = asks(7, seed=6, sampled=False)
    engine = serve(scheduler=scheduler)
    assert engine._batch.sizes == (2, 3, 6)
    engine.warm_up(sampled=False)
    compiled = serve_round._cache_size()
    handles = [engine.submit(**one, trace=True) for one in requests]
    drive(engine)
    assert [list(one.result().tokens) for one in handles] == reference(requests)
    assert serve_round._cache_size() == compiled
    rounds = [piece.round for one in handles for piece in one.pieces if piece.round is not None]
    assert (len({one.admitted for one in rounds}) > 1) == (name == "lagged")


@pytest.mark.parametrize("maximum", others_slow((0, 1), 0))
def test_fewer_admitted_drafts_compute_fewer_rows(serve: Any, reference: Any, maximum: int) -> None:
    """Without being asked: two slots with nothing admitted are 2 rows, with one draft each 4 that are computed as 6."""
    engine = serve(scheduler=schedulers.early_stop(np.ones(13), maximum=maximum))
    requests = asks(4, seed=6, sampled=False)
    handles = [engine.submit(**one) for one in requests]
    drive(engine)
    assert [list(one.result().tokens) for one in handles] == reference(requests)
    whole = (SIZE + 1) * 2 * engine.metrics.rounds
    assert engine.metrics.rows <= {0: whole / 4, 1: whole * 3 / 4}[maximum]


def test_without_a_drafter(target: Target, reference: Any) -> None:
    requests = asks(5, seed=4, sampled=False)
    engine = Engine(Models(target), slots=2, capacity=CAPACITY, prefill_chunk=CHUNK)
    handles = [engine.submit(**one) for one in requests]
    drive(engine)
    assert [list(one.result().tokens) for one in handles] == reference(requests)
    assert all(one.metrics.accepted == 0 for one in handles)


@pytest.mark.slow
def test_a_slot_is_handed_over_clean(models: Any, target: Target) -> None:
    """After rounds of another request, a drafter with a memory of its own and the history hold nothing of it."""
    drafter = models.near(target, 2, confidence=True)
    scheduler = schedulers.lagged(np.ones(9), [0.75, 0.5], online=EstimateSettings())
    pair = Models(target, drafter)
    slots = open_slots(pair, scheduler, count=2, rows=32, stops=1)
    state = slots.state
    shown, seen = state.draft_cache
    used = (jnp.full_like(shown, 7.0), jnp.full_like(seen, 3))
    estimate = state.history.estimate
    estimate = dataclasses.replace(estimate, accepted=estimate.accepted + 3, all_accepted=estimate.all_accepted + 5)
    blank = dataclasses.replace(state.history, survival=state.history.survival * 0, estimate=estimate)
    state = jax.tree.map(jnp.copy, state.__class__(**(vars(state) | {"draft_cache": used, "history": blank})))
    slots = slots.__class__(state, slots.sampling, slots.stop_tokens)
    prompt = np.arange(1, 7, dtype=np.int32)
    nobody = np.zeros(2, bool)
    for start, count in ((0, 4), (4, 2)):
        # A round moves the history on, and writes cache rows of slots that take no part in it.
        slots, _ = serve_round(pair, slots, nobody, scheduler, mode=Mode())
        tokens = np.zeros(4, np.int32)
        tokens[:count] = prompt[start : start + count]
        numbers = [np.int32(n) for n in (count, start, 1, 6, 9, 0, 0)]
        chunk = Chunk(
            tokens, *numbers, np.float32(0), np.int32(0), np.float32(1), np.float32(0), np.full(1, -1, np.int32)
        )
        chunk = jax.tree.map(lambda value: value[None], chunk)  # one part
        slots, committed = prefill_chunk(pair, slots, chunk, scheduler)
        assert committed.counts.tolist() == [int(start == 4)]
        assert slots.state.lengths.tolist() == [1, start + count + 1]
        assert slots.state.finished.tolist() == [True, start == 0]
    shown, seen = slots.state.draft_cache
    assert seen[1].tolist() == [*prompt.tolist(), *[-1] * (26 + pair.pending_rows)]
    assert np.isnan(shown[1, 6:]).all() and np.isfinite(shown[1, :6]).all()
    assert (seen[0] == 3).all() and (shown[0] == 7).all()
    history = slots.state.history
    assert history.survival[:, 1].tolist() == [[0.75, 0.5]] * 2
    assert not (history.survival[:, 0] == 0.75).any()
    assert history.estimate.accepted.tolist() == [[3, 3], [0, 0]]  # what all requests did stays known
    assert history.estimate.all_accepted.tolist() == [5, 5]


def test_a_long_prompt_does_not_stall_the_others(serve: Any) -> None:
    """Every step launches one round and at most one chunk, and what a step launches is read by the next one."""
    engine = serve()
    short = engine.submit([1], max_new_tokens=40)
    engine.step()
    assert (engine.metrics.chunks, engine.metrics.rounds, len(short.pieces)) == (1, 1, 0)
    engine.step()
    assert (engine.metrics.chunks, engine.metrics.rounds, len(short.pieces)) == (1, 2, 2)
    long = engine.submit([2] * (4 * CHUNK + 1), max_new_tokens=2)
    for step in range(1, 6):
        engine.step()
        assert (engine.metrics.chunks, engine.metrics.rounds, len(short.pieces)) == (1 + step, 2 + step, 2 + step)
        assert not long.pieces
    engine.step()
    assert engine.metrics.chunks == 6 and long.pieces
    engine.close()
    assert short.finish_reason == "cancelled"


def test_a_cancelled_request_costs_nothing_further(serve: Any) -> None:
    """The device learns of it with the next round, and the others go on."""
    engine = serve()
    handles = [engine.submit([number], max_new_tokens=40) for number in range(3)]
    for _ in range(5):
        engine.step()
    assert handles[1].cancel()
    tokens = handles[1].result().tokens
    engine.step()
    state = engine._batch._device.state
    assert state.finished.tolist() == [False, True, False]
    lengths = state.lengths.tolist()
    engine.step()
    assert engine._batch._device.state.lengths[1] == lengths[1]
    assert handles[1].result().tokens == tokens and len(tokens) < 40
    drive(engine)
    assert [one.finish_reason for one in handles] == ["length", "cancelled", "length"]


def test_stop_strings_and_stop_tokens_of_a_request(serve: Any, reference: Any, byte_tokenizer: Any) -> None:
    requests = asks(6, seed=6, sampled=False)
    for one in requests:
        one |= {"max_new_tokens": 24, "prompt": one["prompt"][:24]}
    expected, tokenizer = reference(requests), byte_tokenizer
    engine = serve()
    plain = [engine.submit(**one) for one in requests]
    chosen = next(i for i, tokens in enumerate(expected) if len(set(tokens[4:10])) > 3)
    tokens = expected[chosen]
    by_token = engine.submit(**requests[chosen], stop_tokens=[tokens[6]])
    text = tokenizer.decode(tokens)
    stop = next(text[i : i + 3] for i in range(8, len(text)) if "\ufffd" not in text[i : i + 3])
    by_text = engine.submit(**requests[chosen], stop_strings=["never", stop])
    drive(engine)
    assert [list(one.result().tokens) for one in plain] == expected
    assert [one.result().text for one in plain] == [tokenizer.decode(ids) for ids in expected]
    result = by_token.result()
    assert list(result.tokens) == tokens[: tokens.index(tokens[6]) + 1]
    assert result.text == tokenizer.decode(result.tokens[:-1])
    assert by_text.finish_reason == result.finish_reason == "stop"
    result = by_text.result()
    assert result.text == text[: text.find(stop)]
    assert list(result.tokens) == tokens[: len(result.tokens)]
    assert stop in tokenizer.decode(result.tokens) and stop not in tokenizer.decode(result.tokens[:-1])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "the prompt is empty; give at least one token"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": "\ud800"}, "the prompt is not UTF-8: it has the lone surrogate U+D800 as its character 0"),
    ({"prompt": 7}, "prompt=7 is int; give a list of token ids"),
    ({"prompt": [1, 2.5]}, "prompt has 2.5, which is no token id"),
    ({"prompt": [VOCAB]}, "prompt has token 32 outside the vocabulary 0..31"),
    ({"prompt": [-1]}, "prompt has token -1 outside"),
    ({"prompt": [1] * 46}, "prompt of 46 tokens and max_new_tokens=5 exceed the engine's capacity=50"),
    ({"max_new_tokens": 0}, "max_new_tokens=0 is out of range; use 1 or more"),
    ({"max_new_tokens": "9"}, "max_new_tokens='9' is str; an integer is needed"),
    ({"temperature": "hot"}, "temperature='hot' is str; a number is needed"),
    ({"temperature": -1.0}, "temperature=-1.0 is out of range"),
    ({"temperature": float("nan")}, "temperature=nan is out of range"),
    ({"top_k": 1.5}, "top_k=1.5 is float"),
    ({"top_k": True}, "top_k=True is bool"),
    ({"top_p": 0.0}, "top_p=0.0 is out of range"),
    ({"min_p": 2}, "min_p=2.0 is out of range"),
    ({"seed": -1}, "seed=-1 is out of range"),
    ({"stop_tokens": [40]}, "stop_tokens has token 40 outside"),
    ({"stop_tokens": "5"}, "stop_tokens='5' is str; give a list of token ids"),
    ({"stop_tokens": [1, 2, 3, 4, 6]}, "at most max_stop_tokens=4"),
    ({"stop_tokens": [1, 2, 3, 4]}, "with the engine's own 5; at most max_stop_tokens=4"),
    ({"stop_strings": "end"}, "stop_strings='end' is no list"),
    ({"stop_strings": [""]}, "stop_strings has ''"),
    ({"trace": 1}, "trace=1 is neither True nor False"),
    ({"temprature": 1.0}, "temprature: no such parameter; did you mean temperature?"),
    ({"qqq": 1.0}, "qqq: no such parameter; leave it out"),
]


def test_bad_requests_are_refused_in_one_line_and_touch_nothing(serve: Any, reference: Any) -> None:
    requests = asks(4, seed=8, sampled=False)
    engine = serve(stop_tokens=[5])
    handles = [engine.submit(**one) for one in requests]
    for change, message in BAD:
        with pytest.raises(InputError) as refused:
            engine.submit(**({"prompt": [1], "max_new_tokens": 5} | change))
        assert message in str(refused.value) and "\n" not in str(refused.value)
        engine.step()
    drive(engine)
    assert [list(one.result().tokens) for one in handles] == reference(requests, stop_tokens=[5])
    assert (engine.metrics.submitted, engine.metrics.rejected) == (4, len(BAD))
    silent = serve(tokenizer=None)
    for change, message in (({"prompt": "ab"}, "has no tokenizer"), ({"stop_strings": ["a"]}, "need the tokenizer")):
        with pytest.raises(InputError, match=message):
            silent.submit(**({"prompt": [1], "max_new_tokens": 5} | change))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots=0"),
        ({"capacity": 1}, "capacity=1 is out of range; use 2 or more"),
        ({"capacity": 129}, "exceeds the target's max_position_embeddings=128"),
        ({"prefill_chunk": 2.0}, "prefill_chunk=2.0 is float"),
        ({"stop_tokens": [99]}, "stop_tokens has token 99"),
        ({"scheduler": schedulers.fixed([1, 2])}, "for 3 requests"),
    ],
)
def test_an_engine_that_cannot_work_is_refused(serve: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        serve(**options)


def test_a_full_queue_pushes_back(serve: Any) -> None:
    engine = serve(max_queue=2)
    first = [engine.submit([1, 2], max_new_tokens=6) for _ in range(2)]
    with pytest.raises(QueueFull, match="the queue is full \\(2 requests wait for 3 slots\\)"):
        engine.submit([3], max_new_tokens=6)
    assert first[0].cancel() and not first[0].cancel()  # a waiting request leaves the queue at once
    again = engine.submit([3], max_new_tokens=6)
    waited = engine.submit([4], max_new_tokens=6, block=True)  # drives the engine until there is room
    drive(engine)
    assert [one.finish_reason for one in (*first, again, waited)] == ["cancelled", "length", "length", "length"]
    assert (engine.metrics.refused, engine.metrics.submitted) == (1, 4)
    assert first[0].result().tokens == ()


@pytest.mark.parametrize("others", (False, True))
def test_a_wait_ends_in_time_without_a_thread(serve: Any, others: bool) -> None:
    """Between steps that get nowhere, and while somebody else is in the middle of a step."""
    engine = serve(max_queue=2)
    waiting = [engine.submit([1], max_new_tokens=9) for _ in range(2)]
    end = time.monotonic() + 60

    def advance() -> None:
        assert time.monotonic() < end, "the timeout was ignored"
        time.sleep(0.002)

    engine._admit = engine._batch.advance = advance
    with engine._driving if others else contextlib.nullcontext():
        began = time.monotonic()
        with pytest.raises(TimeoutError, match="request 0 has not ended after 0.02 seconds"):
            waiting[0].result(timeout=0.02)
        with pytest.raises(QueueFull):
            engine.submit([2], max_new_tokens=9, block=True, timeout=0.02)
        with pytest.raises(TimeoutError, match="2 requests have not ended after 0.02 seconds"):
            engine.drain(timeout=0.02)
        assert 0.06 <= time.monotonic() - began < 30
    engine.close()
    engine.drain(timeout=0)  # there is nothing to wait for


@pytest.fixture
def threads() -> Iterator[list[threading.Thread]]:
    """Threads that must have ended when the test does."""
    found: list[threading.Thread] = []
    yield found
    for one in found:
        one.join(60)
        assert not one.is_alive()


@pytest.mark.slow
def test_the_engines_own_thread_serves_many_at_once(serve: Any, reference: Any, threads: list[Any]) -> None:
    requests = asks(12, seed=0)  # as in the first test: nothing new is compiled
    expected = reference(requests, stop_tokens=[5])
    got: dict[int, list[int]] = {}

    def ask(number: int, engine: Engine) -> None:
        handle = engine.submit(**requests[number], block=True)
        got[number] = [token for piece in handle for token in piece.tokens]

    with serve(stop_tokens=[5], max_queue=2) as engine:
        threads += [threading.Thread(target=ask, args=(number, engine)) for number in range(12)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(300)
        last = engine.submit([1], max_new_tokens=4)
    assert [got[number] for number in range(12)] == expected
    assert last.finish_reason == "length"  # leaving the block drains
    with pytest.raises(EngineClosed, match="takes no more requests"):
        engine.submit([1], max_new_tokens=4)
    engine.close()


def test_closing_cancels_what_is_left(serve: Any) -> None:
    engine = serve().start()
    handles = [engine.submit([1], max_new_tokens=45) for _ in range(8)]
    engine.close()
    assert {one.result(timeout=5).finish_reason for one in handles} <= {"cancelled", "length"}
    assert sum(engine.metrics.finished.values()) == 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("threaded", [False, True])
def test_an_unexpected_error_reaches_everybody(serve: Any, monkeypatch: Any, threaded: bool) -> None:
    """No request waits for ever, and the next call says what happened."""
    engine = serve()
    handles = [engine.submit([1], max_new_tokens=9) for _ in range(5)]

    def fail(*_: Any, **__: Any) -> Any:
        raise FloatingPointError("the device\nis gone")

    monkeypatch.setattr(batch_module, "serve_round", fail)
    if threaded:
        engine.start()
    else:
        with pytest.raises(FloatingPointError):
            engine.step()
    results = [one.result(timeout=60) for one in handles]
    assert {one.finish_reason for one in results} == {"error"}
    assert results[0].error == "the engine has stopped: FloatingPointError: the device is gone"
    for call in (lambda: engine.submit([1], max_new_tokens=1), engine.drain, engine.start):
        with pytest.raises(EngineFailed, match="FloatingPointError") as raised:
            call()
        assert isinstance(raised.value.__cause__, FloatingPointError)
    engine.close()


def test_slots_split_over_a_mesh(serve: Any, reference: Any) -> None:
    requests = asks(6, seed=9, sampled=False)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        engine = serve(slots=4)
    handles = [engine.submit(**one) for one in requests]
    drive(engine)  # outside `set_mesh`: the engine remembers its mesh, as its thread has to
    assert [list(one.result().tokens) for one in handles] == reference(requests)
    for keys in engine._batch._device.state.target_cache.keys:  # one array per layer
        assert len(keys.sharding.device_set) == 8 and keys.addressable_shards[0].data.shape[0] == 1
