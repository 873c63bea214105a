"""Decoding rounds and train steps at the released shapes, with random weights built on the device.

    python tests/benchmarks/released.py --model qwen3_4b --parts decode,train --json released.json

For one accelerator, in under ten minutes. Every line gives the time, the floor (of plain steps the bytes that must be
read at the rate of a copy, of train steps the operations at the rate of a large product, of drafted rounds the larger;
both rates are measured here first), their ratio, and what the PyTorch reference took on an H100 for Qwen3-4B.
`--profile` adds the kernels that take the time. `--quick` is a tiny model, to try this file on any machine.
`python -m dspark_jax.kernels` times single operations.

    python tests/benchmarks/released.py --model qwen3_4b --parts "" --card dspark_jax/evaluation/costs/CARD_MODEL.json

measures the round times of DSpark on this card, on which `evaluate` replays load then.
"""

import argparse
import collections
import dataclasses
import glob
import gzip
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.config import Config, DrafterConfig, MeshConfig, TargetArchitecture
from dspark_jax.drafter import make_drafter
from dspark_jax.engine.cost import RoundShape, round_seconds, rounds_of
from dspark_jax.engine.models import Models
from dspark_jax.planning.timing import Rates
from dspark_jax.sharding import make_mesh
from dspark_jax.target.model import Target
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, init_state, to_params
from dspark_jax.training.step import make_train_step, place_batch

REFERENCE = {"train step, features given": 0.1137}
"""Seconds of the PyTorch reference (compiled, flex attention) on one H100 80GB HBM3, Qwen3-4B, 1 x 4096 tokens."""


def released(model: str) -> Config:
    """The config of a released drafter's training, one answer to a sequence; `quick` is a tiny one."""
    from importlib import import_module

    config = import_module(f"configs.dspark_{'qwen3_4b' if model == 'quick' else model}").get_config()
    config.data.pack, config.train.num_anchors = False, 512
    if model == "quick":
        arch = TargetArchitecture("qwen3", 1000, 64, 4, 4, 2, 16, 128, 1e-6, 1e6, True, 4096)
        drafter = DrafterConfig(num_layers=2, target_layer_ids=(0, 2), mask_token_id=999, markov_rank=128)
        config = dataclasses.replace(config, drafter=drafter)
        config.target.architecture, config.data.max_length, config.train.num_anchors = arch, 128, 8
        return config
    return config


def narrow(module: Any) -> Any:
    """Matrices in bfloat16, as checkpoints have them."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, module)


def models(config: Config) -> tuple[Any, Any]:
    """Target (bfloat16) and drafter (float32 parameters) with random weights."""
    arch = config.target.architecture
    target = jax.jit(lambda: narrow(Target(arch, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))()
    drafter = jax.jit(lambda: make_drafter(arch, config.drafter, rngs=nnx.Rngs(1), dtype=jnp.bfloat16))()
    return target, drafter


def size_of(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def row(name: str, seconds: float, floor: float, **more: Any) -> dict[str, Any]:
    """Prints a line and returns it."""
    extra = "".join(f", {key} {value}" for key, value in more.items())
    if name in REFERENCE:
        extra += f", reference on an H100 {1e3 * REFERENCE[name]:.1f} ms"
    print(
        f"{name:44} {1e3 * seconds:9.3f} ms, floor {1e3 * floor:8.3f}, ratio {seconds / floor:5.2f}{extra}", flush=True
    )
    return {"name": name, "seconds": seconds, "floor": floor, **more}


def profile(run: Callable[[], Any], top: int = 16) -> None:
    """Prints the kernels of one call by their share."""
    folder = tempfile.mkdtemp()
    jax.block_until_ready(run())
    with jax.profiler.trace(folder):
        jax.block_until_ready(run())
    files = glob.glob(folder + "/**/*.trace.json.gz", recursive=True)
    if not files:
        return
    with gzip.open(files[0]) as file:
        events = json.load(file)["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    total, count = collections.Counter(), collections.Counter()
    for event in events:
        where = (event.get("pid"), event.get("tid"))
        if event.get("ph") == "X" and "GPU" in processes.get(where[0], "") and "Stream" in threads.get(where, ""):
            total[event["name"]] += event["dur"]
            count[event["name"]] += 1
    busy = sum(total.values())
    print(f"    kernels {sum(count.values())}, busy {busy / 1e3:.3f} ms")
    for name, microseconds in total.most_common(top):
        print(f"    {microseconds / 1e3:9.4f} ms x{count[name]:5}  {100 * microseconds / busy:5.1f} %  {name[:100]}")


def decoding(config: Config, rates: Rates, quick: bool, show: bool) -> list[dict[str, Any]]:
    """Plain steps and drafted rounds, greedy, every request at 1024 tokens."""
    arch, context = config.target.architecture, 32 if quick else 1024
    both = Models(*models(config)).for_decoding(batch_size=1, consume=True)
    target, drafter = both.target, both.drafter
    embedding = 0 if arch.tie_word_embeddings else arch.vocab_size * arch.hidden_size * 2
    weights, drafts = size_of(target) - embedding, size_of(drafter) - size_of(drafter.markov.w1)
    head = arch.vocab_size * arch.hidden_size * 2
    heads = config.drafter.block_size * size_of(drafter.markov.w2) - size_of(drafter.markov.w2)
    found = []
    for batch in (1, 32):
        cache = 2 * arch.num_key_value_heads * arch.head_dim * context * batch * 2
        plain = rates.floor(weights + arch.num_hidden_layers * cache)
        moved = weights + drafts + head + heads + (arch.num_hidden_layers + config.drafter.num_layers) * cache
        rows = batch * (config.drafter.block_size + 1)
        operations = 2 * rows * (weights + drafts + head) / 2
        for name, helper, tokens, floor in (
            (f"plain step, batch {batch}", both.plain(), 0, plain),
            (f"drafted round, batch {batch}", both, rows, rates.floor(moved, operations)),
        ):
            shape = RoundShape(batch, context, tokens)
            start = time.perf_counter()
            seconds = round_seconds(helper, shape, rounds=16)
            found.append(row(name, seconds, floor, compiled=f"{time.perf_counter() - start:.0f} s"))
            if show:
                run = rounds_of(helper, shape)
                profile(lambda run=run: run(2))
    stats = jax.devices()[0].memory_stats() or {}
    peak, both = stats.get("peak_bytes_in_use", 0) / 2**30, (size_of(target) + size_of(drafter)) / 2**30
    print(f"    memory in use at most {peak:.1f} GiB, of which models {both:.1f}")
    return found


def card(config: Config, model: str, quick: bool) -> dict[str, Any]:
    """Round times by the number of requests and of verified rows, as a file of `dspark_jax/evaluation/costs/`."""
    context, block = 32 if quick else 1024, config.drafter.block_size
    both = Models(*models(config)).for_decoding(batch_size=1, consume=True)
    plain, drafted = [], []
    for requests in (1, 2) if quick else (1, 4, 16, 32, 64):
        seconds = round_seconds(both.plain(), RoundShape(requests, context, 0), rounds=16)
        plain.append({"requests": requests, "milliseconds": round(1e3 * seconds, 3)})
        for drafts in (2, block):
            rows = requests * (drafts + 1)
            seconds = round_seconds(both, RoundShape(requests, context, rows), rounds=16)
            drafted.append({"requests": requests, "rows": rows, "milliseconds": round(1e3 * seconds, 3)})
    device, name = jax.devices()[0].device_kind, os.path.basename(config.target.path)
    return {
        "name": f"one {device} with {name} and DSpark",
        "source": f"Measured with JAX {jax.__version__} on {jax.default_backend()}: random weights in bfloat16, "
        f"greedy, every request with {context} tokens of context, blocks of {block} drafts "
        f"(tests/benchmarks/released.py --model {model} --card).",
        "limits": f"Rounds of {', '.join(str(one['requests']) for one in plain)} requests, with 2 and with {block} "
        "drafts of each verified, were measured. Between them it is assumed that a round takes what a plain one of as "
        "many requests takes, the time to draft, and a time for each draft that is verified. Other kinds of drafters "
        "draft in other times.",
        "kinds": ["dspark", "dflash"],
        "block_size": block,
        "device": device,
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "context": context,
        "drafted_rounds": sorted(drafted, key=lambda one: one["rows"]),
        "plain_rounds": plain,
    }


def training(config: Config, rates: Rates, show: bool) -> list[dict[str, Any]]:
    """One sequence of 4096 tokens, 512 anchors, by what is computed again; and four, with the target in the step."""
    from tests.benchmarks.train_step import floor_flops

    config = dataclasses.replace(
        config,
        target=dataclasses.replace(config.target, dtype="bfloat16"),
        drafter=dataclasses.replace(config.drafter, dtype="bfloat16"),
        mesh=MeshConfig(1, 1, 1),
    )
    found = []
    for name, batch, online, recompute in (
        ("train step, features given", 1, False, "nothing"),
        ("the same, cheap parts computed again", 1, False, "cheap"),
        ("the same, layers computed again", 1, False, "layers"),
        ("train step, online target", 1, True, "nothing"),
        ("train step, online target, 4 sequences", 4, True, "nothing"),
    ):
        train = dataclasses.replace(config.train, steps=1000, batch_size=batch, accumulate=1, recompute=recompute)
        case = dataclasses.replace(config, train=train)
        seconds, memory, compiled, run = train_step(case, online)
        floor = rates.floor(0, sum(floor_flops(case, online).values()))
        tokens = batch * case.data.max_length / seconds
        more = {"tokens_per_second": int(tokens), "memory": memory, "compiled": f"{compiled:.0f} s"}
        found.append(row(name, seconds, floor, **more))
        if show:
            profile(run, top=24)
        del run
    return found


def train_step(config: Config, online: bool) -> tuple[float, str, float, Callable[[], Any]]:
    """(seconds, memory, seconds of compiling, a step to profile)."""
    arch, batch, length = config.target.architecture, config.train.batch_size, config.data.max_length
    mesh, rng = make_mesh(config.mesh, jax.devices()[:1]), np.random.default_rng(0)
    given = {
        "tokens": rng.integers(0, arch.vocab_size, (batch, length), np.int32),
        "loss_mask": np.broadcast_to(np.arange(length) >= length // 20, (batch, length)).astype(np.uint8),
        "lengths": np.full((batch,), length, np.int32),
        "sample_id": np.arange(batch, dtype=np.int32),
    }
    if not online:
        import ml_dtypes

        wide = arch.hidden_size * len(config.drafter.target_layer_ids)
        for name, width in (("features", wide), ("last_hidden", arch.hidden_size)):
            given[name] = rng.standard_normal((batch, length, width), np.float32).astype(ml_dtypes.bfloat16)
    with jax.set_mesh(mesh):
        target = jax.jit(lambda: narrow(Target(arch, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)))()
        optimizer = make_optimizer(config.optim, 1000)
        state, frozen = init_state(config, optimizer, mesh), to_params(target)
        placed = place_batch(given, 1, mesh)
        start = time.perf_counter()
        lowered = make_train_step(config, abstract_drafter(config), target, optimizer, mesh).lower(
            state, frozen, placed
        )
        step = lowered.compile()
        compiled, analysis, times = time.perf_counter() - start, step.memory_analysis(), []
        holder = [state]
        del state

        def run() -> Any:
            holder[0], metrics = step(holder[0], frozen, placed)
            return metrics

        for _ in range(8):
            start = time.perf_counter()
            jax.block_until_ready((run(), holder[0]))
            times.append(time.perf_counter() - start)
    memory = f"{analysis.argument_size_in_bytes / 2**30:.1f} + {analysis.temp_size_in_bytes / 2**30:.1f} GiB"
    return statistics.median(times[2:]), memory, compiled, run


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3_4b", help="qwen3_4b, qwen3_8b or qwen3_14b")
    parser.add_argument("--parts", default="decode,train", help="some of decode, train")
    parser.add_argument("--profile", action="store_true", help="the kernels that take the time")
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--card", help="file for the round times of this card")
    options = parser.parse_args()
    device = jax.devices()[0]
    rates = Rates.measured()
    print(
        f"{device.device_kind}, jax {jax.__version__}: copy {rates.bytes / 1e9:.0f} GB/s, "
        f"product {rates.operations / 1e12:.2f} TFLOP/s",
        flush=True,
    )
    config, found = released("quick" if options.quick else options.model), []
    parts = options.parts.split(",")
    if "decode" in parts:
        found += decoding(config, rates, options.quick, options.profile)
    if "train" in parts:
        found += training(config, rates, options.profile)
    if options.card:
        content = card(config, options.model, options.quick)
        Path(options.card).write_text(json.dumps(content, indent=1) + "\n")
        print(f"round times: {options.card}")
    if options.json:
        about = {"device": device.device_kind, "jax": jax.__version__, **dataclasses.asdict(rates)}
        Path(options.json).write_text(json.dumps({**about, "model": options.model, "figures": found}, indent=1))


if __name__ == "__main__":
    main()
