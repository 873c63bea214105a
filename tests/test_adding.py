"""A loss term, a head and a kind of drafter that are not part of the package (docs/adding.md): nothing in it is edited.

The same for a scheduler is in engine/test_adding_scheduler.py, for an implementation of an operation in
ops/test_dispatch.py.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import (
    Config,
    DataConfig,
    InputError,
    MeshConfig,
    TargetArchitecture,
    TargetConfig,
    from_json,
    resolve,
    to_json,
)
from dspark_jax.drafter.blocks import block_targets
from dspark_jax.drafter.heads import HEADS, SequentialHead
from dspark_jax.drafter.interface import BlockOutputs, DrafterModule, Proposal
from dspark_jax.engine import Models, generate
from dspark_jax.kinds import KINDS, Kind, as_kind
from dspark_jax.metrics import values
from dspark_jax.ops.sampling import sample
from dspark_jax.ops.vocab_loss import vocab_loss
from dspark_jax.registry import Entry
from dspark_jax.sharding import make_mesh
from dspark_jax.target.layers import normal
from dspark_jax.target.model import Target
from dspark_jax.training.losses import LOSS_TERMS, Blocks, BlockTerm, Distributions, VocabTerm, vocab_terms
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, init_state, to_module, to_params
from dspark_jax.training.step import make_train_step, place_batch

V = 11
PROMPTS = [[1, 2, 3], [4], [5, 6], [9]]
ARCH = TargetArchitecture("qwen3", V, 16, 3, 2, 1, 8, 32, 1e-6, 1e4, True, 256)


class Hellinger(VocabTerm):
    """1 - sum_v sqrt(p_draft p_target); its slope is left to automatic differentiation."""

    def value(self, rows: Distributions) -> jax.Array:
        return 1.0 - jnp.sum(jnp.exp(0.5 * (rows.log_draft + rows.log_teacher)), axis=-1)


class Brier(VocabTerm):
    """(1 - p_draft(label))^2, with its slope; every supervised row counts once."""

    weighted: ClassVar[bool] = False

    def value(self, rows: Distributions) -> jax.Array:
        return (1.0 - self._chosen(rows)) ** 2

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        chosen, p = self._chosen(rows)[..., None], rows.draft * rows.draft_scale
        return -2.0 * scale * (1.0 - chosen) * chosen * (rows.is_label - p)

    def _chosen(self, rows: Distributions) -> jax.Array:
        return jnp.exp(rows.label_logit - rows.top[..., 0]) * rows.draft_scale[..., 0]


class Size(BlockTerm):
    """Mean square of the hidden states: a term that knows nothing of the vocabulary."""

    def __call__(self, blocks: Blocks) -> tuple[jax.Array, dict[str, Any]]:
        return jnp.mean(jnp.square(blocks.outputs.hidden), axis=-1), {}


class FadingHead(SequentialHead):
    """The sum of the embeddings of all tokens before, each step half of what it was."""

    def start(self, shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros((*shape, self.rank))

    def step(self, state: jax.Array, hidden: jax.Array, prev_embedding: jax.Array) -> tuple[jax.Array, jax.Array]:
        state = 0.5 * state + prev_embedding
        return state, state


class Maps(DrafterModule):
    """G linear maps of the feature before the anchor, each of which gives one draft (Medusa's idea, without heads)."""

    def __init__(self, arch: TargetArchitecture, config: Any, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.block_size, self.taps, self.dtype = config.block_size, tuple(config.target_layer_ids), dtype
        self.width = len(self.taps) * arch.hidden_size
        shape, scale = (self.width, arch.hidden_size), config.initializer_range
        self.maps = normal(rngs, (self.block_size,), shape, ("features", "embed"), scale)

    def hidden(self, target: Any, feature: jax.Array, anchors: jax.Array) -> jax.Array:
        """Features [..., M*D] and anchors [...] -> [..., G, D]."""
        mapped = jnp.einsum("...f,gfd->...gd", feature.astype(self.dtype), self.maps[...])
        return mapped + target.embed(anchors)[..., None, :]

    def __call__(
        self, target: Any, features: Any, tokens: Any, loss_mask: Any, anchors: Any, starts: Any = None
    ) -> BlockOutputs:
        labels = block_targets(tokens, loss_mask, anchors, self.block_size)
        before = jnp.take_along_axis(features, jnp.maximum(anchors.positions - 1, 0)[..., None], axis=1)
        hidden = self.hidden(target, before, labels.prev_tokens[..., 0])
        return BlockOutputs(hidden, labels.prev_tokens, labels.labels, labels.teacher_rows, labels.mask)

    def init_cache(self, batch: int, length: int) -> jax.Array:
        return jnp.zeros((batch, self.width))  # the newest feature

    def extend(self, cache: Any, features: Any, tokens: Any, positions: Any, counts: Any) -> jax.Array:
        last = jnp.take_along_axis(features, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
        return jnp.where(counts[:, None] > 0, last, cache)

    def propose(
        self, target: Any, cache: Any, anchors: Any, positions: Any, uniforms: Any, sampling: Any
    ) -> tuple[Proposal, Any]:
        logits = target.unembed(self.hidden(target, cache, anchors))
        tokens = jax.vmap(sample, in_axes=(1, None, 1), out_axes=1)(logits, sampling, uniforms)
        return Proposal(tokens, logits, None), cache


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program does that adds them."""
    monkeypatch.setitem(LOSS_TERMS, "hellinger", Entry(Hellinger, "1 - sum_v sqrt(p_draft p_target)"))
    monkeypatch.setitem(LOSS_TERMS, "brier", Entry(Brier, "(1 - p(label))^2"))
    monkeypatch.setitem(LOSS_TERMS, "size", Entry(Size, "mean square of the hidden states"))
    monkeypatch.setitem(HEADS, "fading", Entry(FadingHead, "all tokens before, fading"))
    monkeypatch.setitem(KINDS, "maps", Kind(Maps, "one linear map per draft", needs_mask=False))


def base() -> Config:
    config = Config(
        target=TargetConfig(architecture=ARCH),
        data=DataConfig(max_length=16, max_prompt_length=4),
        mesh=MeshConfig(1, 1, 1),
    )
    drafter = {"num_layers": 1, "block_size": 3, "target_layer_ids": (0, 1), "mask_token_id": V - 1, "markov_rank": 4}
    config.drafter = dataclasses.replace(config.drafter, **drafter, initializer_range=0.3)
    config.train = dataclasses.replace(
        config.train, steps=4, batch_size=4, num_anchors=5, vocab_chunk=8, evaluate=False
    )
    return config


def with_head() -> Config:
    config = base()
    config.drafter.markov_head_type = "fading"
    config.loss.extra = {"hellinger": 0.5, "brier": 0.25, "size": 0.1}
    return config


@functools.cache
def target() -> Target:
    return Target(ARCH, rngs=nnx.Rngs(0), scale=0.5)


@functools.cache
def plain() -> list[np.ndarray]:
    return generate(Models(target()), PROMPTS, max_new_tokens=12).tokens


@pytest.mark.parametrize("make", [with_head, lambda: as_kind(base(), "maps")], ids=["head and terms", "kind"])
@pytest.mark.slow
def test_trains_and_decodes(make: Any) -> None:
    config = resolve(make())
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    optimizer = make_optimizer(config.optim, config.train.steps)
    state, drafter = init_state(config, optimizer, mesh), abstract_drafter(config)
    before = jax.device_get(state.params)
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, V, (4, 16)).astype(np.int32),
        "loss_mask": np.broadcast_to(np.arange(16) >= 3, (4, 16)).astype(np.uint8),
        "lengths": np.full(4, 16, np.int32),
        "sample_id": np.arange(4, dtype=np.int32),
    }
    with jax.set_mesh(mesh):
        step = make_train_step(config, drafter, target(), optimizer, mesh)
        state, metrics = step(state, to_params(target()), place_batch(batch, 1, mesh))
    found = values(metrics.ratios)
    assert set(config.loss.extra) <= set(found) and all(np.isfinite(value) for value in found.values())
    assert found["loss"] > sum(found[name] * weight for name, weight in config.loss.extra.items() if name != "brier")
    unchanged = [name for name, value in before.items() if np.array_equal(value, state.params[name])]
    assert not unchanged

    drafted = generate(Models(target(), to_module(drafter, state.params)), PROMPTS, max_new_tokens=12)
    assert all(np.array_equal(a, b) for a, b in zip(plain(), drafted.tokens, strict=True))
    assert max(int(lengths.max()) for lengths in drafted.acceptance_lengths) > 1  # drafts are accepted


@pytest.mark.parametrize("name", ["hellinger", "brier"])
def test_a_terms_slope_is_that_of_its_value_in_chunks_too(name: str) -> None:
    """Against automatic differentiation of the whole; with a head, a soft-cap and rows of weight 0 that are NaN."""
    rng = np.random.default_rng(1)
    shapes = {
        "hidden": (2, 6, 5),
        "prev_embedding": (2, 6, 3),
        "teacher": (2, 6, 5),
        "head": (V, 5),
        "markov_w2": (V, 3),
    }
    args = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    fixed = {key: args.pop(key) for key in ("teacher", "head")}
    fixed |= {"labels": rng.integers(0, V, (2, 6)), "weights": rng.uniform(0.1, 1.0, (2, 6)).astype(np.float32)}
    fixed["weights"][:, 4:] = 0.0

    def run(args: Any, implementation: str) -> Any:
        def loss(args: Any) -> jax.Array:
            terms = vocab_terms({name: 0.7, "ce": 0.1})
            return vocab_loss(**args, **fixed, terms=terms, softcap=2.0, chunk=5, implementation=implementation).loss

        return jax.jit(jax.value_and_grad(loss))(args)

    value, grads = run(args, "reference")
    poisoned = np.where(fixed["weights"][..., None] > 0, args["hidden"], np.nan)
    got, got_grads = run({**args, "hidden": poisoned}, "xla")
    np.testing.assert_allclose(got, value, rtol=1e-6)
    for key, grad in grads.items():
        np.testing.assert_allclose(got_grads[key], grad, atol=3e-6 * np.abs(grad).max(), err_msg=key)


def test_a_config_names_the_module_that_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config.json read elsewhere, too: by `resolve`, or by whoever makes the drafter of a checkpoint."""
    monkeypatch.syspath_prepend(tmp_path)
    for name, use in {"additions_a": resolve, "additions_b": abstract_drafter}.items():
        (tmp_path / f"{name}.py").write_text(
            "from dspark_jax.kinds import KINDS, Kind\n"
            f"KINDS['{name}'] = Kind('tests.test_adding:Maps', 'maps', needs_mask=False)\n"
        )
        config = as_kind(base(), "maps")
        config.drafter.kind, config.imports = name, (name,)
        monkeypatch.setitem(KINDS, name, KINDS["maps"])  # it is taken out again in the end
        del KINDS[name]
        use(from_json(to_json(config)))
        assert name in KINDS
    with pytest.raises(InputError, match="imports has 'additions_c', which cannot be imported .*; install it, or add"):
        resolve(dataclasses.replace(base(), imports=("additions_c",)))


def test_messages_list_what_was_added() -> None:
    for change, message in {
        ("loss", "extra", ("heling", 1.0)): "loss.extra has 'heling', which is unknown; use ce, .*, brier or size",
        ("loss", "extra", ("ce", 1.0)): "loss.extra has 'ce', which has a field of its own; set loss.ce=1.0",
        ("loss", "extra", ("size", -1.0)): "loss.extra has 'size': -1.0; each weight must be 0 or above",
        ("drafter", "markov_head_type", "lstm"): "'lstm' is unknown; use vanilla, gated, rnn, selector or fading",
        ("drafter", "kind", "hydra"): "'hydra' is unknown; use dspark, dflash, dflash2, dspark5, eagle3, mtp or maps",
    }.items():
        group, field, value = change
        config = base()
        setattr(getattr(config, group), field, dict([value]) if field == "extra" else value)
        with pytest.raises(InputError, match=message):
            resolve(config)
