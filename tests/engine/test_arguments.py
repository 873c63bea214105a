"""Every argument of `Engine`, `submit`, `generate` and the schedulers refuses what it cannot be, in one line."""

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import InputError
from dspark_jax.engine import generate, schedulers
from dspark_jax.engine.estimator import EstimateSettings
from dspark_jax.engine.models import Models
from dspark_jax.engine.request import Request
from dspark_jax.engine.schedulers import Scheduler, check_scheduler
from dspark_jax.engine.serving import Engine

VOCAB, SIZE = 7, 3
RAGGED: Any = [[1], [2, 3]]
HUGE = 10**30
NO_INTEGER = [None, "1", b"1", 1.5, True, math.nan, [1], {}, np.ones(2), HUGE, -1]
NO_SIZE = [*NO_INTEGER, 0]
NO_NUMBER = [None, "1", b"1", True, [1.0, 2.0], {}, 1j, 10**400, math.nan]
NO_BOOLEAN = [None, "", "yes", 0, 1, 1.0, [], np.ones(2)]
NO_SECONDS = ["1", True, [1], {}, math.nan, -1, np.ones(2)]
NO_TOKENS = [7, 1.5, True, b"x", {}, {1}, [1.5], [True], ["a"], [None], [HUGE], [-1], [VOCAB], RAGGED, np.ones(2)]
NO_MODELS = [None, "model", 1, [], object(), Models("model"), Models(None)]  # pyright: ignore[reportArgumentType]
NO_SCHEDULER = ["fixed", "", 0, [], Scheduler, object(), np.ones((1, 2))]
NO_SIZES = [None, 4, "a", "8", {8}, ["a"], [0], [1.5], [True], [None], [HUGE], RAGGED]

ENGINE: dict[str, list[Any]] = {
    "models": NO_MODELS,
    "slots": NO_SIZE,
    "capacity": [*NO_SIZE, 1],
    "scheduler": NO_SCHEDULER,
    "tokenizer": ["Qwen/Qwen3-4B", 1, [], len],
    "stop_tokens": [None, "5", *NO_TOKENS],
    "max_queue": NO_SIZE,
    "prefill_chunk": NO_SIZE,
    "prefill_chunks": NO_SIZE[1:],
    "max_stop_tokens": NO_SIZE,
    "verify_sizes": NO_SIZES[1:],  # None chooses
}
SUBMIT: dict[str, list[Any]] = {
    "prompt": [None, *NO_TOKENS, "", [], "\ud800", "caf\udce9"],
    "max_new_tokens": NO_SIZE,
    "temperature": [*NO_NUMBER, -1, math.inf, 1e39],
    "top_k": NO_INTEGER,
    "top_p": [*NO_NUMBER, 0, 1.5, 1e-50],
    "min_p": [*NO_NUMBER, -1, 1.5],
    "seed": NO_INTEGER,
    "random_stream": NO_INTEGER,
    "stop_tokens": [None, "5", *NO_TOKENS],
    "stop_strings": [None, "end", b"end", 1, {}, [1], [""], [None], ["\ud800"]],
    "trace": NO_BOOLEAN,
    "block": NO_BOOLEAN,
    "timeout": NO_SECONDS,
    "unknown": [],
}
GENERATE: dict[str, list[Any]] = {
    "models": NO_MODELS,
    "prompts": [None, "text", b"x", 3, {}, {3}, [3], [1.5], ["a"], [[]], [[1.5]], [[True]], [[HUGE]], np.ones((1, 2))],
    "max_new_tokens": NO_SIZE,
    "temperature": [None, "1", True, [True], ["1"], [None], {}, 1j, math.nan, math.inf, 1e39, [1.0, 2.0], RAGGED],
    "top_k": [None, "1", True, 1.5, -1, [1, 2]],
    "top_p": [None, "1", True, 0, 1.5, 1e-50],
    "min_p": [None, "1", True, -1, 1.5],
    "stop_tokens": [
        None,
        "5",
        *(one for one in NO_TOKENS if repr(one) != f"[{VOCAB}]"),
    ],  # a token beyond it ends nothing
    "seed": NO_INTEGER,
    "keys": ["a", 1, [1], np.ones(1), jnp.ones(1), jax.random.key(0), jax.random.split(jax.random.key(0), 2)],
    "confidence_threshold": [*NO_NUMBER, -0.5, 1.5],
    "scheduler": NO_SCHEDULER,
    "batch_size": NO_SIZE,
    "prompt_width": NO_INTEGER,
    "verify_sizes": NO_SIZES[1:],  # None chooses
    "trace": NO_BOOLEAN,
    "progress": ["a", 1],
}
NO_COUNT = ["1", 1.5, True, [True], [None], {}, RAGGED, HUGE, -1, [1, -1], [1, 2, 3], np.ones((2, 2), int)]
NO_RATES = [None, "1", [], [math.nan], [-1.0], [math.inf], [[1.0]], ["a"], [None], {}, 1j, RAGGED]
BOUNDS: dict[str, list[Any]] = {
    "minimum": [None, *NO_COUNT, SIZE + 1],
    "maximum": NO_COUNT,
    "bias": ["1", True, {}, math.nan, [1.0, math.inf], [1.0, 2.0, 3.0], RAGGED],
    "temperatures": ["1", True, {}, 1.0, [1.0], [0.0] * SIZE, [math.nan] * SIZE, [math.inf] * SIZE, RAGGED],
    "online": ["settings", True, 0.5, {}],
    "minimun": [1],
}
TABLED = BOUNDS | {"steps_per_second": [*NO_RATES, 1.0]}
RUNGS = {"capacities": [4, "4", [], ["a"], [1.5], [0, 4], [8, 4], {4}]}
SCHEDULERS: dict[str, tuple[dict[str, Any], dict[str, list[Any]]]] = {
    "fixed": ({}, {"length": NO_COUNT}),
    "threshold": (
        {"confidence": 0.5},
        BOUNDS | {"confidence": [None, "a", True, {}, math.nan, -0.1, 1.5, [0.5, 0.5]], "capacities": [(4,)]},
    ),
    "early_stop": ({"steps_per_second": [1.0]}, TABLED | {"capacities": [(4,)]}),
    "lagged": (
        {"steps_per_second": [1.0], "prior": [0.5] * SIZE},
        TABLED | RUNGS | {"prior": [None, "a", 0.5, [0.5], [1.5] * SIZE, [math.nan] * SIZE, ["a"] * SIZE, RAGGED]},
    ),
    "adaptive": (
        {"steps_per_second": 0.5},
        BOUNDS
        | RUNGS
        | {"steps_per_second": NO_RATES, "plain_steps_per_second": NO_RATES}
        | {"probe": [None, "1", 1.5, True, -1, [1], HUGE], "confident": NO_BOOLEAN}
        | {"trial_share": [None, "1", True, -0.1, math.nan, [0.1]]},
    ),
}
NO_REAL = [None, "1", True, [1.0], {}, math.nan, 0.0, -1.0, math.inf]


def refuse(call: Callable[..., Any], good: dict[str, Any], wrong: dict[str, list[Any]]) -> None:
    """Every wrong value of every argument is refused in one line with the argument's name."""
    failed = []
    for name, values in wrong.items():
        shown = "maximum" if name == "length" else name  # the attribute that `schedulers.fixed` sets
        for value in values:
            try:
                call(**(good | {name: value}))
                failed.append(f"{name}={value!r} was taken")
            except InputError as error:
                if all(word.removesuffix("s") not in str(error) for word in (name, shown)) or "\n" in str(error):
                    failed.append(f"{name}={value!r}: {error}")
            except Exception as error:  # noqa: BLE001 - which one is what the message shows
                failed.append(f"{name}={value!r}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


@pytest.fixture(scope="module")
def pair(models: Any) -> dict[str, Any]:
    """A target and a confident drafter."""
    drafter = models.bigram_drafter(models.table(VOCAB, 1), SIZE, (), models.table(VOCAB, 2)[0])
    return {"models": Models(models.bigram_target(models.table(VOCAB, 0)), drafter)}


@pytest.fixture(scope="module")
def engine(pair: dict[str, Any], byte_tokenizer: Any) -> Engine:
    return Engine(**pair, slots=2, capacity=32, prefill_chunk=8, max_stop_tokens=4, tokenizer=byte_tokenizer)


def parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"self"}


def test_arguments_of_an_engine(pair: dict[str, Any]) -> None:
    assert set(ENGINE) == parameters(Engine)
    refuse(Engine, pair | {"capacity": 32}, ENGINE)


def test_arguments_of_a_request(engine: Engine) -> None:
    assert set(SUBMIT) == parameters(Engine.submit)
    refuse(engine.submit, {"prompt": [1], "max_new_tokens": 4}, SUBMIT)
    assert engine.metrics.rejected == sum(map(len, SUBMIT.values())) and not engine.metrics.submitted
    waiting = engine.submit([1], max_new_tokens=4)
    for wait in (waiting.result, engine.drain):
        refuse(wait, {}, {"timeout": NO_SECONDS})
    assert not engine._closed
    assert waiting.cancel() and waiting.result(timeout=1e30).finish_reason == "cancelled"
    refuse(engine.warm_up, {}, dict.fromkeys(("greedy", "sampled", "filtered"), NO_BOOLEAN))
    assert parameters(Engine.drain) == parameters(Request.result) == {"timeout"}
    assert parameters(Engine.warm_up) == {"greedy", "sampled", "filtered"}


def test_arguments_of_generate(pair: dict[str, Any]) -> None:
    assert set(GENERATE) == parameters(generate)
    refuse(generate, pair | {"prompts": [[1]], "max_new_tokens": 2}, GENERATE)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_arguments_of_a_scheduler(pair: dict[str, Any], name: str) -> None:
    good, wrong = SCHEDULERS[name]
    named = parameters(getattr(schedulers, name)) - {"bounds"}
    assert named <= set(wrong) and (
        not {"bounds"} <= parameters(getattr(schedulers, name)) or set(BOUNDS) <= set(wrong)
    )

    def make(**options: Any) -> None:
        check_scheduler(getattr(schedulers, name)(**options), pair["models"], 2)

    make(**good)
    refuse(make, good, wrong)


def test_settings_of_the_running_estimate(pair: dict[str, Any]) -> None:
    def make(**options: Any) -> None:
        check_scheduler(schedulers.adaptive(0.5, online=EstimateSettings(**options)), pair["models"], 2)

    wrong = {field.name: NO_REAL for field in dataclasses.fields(EstimateSettings)}
    refuse(make, {}, wrong | {"confident": NO_BOOLEAN, "prior": [*NO_REAL, 1.0]})


@pytest.mark.parametrize("name", ("threshold", "early_stop", "lagged", "adaptive"))
def test_a_scheduler_made_by_hand_lacks_nothing(pair: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"scheduler '{name}' has no .*; make it with schedulers.{name}"):
        check_scheduler(schedulers.SCHEDULERS[name](), pair["models"], 2)


def test_values_that_mean_something_are_taken(pair: dict[str, Any]) -> None:
    """Numbers of NumPy are numbers, arrays are lists, and a maximum beyond the block does no harm."""
    options = {"batch_size": np.int64(2), "prompt_width": np.int32(3), "verify_sizes": np.zeros(0, int)}
    sampling = {"temperature": np.float32(0.5), "top_k": np.int64(5), "min_p": jnp.bfloat16(0.25), "seed": np.int64(3)}
    result = generate(
        **pair,
        prompts=np.ones((2, 2), np.int64),  # pyright: ignore[reportArgumentType] - looser than what is promised
        max_new_tokens=np.int32(2),  # pyright: ignore[reportArgumentType]
        stop_tokens=jnp.asarray([6]),  # pyright: ignore[reportArgumentType]
        scheduler=schedulers.threshold(np.float32(0.5), minimum=np.asarray([0, 3]), maximum=100),
        **options,
        **sampling,
    )
    assert [len(tokens) for tokens in result.tokens] == [2, 2] or result.stopped.any()
