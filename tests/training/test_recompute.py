"""`train.recompute`: the same gradients, of which less or more is kept and computed again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import Config, resolve
from dspark_jax.kinds import as_kind
from dspark_jax.target.loading import load_target
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, init_state
from dspark_jax.training.step import loss_sums
from tests.conftest import others_slow

CHOICES = ("nothing", "cheap", "layers")


@pytest.mark.parametrize("kind", others_slow(("dspark", "eagle3"), "dspark"))
def test_gradients_are_the_same_and_what_is_kept_is_not(kind, config, meshes, batch):
    config = as_kind(config, kind)
    config = dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, num_layers=1))
    config.train.num_anchors = config.data.max_length if kind == "eagle3" else 6
    config = resolve(config)
    mesh = meshes["one"]
    target, drafter = load_target(config.target, mesh), abstract_drafter(config)
    params = init_state(config, make_optimizer(config.optim, 1), mesh).params
    batch = {name: jnp.asarray(x) for name, x in batch.items()}

    def loss(how: str):
        chosen: Config = dataclasses.replace(config, train=dataclasses.replace(config.train, recompute=how))
        return lambda params: loss_sums(params, drafter, target, batch, jnp.int32(0), chosen)[0]

    gradients, kept, products = {}, {}, {}
    for how in CHOICES:
        gradient = jax.grad(loss(how))
        gradients[how] = jax.device_get(jax.jit(gradient)(params))
        products[how] = str(jax.make_jaxpr(gradient)(params)).count("dot_general")
        backward = jax.eval_shape(lambda params, how=how: jax.vjp(loss(how), params)[1], params)
        kept[how] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))
    for how in CHOICES[1:]:
        for name, want in gradients["nothing"].items():
            atol = 3e-6 * np.abs(want).max()
            np.testing.assert_allclose(gradients[how][name], want, rtol=0, atol=atol, err_msg=f"{how} {name}")
    assert kept["nothing"] > 1.2 * kept["cheap"] > 1.2 * kept["layers"], kept
    assert products["nothing"] < products["cheap"] < products["layers"], products


def test_an_unknown_choice_is_refused(config):
    config.train.recompute = "all"
    with pytest.raises(ValueError, match="train.recompute='all' is unknown; use nothing, cheap or layers"):
        resolve(config)
