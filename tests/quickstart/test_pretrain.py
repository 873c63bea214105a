"""Pre-training: the fast forward pass against the model, the optimizer, packing, kill and resume."""

from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer

from dspark_jax.config import TargetArchitecture
from dspark_jax.target.model import Target
from tests.quickstart.builder import pretrain
from tests.quickstart.builder.corpus import DOMAINS
from tests.quickstart.builder.fast_forward import last_hidden
from tests.quickstart.builder.packing import MIXTURE, PROMPT_WEIGHT, ROW_LENGTH, rows
from tests.quickstart.builder.tokenizer import EOS, PAD

SMALL = TargetArchitecture(
    model_type="qwen3", vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, intermediate_size=48, max_position_embeddings=512,
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(pretrain, "ARCHITECTURE", SMALL)


@pytest.fixture(scope="module")
def tokenizer(target_folder):
    return Tokenizer.from_file(str(target_folder / "tokenizer.json"))


def test_fast_forward_is_the_model():
    model = Target(SMALL, rngs=nnx.Rngs(0), scale=0.2)
    tokens = jax.random.randint(jax.random.key(1), (3, 141), 0, 96)  # more than one attention chunk, and a ragged one
    positions = jnp.broadcast_to(jnp.arange(141), tokens.shape)
    expected = np.asarray(jax.jit(lambda m: m.forward(tokens, positions).last_hidden)(model))
    found = np.asarray(jax.jit(last_hidden)(model, tokens))
    # Operands carry 8 bits; about ten products in a row, each a sum of independently rounded terms.
    assert np.sqrt(np.mean((found - expected) ** 2)) < 10 * 2**-8 * np.sqrt(np.mean(expected**2))


@pytest.mark.parametrize("shape", [(2, 24, 24), (3, 16, 48), (3, 48, 16)])
def test_matrices_move_by_orthogonal_updates(shape):
    """Of a root mean square of 0.2, layer by layer; embeddings do not."""
    params = {"matrix": jnp.zeros(shape), "embedding": jnp.zeros((8, 4))}
    grads = {"matrix": jax.random.normal(jax.random.key(0), shape), "embedding": jnp.ones((8, 4))}
    rule = pretrain.optimizer()
    updates, _ = rule.update(grads, rule.init(params), params)
    values = np.linalg.svd(np.asarray(updates["matrix"]), compute_uv=False) / (0.2 * max(shape[1:]) ** 0.5)
    assert 0.6 < np.median(values) < 1.3 and values.max() < 1.4
    moved = np.asarray(updates["embedding"])  # Adam's first step by equal gradients, with Nesterov's look ahead
    assert np.ptp(moved) < 1e-5 and -1.6 < moved[0, 0] < -0.9


def test_schedule_follows_the_clock():
    budget = pretrain.Budget(minutes=10, peak=1.0)
    assert budget.done(10**6, 300) == 0.5
    rates = [budget.rate(f) for f in (0.0, 0.01, 0.02, 0.2, 0.625, 1.0, 2.0)]
    assert rates == pytest.approx([0.02, 0.5, 1.0, 1.0, 0.5, 0.01, 0.01])
    assert pretrain.Budget(steps=4).done(3, 10**6) == 0.75


def test_rows_hold_whole_conversations(split, tokenizer):
    source = rows(tokenizer, split["train"], MIXTURE, 8, seed=0)
    eos, pad, start = (tokenizer.token_to_id(t) for t in (EOS, PAD, "<|im_start|>"))
    padding = []
    for batch in islice(source, 4):
        assert batch.tokens.shape == batch.weights.shape == (8, ROW_LENGTH)
        assert (batch.tokens[:, 0] == start).all() and (batch.weights[:, 0] == 0).all()
        assert (batch.weights[batch.tokens == pad] == 0).all()
        assert set(np.unique(batch.weights)) == {0, np.float32(PROMPT_WEIGHT), 1}
        assert (batch.weights[batch.tokens == eos] == 1).sum() * 2 == (batch.tokens == eos).sum()  # each answer's end
        for row in batch.tokens:
            assert (row == start).sum() == (row == eos).sum()
        padding.append((batch.tokens == pad).mean())
    assert np.mean(padding) < 0.05


def test_kill_and_resume(small, tmp_path):
    def batches(first):
        for step in range(first, 100):
            tokens = np.random.default_rng(step).integers(0, 96, (2, 16)).astype(np.int32)
            yield pretrain.Rows(tokens, np.ones((2, 16), np.float32))

    path = tmp_path / "checkpoint.npz"
    budget = pretrain.Budget(steps=4, peak=1e-2)
    straight, progress = pretrain.train(batches, {}, tmp_path / "other.npz", budget)
    assert progress.step == 4 and progress.tokens == 4 * 32

    class Killed(Exception):
        pass

    def interrupted(first):
        yield from (batch for batch, _ in zip(batches(first), range(2), strict=False))
        raise Killed

    with pytest.raises(Killed):
        pretrain.train(interrupted, {}, path, budget, save_every=0)
    assert not list(tmp_path.glob("*.tmp*"))
    resumed, progress = pretrain.train(batches, {}, path, budget, resume=True)
    assert progress.step == 4
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_foreign_checkpoint_is_refused(small, tmp_path, monkeypatch):
    params, state = pretrain.fresh(0)
    pretrain.save(tmp_path / "c.npz", params, state, pretrain.Progress())
    monkeypatch.undo()
    params, state = pretrain.fresh(0)
    with pytest.raises(ValueError, match="start afresh in another folder"):
        pretrain.load(tmp_path / "c.npz", params, state)


def test_mixture_names_the_domains():
    assert set(MIXTURE) == set(DOMAINS) and sum(MIXTURE.values()) == pytest.approx(1)
