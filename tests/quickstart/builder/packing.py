"""Conversations -> rows of tokens with loss weights, drawn endlessly in a fixed mixture of domains."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from tokenizers import Tokenizer

from tests.quickstart.builder.corpus import Conversation, Library, conversations
from tests.quickstart.builder.tokenizer import PAD, render

ROW_LENGTH = 384
PROMPT_WEIGHT = 0.2  # of a token the user wrote; answers count 1
MIXTURE = {"math": 0.30, "code": 0.38, "chat": 0.32}  # shares of tokens


@dataclass(frozen=True)
class Rows:
    """A batch of packed rows; row starts are conversation starts."""

    tokens: np.ndarray  # [B, S] int32
    weights: np.ndarray  # [B, S] float32: of predicting tokens[:, t]; 0 on padding and at t = 0


def encode(tokenizer: Tokenizer, batch: Sequence[Conversation]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens [S], weights [S]) of each conversation."""
    pieces = [render(conversation.messages) for conversation in batch]
    encoded = iter(tokenizer.encode_batch_fast([text for p in pieces for text, _ in p]))
    found = []
    for p in pieces:
        ids = [(next(encoded).ids, is_answer) for _, is_answer in p]
        tokens = np.concatenate([np.asarray(i, np.int32) for i, _ in ids])
        weights = np.concatenate([np.full(len(i), 1.0 if a else PROMPT_WEIGHT, np.float32) for i, a in ids])
        found.append((tokens, weights))
    return found


def _stream(tokenizer: Tokenizer, library: Library, domain: str, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    source = conversations(domain, library, seed)
    while True:
        for item in encode(tokenizer, list(islice(source, 256))):
            if len(item[0]) <= ROW_LENGTH:
                yield item


def rows(tokenizer: Tokenizer, library: Library, mixture: dict[str, float], batch: int, seed: int) -> Iterator[Rows]:
    """Endless batches of `batch` rows. Conversations are never cut; a pool of candidates keeps padding near 1 %."""
    streams = {domain: _stream(tokenizer, library, domain, seed) for domain in mixture}
    drawn = dict.fromkeys(mixture, 0.0)
    rng = random.Random(seed)
    pool: list[tuple[np.ndarray, np.ndarray]] = []
    pad = tokenizer.token_to_id(PAD)
    while True:
        tokens = np.full((batch, ROW_LENGTH), pad, np.int32)
        weights = np.zeros((batch, ROW_LENGTH), np.float32)
        for row in range(batch):
            used = 0
            while True:
                while len(pool) < 64:
                    domain = min(mixture, key=lambda d: drawn[d] / mixture[d])
                    item = next(streams[domain])
                    drawn[domain] += len(item[0])
                    pool.insert(rng.randrange(len(pool) + 1), item)
                fitting = next((i for i, item in enumerate(pool) if used + len(item[0]) <= ROW_LENGTH), None)
                if fitting is None:
                    break
                ids, weight = pool.pop(fitting)
                tokens[row, used : used + len(ids)] = ids
                weights[row, used : used + len(ids)] = weight
                used += len(ids)
        weights[:, 0] = 0.0
        yield Rows(tokens, weights)
