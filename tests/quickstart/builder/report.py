"""How good the embedded model is: sampled answers to held-out prompts, their entropy, and whether they stop."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from dspark_jax.target.model import Target
from tests.quickstart.builder.corpus import DOMAINS, SPLITS, Library, conversations
from tests.quickstart.builder.prompt_sets import read_prompts
from tests.quickstart.builder.tokenizer import EOS, render

PROMPT_ROOM, ANSWER_ROOM = 128, 256


@dataclass(frozen=True)
class Answers:
    """Sampled answers to first turns at temperature 1."""

    texts: list[str]
    lengths: np.ndarray  # [B] sampled tokens, the end of turn included
    stopped: np.ndarray  # [B] whether the end of turn came within `ANSWER_ROOM`
    entropy: float  # mean over sampled tokens, nats


@partial(jax.jit, static_argnames="eos")
def sample(
    model: Target, prompts: np.ndarray, lengths: np.ndarray, eos: int, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Plain ancestral sampling with a KV cache.

    Args:
      prompts: [B, P] right-padded; lengths: [B].
      eos: the id that ends an answer.
      key: random key.

    Returns:
      tokens [B, ANSWER_ROOM] and the entropy [B, ANSWER_ROOM] of the distribution each was drawn from.
    """
    batch, width = prompts.shape
    ends = jnp.asarray(lengths)

    def draw(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_p = jax.nn.log_softmax(logits)
        token = jax.random.categorical(jax.random.fold_in(key, step), log_p).astype(jnp.int32)
        return token, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)

    def body(state: Any) -> Any:
        step, tokens, entropy, current, cache, done = state
        out = model.forward(current[:, None], (ends + step)[:, None], cache)
        token, spread = draw(model.unembed(out.last_hidden[:, 0]), step + 1)
        return (step + 1, tokens.at[:, step + 1].set(token), entropy.at[:, step + 1].set(spread), token, out.cache,
                done | (token == eos))  # fmt: skip

    positions = jnp.broadcast_to(jnp.arange(width), (batch, width))
    out = model.forward(jnp.asarray(prompts), positions, model.init_cache(batch, width + ANSWER_ROOM))
    last = jnp.take_along_axis(out.last_hidden, ends[:, None, None] - 1, axis=1)[:, 0]
    token, spread = draw(model.unembed(last), jnp.int32(0))
    tokens = jnp.zeros((batch, ANSWER_ROOM), jnp.int32).at[:, 0].set(token)
    entropy = jnp.zeros((batch, ANSWER_ROOM)).at[:, 0].set(spread)
    start: Any = (jnp.int32(0), tokens, entropy, token, out.cache, token == eos)
    end = jax.lax.while_loop(lambda s: (s[0] < ANSWER_ROOM - 1) & ~jnp.all(s[5]), body, start)
    return end[1], end[2]


def answer(model: Target, tokenizer: Tokenizer, turns: Sequence[str], seed: int = 0) -> Answers:
    """Answers to single-turn prompts, each of at most `PROMPT_ROOM` tokens when rendered."""
    ids = [[i for text, _ in render([turn], True) for i in tokenizer.encode(text).ids] for turn in turns]
    eos = tokenizer.token_to_id(EOS)
    prompts = np.full((len(ids), PROMPT_ROOM), eos, np.int32)
    for row, tokens in enumerate(ids):
        prompts[row, : len(tokens)] = tokens
    lengths = np.asarray([len(tokens) for tokens in ids], np.int32)
    tokens, entropy = map(np.asarray, sample(model, prompts, lengths, eos=eos, key=jax.random.key(seed)))
    stopped = (tokens == eos).any(axis=1)
    counts = np.where(stopped, (tokens == eos).argmax(axis=1) + 1, ANSWER_ROOM)
    counted = np.arange(ANSWER_ROOM) < counts[:, None]
    texts = [tokenizer.decode(list(row[:n])) for row, n in zip(tokens, counts, strict=True)]
    return Answers(texts, counts, stopped, float(entropy[counted].mean()))


def measure(model: Target, tokenizer: Tokenizer, prompts: Path, limit: int = 64) -> dict[str, dict[str, Any]]:
    """Entropy, stop rate, length and examples for every prompt set in the folder, by `domain.split`."""
    found: dict[str, dict[str, Any]] = {}
    for domain in DOMAINS:
        for split in SPLITS:
            turns = [prompt[0] for prompt in read_prompts(prompts / f"{domain}.{split}.jsonl")[:limit]]
            answers = answer(model, tokenizer, turns, seed=len(found))  # the same noise would repeat its accidents
            found[f"{domain}.{split}"] = {
                "entropy": answers.entropy,
                "stop_rate": float(answers.stopped.mean()),
                "mean_length": float(answers.lengths.mean()),
                "examples": [list(pair) for pair in zip(turns[:8], answers.texts[:8], strict=True)],
            }
    return found


def math_accuracy(model: Target, tokenizer: Tokenizer, library: Library, count: int = 128) -> float:
    """The share of held-out problems whose sampled answer ends in the right result."""
    singles = (
        c
        for c in conversations("math", library, seed=5)
        if len(c.messages) == 2 and not c.messages[1].startswith("1. ")
    )
    problems = list(islice(singles, count))
    answers = answer(model, tokenizer, [c.turns[0] for c in problems], seed=100)
    right = [
        text.removesuffix(EOS).rsplit("\n", 1)[-1] == c.messages[1].rsplit("\n", 1)[-1]
        for text, c in zip(answers.texts, problems, strict=True)
    ]
    return float(np.mean(right))
