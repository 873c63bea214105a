"""How an operation finds its implementation."""

import jax
import jax.numpy as jnp
import pytest

from dspark_jax import platform
from dspark_jax.ops.attention.api import OPERATION, attention
from dspark_jax.ops.dispatch import Choice, Operation, Unsupported, watched

ROWS = jnp.ones((1, 2, 1, 4))


@pytest.fixture
def toy():
    """An implementation from outside of the package, which does one head only."""
    calls = []

    def run(query, key, value, limit, starts, *, scale, window, sinks):
        del key, limit, starts, scale, window, sinks
        if query.shape[2] > 1:
            raise Unsupported("more than one head")
        calls.append(query.shape)
        return value * 0 + 7

    OPERATION.register("toy", run, ["cpu"])
    yield calls
    OPERATION.unregister("toy")


def test_the_first_that_can_do_the_case_runs(toy):
    assert float(attention(ROWS, ROWS, ROWS, scale=1.0)[0, 0, 0, 0]) == 7 and len(toy) == 1
    two = jnp.ones((1, 2, 2, 4))
    assert float(attention(two, two, two, scale=1.0)[0, 0, 0, 0]) == 1 and len(toy) == 1  # the next one is asked
    with pytest.raises(Unsupported, match="more than one head"):  # and is not, where one was named
        attention(two, two, two, scale=1.0, implementation="toy")


def test_a_name_is_taken_once_and_given_back(toy):
    with pytest.raises(ValueError, match="an implementation 'toy' already"):
        OPERATION.register("toy", lambda: None, ["cpu"])
    OPERATION.unregister("toy")
    with pytest.raises(ValueError, match="'toy' is not one of .*'cudnn'"):
        attention(ROWS, ROWS, ROWS, scale=1.0, implementation="toy")
    OPERATION.register("toy", lambda: None, ["cpu"])


@pytest.mark.parametrize("listed", ["toy", "vocab_loss.xla, attention.toy"])
def test_an_implementation_can_be_switched_off(toy, monkeypatch, listed):
    monkeypatch.setenv("DSPARK_JAX_WITHOUT", listed)
    assert float(attention(ROWS, ROWS, ROWS, scale=1.0)[0, 0, 0, 0]) == 1 and not toy
    assert float(attention(ROWS, ROWS, ROWS, scale=1.0, implementation="toy")[0, 0, 0, 0]) == 7  # asked for by name
    monkeypatch.setenv("DSPARK_JAX_WITHOUT", "block_attention.toy")
    assert float(attention(ROWS, ROWS, ROWS, scale=1.0)[0, 0, 0, 0]) == 7
    monkeypatch.setenv("DSPARK_JAX_WITHOUT", "toy,xla")
    with pytest.raises(Unsupported, match="xla: switched off by DSPARK_JAX_WITHOUT"):
        attention(ROWS, ROWS, ROWS, scale=1.0)


def test_choices_are_counted_with_what_was_refused(toy):
    two = jnp.ones((1, 2, 2, 4))
    with watched() as outer:
        attention(ROWS, ROWS, ROWS, scale=1.0)
        with watched() as inner:
            attention(two, two, two, scale=1.0)
        attention(two, two, two, scale=1.0)
        attention(two, two, two, scale=1.0)
        attention(two, two, two, scale=1.0, implementation="xla")  # no choice
    attention(ROWS, ROWS, ROWS, scale=1.0)
    refused = Choice("attention", "xla", ("toy: more than one head",))
    assert outer == {Choice("attention", "toy", ()): 1, refused: 2} and inner == {refused: 1}


def test_nobody_can_do_it():
    operation = Operation("nothing", {"cpu": []})

    def refuse():
        raise Unsupported("too hard")

    operation.register("refusing", refuse, ["cpu"])
    with pytest.raises(Unsupported, match="nothing: no implementation can do this here; refusing: too hard"):
        operation(None)


def test_other_errors_are_not_taken_for_a_refusal():
    operation = Operation("wrong", {"cpu": []})

    def fail():
        raise NotImplementedError("a bug inside")

    operation.register("failing", fail, ["cpu"])
    operation.register("never asked", lambda: pytest.fail("went on"), [])
    with pytest.raises(NotImplementedError, match="a bug inside"):
        operation(None)


def test_the_platform_is_that_of_the_mesh_that_is_set():
    assert platform.current() == jax.default_backend() == "cpu"
    described = jax.sharding.AbstractDevice(device_kind="H100", num_cores=None, platform="cuda")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=described)
    with jax.sharding.use_abstract_mesh(mesh):
        assert platform.current() == "gpu"
