"""Losses of the speculators package and this project's terms of the same names: values and gradients."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.ops.vocab_loss import vocab_loss
from dspark_jax.training.losses import vocab_terms
from tests.servers.conftest import serve

pytestmark = pytest.mark.servers
BLOCK, BLOCKS, V = 5, 6, 41
NAMES = {
    "kl": "kl_div", "reverse_kl": "rkl", "jsd": "jsd", "nla": "nla", "lk_hybrid": "lk_hybrid", "greedy_ce": "ce",
    "l1": "tv", "dpace": "ce",
}  # fmt: skip


def test_losses_of_the_package(given: Any, tmp_path: Path) -> None:
    """It divides by supervised rows, has half of our l1, and takes the target's likeliest tokens as labels."""
    rng = np.random.default_rng(0)
    lengths = np.array([5, 0, 3, 1, 5, 4])
    mask = (np.arange(BLOCK) < lengths[:, None]).reshape(1, -1).astype(np.float32)
    logits, targets = (2 * rng.normal(size=(1, BLOCK * BLOCKS, V)).astype(np.float32) for _ in range(2))
    np.savez(tmp_path / "in.npz", logits=logits, targets=targets, mask=mask)
    losses = [(name, loss, "dpace" if name == "dpace" else "fixed-exp-decay") for name, loss in NAMES.items()]
    asked = {"arrays": str(tmp_path / "in.npz"), "output": str(tmp_path / "out.npz"), "losses": losses, "block": BLOCK}
    serve(given("--speculators-python"), "score_losses.py", asked)
    theirs = np.load(tmp_path / "out.npz")
    weights = mask * np.exp(-(np.arange(mask.size) % BLOCK) / 4, dtype=np.float32)

    for name in NAMES:

        def loss(rows: jax.Array, name: str = name) -> jax.Array:
            factor = 0.5 if name == "l1" else 1.0
            terms = vocab_terms({name: factor / mask.sum()})
            arrays = (targets, np.eye(V, dtype=np.float32), np.argmax(targets, axis=-1), weights)
            teacher, head, labels, each = map(jnp.asarray, arrays)
            return vocab_loss(rows, None, teacher, head, None, labels, each, terms=terms, block=BLOCK, chunk=10).loss

        value, grad = jax.value_and_grad(loss)(jnp.asarray(logits))
        np.testing.assert_allclose(value, theirs[name], rtol=2e-5, err_msg=name)
        want = theirs[f"{name} slope"]
        np.testing.assert_allclose(grad, want, atol=2e-5 * np.abs(want).max(), err_msg=name)
