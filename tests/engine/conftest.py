"""Tiny models for the engine's tests: targets and drafters that are simple enough to be oracles."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dspark_jax.config import TargetArchitecture
from dspark_jax.drafter.interface import Proposal
from dspark_jax.ops.sampling import Sampling, sample
from dspark_jax.sharding import Param
from dspark_jax.target.model import Target, TargetOutput

WIDTH = 16


def architecture(vocab: int) -> TargetArchitecture:
    """Three layers of width 16."""
    return TargetArchitecture("qwen3", vocab, WIDTH, 3, 2, 1, 8, 32, 1e-6, 1e4, True, 256)


class BigramTarget(nnx.Module):
    """A target whose next-token logits are a table [V, V] by the last token alone: every distribution is known."""

    narrow = False
    dtype = jnp.float32

    def __init__(self, table: jax.Array):
        self.table = Param(table)
        self.arch = architecture(table.shape[0])

    def init_cache(self, batch: int, length: int, block: int = 1) -> jax.Array:
        return jnp.zeros((batch, 0))

    def forward(
        self,
        tokens: jax.Array,
        positions: Any,
        cache: Any = None,
        *,
        taps: Any = (),
        counts: Any = None,
        rows: Any = None,
    ) -> Any:
        return TargetOutput(jnp.zeros((*tokens.shape, 0)), jax.nn.one_hot(tokens, self.arch.vocab_size), cache)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        return hidden @ self.table[...]


class BigramDrafter(nnx.Module):
    """Proposes from a fixed table of logits [V, V] by previous token; knows nothing of the context.

    Its cache keeps the features and tokens it was shown, by position, so that tests can check them.
    """

    dtype = jnp.float32

    def __init__(self, table: jax.Array, block_size: int, taps: tuple[int, ...] = (), confidence: Any = None):
        self.table = Param(table)
        self.block_size = block_size
        self.taps = taps
        # Logits by the token before the draft, [V] or, by position too, [G, V].
        self.confidence = None if confidence is None else Param(confidence)

    def init_cache(self, batch: int, length: int) -> tuple[jax.Array, jax.Array]:
        return jnp.full((batch, length, WIDTH * len(self.taps)), jnp.nan), jnp.full((batch, length), -1)

    def extend(
        self, cache: Any, features: Any, tokens: Any, positions: Any, counts: Any
    ) -> tuple[jax.Array, jax.Array]:
        shown, seen = cache
        rows = jnp.arange(tokens.shape[1])
        positions = jnp.where(rows < counts[:, None], positions, seen.shape[1])  # out of range: dropped
        batch = jnp.arange(tokens.shape[0])[:, None]
        return shown.at[batch, positions].set(features), seen.at[batch, positions].set(tokens)

    def propose(
        self, target: Any, cache: Any, anchors: jax.Array, positions: Any, uniforms: jax.Array, sampling: Sampling
    ) -> tuple[Proposal, Any]:
        tokens, logits, previous = [], [], [anchors]
        for k in range(self.block_size):
            logits.append(self.table[...][previous[-1]])
            tokens.append(sample(logits[-1], sampling, uniforms[:, k]))
            previous.append(tokens[-1])
        confidence = None
        if self.confidence is not None:
            table = jnp.broadcast_to(self.confidence[...], (self.block_size, logits[0].shape[-1]))
            confidence = table[jnp.arange(self.block_size), jnp.stack(previous[:-1], axis=1)]
        return Proposal(jnp.stack(tokens, axis=1), jnp.stack(logits, axis=1), confidence), cache


class Tiny:
    """Builders of tiny random models, and the test of what is sampled from them."""

    @staticmethod
    def qwen3(vocab: int = 19, seed: int = 0, scale: float = 0.3) -> Target:
        """A random Qwen3; a larger scale gives more peaked distributions."""
        return Target(architecture(vocab), rngs=nnx.Rngs(seed), scale=scale)

    @staticmethod
    def table(vocab: int, seed: int, scale: float = 2.0) -> jax.Array:
        """Random logits [V, V]."""
        return scale * jax.random.normal(jax.random.key(seed), (vocab, vocab))

    @staticmethod
    def near(target: Target, block_size: int, *, noise: float = 0.0, confidence: bool = False, taps: Any = (0,)) -> Any:
        """A bigram drafter that copies the target's behaviour after a one-token prompt: right now and then."""
        vocab = target.arch.vocab_size
        tokens = jnp.arange(vocab)[:, None]
        table = target.unembed(target.forward(tokens, jnp.zeros_like(tokens)).last_hidden)[:, 0]
        table = table + Tiny.table(vocab, 7, noise)
        return BigramDrafter(table, block_size, taps, Tiny.table(vocab, 8)[0] if confidence else None)

    @staticmethod
    def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
        """p-value of counts under probabilities; cells that expect fewer than 8 are pooled."""
        counts, expected = counts.ravel().astype(np.float64), expected.ravel() * counts.sum()
        rare = expected < 8
        if rare.any():
            counts = np.append(counts[~rare], counts[rare].sum())
            expected = np.append(expected[~rare], expected[rare].sum())
        statistic = np.sum((counts - expected) ** 2 / np.maximum(expected, 1e-3))
        return float(jax.scipy.stats.chi2.sf(statistic, len(counts) - 1))

    bigram_target = BigramTarget
    bigram_drafter = BigramDrafter


@pytest.fixture(scope="session")
def models() -> type[Tiny]:
    return Tiny


class ByteTokenizer:
    """32 tokens; each is a few bytes, not always whole characters."""

    def __init__(self) -> None:
        self.pieces = [b"a", b"b", b"ab", b"abc", b"c", b" ", b"\n", b"\xc3", b"\xa9", "é".encode(), "😀".encode()[:2]]
        self.pieces += ["😀".encode()[2:], b"", b"xyz", b"yz", b"z"]
        self.pieces += [bytes([97 + i]) * 2 for i in range(32 - len(self.pieces))]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", errors="replace")

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [self.pieces.index(character.encode()) for character in text]}


@pytest.fixture(scope="session")
def byte_tokenizer() -> ByteTokenizer:
    """A tokenizer whose tokens end in the middle of characters."""
    return ByteTokenizer()
