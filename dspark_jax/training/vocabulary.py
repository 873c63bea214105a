"""A drafter that drafts from a part of the vocabulary: which part, how its head begins, where it is supervised."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import Config, InputError
from dspark_jax.data.sources import Samples
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.drafter.vocabulary import DraftVocabulary
from dspark_jax.json_file import write_json
from dspark_jax.sharding import parts_of
from dspark_jax.target.interface import EmbeddingAndHead
from dspark_jax.training.state import TrainState
from dspark_jax.vocabulary import count_tokens, decode_vocabulary, encode_vocabulary, most_frequent

FILE = "draft_vocabulary.json"
HEAD = "vocabulary.head"
"""The parameter of a drafter that is its own LM head."""


class Inside(NamedTuple):
    """Of the target's rows [B, S].

    Attributes:
      supervised: bool, its likeliest token is in the draft vocabulary.
      mass: probability of all tokens there.
    """

    supervised: jax.Array
    mass: jax.Array


def inside_vocabulary(
    vocabulary: DraftVocabulary, target: EmbeddingAndHead, last_hidden: jax.Array, chunk: int
) -> Inside:
    """What of the target's distribution is in a draft vocabulary, by row.

    Args:
      vocabulary: whose ids are asked for.
      target: its LM head makes the distributions.
      last_hidden: [B, S, D] after the final norm.
      chunk: rows per device whose logits over the whole vocabulary are in memory at once.
    """
    b, s, d = last_hidden.shape
    size = max(min(chunk * parts_of("batch") // b, s), 1)
    padded = jnp.pad(jax.lax.stop_gradient(last_hidden), ((0, 0), (0, -s % size), (0, 0)))
    inside = jnp.asarray(vocabulary.inside)

    def one(states: jax.Array) -> Inside:
        logits = target.unembed(states)
        within = jax.nn.logsumexp(jnp.where(inside, logits, -jnp.inf), axis=-1)
        mass = jnp.exp(within - jax.nn.logsumexp(logits, axis=-1))
        return Inside(inside[jnp.argmax(logits, axis=-1)], mass)

    found = jax.lax.map(one, jnp.moveaxis(padded.reshape(b, -1, size, d), 1, 0))
    return Inside(*(jnp.moveaxis(x, 0, 1).reshape(b, -1)[:, :s] for x in found))


def begin_head(state: TrainState, drafter: DrafterModule, target: EmbeddingAndHead) -> TrainState:
    """The state of step 0 with the target's rows as the drafter's own LM head, if it has one."""
    vocabulary = drafter.vocabulary
    if vocabulary is None:
        return state
    old = state.params[HEAD]
    rows = jax.jit(lambda head: head[vocabulary.ids].astype(old.dtype), out_shardings=old.sharding)(target.head)
    return dataclasses.replace(state, params={**state.params, HEAD: rows})


def known_vocabulary(config: Config, saved: Config | None) -> Config:
    """The config with the draft vocabulary of a drafter that it goes on with, or starts from; see `train`.

    Raises:
      InputError: it has another one of this size, whose head would be for other tokens.
    """
    drafter, other = config.drafter, None if saved is None else saved.drafter
    if not other or drafter.draft_vocab_size != other.draft_vocab_size:
        return config
    if drafter.draft_vocabulary not in ("", other.draft_vocabulary):
        raise InputError("drafter.draft_vocabulary names other tokens than the drafter that is there; leave it empty")
    return dataclasses.replace(config, drafter=dataclasses.replace(drafter, draft_vocabulary=other.draft_vocabulary))


def fill_vocabulary(config: Config, samples: Samples, workdir: Path) -> tuple[Config, str]:
    """The config with the most frequent tokens of the answers as its draft vocabulary, and what is to be said of it.

    A vocabulary that it has already stays. Writes `draft_vocabulary.json`: how much of the answers these tokens are.

    Raises:
      InputError: the answers are empty.
    """
    drafter, whole = config.drafter, config.target.architecture.vocab_size
    counts = count_tokens(((one.tokens, one.loss_mask) for one in map(samples.__getitem__, range(len(samples)))), whole)
    if not counts.sum():
        raise InputError(
            "drafter.draft_vocab_size: the training data has no answers to count tokens in; prepare it again"
        )
    given = drafter.draft_vocabulary
    size = drafter.draft_vocab_size
    ids = decode_vocabulary(given, size, whole) if given else most_frequent(counts, size)
    about = {
        "draft_vocab_size": size,
        "vocab_size": whole,
        "distinct_tokens": int(np.count_nonzero(counts)),
        "tokens": int(counts.sum()),
        "coverage": float(counts[ids].sum() / counts.sum()),
    }
    if jax.process_index() == 0:
        write_json(workdir / FILE, about)
    text = encode_vocabulary(ids, whole)
    config = dataclasses.replace(config, drafter=dataclasses.replace(drafter, draft_vocabulary=text))
    return config, describe(about)


def describe(about: dict[str, Any]) -> str:
    """What `draft_vocabulary.json` says, as a line."""
    return (
        f"draft vocabulary: {about['draft_vocab_size']} of {about['vocab_size']} tokens cover "
        f"{100 * about['coverage']:.2f} % of the {about['tokens']} supervised tokens of the training data, which has "
        f"{about['distinct_tokens']} different ones"
    )
