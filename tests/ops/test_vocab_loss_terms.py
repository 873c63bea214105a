"""The soft cross-entropy and the expected accepted length, against automatic differentiation in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.ops.vocab_loss import vocab_loss
from dspark_jax.training.losses import vocab_terms

B, T, G, V, D, R = 2, 12, 4, 23, 6, 3
MASK = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1]], bool)


def problem(seed=0):
    """Arguments by name: blocks of four rows, whole, cut and empty."""
    rng = np.random.default_rng(seed)
    args = {"hidden": (B, T, D), "prev_embedding": (B, T, R), "teacher": (B, T, D), "head": (V, D), "markov_w2": (V, R)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in args.items()}
    arrays["labels"] = rng.integers(0, V, (B, T)).astype(np.int32)
    return arrays | {"weights": (rng.uniform(0.1, 1, (B, T)) * MASK).astype(np.float32)}


def definition(args, soft_ce, length):
    """Loss and gradients of the plain formulas, differentiated automatically, in float64; block by block."""

    def loss(wanted):
        x = {**fixed, **wanted}
        logits = x["hidden"] @ x["head"].T + x["prev_embedding"] @ x["markov_w2"].T
        q = jax.nn.softmax(x["teacher"] @ x["head"].T)
        log_p = jax.nn.log_softmax(logits)
        total = soft_ce * jnp.sum(x["weights"] * -jnp.sum(q * log_p, axis=-1))
        distance = jnp.sum(jnp.abs(jnp.exp(log_p) - q), axis=-1)
        for b in range(B):
            for start in range(0, T, G):
                survival = 1.0
                for row in range(start, start + G):
                    if MASK[b, row]:
                        survival = survival * (1 - 0.5 * distance[b, row])
                        total = total + length * (1 - survival)
                    else:
                        survival = 0.0
        return total

    with jax.enable_x64(True):
        wide = {n: jnp.asarray(v, jnp.float64 if v.dtype == np.float32 else None) for n, v in args.items()}
        names = ("hidden", "prev_embedding", "markov_w2")
        fixed = {name: value for name, value in wide.items() if name not in names}
        value, grads = jax.value_and_grad(loss)({name: wide[name] for name in names})
        return float(value), {name: np.asarray(grad) for name, grad in grads.items()}


def run(args, implementation, chunk, **terms):
    names = ("hidden", "prev_embedding", "markov_w2")

    def loss(wanted):
        out = vocab_loss(
            **{**args, **wanted}, terms=vocab_terms(terms), block=G, chunk=chunk, implementation=implementation
        )
        return out.loss, out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))({name: args[name] for name in names})
    return value, out, grads


@pytest.mark.parametrize(
    ("implementation", "terms"),
    [
        *((name, terms) for terms in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7)) for name in ("xla", "reference")),
        ("pallas_tpu", (1.0, 0.0)),
    ],
)
def test_equals_the_float64_definition(implementation, terms):
    args, (soft_ce, length) = problem(), terms
    value, out, grads = run(args, implementation, 5, soft_ce=soft_ce, length=length)
    want, want_grads = definition(args, soft_ce, length)
    np.testing.assert_allclose(value, want, rtol=3e-6)
    assert ("soft_ce" in out.values) == (soft_ce != 0)
    for name, grad in want_grads.items():
        np.testing.assert_allclose(grads[name], grad, atol=5e-6 * np.abs(grad).max(), err_msg=name)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_blocks_stay_whole_in_every_chunk(chunk):
    args = problem()
    value, _, grads = run(args, "xla", chunk, soft_ce=0.0, length=1.0)
    want, _, want_grads = run(args, "xla", T * B, soft_ce=0.0, length=1.0)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for name, grad in want_grads.items():
        np.testing.assert_allclose(grads[name], grad, atol=2e-6 * np.abs(grad).max(), err_msg=name)


def test_unsupervised_rows_may_be_nan():
    args = problem()
    want, _, want_grads = run(args, "xla", 5, soft_ce=0.5, length=1.0)
    for name in ("hidden", "prev_embedding", "teacher"):
        args[name][~MASK] = np.nan
    value, _, grads = run(args, "xla", 5, soft_ce=0.5, length=1.0)
    np.testing.assert_array_equal(value, want)
    for name, grad in want_grads.items():
        np.testing.assert_array_equal(grads[name], grad, err_msg=name)


def test_impossible_drafts_leave_the_gradient_finite():
    """Acceptances of exactly 0 and 1, where a product divided by its factor would be 0 / 0."""
    args = problem()
    args["prev_embedding"] *= 0
    args["hidden"] = args["teacher"].copy()
    args["hidden"][:, 1::4] *= -300
    value, _, grads = run(args, "xla", 5, soft_ce=0.0, length=1.0)
    assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads.values())


def test_refuses_rows_that_are_no_blocks():
    with pytest.raises(ValueError, match="12 rows are no multiple of block 5"):
        vocab_loss(**problem(), terms=vocab_terms({"length": 1.0}), block=5, chunk=4)


def test_chunks_without_supervision_are_left_out():
    """A conditional in the compiled program, and the same numbers as with one chunk of everything."""
    args = problem()
    args["weights"][:, :8] = 0.0  # whole chunks of two

    def loss(hidden, chunk):
        return vocab_loss(**{**args, "hidden": hidden}, terms=vocab_terms({"ce": 0.5, "l1": 0.5}), chunk=chunk).loss

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    assert "conditional" in step.lower(args["hidden"], 2).compile().as_text()
    (value, grad), (want, want_grad) = step(args["hidden"], 2), step(args["hidden"], 100)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, atol=1e-6)
