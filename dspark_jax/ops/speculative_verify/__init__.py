"""How many drafts are accepted, and the token that follows: from the target's logits and the drafter's."""

from dspark_jax.ops.speculative_verify.api import speculative_verify
from dspark_jax.ops.speculative_verify.rule import acceptance_probabilities, accepted_prefix, residual

__all__ = ["acceptance_probabilities", "accepted_prefix", "residual", "speculative_verify"]
