"""Every kind of drafter, random and real, in the same engine: greedy output is plain decoding's, sampled output has
the target's distribution."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax import platform
from dspark_jax.config import Config, DataConfig, DrafterConfig, TargetArchitecture, TargetConfig, resolve
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import generate, schedulers
from dspark_jax.engine.models import Models
from dspark_jax.engine.serving import Engine
from dspark_jax.kinds import as_kind, names
from dspark_jax.sharding import Param
from dspark_jax.target.model import Target
from dspark_jax.vocabulary import encode_vocabulary

VOCAB = 5
ARCH = TargetArchitecture("qwen3", VOCAB, 16, 3, 2, 1, 8, 32, 1e-6, 1e4, True, 256)
PROMPTS = [[int(t) for t in np.random.default_rng(i).integers(0, VOCAB, 1 + i % 7)] for i in range(12)]


@functools.cache
def target() -> Target:
    """With opinions: most rows have a clear favourite, and some have not."""
    return Target(ARCH, rngs=nnx.Rngs(0), scale=0.5)


@functools.cache
def drafter(kind: str) -> Any:
    """A random drafter of a kind; that with a layer of Llama drafts from three of the five tokens."""
    base = DrafterConfig(
        num_layers=2, block_size=3, target_layer_ids=(0, 1), mask_token_id=4, markov_rank=4, initializer_range=0.5,
        selector_top_k=3,
    )  # fmt: skip
    data = DataConfig(max_length=64, max_prompt_length=16)
    config = as_kind(Config(target=TargetConfig(architecture=ARCH), drafter=base, data=data), kind)
    if kind == "eagle3_llama":
        config.drafter.draft_vocab_size, config.drafter.draft_vocabulary = (
            3,
            encode_vocabulary(np.array([0, 2, 3]), VOCAB),
        )
    config = resolve(config)
    return make_drafter(ARCH, config.drafter, rngs=nnx.Rngs(3))


SLOW = ("fill_in", "dflash2")
DRAFTERS = [
    pytest.param(kind, marks=pytest.mark.slow if kind in SLOW else ())
    for kind in names()
    if kind != "length"  # which is dspark with another loss
]


GREEDY, SAMPLES, BUDGET = len(PROMPTS), 4000, 8
SAMPLED = PROMPTS[4]


@functools.cache
def plain() -> list[np.ndarray]:
    """Greedy tokens of all prompts, without a drafter."""
    return generate(Models(target()), PROMPTS, max_new_tokens=BUDGET).tokens


@pytest.mark.parametrize("kind", DRAFTERS)
def test_output_is_the_targets(kind: str) -> None:
    """Greedy requests and 4000 sampled ones in one batch. Of those, the first three tokens are compared with their
    exact 125 probabilities (chi-square, 6 sigma)."""
    prompts = PROMPTS + [SAMPLED] * SAMPLES
    heat = [0.0] * GREEDY + [1.0] * SAMPLES
    result = generate(
        Models(target(), drafter(kind)),
        prompts,
        max_new_tokens=BUDGET,
        temperature=heat,
        batch_size=len(prompts),
        seed=7,
    )
    for want, got in zip(plain(), result.tokens[:GREEDY], strict=True):
        np.testing.assert_array_equal(got, want)
    assert max(int(lengths.max()) for lengths in result.acceptance_lengths) > 1  # drafts are accepted

    drawn = np.stack([tokens[:3] for tokens in result.tokens[GREEDY:]]) @ np.array([VOCAB**2, VOCAB, 1])
    expected = SAMPLES * exact(tuple(SAMPLED))
    observed = np.bincount(drawn, minlength=VOCAB**3)
    rare = expected < 4
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    statistic, freedom = np.sum((observed - expected) ** 2 / expected), len(expected) - 1
    assert freedom > 10 and statistic < freedom + 6 * np.sqrt(2 * freedom), (statistic, freedom)


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "dspark" else pytest.param(kind, marks=pytest.mark.slow) for kind in names() if kind != "length"],
)
def test_the_form_in_which_a_tpu_decodes_drafts_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers in stacks, matrices of heads the other way round."""

    def run() -> Any:
        jax.clear_caches()  # a form that was traced is remembered
        models = Models(target(), drafter(kind)).for_decoding(batch_size=4)  # which `generate` asks for again
        leaves = jax.tree.leaves(models, is_leaf=lambda leaf: isinstance(leaf, Param))
        across = [leaf for leaf in leaves if isinstance(leaf, Param) and leaf.get_metadata().get("across")]
        return generate(models, PROMPTS[:4], max_new_tokens=BUDGET, trace=True), len(across)

    expected, turned = run()
    assert not turned
    with monkeypatch.context() as patch:
        patch.setattr(platform, "unstacks_layers", lambda: False)
        patch.setattr(platform, "joins_heads", lambda: False)
        found, turned = run()
    jax.clear_caches()
    assert turned >= 3
    for name in ("tokens", "acceptance_lengths", "drafted"):
        for got, want in zip(getattr(found, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(got, want, err_msg=name)


QUESTIONS = [*PROMPTS, [int(t) for t in np.random.default_rng(12).integers(0, VOCAB, 37)]]
"""Also one of more tokens than a drafter reads at a time of what it has not read yet."""


@functools.cache
def drafts_everywhere(kind: str) -> list[np.ndarray]:
    """[rounds, G] what is drafted after every token of a greedy answer, by taking one token at a time."""
    result = generate(
        Models(target(), drafter(kind)), QUESTIONS, max_new_tokens=24, scheduler=schedulers.fixed(0), trace=True
    )
    assert result.drafted is not None
    return result.drafted


@pytest.mark.parametrize(
    "kind", ("dspark", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("eagle3", "mtp")))
)
@pytest.mark.slow
def test_drafts_behind_rounds_without_drafts(kind: str) -> None:
    """The drafter catches up with what was committed without it: it drafts what it would have drafted anyway."""
    # Several requests catch up at 16 pending rows though nothing is drafted; one has more, and reads 16 at a time, of
    # its prompt as well.
    for probe, size in ((1, 4), (20, 4), (20, 1)):
        scheduler = schedulers.adaptive(1 / 1000, probe=probe, trial_share=np.inf)
        options: dict[str, Any] = {"max_new_tokens": 24, "batch_size": size, "scheduler": scheduler, "trace": True}
        result = generate(Models(target(), drafter(kind)), QUESTIONS, **options)
        assert result.drafted is not None
        for emitted, drafted, wanted in zip(
            result.acceptance_lengths, result.drafted, drafts_everywhere(kind), strict=True
        ):
            starts, some = np.cumsum(emitted) - emitted, drafted[:, 0] >= 0
            assert some.any() and not some.all()
            np.testing.assert_array_equal(drafted[some], wanted[starts[some]])


def test_served_drafts_behind_rounds_without_drafts() -> None:
    """The same in slots, which new requests take while others have not caught up."""
    scheduler = schedulers.adaptive(1 / 1000, probe=2, trial_share=np.inf)
    options: dict[str, Any] = {"capacity": 80, "prefill_chunk": 2, "max_stop_tokens": 4, "scheduler": scheduler}
    with Engine(Models(target(), drafter("dspark")), slots=2, **options) as engine:
        handles = [
            engine.submit(prompt, max_new_tokens=9 + number, trace=True) for number, prompt in enumerate(QUESTIONS)
        ]
        while engine.step():
            pass
    seen = 0
    for handle, wanted in zip(handles, drafts_everywhere("dspark"), strict=True):
        position = 0
        for piece in handle.pieces:
            if piece.round is not None and piece.round.drafted:
                assert list(piece.round.drafted) == wanted[position - 1].tolist()
                seen += 1
            position += len(piece.tokens)
    assert seen > len(QUESTIONS)


def test_eagle3_is_served_in_chunks_and_slots() -> None:
    """Prompts come in chunks of two tokens, slots are handed over, and caches are cropped and extended."""
    with Engine(
        Models(target(), drafter("eagle3")), slots=2, capacity=24, prefill_chunk=2, max_stop_tokens=4
    ) as engine:
        requests = [engine.submit(prompt, max_new_tokens=BUDGET, temperature=0.0) for prompt in PROMPTS[:5]]
        while engine.step():
            pass
        results = [request.result() for request in requests]
    for result, want in zip(results, plain(), strict=False):
        assert list(result.tokens) == want.tolist()


@functools.cache
def exact(prompt: tuple[int, ...]) -> np.ndarray:
    """[V^3] probabilities of the next three tokens, by running the target over every continuation."""
    paths = np.stack(np.meshgrid(*[np.arange(VOCAB)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    tokens = np.concatenate([np.tile(prompt, (len(paths), 1)), paths], axis=1)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    out = target().forward(jnp.asarray(tokens, jnp.int32), positions)
    rows = jax.nn.softmax(target().unembed(out.last_hidden), axis=-1)[:, len(prompt) - 1 : -1]
    return np.prod(np.take_along_axis(np.asarray(rows, np.float64), paths[..., None], axis=-1)[..., 0], axis=1)
