"""The parts of a DeepSeek-V4 that are around its sublayers and in the place of its MLP, against transformers'."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import MeshConfig
from dspark_jax.sharding import make_mesh
from dspark_jax.target.experts import Experts
from dspark_jax.target.families.family import ExpertShape, HyperShape
from dspark_jax.target.hyper_connections import HyperConnection, HyperHead, sinkhorn, streams_of

torch = pytest.importorskip("torch")
modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

N, D, E, K, F, V = 4, 12, 6, 2, 10, 17
ARCH: Any = SimpleNamespace(hidden_size=D, rms_norm_eps=1e-6)
HYPER = HyperShape(N, 20, 1e-6)


def of_transformers(**change):
    return modeling.DeepseekV4Config(
        hidden_size=D, hc_mult=N, n_routed_experts=E, num_experts_per_tok=K, moe_intermediate_size=F, vocab_size=V,
        num_hidden_layers=2, mlp_layer_types=["hash_moe", "moe"], swiglu_limit=0.4, **change,
    )  # fmt: skip


def with_random(module):
    """A module of transformers in float64 with numbers everywhere that matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in [*module.parameters(), *module.buffers()]:
            if parameter.is_floating_point():
                parameter.normal_(0, 0.7)
            else:
                parameter.copy_(torch.stack([torch.randperm(E)[:K] for _ in range(V)]))
    return module.double()


def put(variable, value, shape=None):
    value = value.detach().numpy()
    variable.set_value(jnp.asarray(value.T.reshape(shape) if shape else value, variable[...].dtype))


def random(*shape):
    return np.random.default_rng(0).normal(size=shape)


def test_streams_are_collapsed_and_mixed_as_in_transformers():
    theirs = with_random(modeling.DeepseekV4HyperConnection(of_transformers()))
    ours = HyperConnection(ARCH, HYPER, stack=(), scale=0.1, rngs=nnx.Rngs(0))
    put(ours.mix, theirs.fn, (N, D, -1))
    put(ours.base, theirs.base)
    put(ours.scale, theirs.scale)
    streams, out = random(2, 5, N, D), random(2, 5, D)
    post, comb, collapsed = theirs(torch.tensor(streams))
    found, kept = ours.collapse(jnp.asarray(streams, jnp.float32))
    np.testing.assert_allclose(found, collapsed.detach().numpy(), rtol=2e-5, atol=2e-5)
    mixed = torch.matmul(comb.transpose(-1, -2).double(), torch.tensor(streams))
    expected = (post.unsqueeze(-1) * torch.tensor(out).unsqueeze(-2) + mixed).detach().numpy()
    after = ours.expand(jnp.asarray(streams, jnp.float32), jnp.asarray(out, jnp.float32), kept)
    np.testing.assert_allclose(after, expected, rtol=2e-5, atol=2e-5)


def test_the_last_streams_are_collapsed_as_in_transformers():
    theirs = with_random(modeling.DeepseekV4HyperHead(of_transformers()))
    ours = HyperHead(ARCH, HYPER, rngs=nnx.Rngs(0))
    put(ours.mix, theirs.hc_fn, (N, D, N))
    put(ours.base, theirs.hc_base)
    put(ours.scale, theirs.hc_scale)
    streams = random(2, 5, N, D)
    expected = theirs(torch.tensor(streams)).detach().numpy()
    np.testing.assert_allclose(ours(jnp.asarray(streams, jnp.float32)), expected, rtol=2e-5, atol=2e-5)


def test_mixing_keeps_the_sum_of_the_streams():
    mixing = sinkhorn(jnp.exp(jnp.asarray(random(7, N, N))), 20, 1e-6)
    for axis in (-1, -2):
        np.testing.assert_allclose(jnp.sum(mixing, axis=axis), 1, atol=2e-2)
    assert streams_of(jnp.ones((2, D)), HYPER).shape == (2, N, D)


def mixture(hashed, scores="sqrtsoftplus"):
    """A mixture of transformers and ours with its weights."""
    layer = 0 if hashed else 1
    theirs = with_random(modeling.DeepseekV4SparseMoeBlock(of_transformers(scoring_func=scores), layer))
    theirs.experts.config._experts_implementation = "eager"
    shape = ExpertShape(
        E, K, F, True, scores, 1.5, corrected=not hashed, hashed=V if hashed else 0, limit=0.4, shared=F
    )
    ours = Experts(ARCH, shape, stack=(), scale=0.1, rngs=nnx.Rngs(0))
    put(ours.router, theirs.gate.weight, (D, E))
    if hashed:
        put(ours.table, theirs.gate.tid2eid)
    else:
        put(ours.correction, theirs.gate.e_score_correction_bias)
    both = theirs.experts.gate_up_proj.detach().numpy()
    for variable, value in ((ours.gate, both[:, :F]), (ours.up, both[:, F:])):
        variable.set_value(jnp.asarray(value.swapaxes(1, 2), jnp.float32))
    ours.down.set_value(jnp.asarray(theirs.experts.down_proj.detach().numpy().swapaxes(1, 2), jnp.float32))
    for name in ("gate", "up", "down"):
        weight = getattr(theirs.shared_experts, f"{name}_proj").weight
        put(getattr(ours.shared, name), weight, (weight.shape[1], weight.shape[0]))
    return theirs, ours


@pytest.mark.parametrize(("hashed", "scores"), [(True, "sqrtsoftplus"), (False, "sqrtsoftplus"), (False, "sigmoid")])
@pytest.mark.parametrize("rows", [1, 9])
def test_routers_shared_expert_and_limits_are_those_of_transformers(hashed, scores, rows):
    theirs, ours = mixture(hashed, scores)
    x, tokens = random(1, rows, D), np.random.default_rng(1).integers(0, V, (1, rows))
    with torch.no_grad():
        expected = theirs(torch.tensor(x), input_ids=torch.tensor(tokens)).numpy()
    found = jax.jit(ours)(jnp.asarray(x, jnp.float32), jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    unbounded = without_limit(ours)(jnp.asarray(x, jnp.float32), jnp.asarray(tokens))
    assert np.abs(unbounded - expected).max() > 0.1  # the limit matters here


def without_limit(mixture):
    copy = nnx.clone(mixture)
    copy.shape = dataclasses.replace(copy.shape, limit=0.0)
    copy.shared.limit = 0.0
    return copy


@pytest.mark.parametrize("hashed", [True, False])
def test_a_mesh_routes_as_one_device_does(hashed):
    _, ours = mixture(hashed)
    x, tokens = jnp.asarray(random(4, 3, D), jnp.float32), jnp.asarray(np.arange(12).reshape(4, 3))
    expected = ours(x, tokens)
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2), jax.devices())):
        found = jax.jit(ours)(x, tokens)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-4)
