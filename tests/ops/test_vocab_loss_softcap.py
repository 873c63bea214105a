"""The soft-cap of Gemma's logits in `vocab_loss`: against float64 with finite differences, in both implementations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.ops.vocab_loss import vocab_loss
from dspark_jax.training.losses import vocab_terms

B, T, D, R, V, CAP = 2, 3, 5, 4, 19, 3.0


def problem(seed: int = 0) -> dict[str, np.ndarray]:
    """Logits of several times the cap, one row without weight."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.2, 1.0, (B, T))
    weights[1, 2] = 0.0
    return {
        "hidden": 2 * rng.normal(size=(B, T, D)), "prev": rng.normal(size=(B, T, R)),
        "teacher": 2 * rng.normal(size=(B, T, D)), "head": rng.normal(size=(V, D)), "w2": rng.normal(size=(V, R)),
        "labels": rng.integers(0, V, (B, T)), "weights": weights,
    }  # fmt: skip


def loss64(x: dict[str, np.ndarray], ce: float, l1: float) -> float:
    """The definition in float64: the cap lies before the Markov bias, and on the teacher."""

    def softmax(z):
        e = np.exp(z - z.max())
        return e / e.sum()

    total = 0.0
    for b in range(B):
        for t in range(T):
            draft = CAP * np.tanh(x["head"] @ x["hidden"][b, t] / CAP) + x["w2"] @ x["prev"][b, t]
            p, q = softmax(draft), softmax(CAP * np.tanh(x["head"] @ x["teacher"][b, t] / CAP))
            total += x["weights"][b, t] * (-ce * np.log(p[x["labels"][b, t]]) + l1 * np.abs(p - q).sum())
    return total


@pytest.mark.parametrize("implementation", ["xla", "reference", "pallas_tpu", "pallas_gpu"])
def test_value_and_gradients(implementation):
    x = problem()

    def loss(hidden, prev, w2):
        y = {name: jnp.asarray(value, jnp.float32) for name, value in x.items() if name != "labels"}
        return vocab_loss(
            hidden, prev, y["teacher"], y["head"], w2, jnp.asarray(x["labels"]), y["weights"],
            terms=vocab_terms({"ce": 0.3, "l1": 0.9}), softcap=CAP, chunk=2, implementation=implementation,
        ).loss  # fmt: skip

    names = ("hidden", "prev", "w2")
    arguments = [jnp.asarray(x[name], jnp.float32) for name in names]
    value, gradients = jax.value_and_grad(loss, argnums=(0, 1, 2))(*arguments)
    exact = loss64(x, 0.3, 0.9)
    np.testing.assert_allclose(value, exact, rtol=1e-6)
    rng = np.random.default_rng(1)
    for name, gradient in zip(names, gradients, strict=True):
        direction = rng.normal(size=x[name].shape)
        ends = [loss64({**x, name: x[name] + step * direction}, 0.3, 0.9) for step in (1e-5, -1e-5)]
        slope = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(gradient, np.float64) * direction), slope, rtol=2e-5, atol=2e-5)
    assert abs(exact - loss64({**x, "head": x["head"] * 1e-6}, 0.3, 0.9)) > 0.1  # the head matters
