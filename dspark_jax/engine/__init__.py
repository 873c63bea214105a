"""Decoding: `generate` runs draft, schedule, verify and commit in one jitted loop; `decode_round` is one turn of it.

`serving.Engine` decodes requests as they come.
"""

from dspark_jax.engine.generate import Prompts, generate, prefill
from dspark_jax.engine.models import Models
from dspark_jax.engine.result import DecodeResult
from dspark_jax.engine.round import decode_round
from dspark_jax.engine.sampling import Requests, Uniforms, request_keys, round_uniforms
from dspark_jax.engine.state import DecodeState, Round

__all__ = [
    "DecodeResult",
    "DecodeState",
    "Models",
    "Prompts",
    "Requests",
    "Round",
    "Uniforms",
    "decode_round",
    "generate",
    "prefill",
    "request_keys",
    "round_uniforms",
]
