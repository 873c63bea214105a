"""AdamW or Muon with clipping, linear warm-up and cosine decay to zero (trap 17)."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from dspark_jax.config import OptimConfig


def learning_rate(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step i = 0..total_steps-1, in closed form.

    peak * (i + 1) / W while i < W = int(total_steps * warmup_ratio), then peak * (1 + cos(pi (i - W) / (N - W))) / 2,
    which starts at the peak again and would reach 0 at step N = total_steps. The reference intends this; with newer
    PyTorch its first step after the warm-up overshoots the peak by about 0.1 %.

    Args:
      config: peak and warm-up share.
      total_steps: N, at least 1.

    Returns:
      A function of the step (integer or traced) to a float32 scalar.
    """
    warmup = int(total_steps * config.warmup_ratio)
    decay = max(total_steps - warmup, 1)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        # (1 + cos x) / 2 as cos(x / 2)^2, which does not cancel near the end.
        cosine = jnp.square(jnp.cos(0.5 * jnp.pi * jnp.clip((step - warmup) / decay, 0.0, 1.0)))
        share = jnp.where(step < warmup, (step + 1.0) / max(warmup, 1), cosine)
        return config.learning_rate * share

    return schedule


def make_optimizer(
    config: OptimConfig, total_steps: int, *, schedule: optax.Schedule | None = None
) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW or Muon (decoupled weight decay on every parameter).

    Args:
      config: kind, learning rates, betas, epsilon, weight decay, largest gradient norm.
      total_steps: optimizer steps of the run.
      schedule: learning rate by step; `learning_rate(config, total_steps)` unless given.

    Returns:
      A transformation of the pytree of float32 gradients; its state has the parameters' shapes, so their shardings fit.
    """
    rate = learning_rate(config, total_steps) if schedule is None else schedule
    if config.kind == "muon":
        ratio = config.muon_learning_rate / config.learning_rate
        rule = muon(
            lambda count: ratio * rate(count),
            adam_learning_rate=rate,
            adam_b1=config.b1,
            adam_b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            adam_weight_decay=config.weight_decay,
            muon_weight_dimension_numbers=matrix_axes,  # pyright: ignore[reportArgumentType]  (a function will do)
        )
    else:
        rule = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), rule)


def matrix_axes(params: Mapping[str, Any]) -> dict[str, MuonDimensionNumbers | None]:
    """Which axes of each parameter are a matrix's inputs and outputs; None where Muon does not apply.

    The matrices of the layers, those of the gated, the RNN and the selector head, and those that give convolutions
    their coefficients are orthogonalised, layer by layer. Norms, what convolutions have for every channel, the Markov
    tables (embeddings) and the confidence head are left to AdamW, which has Nesterov momentum here.
    """
    return {path: _MATRICES.get(path.removeprefix("backbone.")) for path in params}


_MATRICES = {
    "fc": MuonDimensionNumbers((0,), (1,)),
    "projection": MuonDimensionNumbers((0,), (1,)),
    "markov.gate": MuonDimensionNumbers((0,), (1,)),
    "markov.projection": MuonDimensionNumbers((0,), (1,)),
    "markov.joint": MuonDimensionNumbers((0,), (1,)),
    "layers.attention.query": MuonDimensionNumbers((1,), (2, 3)),
    "layers.attention.key": MuonDimensionNumbers((1,), (2, 3)),
    "layers.attention.value": MuonDimensionNumbers((1,), (2, 3)),
    "layers.attention.out": MuonDimensionNumbers((1, 2), (3,)),
    "layers.mlp.gate": MuonDimensionNumbers((1,), (2,)),
    "layers.mlp.up": MuonDimensionNumbers((1,), (2,)),
    "layers.mlp.down": MuonDimensionNumbers((1,), (2,)),
    "layers.around_attention.projection": MuonDimensionNumbers((1,), (2,)),
    "layers.around_mlp.projection": MuonDimensionNumbers((1,), (2,)),
}
"""Stacks of layers have their layer axis in front."""
