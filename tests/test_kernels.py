"""`kernels`: every operation is tried, interpreted kernels agree, and what fails is named for the environment."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

from dspark_jax.config import Config, InputError
from dspark_jax.kernels import distance, kernels, tried
from dspark_jax.ops.dispatch import Operation, Unsupported
from dspark_jax.planning.cases import Case, cases
from dspark_jax.planning.timing import TURNS, Rates, _in_turn, device_seconds
from dspark_jax.presets import deepseek_v4, released

HERE = Path()
OPERATIONS = {
    path.parent.name for path in (Path(__file__).parents[1] / "dspark_jax/ops").glob("*/api.py")
}  # all that there are


def small(model: str, target: str, kind: str = "dspark", **sizes: Any) -> Config:
    """A released config with everything small."""
    config = released(model, target, kind)
    few = {"vocab_size": 1024, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    arch = dataclasses.replace(config.target.architecture, **(few | sizes))
    drafter = dataclasses.replace(config.drafter, block_size=3, markov_rank=config.drafter.markov_rank and 128)
    return dataclasses.replace(
        config,
        target=dataclasses.replace(config.target, architecture=arch),
        drafter=drafter,
        data=dataclasses.replace(config.data, max_length=64),
        train=dataclasses.replace(config.train, num_anchors=8, vocab_chunk=64),
    )


QWEN3 = small("qwen3_4b", "Qwen/Qwen3-4B")


def of(config: Config) -> list[Case]:
    return [*cases(config, requests=2, context=28)]  # with four rows of each, whole tiles


def test_every_operation_is_there() -> None:
    """Of a mixture all but linear attention, which has no kernel."""
    moe = small("qwen3_30b_a3b", "Qwen/Qwen3-30B-A3B", own={**_MOE, "num_experts": 4, "moe_intermediate_size": 32})
    assert {case.operation.name for case in of(moe)} == OPERATIONS - {"delta_rule"}
    assert {case.operation.name for case in of(QWEN3)} == OPERATIONS - {"delta_rule", "expert_mlp"}
    dflash = {case.operation.name for case in of(small("qwen3_4b", "Qwen/Qwen3-4B", "dflash"))}
    assert dflash == OPERATIONS - {"delta_rule", "expert_mlp", "markov_sample"}


_MOE = released("qwen3_30b_a3b", "Qwen/Qwen3-30B-A3B", "dspark").target.architecture.own


def test_shapes_are_those_of_every_kind_of_layer() -> None:
    """Gemma's windows and wide heads, and its drafter's; of DeepSeek-V4, whose attention is its own, what is left."""
    gemma = released("gemma4_12b", "google/gemma-4-12B-it", "dspark")
    labels = [f"{case.operation.name}: {case.label}" for case in cases(gemma)]
    for shape in ("16/8 heads of 256, 4096 rows, a window of 1024", "16/1 heads of 512, 4096 rows"):
        assert f"attention: {shape}" in labels
    assert "cached_attention: 16/8 heads of 256, 32 x 8 rows over 1024, a window of 1024" in labels
    packed = "2048 blocks of 7 over 4096 rows, four documents"
    assert f"block_attention: 16/1 heads of 512, {packed}, and gradients" in labels
    v4 = [case.operation.name for case in cases(deepseek_v4("v4", "deepseek-ai/DeepSeek-V4-Flash-0731", "dspark5"))]
    assert "attention" not in v4 and "expert_mlp" in v4


@pytest.mark.slow
@pytest.mark.parametrize("which", ["pallas_gpu", "pallas_tpu"])
def test_interpreted_kernels_agree_with_the_definition(which: str) -> None:
    found = [one for case in of(QWEN3) if which in case.operation.names for one in tried(case, [which])]
    assert len({one.operation for one in found}) == {"pallas_gpu": 6, "pallas_tpu": 7}[which]
    for one in found:
        assert not one.failed and not one.refused and one.error is not None, one


def right(x: jax.Array) -> jax.Array:
    return x + 1


def refuses(x: jax.Array) -> jax.Array:
    raise Unsupported("odd sizes")


def breaks(x: jax.Array) -> jax.Array:
    raise RuntimeError("no such instruction\nsecond line")


WRONG: dict[str, tuple[Callable[..., jax.Array], str]] = {
    "far": (lambda x: x + 1.5, "differs from the definition by"),
    "nan": (lambda x: x * jnp.nan, "differs from the definition by nan"),
    "breaks": (breaks, "RuntimeError: no such instruction"),
}


def four_numbers(operation: Operation) -> Case:
    def run(x: jax.Array, *, implementation: str) -> jax.Array:
        return operation(implementation, x)

    return Case(operation, "four numbers", run, lambda: (jnp.arange(4, dtype=jnp.bfloat16),), lambda x: (16.0, 4.0))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operation]:
    """An operation that adds 1, as the only case."""
    operation = Operation("toy", {"cpu": ["xla"]})
    operation._functions["xla"] = right
    monkeypatch.setattr("dspark_jax.kernels.cases", lambda *_, **__: [four_numbers(operation)])
    monkeypatch.setattr(Rates, "measured", lambda: Rates(1e15, 1e15))
    yield operation


def test_what_agrees_is_timed_against_xla(toy: Operation, capsys: Any, tmp_path: Path) -> None:
    toy.register("mine", right, ["cpu"])
    toy.register("shy", refuses, ["cpu"])
    found = kernels(QWEN3, HERE, json=str(tmp_path / "tried.json"))
    assert [(one.implementation, one.error, one.failed) for one in found] == [
        ("shy", None, ""),
        ("mine", 0.0, ""),
        ("xla", 0.0, ""),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu, jax ") and " GB/s, product " in lines[0] and lines[1] == "toy: four numbers"
    assert lines[2].split(maxsplit=1) == ["shy", "leaves it: odd sizes"]
    assert " x floor" in lines[3] and " x XLA  differs by 0.0e+00" in lines[3]
    assert lines[-1] == "1 kernels agree with the definition"
    assert found[1].floor == pytest.approx(1e3 * 16 / 1e15)
    written = json.loads((tmp_path / "tried.json").read_text())
    assert written["tried"] == [dataclasses.asdict(one) for one in found]


@pytest.mark.parametrize("name", WRONG)
def test_what_fails_is_named_for_the_environment(toy: Operation, name: str, capsys: Any, monkeypatch: Any) -> None:
    function, said = WRONG[name]
    toy.register("mine", right, ["cpu"])
    toy.register(name, function, ["cpu"])
    with pytest.raises(SystemExit) as ended:
        kernels(QWEN3, HERE)
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert f"FAILS: {said}" in printed and "second line" not in printed
    setting = printed.splitlines()[-1].split()[-1]
    assert setting == f"DSPARK_JAX_WITHOUT=toy.{name}"
    monkeypatch.setenv(*setting.split("="))
    assert [one.implementation for one in kernels(QWEN3, HERE)] == ["mine", "xla"]


def test_without_kernels_it_says_so(toy: Operation, capsys: Any) -> None:
    kernels(QWEN3, HERE)
    assert capsys.readouterr().out.splitlines()[-1] == "cpu: XLA alone, no kernels"


def test_several_sizes_of_rounds(toy: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case once, and those that do not depend on the size not again."""
    case = four_numbers(toy)
    label = "{} requests of {}".format

    def of_size(_: Config, requests: int, context: int) -> list[Case]:
        return [case, dataclasses.replace(case, label=label(requests, context))]

    monkeypatch.setattr("dspark_jax.kernels.cases", of_size)
    found = kernels(QWEN3, HERE, requests=["1", "8"], context=["64", "128"])
    assert [one.case for one in found] == ["four numbers", *(label(i, j) for i in (1, 8) for j in (64, 128))]
    for wrong in ("0", "x", "²", "", "1" * 5000):
        with pytest.raises(InputError, match="--requests has '.*'; give positive integers"):
            kernels(QWEN3, HERE, requests=[wrong])


def test_what_a_call_takes_is_that_of_calls_on_the_device() -> None:
    """Small ones are made many at a time, each of them; what is written in place goes from call to call."""
    seen: list[float] = []

    def count(x: jax.Array, by: jax.Array) -> tuple[jax.Array, jax.Array]:
        io_callback(lambda one: seen.append(float(one)), None, x)
        return x + by, by * 2

    one = jnp.ones(())
    assert device_seconds(count, (0 * one, one)) > 0
    assert len(seen) == 3 + 6 * TURNS and set(seen) == {0.0}
    seen.clear()
    device_seconds(count, (0 * one, one), in_place=1)
    assert seen == [float(turn) for turn in range(6 * TURNS)]


def test_calls_stay_in_the_loop() -> None:
    """A compiler may take what does not depend on the turn out of it, and would be timed once for all turns."""
    arrays = jnp.ones((64, 32)), jnp.ones((32, 16))
    run = functools.partial(_in_turn, lambda x, y: jnp.tanh(x @ y), 0)
    text = jax.jit(run).lower([[jnp.zeros((64, 16))]] * 2, [arrays] * 2).compile().as_text()
    inside, outside = text.split("ENTRY")
    assert "dot_general" in inside and "dot_general" not in outside


def test_what_does_not_fit_is_left(toy: Operation, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends in a line, and what fits is tried all the same."""

    def full() -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory\nsecond line")

    cases_of = [dataclasses.replace(four_numbers(toy), label="many", arrays=full), four_numbers(toy)]
    monkeypatch.setattr("dspark_jax.kernels.cases", lambda *_, **__: cases_of)
    large, small_one = kernels(QWEN3, HERE)
    assert large.refused == "XLA in float32 did not run (RESOURCE_EXHAUSTED: out of memory)" and not large.failed
    assert small_one.error == 0.0


def test_floors_count_what_is_seen() -> None:
    """Against masks drawn by hand: windows, documents, a prompt's last rows, rows over caches."""
    window = 16
    gemma = small("gemma4_12b", "google/gemma-4-12B-it", sliding_window=window)
    found = {
        f"{case.operation.name} {case.label}": case for case in of(gemma) if case.operation.name.endswith("attention")
    }
    rows, keys = np.arange(64)[:, None], np.arange(64)[None]
    for label, case in found.items():
        arrays = case.arrays()
        n, h = arrays[0].shape[-2:]
        mask = keys <= rows
        if case.operation.name == "attention":
            mask = mask & (keys > rows - window) if "window" in label else mask
            mask = mask & (keys // 16 == rows // 16) if "documents" in label else mask
            mask = mask[-32:] if "last" in label else mask
            read = mask.any(axis=0).mean() * sum(x.nbytes for x in arrays[1:])
            assert case.work(*arrays) == (2 * arrays[0].nbytes + read, 4 * n * h * mask.sum()), label
        elif case.operation.name == "cached_attention":
            positions = np.asarray(arrays[-1])
            last = (positions[:, None] + np.arange(4)).max(1)
            first = np.maximum(positions - window + 1, 0) if "window" in label else 0 * positions
            read = int((last - first + 1).sum()) * 2 * arrays[1].shape[1] * h * 2
            assert case.work(*arrays)[0] == pytest.approx(read + 2 * arrays[0].nbytes), label
        else:
            anchors, keep = arrays[-3:-1]
            pairs = sum(3 * (int(a) % 16 + 3) for a, k in zip(anchors[0], keep[0], strict=True) if k)
            assert case.work(*arrays)[1] == 7 * 2 * n * h * pairs
    assert len(found) == 9 and sum("window" in label for label in found) == 4


def test_how_far_results_are() -> None:
    """The worst of all arrays: numbers by their norm, tokens by the share that differs."""
    numbers, tokens = jnp.array([3.0, 4.0]), jnp.arange(100)
    assert distance({"a": numbers, "b": tokens}, {"a": numbers, "b": tokens}) == (0.0, "")
    far, wrong = distance((numbers + jnp.array([0.0, 0.05]), tokens), (numbers, tokens))
    assert far == pytest.approx(0.01, rel=1e-4) and not wrong
    assert distance(1.04 * numbers, numbers)[1] == "differs from the definition by 0.04, more than 0.02"
    assert not distance(tokens.at[:5].add(1), tokens)[1] and distance(tokens.at[:6].add(1), tokens)[1]
    both = (jnp.array([1.0, jnp.nan]), tokens), (jnp.ones(2), tokens)
    far, wrong = distance(*both)
    assert np.isnan(far) and wrong
