"""In which dialect was a drafter trained? Scored on what the target itself would write.

A drafter that is read with layer ids one off, in the other block layout or with another mask token loads without
complaint and accepts less, or next to nothing. So each reading is tried along greedy answers of the target, from many
anchors: the overlap (1 - total variation) of every draft distribution with the target's own is the chance that the
draft is accepted, and from these follow the tokens per round. Readings are compared anchor by anchor; what chance can
do to the mean shows in stretches of neighbours, which are alike, and in whether most answers agree. The overlap of the
first drafts is also taken with the target's distribution without its final norm, from which some trainers distil by
mistake (trap 11).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.convert.layouts import Layout
from dspark_jax.drafter.blocks import block_tokens
from dspark_jax.drafter.dspark import DSpark
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.ops.sampling import Sampling
from dspark_jax.target.interface import EmbeddingAndHead, LanguageModel

MASK_TOKENS = {"Qwen3": 151669, "Qwen3.5": 248070, "Gemma 4": 4, "Kimi-K3": 163824, "DeepSeek-V4": 128799}
"""Mask tokens of released drafters (trap 15)."""
DEVIATIONS = 3.0
"""A reading is better than another if its mean advantage is so many standard errors of stretches of neighbours, ..."""
STRETCH = 8
"""... which are so many anchors of one answer, whose blocks overlap, ..."""
AGREE = 0.8
"""... if it is better in this share of the answers, ..."""
GAIN = 0.01
"""... and if the advantage is so much overlap at least: less is no other dialect, however often it is seen."""
ENOUGH = 16
"""Anchors from which on readings are told apart ..."""
ENOUGH_ANSWERS = 3
"""... and answers that they come from."""
LEARNED = 1.5
"""Tokens per round that another reading has to reach: a drafter that has learned too little has no dialect yet, and may
draft better from other layers than its own."""
CLEARLY = 1.1
"""Tokens per round of a better reading over those of the stated one; below, the file may be right all the same."""
TEACHER_MARGIN = 0.1
"""Overlap with the wrong teacher above that with the right one that is no accident."""
NOTHING = 1.2
"""Tokens per round of a drafter that might as well draft at random."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A prompt and the target's greedy answer to it.

    Attributes:
      tokens: [S] ids of both.
      start: index of the answer's first token.
    """

    tokens: np.ndarray
    start: int


@dataclasses.dataclass(frozen=True)
class Score:
    """How well a drafter drafts when it is read in one way.

    Attributes:
      layout: the reading.
      rounds: [N] expected tokens of a round from each anchor, the bonus token included, at temperature 1.
      overlap: [N] mean overlap of the drafts of each anchor with the target, without the last draft, which the fill-in
        layout does not have. It tells readings apart with the fewest anchors: `rounds` depends on the first draft.
      answer: [N] index of the answer that the anchor is in.
      greedy_rounds: [N] as `rounds` if each draft is the likeliest token; the target still samples.
    """

    layout: Layout
    rounds: np.ndarray
    overlap: np.ndarray
    answer: np.ndarray
    greedy_rounds: np.ndarray

    @property
    def tau(self) -> float:
        """Mean tokens per round."""
        return float(self.rounds.mean())

    @property
    def greedy_tau(self) -> float:
        """Mean tokens per round of greedy drafts."""
        return float(self.greedy_rounds.mean())

    @property
    def enough(self) -> bool:
        """Whether there is text enough to tell readings apart."""
        return len(self.answer) >= ENOUGH and len(np.unique(self.answer)) >= ENOUGH_ANSWERS

    def beats(self, other: "Score") -> bool:
        """Whether it is better by more than chance; never where there is too little text to tell."""
        if not self.enough:
            return False
        gain, starts = self.overlap - other.overlap, np.flatnonzero(np.diff(self.answer, prepend=-1))
        answers = np.split(gain, starts[1:])
        cuts = [np.array_split(part, max(len(part) // STRETCH, 1)) for part in answers]
        stretches = np.asarray([stretch.mean() for parts in cuts for stretch in parts])
        error = float(stretches.std(ddof=1)) / len(stretches) ** 0.5
        agree = np.mean([part.mean() > 0 for part in answers])
        return bool(float(gain.mean()) > max(GAIN, DEVIATIONS * error) and agree >= AGREE)


@dataclasses.dataclass(frozen=True)
class Dialect:
    """What the scores say.

    Attributes:
      stated: the score of the reading that the file itself states.
      best: that of the best one, which is `stated` unless another `beats` it, accepts `LEARNED` at least, and `CLEARLY`
        more.
      rival: that of a reading that `beats` the stated one, but not clearly; None: there is none.
      scores: all of them, best first.
      teacher: mean overlap (1 - total variation) of the drafter's first distribution with the target's, under `best`.
      raw_teacher: the same with the target without its final norm.
    """

    stated: Score
    best: Score
    scores: tuple[Score, ...]
    teacher: float
    raw_teacher: float
    rival: Score | None = None

    def of(self, layout: Layout) -> Score | None:
        """The score of a reading, if it was tried."""
        return next((score for score in self.scores if same(score.layout, layout)), None)

    @property
    def unknown(self) -> str:
        """Why nothing can be said; empty if there is text enough."""
        if self.stated.enough:
            return ""
        anchors, answers = len(self.stated.answer), len(np.unique(self.stated.answer))
        return (
            f"too little text to tell its dialect: {answers} answers of the target have {anchors} places to draft "
            f"from, {ENOUGH} in {ENOUGH_ANSWERS} answers are needed; give more prompts, or such with longer answers "
            "(--prompts, --limit, --tokens)"
        )

    @property
    def weak(self) -> str:
        """Says that it accepts next to nothing in every dialect, which proves nothing wrong; empty if it accepts more.

        Too little training looks the same as another target's weights, and a server may read the file quite right.
        """
        if self.unknown or self.best.tau >= NOTHING:
            return ""
        most = max(score.tau for score in self.scores)
        return (
            f"it accepts next to nothing in any dialect ({most:.2f} tokens per round at most): it is undertrained, or "
            "made for another target than this; train it longer, or check it with its own target"
        )

    @property
    def close(self) -> str:
        """Says that another reading drafts a little better; empty if none does.

        With another kind of blocks, layers or mask token than it was trained for, a drafter loses much more than that.
        """
        if self.rival is None:
            return ""
        named = "; ".join(differences(self.stated.layout, self.rival.layout))
        return (
            f"another reading accepts a little more ({self.rival.tau:.2f} tokens per round instead of "
            f"{self.stated.tau:.2f}), which a wrong one seldom leaves: ask its author, or give more prompts ({named})"
        )

    def findings(self) -> list[str]:
        """What is wrong with the file, in words; empty if nothing is, or if it is `unknown`."""
        found = []
        if self.unknown:
            return found
        if self.best is not self.stated:
            gain = f"{self.best.tau:.2f} tokens per round instead of {self.stated.tau:.2f}"
            found += [f"{text} ({gain})" for text in differences(self.stated.layout, self.best.layout)]
        if self.raw_teacher > self.teacher + TEACHER_MARGIN:
            found.append(
                "it was distilled from the target without its final norm: its drafts overlap "
                f"{self.raw_teacher:.2f} with that and {self.teacher:.2f} with the target; train it again"
            )
        return found


def same(one: Layout, other: Layout) -> bool:
    """Whether two readings draft the same."""
    keys = ("taps", "mask_token_id", "anchor_first", "block_size")
    return all(getattr(one, key) == getattr(other, key) for key in keys)


def differences(stated: Layout, best: Layout) -> Iterator[str]:
    """Names what a file states wrongly, with the remedy."""
    if stated.anchor_first != best.anchor_first:
        names = {True: "anchor-first (row k predicts anchor + k + 1)", False: "fill-in (row k predicts anchor + k)"}
        yield (
            f"its blocks are {names[best.anchor_first]}, the file says {names[stated.anchor_first].split(' (')[0]}: "
            f"set sample_from_anchor to {str(best.anchor_first).lower()}"
        )
    if stated.taps != best.taps:
        shift = best.taps[0] - stated.taps[0]
        dialect = "one too high (they count layer inputs)" if shift < 0 else "one too low"
        yield f"its layer ids {list(stated.taps)} are {dialect}: the outputs of layers {list(best.taps)} are meant"
    if stated.mask_token_id != best.mask_token_id:
        yield f"its mask token is {best.mask_token_id}, the file says {stated.mask_token_id}: set mask_token_id"


def find_dialect(
    drafter: DrafterModule,
    target: LanguageModel,
    stated: Layout,
    answers: Sequence[Answer],
    masks: Sequence[int] = (),
    anchors: int = 48,
) -> Dialect:
    """Scores block layouts x layer ids (-1, 0, +1), then mask tokens with the best of them, and the teachers.

    Args:
      drafter: a block drafter (DSpark, DFlash), or any other, for which only layer ids are varied.
      target: the language model.
      stated: the file's own reading.
      answers: along which drafts are made.
      masks: further tokens that might be the mask.
      anchors: at most so many per answer.

    Raises:
      InputError: no answer is long enough, or there are no such layers.
    """
    if stated.family == "block" and stated.block_size == 1 and not stated.anchor_first:
        raise InputError("block_size=1 of a fill-in block is its anchor alone and drafts nothing; set block_size")
    rounds = [trial for answer in answers if (trial := _trial(answer, stated, anchors))]
    if not rounds:
        raise InputError(f"no answer of the target has {stated.block_size + 2} tokens; give other prompts")
    layers = target.arch.num_hidden_layers
    taps = tuple(range(-1, layers))
    if not set(stated.taps) <= set(taps):
        raise InputError(f"layer ids {list(stated.taps)} are outside -1..{layers - 1} of this {layers}-layer target")
    run = _target_pass(target, rounds, taps)

    def tapped(features: jax.Array, layout: Layout) -> jax.Array:
        """What a drafter is given: one that is no block drafter reads the embeddings as well, before the features."""
        own = layout.taps if layout.family == "block" else (-1, *layout.taps)
        return features[:, [taps.index(i) for i in own]]

    def score(layout: Layout) -> Score:
        drawn = [
            _overlaps(
                drafter, target, tapped(features, layout), last, trial, layout.mask_token_id,
                anchor_first=layout.anchor_first, block=layout.family == "block",
            )[:, : trial.distinct]
            for trial, (features, last) in zip(rounds, run, strict=True)
        ]  # fmt: skip
        sampled, greedy = np.concatenate(drawn, axis=1)
        common = max(stated.block_size - 1, 1)
        return Score(
            layout,
            rounds=1 + np.cumprod(sampled, axis=1).sum(axis=1),
            overlap=sampled[:, :common].mean(axis=1),
            answer=np.repeat(np.arange(len(rounds)), [trial.distinct for trial in rounds]),
            greedy_rounds=1 + np.cumprod(greedy, axis=1).sum(axis=1),
        )

    scores = {layout: score(layout) for layout in readings(stated, layers)}
    if stated.family == "block":
        best = max(scores.values(), key=_closeness).layout
        for mask in dict.fromkeys(masks):
            layout = dataclasses.replace(best, mask_token_id=mask)
            if layout not in scores and 0 <= mask < target.arch.vocab_size:
                scores[layout] = score(layout)
        mask = max(scores.values(), key=_closeness).layout.mask_token_id
        for layout in readings(dataclasses.replace(stated, mask_token_id=mask), layers):
            if layout not in scores:
                scores[layout] = score(layout)
    ordered = sorted(scores.values(), key=_closeness, reverse=True)
    better = ordered[0].beats(scores[stated]) and ordered[0].tau >= LEARNED
    clear = ordered[0].tau >= CLEARLY * scores[stated].tau
    best = ordered[0] if better and clear else scores[stated]
    layout = best.layout
    teachers = [
        [
            float(
                _overlaps(
                    drafter, target, tapped(features, layout), hidden, trial, layout.mask_token_id,
                    anchor_first=layout.anchor_first, block=layout.family == "block",
                )[0, : trial.distinct, 0].mean()
            )
            for hidden in (last, features[:, -1])
        ]
        for trial, (features, last) in zip(rounds, run, strict=True)
    ]  # fmt: skip
    teacher, raw = np.mean(teachers, axis=0)
    rival = ordered[0] if better and not clear else None
    return Dialect(scores[stated], best, tuple(ordered), float(teacher), float(raw), rival)


def _closeness(score: Score) -> float:
    return float(score.overlap.mean())


def readings(stated: Layout, layers: int) -> list[Layout]:
    """Both block layouts with the stated layer ids and those one lower and higher, as far as there are such layers."""
    found = []
    for first in (stated.anchor_first, not stated.anchor_first):
        if not first and stated.family == "block" and stated.block_size == 1:
            continue  # a fill-in block of one row is its anchor and drafts nothing
        for shift in (0, -1, 1):
            taps = tuple(i + shift for i in stated.taps)
            if min(taps) >= -1 and max(taps) < layers and (first == stated.anchor_first or stated.family == "block"):
                found.append(dataclasses.replace(stated, taps=taps, anchor_first=first))
    return found


@dataclasses.dataclass(frozen=True)
class _Trial:
    """An answer padded to a power of two, and the positions from which drafts are made."""

    tokens: np.ndarray  # [S]
    positions: np.ndarray  # [A], of which only the first `distinct` count
    distinct: int


def _trial(answer: Answer, stated: Layout, anchors: int) -> _Trial | None:
    """Anchors evenly spread over the answer, each with a whole block after it."""
    last = len(answer.tokens) - max(stated.block_size, 7) - 1
    if last < answer.start:
        return None
    distinct = np.unique(np.linspace(answer.start, last, anchors).astype(np.int32))
    positions = np.resize(distinct, anchors)  # repeated in short answers: one executable serves all
    size = max(1 << int(len(answer.tokens) - 1).bit_length(), 64)
    return _Trial(np.pad(answer.tokens, (0, size - len(answer.tokens))).astype(np.int32), positions, len(distinct))


def _target_pass(
    target: LanguageModel, trials: Sequence[_Trial], taps: tuple[int, ...]
) -> list[tuple[jax.Array, jax.Array]]:
    """Per trial all features [S, M, D] and the last hidden states [S, D]."""

    return [_features(target, jnp.asarray(trial.tokens), taps=taps) for trial in trials]


@functools.partial(jax.jit, static_argnames=("taps",))
def _features(target: LanguageModel, tokens: jax.Array, *, taps: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """One sequence [S] through the target: features [S, M, D] and last hidden states [S, D]."""
    out = target.forward(tokens[None], jnp.arange(tokens.shape[0])[None], taps=taps)
    return out.features[0].reshape(tokens.shape[0], len(taps), -1), out.last_hidden[0]


def _overlaps(
    drafter: DrafterModule,
    target: LanguageModel,
    features: jax.Array,
    hidden: jax.Array,
    trial: _Trial,
    mask: int,
    *,
    anchor_first: bool,
    block: bool,
) -> np.ndarray:
    """[2, A, G] chance that each draft is accepted if all before it are; one column fewer in the fill-in layout.

    The first is that of drafts which are sampled, the second that of the likeliest tokens, both at temperature 1.

    Args:
      drafter: any.
      target: its embedding and LM head are used.
      features: [S, M, D] of the tapped layers.
      hidden: [S, D], of which the LM head makes the teacher.
      trial: the answer and its anchors.
      mask: mask token of a block drafter.
      anchor_first: the block layout.
      block: whether it is a block drafter, which is shown the answer; another one continues its own drafts.
    """
    tokens, positions = jnp.asarray(trial.tokens), jnp.asarray(trial.positions)
    if block:
        return np.asarray(
            _block_overlaps(
                drafter, target, features, hidden, tokens, positions, jnp.int32(mask), anchor_first=anchor_first
            )
        )
    return np.asarray(_chain_overlaps(drafter, target, features, hidden, tokens, positions))


def _context(drafter: DrafterModule, features: jax.Array, tokens: jax.Array, positions: jax.Array) -> Any:
    """A drafter's cache with one request per anchor, all over the same sequence."""
    count, length = positions.shape[0], tokens.shape[0]
    rows = jnp.broadcast_to(features.reshape(length, -1), (count, length, features.shape[1] * features.shape[2]))
    every = jnp.broadcast_to(jnp.arange(length), (count, length))
    cache = drafter.init_cache(count, length + drafter.block_size + 1)  # a block is written after its context
    return drafter.extend(cache, rows, jnp.broadcast_to(tokens, (count, length)), every, positions)


def _shared(logits: jax.Array, target: EmbeddingAndHead, hidden: jax.Array, rows: jax.Array) -> jax.Array:
    """[2, A, G] of draft logits [A, G, V] and the target after sequence rows [A, G]: 1 - total variation, and the
    target's probability of the likeliest draft."""
    draft, teacher = (jax.nn.softmax(x.astype(jnp.float32), axis=-1) for x in (logits, target.unembed(hidden[rows])))
    shared = jnp.minimum(draft, teacher).sum(axis=-1)
    likeliest = jnp.take_along_axis(teacher, draft.argmax(axis=-1, keepdims=True), axis=-1)[..., 0]
    finite = jnp.isfinite(draft).all(axis=-1)  # the smaller of NaN and a number may be either
    return jnp.where(finite, jnp.stack([shared, likeliest]), 0.0)


@functools.partial(jax.jit, static_argnames=("anchor_first",))
def _block_overlaps(
    drafter: DSpark,  # or DFlash, which is one without heads
    target: LanguageModel,
    features: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    *,
    anchor_first: bool,
) -> jax.Array:
    """`_overlaps` of a block drafter; its sequential head sees the answer's tokens."""
    cache, size = _context(drafter, features, tokens, positions), drafter.block_size
    inputs = block_tokens(tokens[positions], 0, size).at[:, 1:].set(mask)
    states, _ = drafter.backbone.decode(target.embed(inputs).astype(drafter.dtype), cache, positions)
    states = states if anchor_first else states[:, 1:]
    rows = positions[:, None] + jnp.arange(states.shape[1])  # the target's rows, whose tokens come before each draft
    logits = target.unembed(states)
    if drafter.markov is not None:
        logits = drafter.markov.logits(logits, states, drafter.markov.embed(tokens[rows]))
    return _shared(logits, target, hidden, rows)


@jax.jit
def _chain_overlaps(
    drafter: DrafterModule,
    target: LanguageModel,
    features: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """`_overlaps` of a drafter that continues its greedy drafts: nothing counts after one that leaves the answer."""
    count, size = positions.shape[0], drafter.block_size
    cache = _context(drafter, features, tokens, positions)
    uniforms = jnp.zeros((count, size, 2), jnp.int32)
    proposal, _ = drafter.propose(target, cache, tokens[positions], positions, uniforms, Sampling.constant(0.0, count))
    rows = positions[:, None] + jnp.arange(size)
    agree = jnp.cumprod(proposal.tokens[:, :-1] == tokens[rows[:, 1:]], axis=1)
    return _shared(proposal.logits, target, hidden, rows) * jnp.pad(agree, ((0, 0), (1, 0)), constant_values=1)
