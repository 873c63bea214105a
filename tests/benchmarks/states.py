"""What a verify round costs beside a plain step where layers keep states, and two ways to take rejected rows back.

    python tests/benchmarks/states.py [--batch 1] [--rows 8] [--width 512] [--layers 8]

Times are medians of single calls, in milliseconds. `replayed` is what `DeltaCache` does: one state, and the rows that
it does not know yet. `all states` keeps the state after every row of a pass and picks the one after the accepted rows.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.ops.delta_rule import delta_rule
from dspark_jax.target.decode_weights import decode_weights
from dspark_jax.target.families.family import FULL, LINEAR
from dspark_jax.target.model import Target

HEADS, VALUES, WIDTH = 4, 2, 128


def median(run: Callable[[Any], Any], carry: Any, repeats: int = 30) -> float:
    """Milliseconds of a call that takes the carry and gives it back."""
    times = []
    for _ in range(repeats + 3):
        begin = time.perf_counter()
        carry = jax.block_until_ready(run(carry))
        times.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(times[3:]))


def target_times(args: argparse.Namespace, kinds: tuple[str, ...], rows: int) -> float:
    """A pass of `rows` rows of every request through a whole target that has 512 rows behind it."""
    own = {"linear_num_key_heads": HEADS, "linear_num_value_heads": HEADS * VALUES, "linear_key_head_dim": WIDTH}
    own |= {"linear_value_head_dim": WIDTH, "linear_conv_kernel_dim": 4}
    arch = TargetArchitecture(
        "qwen3_5", 8192, args.width, args.layers, 8, 2, 64, 3 * args.width, max_position_embeddings=2048,
        layer_types=(kinds * args.layers)[: args.layers], partial_rotary_factor=0.25, own=own,
    )  # fmt: skip
    made = Target(arch, rngs=nnx.Rngs(0), scale=0.02)
    target = jax.jit(functools.partial(decode_weights, dtype=jnp.float32, separate_caches=args.batch > 1))(made)

    @functools.partial(jax.jit, donate_argnums=1)
    def step(target: Target, cache: Any) -> Any:
        tokens = jnp.ones((args.batch, rows), jnp.int32)
        out = target.forward(tokens, jnp.broadcast_to(512 + jnp.arange(rows), tokens.shape), cache)
        return out.cache, jnp.argmax(target.unembed(out.last_hidden), -1)

    return median(lambda carry: step(target, carry[0]), (target.init_cache(args.batch, 640, args.rows), 0))


def rule_times(args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Milliseconds of one layer's rule in a round, and MiB that it keeps, both ways."""
    b, t = args.batch, args.rows
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(x, jnp.float32) / WIDTH for x in rng.normal(size=(2, b, t, HEADS, WIDTH)))
    value = jnp.asarray(rng.normal(size=(b, t, HEADS, VALUES, WIDTH)), jnp.float32)
    decay, rate = jnp.full((2, b, t, HEADS, VALUES), 0.5) * jnp.asarray([-1, 1])[:, None, None, None, None]
    state = jnp.zeros((b, HEADS, VALUES, WIDTH, WIDTH))

    @functools.partial(jax.jit, donate_argnums=0)
    def replayed(carry: Any) -> Any:
        state, old = carry
        new = query, key, value, decay, rate
        out, state = delta_rule(*(jnp.concatenate(x, axis=1) for x in zip(old, new, strict=True)), state, kept=t)
        return (state, jax.tree.map(lambda x: x + 0, new)), out[:, t:]

    @functools.partial(jax.jit, donate_argnums=0)
    def all_states(states: Any) -> Any:
        state, outs, kept = jnp.take(states, 2, axis=0), [], []
        for row in range(t):  # the rule has to stop after every row to keep what it is there
            out, state = delta_rule(*(x[:, row : row + 1] for x in (query, key, value, decay, rate)), state)
            outs.append(out)
            kept.append(state)
        return jnp.stack(kept), jnp.concatenate(outs, axis=1)

    size = 4 * state.size / 2**20
    own = (state + 0, jax.tree.map(lambda x: x + 0, (query, key, value, decay, rate)))
    rows = sum(4 * x.size for x in own[1]) / 2**20
    return {
        "replayed": (median(lambda carry: replayed(carry[0]), (own, 0)), size + rows),
        "all states": (median(lambda carry: all_states(carry[0]), (jnp.stack([state] * t), 0)), size * t),
    }


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 1), ("rows", 8), ("width", 512), ("layers", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    print(f"{args.layers} layers of width {args.width}, batch {args.batch}, on {jax.devices()[0].platform}")
    for name, kinds in (("hybrid", (LINEAR, LINEAR, LINEAR, FULL)), ("full attention", (FULL,))):
        plain = target_times(argparse.Namespace(**vars(args) | {"rows": 1}), kinds, 1)
        round_ = target_times(args, kinds, args.rows)
        print(f"{name:15} plain step {plain:7.2f}   {args.rows} rows {round_:7.2f}   {round_ / plain:.2f} times")
    for name, (time_, size) in rule_times(args).items():
        print(f"{name:15} one layer's rule {time_:7.3f} ms, keeps {size:7.2f} MiB")


if __name__ == "__main__":
    main()
