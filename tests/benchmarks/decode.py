"""Decoding speed against Hugging Face `generate` on the same weights, in the same process.

    python tests/benchmarks/decode.py --json decode.json

The problem is part B of the reference figures: a Qwen3 of 6 layers x 256 (5.8 M parameters), a drafter of 2 layers and
block 7, random weights, batch 1, a prompt of 64 tokens and 256 new ones. An untrained drafter is accepted
almost never under greedy decoding: what is measured there is the cost of a round, not the gain from drafting. Machines
drift, so the methods take turns and every figure is the best of its runs; only ratios within one table mean anything.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import generate
from dspark_jax.target.loading import compute_dtype
from dspark_jax.target.qwen3 import Qwen3

ARCHITECTURE = TargetArchitecture("qwen3", 4096, 256, 6, 4, 2, 64, 768, 1e-6, 1e6, True, 2048)
DRAFTER = DrafterConfig("dspark", 2, 7, (0, 1, 2, 3, 4), 4095, 64, True, True)


def hugging_face(target: Qwen3, threads: int) -> Any:
    """The target's weights in `transformers.Qwen3ForCausalLM` (PyTorch, CPU)."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**ARCHITECTURE.to_hf())).eval()
    layers, d = target.layers, ARCHITECTURE.hidden_size
    weights = {"model.embed_tokens.weight": target.embedding[...], "model.norm.weight": target.norm[...]}
    weights["lm_head.weight"] = target.head
    for i in range(ARCHITECTURE.num_hidden_layers):
        attention, mlp, at = layers.attention, layers.mlp, f"model.layers.{i}."
        for name, stack in {"q_proj": attention.query, "k_proj": attention.key, "v_proj": attention.value}.items():
            weights[f"{at}self_attn.{name}.weight"] = stack[...][i].reshape(d, -1).T
        weights[f"{at}self_attn.o_proj.weight"] = attention.out[...][i].reshape(-1, d).T
        weights[f"{at}self_attn.q_norm.weight"] = attention.query_norm[...][i]
        weights[f"{at}self_attn.k_norm.weight"] = attention.key_norm[...][i]
        for name, stack in {"gate_proj": mlp.gate, "up_proj": mlp.up, "down_proj": mlp.down}.items():
            weights[f"{at}mlp.{name}.weight"] = stack[...][i].T
        weights[f"{at}input_layernorm.weight"] = layers.attention_norm[...][i]
        weights[f"{at}post_attention_layernorm.weight"] = layers.mlp_norm[...][i]
    model.load_state_dict({name: torch.tensor(np.array(value)) for name, value in weights.items()})
    return model


def hugging_face_run(model: Any, prompt: list[int], new: int) -> Callable[[], list[int]]:
    """Greedy decoding by Hugging Face's `generate`."""
    import torch

    inputs = torch.tensor([prompt])
    mask = torch.ones_like(inputs)

    def run() -> list[int]:
        with torch.inference_mode():
            output = model.generate(
                inputs, attention_mask=mask, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0
            )
        return output[0, len(prompt) :].tolist()

    return run


def measure(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, Any]]:
    """Best wall and CPU seconds of every run, taking turns after one warm-up each; and its last result."""
    figures: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        start = time.perf_counter()
        figures[name] = {"result": run(), "seconds": np.inf, "cpu": np.inf}
        figures[name]["first_call_seconds"] = time.perf_counter() - start
        print(f"{name}: {figures[name]['first_call_seconds']:.1f} s for the first call", file=sys.stderr, flush=True)
    for _ in range(repeats):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            figures[name]["seconds"] = min(figures[name]["seconds"], wall)
            figures[name]["cpu"] = min(figures[name]["cpu"], cpu)
    return figures


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens (default 64)")
    parser.add_argument("--new", type=int, default=256, help="new tokens (default 256)")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each method (default 5)")
    parser.add_argument("--batch", type=int, default=1, help="requests at a time in our engine (default 1)")
    parser.add_argument("--drafter-dtype", default="bfloat16", help="compute type of the drafter (default bfloat16)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="PyTorch's threads")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()

    # Weights of checkpoints are bfloat16 numbers; the target computes in float32, for both libraries.
    target = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), Qwen3(ARCHITECTURE, rngs=nnx.Rngs(0)))
    target.narrow = True
    drafter = make_drafter(ARCHITECTURE, DRAFTER, rngs=nnx.Rngs(1), dtype=compute_dtype(arguments.drafter_dtype))
    prompts = np.random.default_rng(0).integers(0, 4000, (arguments.batch, arguments.prompt)).tolist()

    def ours(drafter: Any, temperature: float) -> Callable[[], Any]:
        return lambda: generate(
            target, drafter, prompts, max_new_tokens=arguments.new, temperature=temperature, batch_size=arguments.batch
        )

    runs: dict[str, Callable[[], Any]] = {
        "plain, greedy": ours(None, 0.0),
        "plain, temperature 1": ours(None, 1.0),
        "speculative, greedy": ours(drafter, 0.0),
        "speculative, temperature 1": ours(drafter, 1.0),
    }
    if arguments.batch == 1:
        model = hugging_face(target, arguments.threads)
        runs["Hugging Face, greedy"] = hugging_face_run(model, prompts[0], arguments.new)
    figures = measure(runs, arguments.repeats)

    baseline = figures.get("Hugging Face, greedy", figures["plain, greedy"])
    rows = []
    for name, figure in figures.items():
        result, seconds = figure.pop("result"), figure["seconds"]
        hub = isinstance(result, list)
        tokens = len(result) if hub else sum(map(len, result.tokens))
        rounds = tokens if hub else int(result.rounds.max())
        figure |= {
            "rounds": rounds,
            "tau": 1.0 if hub else result.tau,
            "milliseconds_per_round": 1e3 * seconds / rounds,
            "rounds_per_second": rounds / seconds,
            "tokens_per_second": tokens / seconds,
            "rounds_over_baseline_tokens": rounds / seconds / (arguments.new / baseline["seconds"]),
        }
        rows.append((name, figure))
    print(f"batch {arguments.batch}, prompt {arguments.prompt}, new {arguments.new}, {jax.default_backend()}")
    print(f"{'':28}{'ms/round':>9}{'CPU ms':>8}{'rounds/s':>10}{'tau':>6}{'tokens/s':>10}{'rounds / HF tokens':>20}")
    for name, figure in rows:
        print(
            f"{name:28}{figure['milliseconds_per_round']:9.2f}{1e3 * figure['cpu'] / figure['rounds']:8.2f}"
            f"{figure['rounds_per_second']:10.0f}{figure['tau']:6.2f}{figure['tokens_per_second']:10.0f}"
            f"{figure['rounds_over_baseline_tokens']:20.2f}"
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process, everything together: {peak:.0f} MB")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"figures": dict(rows), "peak_megabytes": peak, "arguments": vars(arguments)}, file, indent=1)


if __name__ == "__main__":
    main()
