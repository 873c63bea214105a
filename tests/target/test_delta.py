"""The cache of linear attention: what was taken back leaves no trace, and pieces of a text are the text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.errors import InputError
from dspark_jax.ops.cached_attention import Rows
from dspark_jax.target import families
from dspark_jax.target.decode_weights import decode_weights
from dspark_jax.target.model import Target
from tests.conftest import others_slow
from tests.target.passes import stepper

V, BLOCK, LENGTH = 31, 4, 24
ARCH = TargetArchitecture(
    model_type="qwen3_5", vocab_size=V, hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, intermediate_size=24, rope_theta=100.0, max_position_embeddings=64,
    layer_types=("linear_attention",) * 3 + ("full_attention",), partial_rotary_factor=0.5,
    own={
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
        "linear_conv_kernel_dim": 4,
    },
)  # fmt: skip


@pytest.fixture(scope="module")
def target():
    return decode_weights(Target(ARCH, rngs=nnx.Rngs(0), scale=0.3), jnp.float32)


@pytest.fixture(scope="module")
def step(target):
    return stepper(target)


@pytest.fixture(scope="module")
def texts(target):
    tokens = np.random.default_rng(0).integers(0, V, (2, LENGTH))
    whole = target.forward(jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)).last_hidden
    return tokens, np.asarray(whole)


def test_the_cache_of_a_layer_is_of_its_kind(target):
    cache = target.init_cache(2, LENGTH, BLOCK)
    assert {kind: type(part).__name__ for kind, part in cache.items()} == {
        "linear_attention": "DeltaCache",
        "full_attention": "KVCache",
    }
    longer = target.init_cache(2, 50 * LENGTH, BLOCK)["linear_attention"]  # grows with no text
    assert jax.tree.map(jnp.shape, longer) == jax.tree.map(jnp.shape, cache["linear_attention"])


@pytest.mark.parametrize("accepted", range(1, BLOCK + 1))
def test_rows_that_are_taken_back_leave_no_trace(target, step, texts, accepted):
    """After every accepted length the next rounds are, bit by bit, those after other rejected rows."""
    tokens, whole = texts
    _, prompt = step(tokens[:, :7], [0, 0], target.init_cache(2, 40, BLOCK))
    found = []
    for wrong in (5, 29):
        fed = tokens[:, 7 : 7 + BLOCK].copy()
        fed[:, accepted:] = wrong
        at, cache, rounds = 7, prompt, []
        for _ in range(2):
            hidden, cache = step(fed, [at, at], cache)
            at += accepted
            fed = tokens[:, at : at + BLOCK]
            rounds.append(hidden[:, :accepted])
        last, cache = step(fed, [at, at], cache)
        found.append((*rounds, last, cache["linear_attention"].state))
        np.testing.assert_allclose(last, whole[:, at : at + BLOCK], rtol=0, atol=3e-5)
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)


def test_requests_go_back_by_rows_of_their_own(target, step, texts):
    tokens, whole = texts
    cache, at = target.init_cache(2, 40, BLOCK), np.array([0, 0])
    for taken in ([4, 1], [2, 4], [1, 3], [3, 2], [4, 4]):
        fed = np.stack([tokens[b, at[b] : at[b] + BLOCK] for b in range(2)])
        hidden, cache = step(fed, at, cache)
        for b in range(2):
            np.testing.assert_allclose(hidden[b], whole[b, at[b] : at[b] + BLOCK], rtol=0, atol=3e-5)
        at = at + taken


@pytest.mark.parametrize("width", others_slow((3, 8, 5), 3, 8))
def test_a_prompt_in_chunks_is_the_prompt(target, step, texts, width):
    """Chunks that could be taken back and longer ones, the last one padded; then a round."""
    tokens, whole = texts
    cache = target.init_cache(2, 40, BLOCK)
    for start in range(0, 20, width):
        count = min(width, 20 - start)
        fed = np.full((2, width), 9)
        fed[:, :count] = tokens[:, start : start + count]
        hidden, cache = step(fed, [start] * 2, cache, np.array([count] * 2))
        np.testing.assert_allclose(hidden[:, :count], whole[:, start : start + count], rtol=0, atol=3e-5)
    hidden, cache = step(tokens[:, 20:24], [20, 20], cache)
    np.testing.assert_allclose(hidden, whole[:, 20:24], rtol=0, atol=3e-5)


def test_a_slot_forgets_the_request_before(target, step, texts):
    """A request that begins at position 0 finds what another one has left, whether that is in the state or not."""
    tokens, whole = texts
    for used in (3, 9):
        _, cache = step(tokens[:, 2 : 2 + used], [0, 0], target.init_cache(2, 40, BLOCK))
        for width in (3, 9):
            hidden, _ = step(tokens[:, :width], [0, 0], cache)
            np.testing.assert_allclose(hidden, whole[:, :width], rtol=0, atol=3e-5)


@pytest.mark.slow
def test_flat_rows_are_the_rows_of_each_request(target, step, texts):
    """Requests with 3, 0 and 2 rows in one flat batch; the one without rows goes on as if nothing had been."""
    tokens = np.concatenate([texts[0], texts[0][:1]])
    whole = np.concatenate([texts[1], texts[1][:1]])
    _, cache = step(tokens[:, :6], [0, 0, 0], target.init_cache(3, 40, BLOCK))
    at, counts = np.array([6, 6, 6]), np.array([3, 0, 2])
    rows = Rows.of(jnp.asarray(counts), jnp.asarray(at), size=8, most=BLOCK)
    flat = rows.flatten(jnp.asarray(tokens[:, 6 : 6 + BLOCK]))[None]
    out = jax.jit(lambda cache: target.forward(flat, rows.at[None], cache, rows=rows))(cache)
    found = rows.pad(out.last_hidden[0])
    for b, count in enumerate(counts):
        np.testing.assert_allclose(found[b, :count], whole[b, 6 : 6 + count], rtol=0, atol=3e-5)
    at = at + counts
    fed = np.stack([tokens[b, at[b] : at[b] + BLOCK] for b in range(3)])
    hidden, _ = step(fed, at, out.cache)
    for b in range(3):
        np.testing.assert_allclose(hidden[b], whole[b, at[b] : at[b] + BLOCK], rtol=0, atol=3e-5)


RAW = {**ARCH.to_hf(), "tie_word_embeddings": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["linear_attention"] * 4}, "without any layer of full attention is not supported"),
        ({"layer_types": ["linear_attention", "sliding_attention"] * 2}, "layer_types has 4 entries .*sliding"),
        ({"linear_num_value_heads": 3}, "linear_num_value_heads 3 is no multiple of linear_num_key_heads 2"),
        ({"rope_parameters": {"rope_theta": 5.0, "partial_rotary_factor": 0.3}}, "gives no whole pairs"),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"attn_output_gate": False}, "attn_output_gate false is not supported"),
        ({"model_type": "qwen3_5_moe_text", "num_experts": 4}, "num_experts_per_tok 8 is above num_experts 4"),
    ],
)
def test_what_a_hybrid_may_not_say(change, message):
    with pytest.raises(InputError, match=message):
        TargetArchitecture.from_hf(RAW | change)


def test_a_model_with_images_is_its_text():
    """Its own word about the LM head counts, and has to be that of its text."""
    text = {name: value for name, value in RAW.items() if value is not None}
    whole = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 3}, "tie_word_embeddings": True}
    assert TargetArchitecture.from_hf(whole) == dataclasses.replace(ARCH, tie_word_embeddings=True)
    with pytest.raises(InputError, match="tie_word_embeddings is true, and false in text_config"):
        TargetArchitecture.from_hf(whole | {"text_config": text | {"tie_word_embeddings": False}})
    with pytest.raises(InputError, match='quantised checkpoint .*quant_method "gptq"'):
        TargetArchitecture.from_hf(whole | {"quantization_config": {"quant_method": "gptq", "bits": 4}})


def test_tensors_have_the_published_names():
    """Those of Qwen3.5-4B, whose language model is inside a larger one; its images and its drafter are left out."""
    family = families.of_shape(ARCH)
    names = {f"model.language_model.layers.0.linear_attn.{name}" for name in (
        "in_proj_qkv.weight", "in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "conv1d.weight", "A_log",
        "dt_bias", "norm.weight", "out_proj.weight",
    )}  # fmt: skip
    found = {name for weight in family.weights(ARCH, names).values() for name in weight.names(4)}
    assert names == {name for name in found if ".layers.0.linear_attn" in name}
    assert {"model.language_model.layers.3.self_attn.q_proj.weight", "lm_head.weight"} <= found
    assert family.ignores("mtp.fc.weight") and family.ignores("model.visual.pos_embed.weight")
    assert not any(map(family.ignores, found))
