"""AdamW with clipping, linear warm-up and cosine decay to zero (trap 17)."""

import jax
import jax.numpy as jnp
import optax

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
    """Clips by global norm, then AdamW (decoupled weight decay on every parameter).

    Args:
      config: learning rate, betas, epsilon, weight decay, largest gradient norm.
      total_steps: optimizer steps of the run.
      schedule: learning rate by step; `learning_rate(config, total_steps)` unless given.

    Returns:
      A transformation of the pytree of float32 gradients; its state has the parameters' shapes, so their shardings fit.
    """
    schedule = learning_rate(config, total_steps) if schedule is None else schedule
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay),
    )
