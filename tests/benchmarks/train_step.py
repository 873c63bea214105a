"""Seconds and memory per train step, and how far that is from the arithmetic it takes.

    python tests/benchmarks/train_step.py            # features given, then the target in the step
    python tests/benchmarks/train_step.py --json out.json --steps 20

The problem is that of the PyTorch reference's measurements: a target of 6 layers x 256 with 4096 tokens, a drafter of
2 layers, blocks of 7, rank 64, 32 anchors, 4 sequences of 256 tokens, random weights, float32. Every variant runs in a
process of its own, so that its peak memory is its own. The floor is the multiply-adds of all matrix products that the
definition needs (nothing recomputed), at the speed of a large float32 product measured in the same process.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

VARIANTS = ("features given", "online target")


def bench_config(vocab_chunk: int):
    """The problem, as the commands would state it."""
    from dspark_jax.config import (
        Config,
        DataConfig,
        DrafterConfig,
        MeshConfig,
        TargetArchitecture,
        TargetConfig,
        TrainConfig,
    )

    arch = TargetArchitecture("qwen3", 4096, 256, 6, 4, 2, 64, 768, 1e-6, 1e6, True, 2048)
    return Config(
        name="bench",
        target=TargetConfig(architecture=arch, dtype="float32"),
        drafter=DrafterConfig(
            num_layers=2,
            block_size=7,
            target_layer_ids=(0, 1, 2, 3, 4),
            mask_token_id=4095,
            markov_rank=64,
            dtype="float32",
        ),
        data=DataConfig(max_length=256, max_prompt_length=56),
        train=TrainConfig(steps=1000, batch_size=4, num_anchors=32, vocab_chunk=vocab_chunk),
        mesh=MeshConfig(1, 1, 1),
    )


def floor_flops(config, online: bool) -> dict[str, float]:
    """Floating point operations of the matrix products of one step, by part."""
    arch, drafter, train = config.target.architecture, config.drafter, config.train
    d, v, r = arch.hidden_size, arch.vocab_size, drafter.markov_rank
    wide, narrow = arch.num_attention_heads * arch.head_dim, arch.num_key_value_heads * arch.head_dim
    rows = train.batch_size * train.num_anchors * drafter.block_size
    tokens = train.batch_size * config.data.max_length
    layer = d * (2 * wide + 2 * narrow + 3 * arch.intermediate_size)
    keys = config.data.max_length / 2 + drafter.block_size  # what a block sees of the context, on average
    parts = {
        # draft and teacher logits, gradients of hidden, Markov embedding and W2 (the head is frozen)
        "vocabulary": 2 * rows * v * (3 * d + 3 * r),
        # forward, and twice that backward
        "draft layers": 6 * drafter.num_layers * rows * (layer + 2 * wide * keys),
        "context": 6 * drafter.num_layers * tokens * 2 * d * narrow
        + 4 * tokens * d * d * len(drafter.target_layer_ids),  # the features need no gradient
    }
    if online:
        attention = 2 * wide * config.data.max_length / 2
        parts["target"] = 2 * arch.num_hidden_layers * tokens * (layer + attention)
    return parts


def matmul_speed() -> float:
    """Floating point operations per second of a large float32 product here and now: the best of several."""
    import jax
    import jax.numpy as jnp

    size, x = 1536, jnp.ones((1536, 1536), jnp.float32)
    product = jax.jit(lambda a: a @ a)
    times = [_seconds(lambda: jax.block_until_ready(product(x))) for _ in range(8)]
    return 2 * size**3 / min(times)


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _peak_megabytes() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def _resident_megabytes() -> float:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def measure(variant: str, steps: int, vocab_chunk: int) -> dict:
    """Runs one variant in this process."""
    import jax
    import numpy as np
    from flax import nnx

    from dspark_jax.sharding import make_mesh
    from dspark_jax.target.model import Target
    from dspark_jax.training.host_memory import return_freed_memory
    from dspark_jax.training.optim import make_optimizer
    from dspark_jax.training.state import abstract_drafter, init_state, to_params
    from dspark_jax.training.step import make_train_step, place_batch

    config, online = bench_config(vocab_chunk), variant == "online target"
    arch, length = config.target.architecture, config.data.max_length
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    before = _peak_megabytes()
    rng = np.random.default_rng(0)
    shape = (config.train.batch_size, length)
    batch = {
        "tokens": rng.integers(0, arch.vocab_size, shape, np.int32),
        "loss_mask": np.broadcast_to(np.arange(length) >= 56, shape).astype(np.uint8),
        "lengths": np.full(shape[:1], length, np.int32),
        "sample_id": np.arange(shape[0], dtype=np.int32),
    }
    if not online:
        width = arch.hidden_size * len(config.drafter.target_layer_ids)
        batch["features"] = rng.standard_normal((*shape, width), np.float32)
        batch["last_hidden"] = rng.standard_normal((*shape, arch.hidden_size), np.float32)
    with jax.set_mesh(mesh):
        target = jax.jit(lambda: Target(arch, rngs=nnx.Rngs(0)))()
        optimizer = make_optimizer(config.optim, config.train.steps)
        state, frozen = init_state(config, optimizer, mesh), to_params(target)
        placed = place_batch(batch, 1, mesh)
        step = make_train_step(config, abstract_drafter(config), target, optimizer, mesh)
        return_freed_memory()
        start = time.perf_counter()
        compiled = step.lower(state, frozen, placed).compile()
        compiling = time.perf_counter() - start
        return_freed_memory()
        compiled_peak, resting = _peak_megabytes(), _resident_megabytes()
        times, processor = [], []
        for _ in range(steps + 2):
            start, used = time.perf_counter(), time.process_time()
            state, metrics = compiled(state, frozen, placed)
            jax.block_until_ready(state)
            times.append(time.perf_counter() - start)
            processor.append(time.process_time() - used)
        peak, training = _peak_megabytes(), _resident_megabytes()
        speed = matmul_speed()
    times, processor = times[2:], processor[2:]  # the first ones touch fresh memory
    parts = floor_flops(config, online)
    flops, median = sum(parts.values()), statistics.median(times)
    memory = compiled.memory_analysis()
    return {
        "variant": variant,
        "seconds_per_step": median,
        "seconds_min": min(times),
        "seconds_max": max(times),
        "cpu_seconds_per_step": statistics.median(processor),
        "steps": steps,
        "vocab_chunk": vocab_chunk,
        "compile_seconds": compiling,
        "peak_rss_mb": peak,
        "peak_rss_compiling_mb": compiled_peak,
        "rss_compiled_mb": resting,
        "rss_training_mb": training,
        "rss_before_models_mb": before,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "state_mb": sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6,
        "flops": flops,
        "flops_by_part": parts,
        "matmul_flops_per_second": speed,
        "floor_seconds": flops / speed,
        "ratio_to_floor": median / (flops / speed),
        "tokens_per_second": config.train.batch_size * length / median,
        "loss": metrics.ratios["loss"].value(),
    }


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, help="only this one")
    parser.add_argument("--steps", type=int, default=15, help="measured steps (default 15)")
    parser.add_argument("--vocab-chunk", type=int, default=256, help="train.vocab_chunk (default 256)")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    results = []
    for variant in [arguments.variant] if arguments.variant else VARIANTS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(measure, (variant, arguments.steps, arguments.vocab_chunk)))
        r = results[-1]
        print(
            f"{variant}: {r['seconds_per_step']:.3f} s per step ({r['seconds_min']:.3f}-{r['seconds_max']:.3f}; "
            f"{r['cpu_seconds_per_step']:.3f} s of processor time), "
            f"{r['tokens_per_second']:.0f} tokens/s, compiled in {r['compile_seconds']:.1f} s, "
            f"peak {r['peak_rss_mb']:.0f} MB ({r['rss_before_models_mb']:.0f} before the models exist, "
            f"{r['peak_rss_compiling_mb']:.0f} while compiling, {r['rss_training_mb']:.0f} between steps)\n"
            f"  floor: {r['flops'] / 1e9:.1f} GFLOP ("
            + ", ".join(f"{name} {value / 1e9:.1f}" for name, value in r["flops_by_part"].items())
            + f") at {r['matmul_flops_per_second'] / 1e9:.0f} GFLOP/s = {r['floor_seconds']:.3f} s; "
            f"measured / floor = {r['ratio_to_floor']:.2f}"
        )
    if len(results) == 2:
        added = results[1]["seconds_per_step"] - results[0]["seconds_per_step"]
        print(f"the target in the step adds {added:.3f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
