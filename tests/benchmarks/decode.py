"""Decoding speed against Hugging Face `generate` on the same weights, in the same process.

    python tests/benchmarks/decode.py --json decode.json
    python tests/benchmarks/decode.py --workdir runs/quickstart_dspark
    NPROC=1 python tests/benchmarks/decode.py --parts 1 8 32
    NPROC=1 python tests/benchmarks/decode.py --heads 7 16

Without `--workdir` the problem is part B of the reference figures: a Qwen3 of 6 layers x 256 (5.8 M parameters), a
drafter of 2 layers and block 7, random weights, batch 1, a prompt of 64 tokens and 256 new ones. An untrained drafter
is accepted almost never under greedy decoding: what is measured there is the cost of a round, not the gain from
drafting. Machines drift, so the methods take turns and every figure is the best of its runs, of several prompts the
sum of each one's best; only ratios within one table mean anything, and those of one process by some 2 %: where arrays
happen to lie makes the same program faster or slower.

With `--workdir` the target and the newest drafter of a training run answer held-out prompts of all its sets. With
`--parts` the time of a round is split instead, at several batch sizes: drafting, scheduling, verifying, committing;
with `--heads` what each sequential head adds to the draft of so many positions by a backbone without any (DFlash).
On a CPU with tiny models, one XLA thread (NPROC=1) is fastest; PyTorch has `--threads`.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.config import DrafterConfig, TargetArchitecture
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine import generate, schedulers
from dspark_jax.engine.commit import commit
from dspark_jax.engine.cost import decoding_state
from dspark_jax.engine.draft import draft
from dspark_jax.engine.estimator import EstimateSettings
from dspark_jax.engine.generate import ladder
from dspark_jax.engine.models import Models
from dspark_jax.engine.sampling import Requests, round_uniforms
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.engine.state import DecodeState
from dspark_jax.engine.verify import verify
from dspark_jax.evaluation.decoding import join
from dspark_jax.ops.sampling import Sampling
from dspark_jax.target.loading import compute_dtype
from dspark_jax.target.model import Target

ARCHITECTURE = TargetArchitecture("qwen3", 4096, 256, 6, 4, 2, 64, 768, 1e-6, 1e6, True, 2048)
DRAFTER = DrafterConfig("dspark", 2, 7, (0, 1, 2, 3, 4), 4095, 64, True, True)


def hugging_face(target: Target, threads: int) -> Any:
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


def hugging_face_runs(
    model: Any, prompts: list[list[int]], new: int, stops: list[int], **options: Any
) -> list[Callable[[], list[int]]]:
    """Greedy decoding by Hugging Face's `generate`, each prompt by itself; its new tokens."""
    import torch

    def run(prompt: list[int]) -> list[int]:
        with torch.inference_mode():
            inputs = torch.tensor([prompt])
            limits = {"max_new_tokens": new, "eos_token_id": stops or None, "pad_token_id": 0}
            mask = torch.ones_like(inputs)
            output = model.generate(inputs, attention_mask=mask, do_sample=False, **limits, **options)
            return output[0, len(prompt) :].tolist()

    return [functools.partial(run, prompt) for prompt in prompts]


def trained(workdir: Path, count: int) -> tuple[Any, Any, Any, list[list[int]], list[int]]:
    """Target, drafter, Hugging Face model, first held-out prompts of every set, and stop tokens of a training run."""
    import transformers

    from dspark_jax.config import from_json
    from dspark_jax.data.samples import Tally
    from dspark_jax.evaluation.setup import open_decoder, read_questions
    from dspark_jax.run import Run

    config = from_json((workdir / "config.json").read_text())
    decoder = open_decoder(Run(config, workdir))
    with contextlib.closing(Tally(Path(os.devnull))) as tally:
        _, requests = read_questions(config, decoder, tally, config.eval.prompts, count)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.target.path, dtype="float32").eval()
    models = decoder.models
    return models.target, models.drafter, model, [item.prompt for item in requests.items], list(decoder.stop_tokens)


def measure(runs: dict[str, list[Callable[[], Any]]], repeats: int) -> dict[str, dict[str, Any]]:
    """Of every method its last results, and the sum of each call's best wall and CPU seconds, after one warm-up.

    The methods take turns call by call.
    """
    figures: dict[str, dict[str, Any]] = {}
    for name, calls in runs.items():
        start = time.perf_counter()
        figures[name] = {"results": [call() for call in calls], "first_call_seconds": time.perf_counter() - start}
        print(f"{name}: {figures[name]['first_call_seconds']:.1f} s for the first calls", file=sys.stderr, flush=True)
    best = {name: np.full((len(calls), 2), np.inf) for name, calls in runs.items()}
    for _ in range(repeats):
        for number in range(max(map(len, runs.values()))):
            for name, calls in runs.items():
                wall, cpu = time.perf_counter(), time.process_time()
                calls[number]()
                spent = time.perf_counter() - wall, time.process_time() - cpu
                best[name][number] = np.minimum(best[name][number], spent)
    for name, figure in figures.items():
        figure["seconds"], figure["cpu"] = best[name].sum(axis=0).tolist()
    return figures


def parts(models: Models, scheduler: Scheduler, batch: int, context: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a round and of its parts, of `batch` requests that never end; plain without a drafter.

    Draft, verify and commit are differences of loops that do more and more of a round. Scheduling is too short for
    that: it is looped alone.
    """
    models, size = models.for_decoding(batch_size=batch), models.block_size
    state = decoding_state(models, scheduler, batch, batch, context)
    sampling, stops = Sampling.constant(0.0, batch), jnp.full((1,), -1, jnp.int32)
    active = jnp.ones((batch,), bool)

    def turn(models: Models, scheduler: Scheduler, at: DecodeState, depth: int) -> DecodeState:
        requests = Requests(round_uniforms(at.keys, at.positions, size), sampling, stops)
        proposal, at = draft(models, at, requests)
        anchor = proposal.tokens[:, :1].sum(axis=1)  # the next round depends on everything this one did
        if proposal.confidence is not None:
            anchor += (proposal.confidence.sum(axis=1) + proposal.logits[:, :, 0].sum(axis=1) > 1e9).astype(jnp.int32)
        if depth > 0:
            lengths, history = scheduler.schedule(proposal, active, at.history)
            verdict, passed = verify(models, at, proposal, lengths, requests)
            anchor = verdict.next_token + (passed.features.sum(axis=(1, 2)) > 1e9)
            after = dataclasses.replace(at, target_cache=passed.cache, history=history)
            if depth > 1:
                after, _ = commit(models, after, proposal, lengths, verdict, passed, stops)
                anchor = after.anchors
            at = dataclasses.replace(after, lengths=at.lengths, finished=at.finished, stopped=at.stopped)
        return dataclasses.replace(at, tokens=at.tokens.at[:, context - 1].set(anchor % 1000))

    @functools.partial(jax.jit, static_argnames="depth")
    def loop(models: Models, scheduler: Scheduler, at: DecodeState, count: Any, depth: int) -> jax.Array:
        step = functools.partial(turn, models, scheduler, depth=depth)
        return jax.lax.fori_loop(0, count, lambda _, state: step(state), at).tokens

    @jax.jit
    def scheduling(scheduler: Scheduler, confidence: jax.Array, history: Any, count: Any) -> jax.Array:
        def step(_: Any, carry: Any) -> Any:
            confidence, history = carry
            proposal = Proposal(jnp.zeros((batch, size), jnp.int32), jnp.zeros((batch, size, 0)), confidence)
            lengths, history = scheduler.schedule(proposal, active, history)
            history = scheduler.observe(history, lengths, lengths, active, drafted=True)
            return confidence + 1e-3 * (lengths[:, None] % 3 - 1), history

        return jax.lax.fori_loop(0, count, step, (confidence, history))[0]

    def seconds(run: Callable[[int], Any], rounds: int) -> float:
        def timed(count: int) -> float:
            start = time.perf_counter()
            jax.block_until_ready(run(count))
            return time.perf_counter() - start

        timed(1)
        return (min(timed(1 + rounds) for _ in range(4)) - min(timed(1) for _ in range(4))) / rounds

    times = [seconds(lambda count, d=depth: loop(models, scheduler, state, count, d), rounds) for depth in (0, 1, 2)]
    alone = 0.0
    if size:
        noise = jax.random.normal(jax.random.key(0), (batch, size))
        alone = seconds(lambda count: scheduling(scheduler, noise, state.history, count), 500)
    found = {
        "draft": times[0] if size else 0.0,
        "schedule": alone,
        "verify": times[1] - alone - (times[0] if size else 0.0),
        "commit": times[2] - times[1],
        "round": times[2],
    }
    return {name: 1e3 * value for name, value in found.items()}


def show_parts(target: Any, drafter: Any, batches: list[int], context: int) -> dict[str, dict[str, float]]:
    """The table of `--parts`."""
    figures = {}
    print(f"milliseconds per round at {context} tokens of context")
    names = ("draft", "schedule", "verify", "commit", "round")
    print(f"{'batch':>5} {'':12}" + "".join(f"{name:>10}" for name in names) + f"{'schedule/round':>16}")
    for batch in batches:
        table = 50.0 / np.maximum(1.0, np.arange(batch * 8 + 1) / (4 * batch))
        kinds = {"plain": None, "fixed": schedulers.fixed(), "early_stop": schedulers.early_stop(table)}
        kinds["lagged"] = schedulers.lagged(table, np.full(drafter.block_size, 0.5))
        kinds["online"] = schedulers.early_stop(table, online=EstimateSettings())
        for name, scheduler in kinds.items():
            models = Models(target) if scheduler is None else Models(target, drafter)
            found = parts(models, scheduler or schedulers.fixed(), batch, context, max(64 // batch, 6))
            figures[f"{batch} {name}"] = found
            share = found["schedule"] / found["round"]
            print(f"{batch:5} {name:12}" + "".join(f"{found[n]:10.3f}" for n in names) + f"{share:16.2%}", flush=True)
    return figures


def show_heads(target: Any, lengths: list[int], dtype: str, context: int) -> dict[str, dict[str, float]]:
    """The table of `--heads`, at batch 1: shares are of what a head adds to the draft without any."""
    figures: dict[str, dict[str, float]] = {}
    print(f"milliseconds at batch 1, {context} tokens of context")
    columns = ("draft", "round", "of the draft", "of the round")
    print(f"{'positions':>9} {'head':10}" + "".join(f"{name:>14}" for name in columns))
    for length in lengths:
        bare = dataclasses.replace(
            DRAFTER,
            kind="dflash",
            block_size=length,
            markov_rank=0,
            confidence_head=False,
            confidence_with_markov=False,
        )
        heads = {"none": bare, "confidence": dataclasses.replace(bare, kind="dspark", confidence_head=True)}
        for kind in ("vanilla", "gated", "rnn"):
            heads[kind] = dataclasses.replace(DRAFTER, block_size=length, markov_head_type=kind)
        for kind, config in heads.items():
            drafter = make_drafter(ARCHITECTURE, config, rngs=nnx.Rngs(1), dtype=compute_dtype(dtype))
            found = parts(Models(target, drafter), schedulers.fixed(), 1, context, 96)
            figures[f"{length} {kind}"] = found
            added = found["draft"] - figures[f"{length} none"]["draft"]
            times = f"{found['draft']:14.3f}{found['round']:14.3f}"
            print(
                f"{length:9} {kind:10}{times}" + f"{added / found['draft']:14.1%}{added / found['round']:14.1%}",
                flush=True,
            )
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
    parser.add_argument("--workdir", type=Path, help="a training run: its target, drafter and held-out prompts")
    parser.add_argument("--prompts", type=int, default=2, help="prompts of every set with --workdir (default 2)")
    parser.add_argument("--round-cost", type=float, default=2.1, help="plain steps of a drafted round (default 2.1)")
    parser.add_argument("--parts", type=int, nargs="+", metavar="BATCH", help="split the time of rounds instead")
    parser.add_argument("--heads", type=int, nargs="+", metavar="POSITIONS", help="time the sequential heads instead")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    arguments = parser.parse_args()

    if arguments.workdir:
        target, drafter, model, prompts, stops = trained(arguments.workdir, arguments.prompts)
    else:
        # Weights of checkpoints are bfloat16 numbers; the target computes in float32, for both libraries.
        target = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(x.dtype), Target(ARCHITECTURE, rngs=nnx.Rngs(0)))
        target.narrow, model, stops = True, None, []
        drafter = make_drafter(ARCHITECTURE, DRAFTER, rngs=nnx.Rngs(1), dtype=compute_dtype(arguments.drafter_dtype))
        prompts = np.random.default_rng(0).integers(0, 4000, (arguments.batch, arguments.prompt)).tolist()
    if arguments.parts:
        figures: dict[str, Any] = show_parts(target, drafter, arguments.parts, arguments.prompt + arguments.new // 2)
    elif arguments.heads:
        context = arguments.prompt + arguments.new // 2
        figures = show_heads(target, arguments.heads, arguments.drafter_dtype, context)
    else:
        figures = compare(target, drafter, model, prompts, stops, arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process, everything together: {peak:.0f} MB")
    if arguments.json:
        options = {name: str(value) for name, value in vars(arguments).items()}
        with open(arguments.json, "w") as file:
            json.dump({"figures": figures, "peak_megabytes": peak, "arguments": options}, file, indent=1)


def answers(results: list[Any]) -> list[Any]:
    """The tokens of every prompt, by Hugging Face's `generate` or ours."""
    return [tokens for one in results for tokens in ([one] if isinstance(one, list) else one.tokens)]


def compare(
    target: Any, drafter: Any, model: Any, prompts: list[list[int]], stops: list[int], arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Our engine and, at batch 1, Hugging Face on the same weights and prompts; prints the table."""
    width = ladder(max(map(len, prompts)))
    both = Models(target, drafter)
    forms = {True: both.for_decoding(batch_size=arguments.batch)}
    forms[False] = both.plain().for_decoding(batch_size=arguments.batch)

    def ours(drafts: bool, temperature: float, scheduler: Scheduler | None = None) -> list[Callable[[], Any]]:
        settings: Any = {"temperature": temperature, "prompt_width": width, "batch_size": arguments.batch}
        settings |= {"max_new_tokens": arguments.new, "stop_tokens": stops, "scheduler": scheduler}
        together = [[prompt] for prompt in prompts] if arguments.batch == 1 else [prompts]
        return [functools.partial(generate, forms[drafts], some, **settings) for some in together]

    adaptive = schedulers.adaptive(1 / arguments.round_cost, confident=both.confident)
    runs: dict[str, list[Callable[[], Any]]] = {
        "plain, greedy": ours(False, 0.0),
        "plain, temperature 1": ours(False, 1.0),
        "speculative, greedy": ours(True, 0.0),
        "speculative, temperature 1": ours(True, 1.0),
        "adaptive, greedy": ours(True, 0.0, adaptive),
        "adaptive, temperature 1": ours(True, 1.0, adaptive),
    }
    if arguments.batch == 1:
        import torch

        torch.set_num_threads(arguments.threads)
        model = hugging_face(target, arguments.threads) if model is None else model
        model.generation_config.eos_token_id = None  # said for every call
        runs["Hugging Face, greedy"] = hugging_face_runs(model, prompts, arguments.new, stops)
        lookup = hugging_face_runs(model, prompts, arguments.new, stops, prompt_lookup_num_tokens=7)
        runs["Hugging Face, prompt lookup"] = lookup
    figures = measure(runs, arguments.repeats)
    baseline = figures.get("Hugging Face, greedy", figures["plain, greedy"])
    count = sum(len(tokens) for tokens in answers(baseline["results"]))
    for figure in figures.values():
        results, seconds = figure.pop("results"), figure["seconds"]
        tokens = sum(len(one) for one in answers(results))
        decoded = None if isinstance(results[0], list) else join(results)
        # Requests of one batch share their rounds.
        shared = np.sum if arguments.batch == 1 else np.max
        rounds = tokens if decoded is None else int(shared(decoded.rounds))
        figure |= {
            "rounds": rounds,
            "tau": 1.0 if decoded is None else decoded.tau,
            "milliseconds_per_round": 1e3 * seconds / rounds,
            "rounds_per_second": rounds / seconds,
            "tokens_per_second": tokens / seconds,
            "tokens_over_baseline": tokens / seconds / (count / baseline["seconds"]),
            "rounds_over_baseline_tokens": rounds / seconds / (count / baseline["seconds"]),
        }
    print(f"batch {arguments.batch}, {len(prompts)} prompts, new {arguments.new}, {jax.default_backend()}")
    columns = {"ms/round": 9, "CPU ms": 8, "rounds/s": 10, "tau": 6, "tokens/s": 10, "tokens / HF": 13}
    columns["rounds / HF tokens"] = 20
    print(f"{'':28}" + "".join(f"{name:>{size}}" for name, size in columns.items()))
    for name, figure in figures.items():
        print(
            f"{name:28}{figure['milliseconds_per_round']:9.2f}{1e3 * figure['cpu'] / figure['rounds']:8.2f}"
            f"{figure['rounds_per_second']:10.0f}{figure['tau']:6.2f}{figure['tokens_per_second']:10.0f}"
            f"{figure['tokens_over_baseline']:13.2f}{figure['rounds_over_baseline_tokens']:20.2f}"
        )
    return figures


if __name__ == "__main__":
    main()
