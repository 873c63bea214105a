"""Requests that a model in PyTorch reads: rows after a prefix, with what it has read before kept in its own cache.

Whoever asks says the whole prefix every time, so an answer depends on the question alone. What is kept only saves work:
a request that went on differently (rejected drafts, another prompt in its place) is taken back as far as it has to be.
"""

import copy
import dataclasses
import threading
from typing import Any

import numpy as np

from dspark_jax.target.torch_model import TorchModel

CROP, COPY, WHOLE = "crop", "copy", "whole"
"""How rows are taken back: cut off the cache; the cache of the prefix is copied before rows follow, and taken up again;
there is no cache, every pass reads the whole sequence."""

_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2}
"""How far hidden states with a cache may be off those without, of the largest, by the type that is computed with."""


@dataclasses.dataclass
class _Held:
    """What is kept of a request.

    Attributes:
      tokens: that the cache has.
      cache: of transformers; None without tokens.
      saved: length of a prefix, and a copy of its cache.
      answered: taps, length of the prefix, and what the last pass gave.
    """

    tokens: np.ndarray
    cache: Any = None
    saved: tuple[np.ndarray, Any] | None = None
    answered: tuple[tuple[int, ...], int, np.ndarray] | None = None


class TorchRequests:
    """The requests of a batch, by number.

    Attributes:
      model: the language model.
      way: `CROP`, `COPY` or `WHOLE`, whichever is first found to give what the model gives without a cache.
    """

    def __init__(self, model: TorchModel):
        """Tries the ways on a few tokens."""
        self.model = model
        self._held: dict[int, _Held] = {}
        self._lock = threading.Lock()  # several programs may ask at a time
        self.way = WHOLE
        self.way = next((way for way in (CROP, COPY) if self._holds(way)), WHOLE)
        self._held.clear()

    def rows(
        self,
        taps: tuple[int, ...],
        width: int,
        numbers: np.ndarray,
        tokens: np.ndarray,
        starts: np.ndarray,
        counts: np.ndarray,
    ) -> np.ndarray:
        """A pass over some rows of every request.

        Args:
          taps: layers whose raw outputs are wanted.
          width: S, most rows of a request.
          numbers: [B] of the requests; a negative one is nobody's, and nothing of it is kept.
          tokens: [B, C] of each request, up to its last row at least.
          starts: [B] position of each one's first row.
          counts: [B] how many rows each has.

        Returns:
          [B, S, (M+1) D] float32: features of the tapped layers and last hidden states; zeros after a request's rows.
        """
        size = (len(taps) + 1) * self.model.model.config.get_text_config().hidden_size
        found = np.zeros((len(tokens), width, size), np.float32)
        with self._lock:
            for row, (number, start, count) in enumerate(zip(numbers, starts, counts, strict=True)):
                own = tokens[row, : start + count]  # fewer where a slot without a request points past its end
                if count and len(own) > start:
                    found[row, : len(own) - start] = self._read(taps, int(number), own, int(start))
        return found

    def _read(self, taps: tuple[int, ...], number: int, tokens: np.ndarray, start: int) -> np.ndarray:
        """Rows `start`.. of a request with these tokens [T]: [T - start, (M+1) D]."""
        if number < 0:
            return self._run(taps, tokens, None, keep=False)[0][start:]
        held = self._held.setdefault(number, _Held(tokens[:0]))
        if held.answered and held.answered[:2] == (taps, start) and np.array_equal(held.tokens, tokens):
            return held.answered[2]  # a request that has ended asks the same in every round
        if self.way == WHOLE:
            held.tokens = tokens.copy()
            held.answered = (taps, start, self._run(taps, tokens, None, keep=False)[0][start:])
            return held.answered[2]
        self._take_back(held, tokens[:start])
        behind = len(held.tokens)
        if self.way == COPY and start:
            if behind < start:
                held.cache = self._run((), tokens[behind:start], held.cache)[1]
                behind = start
            if held.saved is None or len(held.saved[0]) != start:
                held.saved = (tokens[:start].copy(), copy.deepcopy(held.cache))
        found, held.cache = self._run(taps, tokens[behind:], held.cache)
        held.tokens, held.answered = tokens.copy(), (taps, start, found[start - behind :])
        return held.answered[2]

    def _take_back(self, held: _Held, prefix: np.ndarray) -> None:
        """Leaves what is at the beginning of `prefix`, as much of it as there is."""
        shared = _shared(held.tokens, prefix)
        if held.saved and _shared(held.saved[0], prefix) < len(held.saved[0]):
            held.saved = None
        if shared == len(held.tokens):
            return
        if self.way == CROP and shared:
            held.cache.crop(shared - len(held.tokens))
            held.tokens = held.tokens[:shared]
        elif held.saved:
            held.tokens, held.cache = held.saved[0], copy.deepcopy(held.saved[1])
        else:
            held.tokens, held.cache = prefix[:0], None

    def _run(
        self, taps: tuple[int, ...], tokens: np.ndarray, cache: Any, *, keep: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Rows [T, (M+1) D] of tokens [T] after what is in the cache, and the cache."""
        parts, cache = self.model.run(tokens[None], taps, cache, keep=keep)
        return np.concatenate([part[0].float().cpu().numpy() for part in parts], axis=-1), cache

    def _holds(self, way: str) -> bool:
        """Whether rows are the same with a cache in which others were taken back this way."""
        self._held.clear()
        self.way, taps = way, ()
        vocabulary = self.model.model.config.get_text_config().vocab_size
        tokens = (np.arange(1, 9) * 7) % vocabulary
        try:
            first = self._run(taps, tokens[:3], None)[1]
            if first is None or (way == CROP and not _can_crop(first)):
                return False
            self._read(taps, 0, tokens[:3], 0)
            self._read(taps, 0, np.concatenate([tokens[:3], tokens[5:8]]), 3)
            found = self._read(taps, 0, tokens[:7], 4)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError):  # of another kind of cache
            return False
        wanted = self._run(taps, tokens[:7], None, keep=False)[0][4:]
        most = _TOLERANCE[str(self.model.model.dtype).removeprefix("torch.")] * np.abs(wanted).max()
        return bool(np.abs(found - wanted).max() <= most)


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two sequences."""
    size = min(len(a), len(b))
    unequal = np.flatnonzero(a[:size] != b[:size])
    return int(unequal[0]) if len(unequal) else size


def _can_crop(cache: Any) -> bool:
    """Whether rows can be cut off, however long the sequence is: a window forgets what it would show again."""
    from transformers.cache_utils import DynamicLayer

    layers = getattr(cache, "layers", None)
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)
