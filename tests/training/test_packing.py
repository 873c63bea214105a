"""Packed sequences: the same loss and gradients as one document per sequence, whatever they share a sequence with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.data.packing import pack_batch, pad_batch
from dspark_jax.data.sources import Sample
from dspark_jax.kinds import as_kind
from dspark_jax.target.loading import load_target
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, init_state, to_module, to_params
from dspark_jax.training.step import accumulate, place_batch
from tests.conftest import others_slow

LENGTH, VOCAB = 24, 67


@pytest.fixture
def documents():
    """Five samples that fill two sequences; the second one supervises even its first token."""
    rng = np.random.default_rng(1)
    out = []
    for i, length in enumerate((11, 6, 7, 13, 8)):
        mask = (np.arange(length) >= (0 if i == 1 else 2)).astype(np.uint8)
        out.append(Sample(rng.integers(0, VOCAB - 1, length).astype(np.int32), mask, "set", i))
    return out


@pytest.fixture
def compute(config, meshes, request):
    """Batch -> (gradients, sums) of the initial state, with every candidate as an anchor; of DSpark unless stated."""
    config = as_kind(config, getattr(request, "param", "dspark"))
    if config.drafter.kind == "eagle3":
        config.drafter.block_size = 2
    elif config.drafter.kind == "mtp":
        config.drafter.target_layer_ids = (1,)
    config.train.num_anchors = LENGTH
    config.data.pack = True
    mesh = meshes["one"]
    drafter, target = abstract_drafter(config), load_target(config.target, mesh)
    params = init_state(config, make_optimizer(config.optim, 8), mesh).params

    def run(batch):
        def grads(params, frozen, batch):
            total = accumulate(params, drafter, to_module(target, frozen), batch, jnp.int32(0), config)
            return total.normalised(), total.sums

        with jax.set_mesh(mesh):
            compiled = jax.jit(grads)
            return jax.device_get(compiled(params, to_params(target), place_batch(batch, 1, mesh)))

    return run


@pytest.mark.parametrize("compute", others_slow(["dspark", "eagle3", "mtp"], "dspark"), indirect=True)
def test_packing_changes_neither_loss_nor_gradients(compute, documents):
    apart = pad_batch(documents, LENGTH)
    apart["loss_mask"][:, 0] = 0  # the first token of a document has nothing that predicts it
    packed = pack_batch([documents[:3], documents[3:]], LENGTH)
    assert packed["starts"].max() > 0
    want, want_sums = compute(apart)
    got, got_sums = compute(packed)
    if want_sums.denominator == 5 * LENGTH:  # EAGLE-3: all rows count, and its labels, which it does not learn, go on
        got = {name: grad * (got_sums.denominator / want_sums.denominator) for name, grad in got.items()}
        del want_sums.metrics["ce"]
    else:
        np.testing.assert_allclose(got_sums.denominator, want_sums.denominator, rtol=1e-6)
    np.testing.assert_allclose(got_sums.total, want_sums.total, rtol=2e-6)
    for name, ratio in want_sums.metrics.items():
        if name != "supervised":
            np.testing.assert_allclose(got_sums.metrics[name].num, ratio.num, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, grad in want.items():
        np.testing.assert_allclose(got[name], grad, atol=2e-5 * np.abs(grad).max(), err_msg=name)


def test_a_sequence_without_starts_would_differ(compute, documents):
    packed = pack_batch([documents[:3], documents[3:]], LENGTH)
    merged = packed | {"starts": np.zeros_like(packed["starts"])}
    assert abs(compute(packed)[1].total - compute(merged)[1].total) > 1e-3
