"""Scaled RoPE of drafters: what positions beyond the trained length do to the frequencies of a head's pairs.

The formulas are those of transformers (`modeling_rope_utils`), the names of the numbers those of a `config.json`. It is
all known before anything is computed: no frequency depends on how long a sequence has become, so that keys in a cache
stay true. Dynamic NTK is refused for that reason.
"""

import math
from collections.abc import Iterator, Mapping

NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""By `rope_type` the numbers that it needs ..."""
OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
}
"""... and those that it may have."""


def problems(kind: str, numbers: Mapping[str, float]) -> Iterator[str]:
    """What does not hold of `drafter.rope_type` and `drafter.rope_scaling`."""
    if kind not in NEEDED:
        why = (
            "; its frequencies change as a sequence grows, and cached keys would be wrong" if kind == "dynamic" else ""
        )
        yield f"drafter.rope_type={kind!r} is unknown{why}; use {', '.join(NEEDED)}"
        return
    known = NEEDED[kind] + OPTIONAL.get(kind, ())
    for name in NEEDED[kind]:
        if name not in numbers:
            yield f"drafter.rope_scaling has no {name!r}, which rope_type={kind!r} needs; add it"
    for name, value in numbers.items():
        if name not in known:
            names = f"it has {', '.join(known)}" if known else "it has none"
            yield f"drafter.rope_scaling has {name!r}, which is no number of rope_type={kind!r}; {names}"
        elif not 0 < value < math.inf and not (name == "truncate" and value == 0):
            yield f"drafter.rope_scaling has {name!r}: {value}; it must be positive, and finite"
    if kind == "llama3" and not numbers.get("low_freq_factor", 0) < numbers.get("high_freq_factor", math.inf):
        yield "drafter.rope_scaling: low_freq_factor must be below high_freq_factor; correct them"
    if kind == "yarn" and not numbers.get("beta_slow", 1.0) < numbers.get("beta_fast", 32.0):
        slow, fast = numbers.get("beta_slow", 1.0), numbers.get("beta_fast", 32.0)
        yield f"drafter.rope_scaling: beta_slow {slow} must be below beta_fast {fast}; correct them"


def scaled(kind: str, numbers: Mapping[str, float], width: int, theta: float) -> tuple[tuple[float, ...], float]:
    """Factors of the frequencies of a head's pairs, and of queries and keys.

    Args:
      kind: one of `NEEDED`.
      numbers: of it; `problems` finds none.
      width: of a head.
      theta: base of the frequencies.

    Returns:
      width/2 factors, empty if all are 1; and the number that rotated queries and keys are multiplied with.
    """
    if kind == "default":
        return (), 1.0
    factor = numbers["factor"]
    if kind == "linear":
        return (1.0 / factor,) * (width // 2), 1.0
    frequencies = [theta ** (-2 * pair / width) for pair in range(width // 2)]
    if kind == "llama3":
        return tuple(_llama3(frequency, numbers) for frequency in frequencies), 1.0
    return _yarn(numbers, width, theta), _yarn_attention(numbers)


def _llama3(frequency: float, numbers: Mapping[str, float]) -> float:
    """Slow pairs are stretched, fast ones stay, and those between are blended by their turns in the trained length."""
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    turns = numbers["original_max_position_embeddings"] * frequency / (2 * math.pi)
    share = min(max((turns - low) / (high - low), 0.0), 1.0)
    return (1 - share) / numbers["factor"] + share


def _yarn(numbers: Mapping[str, float], width: int, theta: float) -> tuple[float, ...]:
    """The same with a ramp over the numbers of the pairs."""

    def pair(turns: float) -> float:
        """The number of the pair that turns so often in the trained length."""
        length = numbers["original_max_position_embeddings"]
        return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(numbers.get("beta_fast", 32.0)), pair(numbers.get("beta_slow", 1.0))
    if numbers.get("truncate", 1):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    last += 0.001 if first == last else 0
    stretched = [min(max((i - first) / (last - first), 0.0), 1.0) for i in range(width // 2)]
    return tuple(share / numbers["factor"] + (1 - share) for share in stretched)


def _yarn_attention(numbers: Mapping[str, float]) -> float:
    """What YaRN multiplies queries and keys with: attention is sharpened as the length grows."""

    def sharper(scale: float) -> float:
        factor = numbers["factor"]
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if "attention_factor" in numbers:
        return numbers["attention_factor"]
    if "mscale" in numbers and "mscale_all_dim" in numbers:
        return sharper(numbers["mscale"]) / sharper(numbers["mscale_all_dim"])
    return sharper(1.0)
