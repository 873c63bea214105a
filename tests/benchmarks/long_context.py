"""How much of its acceptance a drafter keeps beyond the length it was trained at: with a window, YaRN, or neither.

    python tests/benchmarks/long_context.py --out runs/long_context
    python tests/benchmarks/long_context.py --out runs/long_context --steps 450 --limit 360 --json out.json

Drafters for the embedded target are trained on sequences of `--length` tokens: a plain one, one whose layers see a
window, and one that has YaRN from the start. Then held-out questions with the target's own answers are put after each
other into sequences of `--rows` tokens, and every drafter drafts from places in the answers. What is shown is the
expected number of tokens of a round at temperature 1 (the overlap of every draft distribution with the target's, after
the true tokens before it) by position of the anchor, with the standard error over sequences. The plain drafter is
measured once more with YaRN that it was not trained with, as one would stretch a drafter that is there already.

The embedded target was trained on 384 tokens: beyond that it is unsure itself, which hits all drafters alike.
Trained drafters in `--out` are kept, so that a second call only measures.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import Config, MeshConfig
from dspark_jax.data.chat import load_tokenizer, prompt_tokens, stop_tokens
from dspark_jax.data.prompts import read_prompts
from dspark_jax.drafter.blocks import sample_anchors
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.engine import Models, generate
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.target.model import Target
from dspark_jax.training.checkpoint import load_drafter
from dspark_jax.training.state import abstract_drafter, to_module, to_params

ROOT = Path(__file__).resolve().parents[2]
ANCHORS = 96
"""Places of a sequence to draft from."""


def variants(length: int, window: int, rows: int) -> dict[str, list[str]]:
    """Flags that a drafter is trained with, by name."""
    return {
        "plain": [],
        "window": [f"--config.drafter.sliding_window={window}"],
        "yarn": ["--config.drafter.rope_type=yarn", f"--config.drafter.rope_scaling={yarn(length, rows)}"],
    }


def yarn(length: int, rows: int) -> dict[str, float]:
    """Numbers of YaRN that stretch the trained length over a whole sequence."""
    return {"factor": rows / length, "original_max_position_embeddings": float(length)}


def train(out: Path, name: str, flags: list[str], arguments: argparse.Namespace) -> Path:
    """A trained run; its data is that of the first one, which it makes if it is the first."""
    workdir, data = out / name, out / "plain" / "data"
    if (workdir / "eval" / "trained").exists():
        return workdir
    if data.exists() and not (workdir / "data").exists():
        shutil.copytree(data, workdir / "data")
    settings = {
        "data.limit": arguments.limit, "data.max_length": arguments.length, "train.steps": arguments.steps,
        "data.max_prompt_length": arguments.length // 2, "train.checkpoint_every": arguments.steps,
        "train.evaluate": False,
    }  # fmt: skip
    own = [f"--config.{field}={value}" for field, value in settings.items()]
    command = [sys.executable, "-m", "dspark_jax.train", "--config=quickstart", f"--workdir={workdir}", *own, *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    (workdir / "eval").mkdir(exist_ok=True)
    (workdir / "eval" / "trained").touch()
    return workdir


def held_out(config: Config, target: Target, count: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` sequences [N, rows] of held-out questions and sampled answers, and which tokens are answers."""
    tokenizer = load_tokenizer(config.target.path)
    found = read_prompts(config.eval.prompts, 24)
    prompts = [ids for prompt in found if len(ids := prompt_tokens(tokenizer, prompt.messages[:1])) <= 96]
    stops, width = stop_tokens(config.target.path, tokenizer), max(map(len, prompts))
    settings: dict[str, Any] = {"max_new_tokens": 128, "temperature": 1.0, "stop_tokens": stops, "batch_size": 24}
    replies = generate(Models(target), prompts, prompt_width=width, **settings).tokens
    rng, tokens, answers = np.random.default_rng(0), np.zeros((count, rows), np.int32), np.zeros((count, rows), bool)
    for number in range(count):
        ids, mask = list[int](), list[bool]()
        while len(ids) < rows:
            one = int(rng.integers(len(prompts)))
            ids += [*prompts[one], *map(int, replies[one])]
            mask += [False] * len(prompts[one]) + [True] * len(replies[one])
        tokens[number], answers[number] = ids[:rows], mask[:rows]
    return tokens, answers


@jax.jit
def expected(drafter: Any, target: Target, tokens: jax.Array, answers: jax.Array, key: jax.Array) -> Any:
    """Anchors [A], expected tokens of a round from each [A], and which of them count: blocks that are all answer."""
    rows = jnp.arange(tokens.size)[None]
    out = target.forward(tokens[None], rows, taps=drafter.taps)
    anchors = sample_anchors(key[None], answers[None], ANCHORS)
    features = out.features.reshape(1, tokens.size, -1)
    found = drafter(target, features, tokens[None], answers[None].astype(jnp.int32), anchors)
    logits, head = target.unembed(found.hidden), drafter.markov
    if head is not None:
        logits = head.logits(logits, found.hidden, head.embed(found.prev_tokens))
    draft = jax.nn.softmax(logits)
    truth = jax.nn.softmax(target.unembed(out.last_hidden[0][found.teacher_rows]))
    accept = jnp.sum(jnp.minimum(draft, truth), axis=-1)
    tau = 1.0 + jnp.sum(jnp.cumprod(accept, axis=-1), axis=-1)
    return anchors.positions[0], tau[0], jnp.all(found.mask, axis=-1)[0]


def measure(drafter: DrafterModule, target: Target, tokens: np.ndarray, answers: np.ndarray, edges: list[int]) -> Any:
    """By range of positions: mean expected tokens of a round, and its standard error over sequences."""
    keys = jax.random.split(jax.random.key(1), len(tokens))
    found = [
        jax.device_get(expected(drafter, target, *map(jnp.asarray, one)))
        for one in zip(tokens, answers, keys, strict=True)
    ]
    means: dict[str, list[float]] = {}
    for positions, tau, counted in found:
        for low, high in itertools.pairwise(edges):
            here = counted & (positions >= low) & (positions < high)
            if here.any():
                means.setdefault(f"{low}-{high}", []).append(float(tau[here].mean()))
    return {
        name: {"tau": float(np.mean(values)), "error": float(np.std(values, ddof=1) / len(values) ** 0.5)}
        for name, values in means.items()
    }


def stretched(config: Config, drafter: DrafterModule, length: int, rows: int) -> DrafterModule:
    """The same parameters with YaRN."""
    shape = dataclasses.replace(config.drafter, rope_type="yarn", rope_scaling=yarn(length, rows))
    return to_module(abstract_drafter(dataclasses.replace(config, drafter=shape)), to_params(drafter))


def measure_all(arguments: argparse.Namespace, edges: list[int]) -> Iterator[tuple[str, Any]]:
    """Trains what is missing; yields drafters and what `measure` gives of them, one after another."""
    length, rows, held = arguments.length, arguments.rows, None
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    for name, flags in variants(length, arguments.window, rows).items():
        workdir = train(arguments.out, name, flags, arguments)
        with jax.set_mesh(mesh):
            config, drafter = load_drafter(workdir, mesh)
            target = load_target(config.target, mesh)
            held = held or held_out(config, target, arguments.sequences, rows)
            yield name, measure(drafter, target, *held, edges)
            if name == "plain":
                yield "plain, YaRN added", measure(stretched(config, drafter, length, rows), target, *held, edges)


def main() -> None:
    """Trains what is missing, measures, prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the trained drafters")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--limit", type=int, default=60, help="prompts of each training file")
    parser.add_argument("--length", type=int, default=128, help="tokens of a training sequence")
    parser.add_argument("--window", type=int, default=64, help="rows that layers with a window see")
    parser.add_argument("--rows", type=int, default=1024, help="tokens of the sequences that are measured")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    length, rows = arguments.length, arguments.rows
    edges = [edge for edge in (0, length // 2, length, 2 * length, 3 * length, 4 * length) if edge < rows] + [rows]
    results: dict[str, Any] = {}
    print(f"expected tokens of a round by position of the anchor; trained on {length} tokens, {arguments.steps} steps")
    print(f"{'':<20}" + "".join(f"{f'{a}-{b}':>15}" for a, b in itertools.pairwise(edges)))
    for name, found in measure_all(arguments, edges):
        results[name] = found
        cells = [f"{cell['tau']:.2f} ± {cell['error']:.2f}" for cell in found.values()]
        print(f"{name:<20}" + "".join(f"{cell:>15}" for cell in cells), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
