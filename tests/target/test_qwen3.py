"""The Qwen3 target against transformers in PyTorch on small random models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import platform
from dspark_jax.config import MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.ops.cached_attention import Rows
from dspark_jax.sharding import make_mesh
from dspark_jax.target.decode_weights import decode_weights, has_decode_weights, unstacked
from dspark_jax.target.layers import rope
from dspark_jax.target.loading import load_target

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPES = {
    "tied": dict(tie_word_embeddings=True, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
    "untied": dict(tie_word_embeddings=False, num_attention_heads=4, num_key_value_heads=4, head_dim=8),
    "one_kv_head_wide": dict(tie_word_embeddings=True, num_attention_heads=4, num_key_value_heads=1, head_dim=32),
}
TAPS = (-1, 0, 2, 4)


def write_model(directory, shards: int = 1, **fields):
    """A random Hugging Face Qwen3 (weights large enough that every part of the model matters), saved."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=199, hidden_size=48, num_hidden_layers=6, intermediate_size=80, rope_theta=10000.0,
        max_position_embeddings=256, initializer_range=0.12, **fields,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    size = sum(p.numel() for p in model.parameters()) * 4
    model.save_pretrained(directory, max_shard_size=-(-size // shards) if shards > 1 else "1GB")
    return model


def test_checkpoints_in_bfloat16_are_known_to_be(tmp_path):
    for dtype, narrow in ((torch.float32, False), (torch.bfloat16, True)):
        write_model(tmp_path / str(narrow), **SHAPES["tied"]).to(dtype).save_pretrained(tmp_path / str(narrow))
        assert load(tmp_path / str(narrow), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])).narrow is narrow


def load(directory, mesh):
    return load_target(TargetConfig(path=str(directory), architecture=TargetArchitecture.from_hf(directory)), mesh)


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    model = write_model(directory, **SHAPES[request.param])
    return model, load(directory, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))


def oracle(model, tokens):
    """Hidden states at the taps, post-norm last hidden and logits, in float64."""
    model = model.double()
    with torch.no_grad():
        out = model(torch.tensor(tokens), output_hidden_states=True)
    features = np.concatenate([out.hidden_states[i + 1].numpy() for i in TAPS], axis=-1)
    return features, out.hidden_states[-1].numpy(), out.logits.numpy()


def assert_close(ours, theirs):
    """float32 accuracy: a few hundred roundings of the largest value."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=4e-6 * np.abs(theirs).max())


def test_forward_equals_transformers(pair):
    model, target = pair
    tokens = np.random.default_rng(0).integers(0, 199, (2, 37))
    positions = jnp.broadcast_to(jnp.arange(37), tokens.shape)
    for model_form in (target, decode_weights(target, jnp.float32)):
        out = jax.jit(lambda t, form=model_form: form.forward(t, positions, taps=TAPS))(tokens)
        features, last_hidden, logits = oracle(model, tokens)
        assert_close(out.features, features)
        assert_close(out.last_hidden, last_hidden)
        assert_close(target.unembed(out.last_hidden), logits)


def test_layers_one_by_one_train_as_a_stack_does(pair):
    """A GPU trains with them; decoding weights can still be made of them."""
    _, target = pair
    tokens = jax.random.randint(jax.random.key(4), (2, 9), 0, 199)
    starts = jnp.asarray([[0] * 9, [0] * 4 + [4] * 5])  # two documents in the second sequence

    def run(model):
        out = model.forward(tokens, jnp.arange(9) - starts, taps=TAPS, starts=starts)
        return out.features, out.last_hidden

    one_by_one = unstacked(target)
    for a, b in zip(jax.jit(run)(one_by_one), jax.jit(run)(target), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    assert not has_decode_weights(one_by_one)
    decoding = [decode_weights(model, jnp.float32, separate_caches=True) for model in (one_by_one, target)]
    assert all(has_decode_weights(model) for model in decoding)
    assert jax.tree.structure(decoding[0]) == jax.tree.structure(decoding[1])
    jax.tree.map(np.testing.assert_array_equal, *decoding)


def test_decode_weights_change_no_result(pair):
    _, target = pair
    # Rounded to bfloat16, the weights are the same in either type.
    target = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), target)
    tokens = jax.random.randint(jax.random.key(3), (2, 9), 0, 199)
    positions = jnp.broadcast_to(jnp.arange(9), tokens.shape)

    def run(model):
        out = model.forward(tokens, positions, model.init_cache(2, 12), taps=TAPS)
        return out.features, model.unembed(out.last_hidden), out.cache

    expected = jax.jit(run)(target)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = jax.jit(lambda model, dtype=dtype: run(decode_weights(model, dtype)))(target)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    apart = jax.jit(lambda model: run(decode_weights(model, jnp.float32, separate_caches=True)))(target)
    assert len(apart[2].keys) == len(apart[2].values) == target.arch.num_hidden_layers
    given = jax.tree.map(jnp.copy, target)
    eager = jax.jit(run)(decode_weights(given, jnp.float32, consume=True))  # one program per kind of array
    for a, b in zip(jax.tree.leaves(eager), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))
    assert given.layers.mlp.down[...].is_deleted() and not given.embedding[...].is_deleted()
    stacked = (*apart[:2], jnp.stack(apart[2].keys), jnp.stack(apart[2].values))
    for a, b in zip(stacked, (*expected[:2], expected[2].keys, expected[2].values), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_cached_decoding_equals_transformers(pair):
    """Two requests of different lengths, fed in uneven pieces, with stale rows of a rolled-back draft in between."""
    model, target = pair
    tokens = np.random.default_rng(1).integers(0, 199, (2, 30))
    expected = oracle(model, tokens)
    cache = target.init_cache(2, 40)
    starts = np.array([0, 0])
    features = np.full((2, 30, expected[0].shape[-1]), np.nan)
    step = jax.jit(lambda t, p, c: target.forward(t, p, c, taps=TAPS))
    for lengths in ([9, 5], [1, 1], [4, 8], [3, 3], [13, 13]):
        width = max(lengths)
        positions = starts[:, None] + np.arange(width)
        fed = np.full((2, width), 7)  # rows after a request's own are drafts that get rejected
        for b, length in enumerate(lengths):
            fed[b, :length] = tokens[b, starts[b] : starts[b] + length]
        out = step(fed, positions, cache)
        cache = out.cache
        for b, length in enumerate(lengths):
            features[b, starts[b] : starts[b] + length] = out.features[b, :length]
        starts = starts + np.array(lengths)
    assert (starts == 30).all()
    assert_close(features, expected[0])


def test_sharded_checkpoint_on_a_mesh_equals_one_device(tmp_path):
    write_model(tmp_path, shards=4, **SHAPES["untied"])
    assert len(list(tmp_path.glob("*.safetensors"))) >= 4
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 199, (4, 12)))
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    results = []
    for config, devices in ((MeshConfig(1, 1, 1), jax.devices()[:1]), (MeshConfig(2, 2, 2), jax.devices())):
        mesh = make_mesh(config, devices)
        with jax.set_mesh(mesh):
            target = load(tmp_path, mesh)
            forward = jax.jit(lambda model, t: model.unembed(model.forward(t, positions, taps=(0,)).last_hidden))
            results.append(np.asarray(forward(target, tokens)))
        sharding = target.layers.mlp.gate[...].sharding
    assert sharding.spec == jax.P(None, "fsdp", "tensor")
    assert_close(results[1], results[0])


def test_rows_of_requests_one_behind_the_other(pair):
    """A ragged pass over flat rows gives what each request's own rows give, with either layout of the cache."""
    _, target = pair
    tokens = jax.random.randint(jax.random.key(5), (3, 12), 0, 199)
    counts, starts = jnp.asarray([4, 0, 1]), jnp.asarray([3, 6, 8])
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    whole = jax.jit(lambda model: model.forward(tokens, positions, model.init_cache(3, 12), taps=TAPS))(target)
    rows = Rows.of(counts, starts, size=7, most=4)

    def ragged(model, separate, unstack):
        model = decode_weights(model, jnp.float32, separate_caches=separate) if unstack else model
        cache = model.forward(tokens[:, :8], positions[:, :8], model.init_cache(3, 12)).cache
        flat = tokens[jnp.minimum(rows.owner, 2), rows.at]
        out = model.forward(flat[None], rows.at[None], cache, taps=TAPS, rows=rows)
        return out.features[0], out.last_hidden[0]

    for separate, unstack in ((False, False), (False, True), (True, True)):
        found = jax.jit(lambda model, how=(separate, unstack): ragged(model, *how))(target)
        for got, wanted in zip(found, (whole.features, whole.last_hidden), strict=True):
            wanted = np.concatenate([wanted[0, 3:7], wanted[2, 8:9]])
            np.testing.assert_allclose(got[:5], wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("turns", [(), (1.0, 0.5, 0.25, 0.0)])
def test_halves_that_swap_by_a_product_rotate_the_same(turns, monkeypatch):
    """As on a TPU, values and gradients: a product with ones and zeros rounds nothing; float32 goes the other way."""
    rng = np.random.default_rng(0)
    positions = jnp.asarray(rng.integers(0, 4096, (2, 5)), jnp.int32)
    for dtype, product in ((jnp.bfloat16, True), (jnp.float32, False)):
        x, cotangent = (jnp.asarray(rng.normal(size=(2, 5, 3, 8)), dtype) for _ in range(2))

        def both(x, cotangent=cotangent):
            out, pull = jax.vjp(lambda x: rope(x, positions, 100.0, turns), x)
            return out, pull(cotangent)[0]

        want = both(x)
        with monkeypatch.context() as patch:
            patch.setattr(platform, "swaps_by_product", lambda: True)
            assert ("dot_general" in str(jax.make_jaxpr(lambda x: rope(x, positions, 100.0, turns))(x))) == product
            got = both(x)
        np.testing.assert_array_equal(*(np.asarray(out[0], np.float32) for out in (got, want)))
        tolerance = 2**-7 * float(jnp.abs(want[1]).max())  # both parts of a gradient are rounded first
        np.testing.assert_allclose(*(np.asarray(out[1], np.float32) for out in (got, want)), rtol=0, atol=tolerance)
