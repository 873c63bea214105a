"""What a config asks for by name: terms of the loss and sequential heads. Kinds of drafters are in `kinds.KINDS`.

An entry says where a thing is, and it is imported when it is first used: so a config is checked, and `--help` printed,
without an accelerator library. A program adds its own from anywhere:

    LOSS_TERMS["hellinger"] = Entry(Hellinger, "1 - sum_v sqrt(p_draft p_target)")
"""

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dspark_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Entry:
    """A thing with a name.

    Attributes:
      home: the thing itself, or `module:name`.
      description: what it is, for `--help`.
    """

    home: Any
    description: str

    def load(self) -> Any:
        """The thing itself."""
        if not isinstance(self.home, str):
            return self.home
        module, _, name = self.home.partition(":")
        return getattr(importlib.import_module(module), name)


_LOSSES = "dspark_jax.training.losses"
_HEADS = "dspark_jax.drafter.heads"

LOSS_TERMS: dict[str, Entry] = {
    "ce": Entry(f"{_LOSSES}.ce:CrossEntropy", "cross-entropy with the data"),
    "l1": Entry(f"{_LOSSES}.l1:Distance", "sum_v |p_draft - p_target|"),
    "soft_ce": Entry(f"{_LOSSES}.soft_ce:SoftCrossEntropy", "cross-entropy with the target's distribution"),
    "kl": Entry(f"{_LOSSES}.kl:KL", "KL(target || draft)"),
    "reverse_kl": Entry(f"{_LOSSES}.reverse_kl:ReverseKL", "KL(draft || target)"),
    "jsd": Entry(f"{_LOSSES}.jsd:JensenShannon", "Jensen-Shannon divergence"),
    "nla": Entry(f"{_LOSSES}.nla:NegativeLogAcceptance", "-log of the acceptance"),
    "lk_hybrid": Entry(f"{_LOSSES}.lk_hybrid:HybridLK", "KL where little is accepted, total variation where much is"),
    "greedy_ce": Entry(f"{_LOSSES}.greedy_ce:GreedyCrossEntropy", "cross-entropy with the target's likeliest token"),
    "dpace": Entry(f"{_LOSSES}.dpace:DPace", "cross-entropy with D-PACE's weights, which follow the drafter's own"),
    "length": Entry(f"{_LOSSES}.length:Length", "what is missing of a block's expected accepted length"),
    "selector": Entry(
        f"{_LOSSES}.selector:Selector", "cross-entropy of the selector with the target's likeliest token"
    ),
    "confidence": Entry(f"{_LOSSES}.confidence:Confidence", "the confidence head's error about the acceptance"),
}
"""Classes (or functions without arguments) that make a `training.losses.base.BlockTerm` or a `VocabTerm`. Those with a
field of their own in `LossConfig` get their weight there, the others in `loss.extra`."""

HEADS: dict[str, Entry] = {
    "vanilla": Entry(f"{_HEADS}.markov:MarkovHead", "the token before"),
    "gated": Entry(f"{_HEADS}.gated:GatedHead", "the token before, as far as the hidden state lets it"),
    "rnn": Entry(f"{_HEADS}.rnn:RNNHead", "the whole prefix of the block"),
    "selector": Entry(f"{_HEADS}.selector:SelectorHead", "the token before and the hidden state, of a few candidates"),
}
"""Classes of sequential heads, each a `drafter.heads.base.SequentialHead`: `drafter.markov_head_type`."""


E = TypeVar("E")


def unknown(field: str, name: str, entries: Iterable[str]) -> str:
    """Says that a field of a config names what there is not."""
    return f"{field}={name!r} is unknown; use {listed(entries)}"


def find(entries: Mapping[str, E], name: str, field: str) -> E:
    """The entry that a field of a config names.

    Raises:
      InputError: there is none; a config that a run has written may name what another program had added.
    """
    if name not in entries:
        raise InputError(unknown(field, name, entries))
    return entries[name]


def listed(names: Iterable[str]) -> str:
    """`a, b or c`."""
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def described(entries: Mapping[str, Any]) -> str:
    """Names with their descriptions, for `--help`."""
    return "; ".join(f"{name} ({entry.description})" for name, entry in entries.items())
