"""What a term of the loss over the vocabulary is: its value for a row, and the slope of that in the draft's logits."""

import dataclasses
import functools
from typing import ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp


class Exponentials(NamedTuple):
    """Of logits [.., V].

    Attributes:
      top: [.., 1] the largest logit.
      total: [.., 1] sum of exp(logits - top).
    """

    top: jax.Array
    total: jax.Array

    @classmethod
    def of(cls, logits: jax.Array) -> Self:
        """Of whole rows."""
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        return cls(top, jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True))


@dataclasses.dataclass(frozen=True)
class Distributions:
    """The draft's and the target's distribution of rows; float32.

    The exponentials are not divided by their sums: passes over [.., m, V] are what a term costs, besides the products.

    Attributes:
      logits: [.., m, V] of the draft.
      top: [.., m, 1] the largest of them; a constant, which every term is free to shift by.
      draft: [.., m, V] exp(logits - top); the probabilities are draft * draft_scale.
      draft_sum: [.., m, 1] their sum.
      teacher_logits: [.., m, V] of the target.
      teacher_top: [.., m, 1] the largest of them.
      teacher: [.., m, V] exp(teacher_logits - teacher_top); the probabilities are teacher * teacher_scale.
      teacher_sum: [.., m, 1] their sum.
      label_logit: [.., m] the draft's logit of the label.
      labels: [.., m].
      weights: [.., m]; rows of weight 0 are not supervised and may be NaN.
      block: G; m is a multiple of it where a term is `blockwise`.
    """

    logits: jax.Array
    top: jax.Array
    draft: jax.Array
    draft_sum: jax.Array
    teacher_logits: jax.Array
    teacher_top: jax.Array
    teacher: jax.Array
    teacher_sum: jax.Array
    label_logit: jax.Array
    labels: jax.Array
    weights: jax.Array
    block: int

    @classmethod
    def of(
        cls,
        logits: jax.Array,
        teacher_logits: jax.Array,
        label_logit: jax.Array,
        labels: jax.Array,
        weights: jax.Array,
        block: int,
        known: tuple[Exponentials, Exponentials] | None = None,
    ) -> Self:
        """From the logits, see the attributes; `known` are the draft's and the teacher's, if they are."""
        (top, total), (teacher_top, teacher_total) = known or (Exponentials.of(logits), Exponentials.of(teacher_logits))
        both = (
            logits,
            top,
            jnp.exp(logits - top),
            total,
            teacher_logits,
            teacher_top,
            jnp.exp(teacher_logits - teacher_top),
        )
        return cls(*both, teacher_total, label_logit, labels, weights, block)

    def at(self, logits: jax.Array) -> Self:
        """The same with other logits of the draft, to differentiate in."""
        label_logit = jnp.sum(jnp.where(self.is_label, logits, 0.0), axis=-1)
        top, total = Exponentials.of(logits)
        return dataclasses.replace(
            self, logits=logits, top=top, draft=jnp.exp(logits - top), draft_sum=total, label_logit=label_logit
        )

    @functools.cached_property
    def draft_scale(self) -> jax.Array:
        """1 / draft_sum, [.., m, 1]."""
        return 1.0 / self.draft_sum

    @functools.cached_property
    def teacher_scale(self) -> jax.Array:
        """1 / teacher_sum, [.., m, 1]."""
        return 1.0 / self.teacher_sum

    @functools.cached_property
    def log_draft(self) -> jax.Array:
        """log p_draft, [.., m, V]; finite where a probability is too small for float32."""
        return self.logits - self.top - jnp.log(self.draft_sum)

    @functools.cached_property
    def log_teacher(self) -> jax.Array:
        """log p_target, [.., m, V]."""
        return self.teacher_logits - self.teacher_top - jnp.log(self.teacher_sum)

    @functools.cached_property
    def is_label(self) -> jax.Array:
        """[.., m, V] bool, true at the label."""
        return jnp.arange(self.logits.shape[-1]) == self.labels[..., None]

    @functools.cached_property
    def difference(self) -> jax.Array:
        """p_draft - p_target, [.., m, V]."""
        return self.draft * self.draft_scale - self.teacher * self.teacher_scale

    @functools.cached_property
    def distance(self) -> jax.Array:
        """sum_v |p_draft - p_target|, [.., m]: twice the total variation, in 0..2."""
        return jnp.sum(jnp.abs(self.difference), axis=-1)

    @functools.cached_property
    def accept(self) -> jax.Array:
        """Probability that a token drawn from the draft is accepted, [.., m]."""
        return jnp.clip(1.0 - 0.5 * self.distance, 0.0, 1.0)

    def distance_slope(self, scale: jax.Array) -> jax.Array:
        """Gradient of sum(scale * distance) in the logits, [.., m, V]; scale is [.., m, 1].

        d L1 / d logit = p (sign - sum_u p_u sign_u), where the sign is 0 for equal probabilities, which pull nowhere.
        """
        sign, pull = jnp.sign(self.difference), scale * self.draft_scale
        mean_sign = jnp.sum(self.draft * sign, axis=-1, keepdims=True) * self.draft_scale
        return self.draft * (pull * sign - pull * mean_sign)


class VocabTerm:
    """A term of the loss that is a function of a row's two distributions and its label.

    A subclass states `value`, and `slope` where a formula is cheaper than automatic differentiation.
    """

    weighted: ClassVar[bool] = True
    """Whether a row's value counts as often as its weight says; if not, every supervised row counts once."""
    blockwise: ClassVar[bool] = False
    """Whether the value of a row depends on other rows of its block, which then stay together."""
    in_kernels: ClassVar[bool] = False
    """Whether `value` and `slope` are known to run inside kernels, too, on a few rows: a term of yours may try."""
    reported: ClassVar[bool] = False
    """Whether its mean is a metric of every run; if not, of those in which it has a weight."""

    def value(self, rows: Distributions) -> jax.Array:
        """[.., m]; anything on rows of weight 0, which add nothing."""
        raise NotImplementedError

    def slope(self, rows: Distributions, scale: jax.Array) -> jax.Array:
        """Gradient of sum(scale * value) in `rows.logits`, [.., m, V]; scale is [.., m, 1]."""
        return jax.grad(lambda logits: jnp.sum(scale[..., 0] * self.value(rows.at(logits))))(rows.logits)
