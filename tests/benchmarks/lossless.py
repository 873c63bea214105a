"""Losslessness at scale, on a trained drafter and the target it was trained for: too long for a test.

    python tests/benchmarks/lossless.py --workdir runs/quickstart_dspark
    python tests/benchmarks/lossless.py --workdir runs/quickstart_dspark --tokens 100000 --prompts 10 --json out.json

Greedy: the prompts of every evaluation set are decoded at batch 1, 8 and 32 under every scheduler; the tokens must be
those of plain decoding one by one (or differ first where two logits are equal but for rounding).

Sampled: under every scheduler the serving engine is kept busy with requests of random budgets and temperatures until it
has given `--tokens` tokens. The target scores each of them in a forward pass without a cache. Where x was drawn from q,
the probability of all tokens that are likelier than x, plus a uniform share of q(x), is uniform on [0, 1]; a chi-square
test over 100 bins says whether it is. It sees any preference for likely or unlikely tokens.

Prints a JSON summary; status 1 if greedy tokens differ or a p-value is below 1e-4.
"""

import argparse
import collections
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from dspark_jax import run as resolved
from dspark_jax.command import load_config
from dspark_jax.config import Config, resolve
from dspark_jax.data.chat import prompt_tokens
from dspark_jax.data.prompts import read_prompts
from dspark_jax.engine import Models, generate, schedulers
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.engine.serving import Engine
from dspark_jax.evaluation.setup import open_decoder
from dspark_jax.progress import Progress

ROOT = Path(__file__).resolve().parents[2]
BUDGET, WIDTH, BINS, ROWS = 96, 256, 100, 8
CAPACITY = 160  # of a slot in the sampled part: shorter prompts, faster rounds
BATCHES = (1, 8, 32)
TEMPERATURES = (1.0, 0.7)
TIE = 1e-3  # logits that are closer than this are equal but for rounding


def all_rules(models: Models) -> dict[str, Scheduler]:
    """Every rule, with a cost table on which the load decides: steps slow down from 64 tokens on."""
    size = models.block_size
    table = 50.0 / np.maximum(1.0, np.arange(32 * (size + 1) + 1) / 64)
    found = {"fixed": schedulers.fixed(), "fixed 2": schedulers.fixed(min(2, size))}
    if models.confident:
        found["threshold"] = schedulers.threshold(0.5)
        found["early_stop"] = schedulers.early_stop(table)
        found["lagged"] = schedulers.lagged(table, 0.6 ** np.arange(1, size + 1))
    found["adaptive"] = schedulers.adaptive(1 / 2.1, confident=models.confident)
    return found


class Run:
    """The run's models and the prompts of its evaluation sets."""

    def __init__(self, config: Config, workdir: Path, prompts: int):
        run = resolved.Run(config, workdir)
        self.mesh, decoder = run.mesh, open_decoder(run)
        self.models, self.stops = decoder.models, decoder.stop_tokens
        found = read_prompts(config.eval.prompts, prompts)
        rows = [prompt_tokens(decoder.tokenizer, prompt.messages[:1]) for prompt in found]
        self.prompts = [ids for ids in rows if len(ids) + BUDGET <= WIDTH]


def greedy(run: Run, rules: dict[str, Scheduler], batches: Sequence[int]) -> dict[str, Any]:
    """How many answers are those of plain decoding, by scheduler and batch size."""

    def decode(batch: int, scheduler: Scheduler | None) -> list[np.ndarray]:
        return generate(
            run.models.plain() if scheduler is None else run.models,
            run.prompts,
            max_new_tokens=BUDGET,
            temperature=0.0,
            stop_tokens=run.stops,
            batch_size=batch,
            prompt_width=max(map(len, run.prompts)),  # one executable for all
            scheduler=scheduler,
        ).tokens

    out: dict[str, Any] = {}
    with Progress("greedy", 1 + len(rules) * len(batches), unit="run") as progress:
        plain = decode(1, None)
        progress.advance(1)
        for name, scheduler in rules.items():
            for batch in batches:
                found = decode(batch, scheduler)
                pairs = list(zip(run.prompts, plain, found, strict=True))
                different = [(ids, want, got) for ids, want, got in pairs if not np.array_equal(want, got)]
                ties = sum(tied(run.models.target, *one) for one in different)
                out[f"{name}, batch {batch}"] = {
                    "answers": len(found),
                    "identical": len(found) - len(different),
                    "tied": ties,
                    "different": len(different) - ties,
                }
                progress.advance(1)
    return out


def tied(target: Any, prompt: list[int], want: np.ndarray, got: np.ndarray) -> bool:
    """Whether two answers part at two logits that are equal but for rounding."""
    at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), None)
    if at is None:
        return False
    tokens = np.zeros((1, WIDTH), np.int32)
    prefix = [*prompt, *want[:at]]
    tokens[0, : len(prefix)] = prefix
    hidden = target.forward(jnp.asarray(tokens), jnp.arange(WIDTH)[None]).last_hidden[:, len(prefix) - 1]
    logits = target.unembed(hidden)[0]
    return abs(float(logits[want[at]] - logits[got[at]])) < TIE


@jax.jit
def ranks(target: Any, tokens: jax.Array, heat: jax.Array, noise: jax.Array) -> jax.Array:
    """Share of probability before each token [B, S] in falling order, randomised inside its own; at t, of token t."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = target.forward(tokens, positions).last_hidden[:, :-1]
    logits = target.unembed(hidden) / heat[:, None, None]
    logits -= jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)
    before = jnp.sum(jnp.where(logits > chosen, weights, 0.0), axis=-1)
    own = jnp.sum(jnp.where(logits == chosen, weights, 0.0), axis=-1)
    shares = (before + noise[:, 1:] * own) / jnp.sum(weights, axis=-1)
    return jnp.pad(shares, ((0, 0), (1, 0)))


def uniforms(run: Run, answers: Sequence[tuple[list[int], tuple[int, ...], float]], seed: int) -> np.ndarray:
    """`ranks` of all answered tokens: uniform on [0, 1] if they were drawn from the target's distribution."""
    rng, out = np.random.default_rng(seed), []
    answers = sorted(answers, key=lambda one: len(one[0]) + len(one[1]))
    for start in range(0, len(answers), ROWS):
        part = answers[start : start + ROWS]
        width = -(-(len(part[-1][0]) + len(part[-1][1])) // 32) * 32  # few widths, few executables
        tokens, heat = np.zeros((ROWS, width), np.int32), np.ones(ROWS, np.float32)
        for row, (prompt, answer, temperature) in enumerate(part):
            tokens[row, : len(prompt) + len(answer)] = [*prompt, *answer]
            heat[row] = temperature
        found = np.asarray(ranks(run.models.target, tokens, heat, rng.random((ROWS, width), np.float32)))
        out += [found[row, len(prompt) : len(prompt) + len(answer)] for row, (prompt, answer, _) in enumerate(part)]
    return np.concatenate(out)


def sampled(run: Run, scheduler: Scheduler, slots: int, count: int, seed: int, name: str) -> dict[str, Any]:
    """At least `count` sampled tokens of a busy engine, and the chi-square test of them."""
    rng = random.Random(seed)
    engine = Engine(
        run.models,
        slots=slots,
        capacity=CAPACITY,
        scheduler=scheduler,
        stop_tokens=run.stops,
        max_queue=2 * slots,
    )
    engine.warm_up(greedy=False)
    prompts = [ids for ids in run.prompts if len(ids) + BUDGET <= CAPACITY]
    waiting: collections.deque[tuple[list[int], float, Any]] = collections.deque()
    answers: list[tuple[list[int], tuple[int, ...], float]] = []
    tokens, emitted, rounds, began = 0, 0, 0, time.monotonic()
    with engine, Progress(f"sampled, {name}", count, unit="token") as progress:
        while tokens < count or waiting:
            if tokens < count:
                prompt, temperature = rng.choice(prompts), rng.choice(TEMPERATURES)
                budget, stream = rng.choice((16, 48, BUDGET)), rng.randrange(1 << 31)
                handle = engine.submit(prompt, max_new_tokens=budget, temperature=temperature, seed=stream, block=True)
                waiting.append((prompt, temperature, handle))
            while waiting and (tokens >= count or waiting[0][2].done):
                prompt, temperature, handle = waiting.popleft()
                result = handle.result()
                answers.append((prompt, result.tokens, temperature))
                tokens += len(result.tokens)
                emitted, rounds = emitted + result.metrics.emitted, rounds + result.metrics.rounds
                progress.advance(len(result.tokens))
    seconds = time.monotonic() - began
    shares = uniforms(run, answers, seed)
    observed = np.histogram(shares, BINS, (0.0, 1.0))[0]
    test = stats.chisquare(observed)
    return {
        "tokens": len(shares),
        "requests": len(answers),
        "seconds": round(seconds, 1),
        "chi_square": round(float(test.statistic), 2),
        "degrees_of_freedom": BINS - 1,
        "p": float(test.pvalue),
        "accepted_length": round(emitted / max(rounds, 1), 3),
    }


def main() -> None:
    """Command line; see the module's text."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="a finished run")
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.py"), help="FILE[:ARG]")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="sampled tokens per scheduler; 0 for none")
    parser.add_argument("--prompts", type=int, default=100, help="greedy prompts of each set; 0 for none")
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--schedulers", help="comma-separated; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the summary there")
    arguments = parser.parse_args()

    run = Run(resolve(load_config(arguments.config)), Path(arguments.workdir), arguments.prompts or 100)
    rules = all_rules(run.models)
    if arguments.schedulers:
        rules = {name: rules[name] for name in arguments.schedulers.split(",")}
    found: dict[str, Any] = {"greedy": {}, "sampled": {}}
    with jax.set_mesh(run.mesh):
        if arguments.prompts:
            found["greedy"] = greedy(run, rules, BATCHES)
        for name, scheduler in rules.items() if arguments.tokens else ():
            found["sampled"][name] = sampled(run, scheduler, arguments.slots, arguments.tokens, arguments.seed, name)
            print(name, found["sampled"][name], flush=True)
    differ = sum(one["different"] for one in found["greedy"].values())
    unlikely = [name for name, one in found["sampled"].items() if one["p"] < 1e-4]
    found["passed"] = not differ and not unlikely
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    raise SystemExit(0 if found["passed"] else 1)


if __name__ == "__main__":
    main()
