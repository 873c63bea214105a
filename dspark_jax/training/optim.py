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
    their coefficients are orthogonalised, layer by layer and expert by expert. Norms, what convolutions have for every
    channel, hyper-connections, output matrices of groups of heads (several in one parameter), the Markov tables
    (embeddings) and the confidence head are left to AdamW, which has Nesterov momentum here.
    """
    return {
        path: _MATRICES.get((path.removeprefix("backbone."), getattr(leaf, "ndim", 0)))  # optax masks what is AdamW's
        for path, leaf in params.items()
    }


def _matrices(axes: int, inputs: tuple[int, ...], outputs: tuple[int, ...], *names: str) -> dict[tuple[str, int], Any]:
    return {(name, axes): MuonDimensionNumbers(inputs, outputs) for name in names}


_MLP = ("layers.mlp.gate", "layers.mlp.up", "layers.mlp.down")
_ATTENTION = ("layers.attention.query", "layers.attention.key", "layers.attention.value")
_MATRICES = (
    _matrices(2, (0,), (1,), "fc", "projection", "markov.gate", "markov.projection", "markov.joint")
    | _matrices(4, (1,), (2, 3), *_ATTENTION)
    | _matrices(4, (1, 2), (3,), "layers.attention.out")
    | _matrices(3, (1,), (2,), *_MLP, "layers.around_attention.projection", "layers.around_mlp.projection")
    # Of DeepSeek-V4's layers: attention through narrower rows, and experts.
    | _matrices(3, (1,), (2,), "layers.attention.query_in", "layers.attention.row", "layers.attention.out")
    | _matrices(3, (1,), (2,), "layers.mlp.router", *(name.replace("mlp", "mlp.shared") for name in _MLP))
    | _matrices(4, (2,), (3,), *_MLP)
)
"""By name and number of axes; stacks of layers have their layer axis in front, those of experts theirs after it."""
