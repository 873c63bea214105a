"""Every step's logits, losses and gradients of EAGLE-3 exports are those that the speculators package computes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import Config
from dspark_jax.convert.export import write_export
from dspark_jax.convert.hf import drafter_tensors, import_drafter
from dspark_jax.convert.mapping import FROZEN
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.kinds import as_kind
from dspark_jax.training.loss import drafter_loss
from dspark_jax.vocabulary import decode_vocabulary
from tests.convert.test_eagle3_formats import DRAFTERS as REDUCED
from tests.convert.test_export import EAGLE3, make_source, mesh
from tests.servers.conftest import serve
from tests.servers.test_speculators_numbers import Matrices

pytestmark = pytest.mark.servers
TAPS, LENGTH = (-1, 0, 1), 20
TWO_TAPS = "llama"
"""The drafter that taps one layer less than usual."""
DRAFTERS = {**REDUCED, "qwen3, the target's head": EAGLE3}


@pytest.mark.parametrize("name", DRAFTERS)
def test_numbers_of_the_package(given: Any, tiny_target: Path, tmp_path: Path, name: str) -> None:
    """The target's likeliest token is in the draft vocabulary at all positions: elsewhere the package supervises what
    EAGLE's authors and SpecForge leave out. Its KL is the cross-entropy less the target's entropy."""
    taps = TAPS[:2] if name == TWO_TAPS else TAPS
    config = replace(DRAFTERS[name], target_layer_ids=taps)
    source, _ = make_source(tiny_target, config)
    tensors = [(key, 0.1 * value) for key, value in source.tensors()]
    source = replace(source, target_name=str(tiny_target), tensors=lambda: tensors)
    directory = write_export(tmp_path / "drafter", source, form="speculators", dtype="float32")
    rng, (embedding, head) = np.random.default_rng(1), (np.asarray(source.frozen[k], np.float32) for k in FROZEN)
    width, vocabulary = source.arch.hidden_size, source.arch.vocab_size
    ids = decode_vocabulary(config.draft_vocabulary, config.draft_vocab_size or vocabulary, vocabulary)
    last = rng.normal(size=(2000, width)).astype(np.float32)
    last = last[np.isin(np.argmax(last @ head.T, axis=-1), ids)][:LENGTH]
    arrays = {
        "features": rng.normal(size=(LENGTH, len(taps) * width)).astype(np.float32),
        "tokens": rng.integers(0, vocabulary, LENGTH), "last_hidden": last, "embedding": embedding, "head": head,
        "ids": ids,
    }  # fmt: skip
    assert len(last) == LENGTH
    np.savez(tmp_path / "in.npz", **arrays)
    asked = {"drafter": str(directory), "arrays": str(tmp_path / "in.npz"), "output": str(tmp_path / "out.npz")}
    steps = config.block_size
    found = serve(given("--speculators-python"), "score_eagle3.py", asked | {"steps": steps})
    assert found["class"] == "Eagle3DraftModel"
    theirs = dict(np.load(tmp_path / "out.npz"))

    read, drafter = import_drafter(directory, mesh())
    assert read.eagle3_norms == config.eagle3_norms and read.qk_norms == config.qk_norms
    target, tokens = Matrices(source.arch, embedding, head), jnp.asarray(arrays["tokens"])[None]
    features = jnp.concatenate([target.embed(tokens), jnp.asarray(arrays["features"])[None]], axis=-1)
    every = Anchors(jnp.zeros((1, LENGTH), jnp.int32), jnp.zeros((1, LENGTH), bool))

    def loss(model: Any) -> Any:
        out = model(target, features, tokens, jnp.ones((1, LENGTH)), every)
        terms = as_kind(Config(), "eagle3").loss
        return drafter_loss(model, target, out, jnp.asarray(last)[None], terms, vocab_chunk=64).total, out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(drafter)
    own = drafter.vocabulary
    teacher, entropy = jax.nn.log_softmax(jnp.asarray(last) @ jnp.asarray(head)[ids].T), 0.0
    for step in range(steps):
        rows = LENGTH - 1 - step
        assert np.asarray(out.mask[0, :, step]).nonzero()[0].tolist() == list(range(rows))
        logits = np.asarray(out.hidden[0, :rows, step] @ (target.head if own is None else own.head[...]).T)
        np.testing.assert_allclose(logits, theirs[f"logits{step}"][:rows], atol=2e-4, err_msg=f"step {step}")
        of_rows = 0.8**step * -jnp.sum(jnp.exp(teacher) * teacher, axis=-1)[step + 1 :]
        entropy += of_rows.sum()
    np.testing.assert_allclose(value - entropy, theirs["loss"], rtol=2e-4)
    means = [theirs[f"loss{step}"] * (LENGTH - 1 - step) for step in range(steps)]
    np.testing.assert_allclose(sum(means), theirs["loss"], rtol=1e-4)
    for key, grad in drafter_tensors(grads, read).items():
        if key != "lm_head.weight":  # which is not trained there
            np.testing.assert_allclose(grad, theirs[key], atol=5e-4 * np.abs(theirs[key]).max(), err_msg=key)
    if config.draft_vocab_size not in (0, vocabulary):
        np.testing.assert_array_equal(theirs["d2t"] + np.arange(len(ids)), ids)
        np.testing.assert_array_equal(np.flatnonzero(theirs["t2d"]), ids)
