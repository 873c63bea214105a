"""What a verify round costs beside a plain step where layers keep states, and ways to take rejected rows back.

    python tests/benchmarks/states.py [--batch 1] [--rows 8] [--width 512] [--layers 8] [--repeats 100]

Everything is called in turn, again and again, and the shortest call of each counts: what else a machine does then
meets all of them alike. Pin it to one core (`taskset -c 1`) where anything else runs: threads that wait for one that is
not running make the small products of linear attention many times slower.

`replayed` is what `DeltaCache` does: one state, and the rows that it does not know yet, which go through the rule once
more. `all states` keeps the state after every row of a pass and takes the one after the accepted rows; `all states at
once` computes them together. `only its own rows` takes nothing back: what a round would cost at least.
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
KINDS = {"hybrid": (LINEAR, LINEAR, LINEAR, FULL), "full attention": (FULL,)}

Timed = tuple[Callable[[Any], Any], Any]  # a call that takes the carry and gives it back, and the first carry


def shortest(timed: dict[str, Timed], repeats: int) -> dict[str, float]:
    """Milliseconds of the shortest call of each, called in turn."""
    carries = {name: jax.block_until_ready(run(carry)) for name, (run, carry) in timed.items()}
    times = {name: list[float]() for name in timed}
    for _ in range(repeats):
        for name, (run, _) in timed.items():
            begin = time.perf_counter()
            carries[name] = jax.block_until_ready(run(carries[name]))
            times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * min(found) for name, found in times.items()}


def target(args: argparse.Namespace, kinds: tuple[str, ...]) -> Target:
    """A random target in the form that decoding wants."""
    own = {"linear_num_key_heads": HEADS, "linear_num_value_heads": HEADS * VALUES, "linear_key_head_dim": WIDTH}
    own |= {"linear_value_head_dim": WIDTH, "linear_conv_kernel_dim": 4}
    arch = TargetArchitecture(
        "qwen3_5", 8192, args.width, args.layers, 8, 2, 64, 3 * args.width, max_position_embeddings=2048,
        layer_types=(kinds * args.layers)[: args.layers], partial_rotary_factor=0.25, own=own,
    )  # fmt: skip
    made = Target(arch, rngs=nnx.Rngs(0), scale=0.02)
    return jax.jit(functools.partial(decode_weights, dtype=jnp.float32, separate_caches=args.batch > 1))(made)


def passes(args: argparse.Namespace) -> dict[str, Timed]:
    """A plain step and a round of every request through whole targets that have 512 rows behind them."""
    timed = dict[str, Timed]()
    for name, kinds in KINDS.items():
        model = target(args, kinds)
        for rows in (1, args.rows):

            @functools.partial(jax.jit, donate_argnums=1)
            def step(model: Target, cache: Any, rows: int = rows) -> Any:
                tokens = jnp.ones((args.batch, rows), jnp.int32)
                out = model.forward(tokens, jnp.broadcast_to(512 + jnp.arange(rows), tokens.shape), cache)
                return out.cache, jnp.argmax(model.unembed(out.last_hidden), -1)

            def run(carry: Any, step: Any = step, model: Target = model) -> Any:
                return step(model, carry[0])

            timed[f"{name}, {rows}"] = run, (model.init_cache(args.batch, 640, rows), 0)
    return timed


def rules(args: argparse.Namespace) -> dict[str, Timed]:
    """One layer's rule in a round, in all ways."""
    b, t = args.batch, args.rows
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(x, jnp.float32) / WIDTH for x in rng.normal(size=(2, b, t, HEADS, WIDTH)))
    value = jnp.asarray(rng.normal(size=(b, t, HEADS, VALUES, WIDTH)), jnp.float32)
    decay, rate = jnp.full((2, b, t, HEADS, VALUES), 0.5) * jnp.asarray([-1, 1])[:, None, None, None, None]
    state, own = jnp.zeros((b, HEADS, VALUES, WIDTH, WIDTH)), (query, key, value, decay, rate)

    @functools.partial(jax.jit, donate_argnums=0)
    def replayed(carry: Any, own: Any) -> Any:
        state, old = carry
        out, state = delta_rule(*(jnp.concatenate(x, axis=1) for x in zip(old, own, strict=True)), state=state, kept=t)
        return (state, jax.tree.map(lambda x: x + 0, own)), out[:, t:]

    @functools.partial(jax.jit, donate_argnums=0)
    def all_states(states: Any, own: Any) -> Any:
        state, outs, kept = jnp.take(states, 2, axis=0), [], []
        for row in range(t):  # the rule stops after every row
            out, state = delta_rule(*(x[:, row : row + 1] for x in own), state=state)
            outs.append(out)
            kept.append(state)
        return jnp.stack(kept), jnp.concatenate(outs, axis=1)

    @functools.partial(jax.jit, donate_argnums=0)
    def at_once(states: Any, own: Any) -> Any:
        state = jnp.take(states, 2, axis=0)
        found = [delta_rule(*own, state=state, kept=row + 1) for row in range(t)]  # what they share is computed once
        return jnp.stack([state for _, state in found]), found[0][0]

    @functools.partial(jax.jit, donate_argnums=0)
    def only_own(state: Any, own: Any) -> Any:
        out, state = delta_rule(*own, state=state)
        return state, out

    many = jnp.stack([state] * t)
    ways = {
        "replayed": (replayed, (state + 0, jax.tree.map(lambda x: x + 0, own))),
        "all states": (all_states, many + 0),
        "all states at once": (at_once, many + 0),
        "only its own rows": (only_own, state + 0),
    }
    return {name: (lambda carry, run=run: run(carry[0], own), (carry, 0)) for name, (run, carry) in ways.items()}


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 1), ("rows", 8), ("width", 512), ("layers", 8), ("repeats", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    where = jax.devices()[0].platform
    print(
        f"{args.layers} layers of width {args.width}, batch {args.batch}, on {where}; shortest of {args.repeats} calls"
    )
    found = shortest(passes(args), args.repeats)
    for name in KINDS:
        plain, several = found[f"{name}, 1"], found[f"{name}, {args.rows}"]
        print(
            f"{name:18} plain step {plain:7.2f} ms   {args.rows} rows {several:7.2f} ms   {several / plain:.2f} times"
        )
    one, rows = 4 * args.batch * HEADS * VALUES * WIDTH**2, args.rows
    held = {"replayed": one + 4 * args.batch * rows * HEADS * (2 + VALUES) * WIDTH, "only its own rows": one}
    for name, time_ in shortest(rules(args), args.repeats).items():
        print(f"{name:18} one layer's rule {time_:7.3f} ms, keeps {held.get(name, one * rows) / 2**20:6.2f} MiB")


if __name__ == "__main__":
    main()
