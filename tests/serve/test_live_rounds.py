"""Events of a request are the engine's trace, field by field, whatever else is decoded beside it."""

import json
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import schedulers
from dspark_jax.engine.models import Models
from dspark_jax.engine.request import Request, Settings, TracedRound
from dspark_jax.engine.serving import Engine
from dspark_jax.serve.rounds import events, token_text
from dspark_jax.target.model import Target
from tests.engine.conftest import ByteTokenizer

VOCAB, BLOCK, SLOTS = 32, 3, 3
ROUND = {"round", "seconds", "drafted", "admitted", "accepted", "next", "committed", "text"}
ROUND |= {"rows", "running", "budget"}
END = {"done", "finish_reason", "error", "text", "rounds", "accepted", "admitted", "tau", "tokens", "seconds"}


@pytest.fixture(scope="module")
def models() -> Models:
    """A random target of two layers, and a random drafter."""
    arch = TargetArchitecture("qwen3", VOCAB, 16, 2, 2, 1, 8, 32, 1e-6, 1e4, True, 128)
    drafter = DrafterConfig("dspark", 1, BLOCK, (0,), VOCAB - 1, 8, True, True)
    return Models(
        Target(arch, rngs=nnx.Rngs(2), scale=0.3), make_drafter(arch, drafter, rngs=nnx.Rngs(1), dtype=jnp.float32)
    )


@pytest.fixture(scope="module")
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def engine(models: Models, byte_tokenizer: Any) -> Iterator[Engine]:
    """One that cuts blocks, so that not everything is verified."""
    rule = schedulers.threshold(0.5)
    engine = Engine(models, slots=SLOTS, capacity=64, scheduler=rule, tokenizer=byte_tokenizer, prefill_chunk=8)
    yield engine
    engine.close()


def test_events_are_the_trace(engine: Engine, byte_tokenizer: Any) -> None:
    prompt = [1, 2, 3]
    request = engine.submit(prompt, max_new_tokens=20, temperature=0.8, seed=3, trace=True)
    others = [engine.submit(prompt, max_new_tokens=9, temperature=0.8, seed=seed) for seed in (4, 5)]
    *rounds, end = json.loads(json.dumps([*events(request, token_text(byte_tokenizer))]))
    for other in others:
        other.result()

    assert [set(event) for event in rounds] == [ROUND] * len(rounds)
    assert set(end) >= END and end["done"] is True
    assert [event["round"] for event in rounds] == list(range(len(request.pieces)))
    for event, piece in zip(rounds, request.pieces, strict=True):
        entry = piece.round
        assert (event["text"], event["committed"]) == (piece.text, len(piece.tokens))
        if entry is None:
            assert event["next"]["id"] == piece.tokens[0] and not event["drafted"]
            continue
        assert tuple(token["id"] for token in event["drafted"]) == entry.drafted
        assert [token["text"] for token in event["drafted"]] == [byte_tokenizer.decode([one]) for one in entry.drafted]
        chances = 1 / (1 + np.exp(-np.asarray(entry.confidence)))
        assert [token["confidence"] for token in event["drafted"]] == pytest.approx(chances)
        assert (event["admitted"], event["accepted"]) == (entry.admitted, entry.accepted)
        assert event["next"]["id"] == entry.next_token
        assert (event["rows"], event["running"]) == (entry.rows, entry.running)
        assert event["budget"] == pytest.approx(entry.scheduled / entry.running)

    result = request.result()
    assert sum(event["committed"] for event in rounds) == end["tokens"] == len(result.tokens)
    assert "".join(event["text"] for event in rounds) + end["text"] == result.text
    assert end["tau"] == pytest.approx(result.metrics.emitted / result.metrics.rounds)
    assert (end["rounds"], end["accepted"], end["admitted"]) == (
        result.metrics.rounds,
        result.metrics.accepted,
        result.metrics.admitted,
    )
    assert sum(event["seconds"] for event in rounds) <= end["seconds"] == result.metrics.total_seconds
    assert all(event["seconds"] >= 0 for event in rounds)


def test_rounds_count_everybody(engine: Engine, byte_tokenizer: Any) -> None:
    """`running`, `scheduled` and `rows` are of all requests, and add up to the engine's totals."""
    asked = {"max_new_tokens": 12, "temperature": 0.8, "trace": True}
    requests = [engine.submit([1, 2, 3], seed=seed, **asked) for seed in range(SLOTS)]
    traces = [[piece.round for piece in request if piece.round] for request in requests]
    shared = [entry for entry in traces[0] if entry.running == SLOTS]
    assert shared  # all three were there together
    assert all(SLOTS <= entry.scheduled <= entry.rows <= SLOTS * (BLOCK + 1) for entry in shared)
    alone = sum(1 + entry.admitted for trace in traces for entry in trace)
    together = sum(entry.scheduled / entry.running for trace in traces for entry in trace)
    assert together == pytest.approx(alone)


def test_a_cancelled_request_ends_its_events(engine: Engine, byte_tokenizer: Any) -> None:
    request = engine.submit([1, 2, 3], max_new_tokens=40, temperature=0.8, trace=True)
    seen = events(request, token_text(byte_tokenizer))
    before = [next(seen) for _ in range(3)]
    request.cancel()
    *rounds, end = [*before, *seen]
    assert end["finish_reason"] == "cancelled" and end["tokens"] < 40
    assert sum(event["committed"] for event in rounds) == end["tokens"]


def test_events_without_drafts(byte_tokenizer: Any) -> None:
    """As the engine hands them out without a drafter, and with one in a round that drafts nothing."""
    settings = Settings(9, 0.0, 0, 1.0, 0.0, 0, 0, (), (), trace=True)
    request = Request(0, np.asarray([1]), settings, None, lambda timeout: False, lambda request: None)
    request.receive([5], None, None, 0)
    request.receive([6], None, TracedRound((), None, 0, 0, 6, running=2, scheduled=2, rows=3), 1)
    request.receive([7], "stop", TracedRound((), (), 0, 0, 7, running=2, scheduled=2, rows=3), 1)
    *rounds, end = events(request, token_text(byte_tokenizer))
    seen = [(event["drafted"], event["next"]["id"], event["committed"], event["budget"]) for event in rounds]
    assert seen == [([], 5, 1, 0.0), ([], 6, 1, 1.0), ([], 7, 1, 1.0)]
    assert (end["tau"], end["tokens"], end["finish_reason"]) == (1.0, 3, "stop")


def test_a_request_that_never_began(engine: Engine, byte_tokenizer: Any) -> None:
    request = engine.submit([1, 2, 3], max_new_tokens=6, trace=True)
    request.cancel()
    (end,) = events(request, token_text(byte_tokenizer))
    assert (end["tau"], end["tokens"], end["first_token_seconds"]) == (None, 0, None)
