"""Hidden states, logits, losses and gradients of exports are those that the speculators package computes itself."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import LossConfig, TargetArchitecture
from dspark_jax.convert.export import write_export
from dspark_jax.convert.hf import drafter_tensors, import_drafter
from dspark_jax.convert.mapping import FROZEN
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.ops.sampling import Sampling
from dspark_jax.training.loss import drafter_loss
from tests.convert.test_export import DFLASH2, FILL_IN, Z_LAB, make_source, mesh
from tests.servers.conftest import serve

pytestmark = pytest.mark.servers
DRAFTERS = {"fill-in dspark": FILL_IN, "dflash": Z_LAB, "dflash2": DFLASH2}
ANCHORS, LENGTH, TOLERANCE = [1, 4, 5, 12], 24, 2e-5


class Matrices:
    """A target's embedding and LM head."""

    softcap = 0.0

    dtype = jnp.float32

    def __init__(self, arch: TargetArchitecture, embedding: np.ndarray, head: np.ndarray):
        self.arch, self.embedding, self.head = arch, jnp.asarray(embedding), jnp.asarray(head)

    def embed(self, tokens: jax.Array) -> jax.Array:
        return self.embedding[tokens]

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.head.T


def compare_choices(drafter: Any, target: Any, out: Any, theirs: dict[str, np.ndarray]) -> None:
    """Candidates, their scores after the true token before, and the greedy walk from the anchors."""
    ids, scores = (theirs[key][:, 1:] for key in ("candidates", "scores"))
    base, head = target.unembed(out.hidden), drafter.markov
    logits = np.asarray(head.logits(base, out.hidden, head.embed(out.prev_tokens)))[0]
    np.testing.assert_allclose(np.take_along_axis(logits, ids, axis=-1), scores, atol=10 * TOLERANCE)
    assert np.isfinite(logits).sum() == ids.size
    steps = (jnp.swapaxes(values[0], 0, 1) for values in (base, out.hidden))
    uniforms = jnp.zeros((ids.shape[1], len(ids), 2), jnp.int32)
    tokens, _ = head.sample(*steps, out.prev_tokens[0, :, 0], uniforms, Sampling.constant(0.0, len(ids)))
    np.testing.assert_array_equal(tokens.T, theirs["walk"])


@pytest.mark.parametrize("name", DRAFTERS)
def test_numbers_of_the_package(given: Any, tiny_target: Path, tmp_path: Path, name: str) -> None:
    """Its hidden states and logits of every row that predicts; its loss and gradients where it trains such a drafter.

    It divides by supervised rows where this project divides by the sum of their weights, and its KL is the
    cross-entropy less the target's entropy.
    """
    config = DRAFTERS[name]
    source, _ = make_source(tiny_target, config)
    source = replace(source, target_name=str(tiny_target))  # from which the package wants to read
    tensors = [(key, 0.1 * value) for key, value in source.tensors()]
    source = replace(source, tensors=lambda: tensors)
    directory = write_export(tmp_path / "drafter", source, form="speculators", dtype="float32")
    rng, frozen = np.random.default_rng(1), [np.asarray(source.frozen[key], np.float32) for key in FROZEN]
    width, vocabulary = source.arch.hidden_size, source.arch.vocab_size
    arrays = {
        "features": rng.normal(size=(LENGTH, len(config.target_layer_ids) * width)).astype(np.float32),
        "tokens": rng.integers(0, vocabulary, LENGTH),
        "loss_mask": np.ones(LENGTH, np.float32),
        "last_hidden": rng.normal(size=(LENGTH, width)).astype(np.float32),
        "anchors": np.asarray(ANCHORS),
        "embedding": frozen[0],
        "head": frozen[1],
    }
    np.savez(tmp_path / "in.npz", **arrays)
    asked = {"drafter": str(directory), "arrays": str(tmp_path / "in.npz"), "output": str(tmp_path / "out.npz")}
    serve(given("--speculators-python"), "score_speculators.py", asked)
    theirs = dict(np.load(tmp_path / "out.npz"))

    read, drafter = import_drafter(directory, mesh())
    assert (read.block_size, read.block_layout) == (config.block_size, "fill_in")
    target, batch = (
        Matrices(source.arch, *frozen),
        {key: jnp.asarray(arrays[key])[None] for key in ("features", "tokens")},
    )
    anchors = Anchors(jnp.asarray([ANCHORS]), jnp.ones((1, len(ANCHORS)), bool))

    def run(model: Any) -> Any:
        return model(target, batch["features"], batch["tokens"], jnp.ones((1, LENGTH)), anchors)

    def loss(model: Any) -> Any:
        more = {"selector": 1.0} if config.kind == "dflash2" else {}
        terms = LossConfig(ce=0.0, l1=0.0, confidence=0.0, soft_ce=1.0, extra=more)
        last = jnp.asarray(arrays["last_hidden"])[None]
        return drafter_loss(model, target, run(model), last, terms, vocab_chunk=16).total

    def rows(values: np.ndarray) -> np.ndarray:
        """[A, G, ...] without what theirs gives for the anchors."""
        return values.reshape(len(ANCHORS), read.block_rows, *values.shape[2:])[:, 1:]

    out = run(drafter)
    assert rows(theirs["mask"]).all() and np.asarray(out.mask).all()
    np.testing.assert_allclose(out.hidden[0], rows(theirs["hidden"]), atol=TOLERANCE)
    np.testing.assert_allclose(target.unembed(out.hidden)[0], rows(theirs["logits"]), atol=10 * TOLERANCE)
    if config.kind == "dflash2":
        compare_choices(drafter, target, out, {key: theirs.pop(key) for key in ("candidates", "scores", "walk")})
    if "loss" not in theirs:
        return
    supervised = len(ANCHORS) * config.block_size
    value, grads = jax.value_and_grad(loss)(drafter)
    at = np.asarray(ANCHORS)[:, None] + np.arange(config.block_size)
    teacher = jax.nn.log_softmax(target.unembed(jnp.asarray(arrays["last_hidden"])[at]))
    entropy = -jnp.sum(jnp.exp(teacher) * teacher, axis=-1) * jnp.exp(-jnp.arange(config.block_size) / 4)
    np.testing.assert_allclose((value - entropy.sum()) / supervised, theirs["loss"], rtol=1e-4)
    for key, grad in drafter_tensors(grads, read).items():
        np.testing.assert_allclose(grad / supervised, theirs.pop(key), atol=2e-4 * np.abs(grad).max(), err_msg=key)
    assert set(theirs) <= {"hidden", "logits", "mask", "loss"}
