"""Kinds of drafters: where the class of each is, and everything else that differs from kind to kind.

A config names a kind in `drafter.kind`. `as_kind` turns a config into one of another kind, or of a variant of one:
dspark with another sequential head or another loss, dflash with other blocks. Everything else of a config (target,
data, steps, optimizer) stays, so that drafters are compared on equal terms.

A program adds its own from anywhere: `KINDS["mine"] = Kind("what it is", MyDrafter)`. Neither this module nor what it
imports knows an accelerator library.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dspark_jax.errors import InputError
from dspark_jax.registry import Entry

if TYPE_CHECKING:
    from dspark_jax.config import Config, DrafterConfig


@dataclasses.dataclass(frozen=True)
class Kind(Entry):
    """A kind of drafter; `home` is its class, a `drafter.interface.DrafterModule`.

    Attributes:
      token_by_token: it drafts one token after another, not a block in one pass. Such drafters are trained on every row
        of a sequence, as the reference trains EAGLE-3, and not at anchors only.
      needs_mask: a mask token fills its blocks. If not, `drafter.mask_token_id` says nothing of it, and `as_kind` puts
        0 there.
      has_heads: it has a sequential head, and may have a confidence head.
      reads_last_layer: it reads one layer of the target, by default the last one; the others read any but the last.
      own_layers: its layers are DeepSeek-V4's for every target (`drafter.layer_sizes`), all with a window, and it may
        read the last layer of the target besides others.
      settings: what `as_kind` sets of `DrafterConfig` besides; other values go as well.
      eagle3: it has the settings of EAGLE-3 (`qk_norms`, `eagle3_norms` and the reduced vocabulary).
      fixed: field of `DrafterConfig` -> the one value that it has, and why.
      loss: what its own loss sets of `LossConfig`; None: it is trained with any.
      served_as: under which method servers load its exports; None: no server does.
      fill_in_served_as: the same with fill-in blocks; empty: under the same method.
    """

    token_by_token: bool = False
    needs_mask: bool = True
    has_heads: bool = False
    reads_last_layer: bool = False
    own_layers: bool = False
    eagle3: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, str]] = dataclasses.field(default_factory=dict)
    loss: Mapping[str, Any] | None = None
    served_as: str | None = None
    fill_in_served_as: str = ""


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kind with other settings.

    Attributes:
      description: what it is, for `--help`.
      drafter: what it sets of `DrafterConfig`.
      loss: what it sets of `LossConfig`.
      kind: which kind.
      every_row: whether every row of a sequence is the anchor of a block, and not `train.num_anchors` of them.
    """

    description: str
    drafter: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loss: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kind: str = "dspark"
    every_row: bool = False


_EAGLE3_LOSS = {"decay": -1.0 / math.log(0.8), "ce": 0.0, "l1": 0.0, "confidence": 0.0, "soft_ce": 1.0, "per_row": True}
"""The reference's: soft cross-entropy, step s weighs 0.8^s, divided by all rows, those of prompts and padding too."""

_MTP_LOSS = {"ce": 1.0, "l1": 0.0, "confidence": 0.0}
"""DeepSeek-V3's: cross-entropy with the data."""

_DFLASH2 = {
    "conv_kernel_size": 2,
    "markov_head_type": "selector",
    "block_layout": "fill_in",
    "confidence_head": False,
    "confidence_with_markov": False,
}
_DFLASH2_LOSS = {"ce": 0.0, "l1": 0.0, "confidence": 0.0, "soft_ce": 1.0, "extra": {"selector": 1.0}}
"""That of speculators, as the authors' is not published: KL with the target, and the selector's cross-entropy."""

_DISTILLED_LOSS = {"ce": 0.0, "soft_ce": 1.0}
"""Far from the target total variation has next to no gradient, and cross-entropy with one drawn token is noisy; the
cross-entropy with the distribution is neither. What each part brings: docs/results.md, "A better recipe"."""

EAGLE3_SETTINGS: Mapping[str, Any] = {
    "qk_norms": True, "eagle3_norms": (), "draft_vocab_size": 0, "train_head": True, "draft_vocabulary": "",
}  # fmt: skip
"""Fields of `DrafterConfig` that are EAGLE-3's alone, and the values that change nothing."""

_ONE_LAYER = {
    "num_layers": (1, "has one layer"),
    "block_layout": ("anchor_first", "has no blocks"),
    "conv_kernel_size": (0, "has no blocks"),
    "sliding_window": (0, "has no window"),
    "layer_types": ((), "has no window"),
    "rope_type": ("default", "has plain RoPE"),
    "rope_scaling": ({}, "has plain RoPE"),
}

_DSPARK5 = {
    "block_layout": ("anchor_first", "has blocks whose anchor's row predicts"),
    "markov_head_type": ("vanilla", "has the vanilla head"),
    "confidence_with_markov": (True, "has a confidence head that reads the Markov embedding"),
    "conv_kernel_size": (0, "has no convolutions"),
    "layer_types": ((), "has a window in every layer"),
    "rope_type": ("default", "has plain RoPE"),
    "rope_scaling": ({}, "has plain RoPE"),
    "init_layers": ("random", "has layers of its own"),
}

KINDS: dict[str, Kind] = {
    "dspark": Kind(
        "dspark_jax.drafter.dspark:DSpark",
        "a block in one pass, with a sequential head and a confidence head",
        has_heads=True,
        served_as="dspark",
    ),
    "dflash": Kind(
        "dspark_jax.drafter.dspark:DSpark",
        "dspark without its heads",
        served_as="dspark",
        fill_in_served_as="dflash",
    ),
    "dflash2": Kind(
        "dspark_jax.drafter.dspark:DSpark",
        "dflash with convolutions along the block, and a head that chooses among the likeliest tokens",
        has_heads=True,
        settings=_DFLASH2,
        loss=_DFLASH2_LOSS,
        fill_in_served_as="dflash",
    ),
    "dspark5": Kind(
        "dspark_jax.drafter.dspark5:DSpark5",
        "dspark with the layers of DeepSeek-V4: mixtures of experts with hyper-connections and a window",
        has_heads=True,
        own_layers=True,
        settings={"sliding_window": 128},
        fixed=_DSPARK5,
        served_as="dspark",
    ),
    "eagle3": Kind(
        "dspark_jax.drafter.eagle3:Eagle3",
        "one layer, fed with its own outputs",
        token_by_token=True,
        needs_mask=False,
        eagle3=True,
        fixed=_ONE_LAYER,
        loss=_EAGLE3_LOSS,
        served_as="eagle3",
    ),
    "mtp": Kind(
        "dspark_jax.drafter.mtp:MTP",
        "one module in DeepSeek-V3's form, one token per round",
        token_by_token=True,
        needs_mask=False,
        reads_last_layer=True,
        fixed=_ONE_LAYER | {"block_size": (1, "drafts one token per round")},
        loss=_MTP_LOSS,
    ),
}

VARIANTS: dict[str, Variant] = {
    "gated": Variant("dspark with the gated head", drafter={"markov_head_type": "gated"}),
    "rnn": Variant("dspark with the recurrent head", drafter={"markov_head_type": "rnn"}),
    "fill_in": Variant(
        "dflash as z-lab has it: the anchor's row predicts nothing", drafter={"block_layout": "fill_in"}, kind="dflash"
    ),
    "eagle3_llama": Variant(
        "eagle3 with a layer of Llama, which more servers know", drafter={"qk_norms": False}, kind="eagle3"
    ),
    "distilled": Variant(
        "dspark with a block at every row, and the target's whole distribution beside total variation in its loss",
        loss=_DISTILLED_LOSS,
        every_row=True,
    ),
    "length": Variant("dspark that maximises its expected accepted length", loss={"l1": 0.0, "length": 1.0}),
}


def names() -> list[str]:
    """What `as_kind` takes."""
    return [*KINDS, *VARIANTS]


def served_as(config: "DrafterConfig") -> str | None:
    """Under which method servers load a drafter, dspark, dflash or eagle3; None: they do not."""
    kind = KINDS[config.kind]
    return config.block_layout == "fill_in" and kind.fill_in_served_as or kind.served_as


def as_kind(config: "Config", name: str) -> "Config":
    """The config with another drafter; depth, block size, taps, rank and compute type stay where they apply.

    Args:
      config: of a dspark drafter.
      name: one of `names()`.

    Raises:
      InputError: there is none of this name.
    """
    if name not in names():
        raise InputError(f"drafter kind {name!r} is unknown; use one of: {', '.join(names())}")
    variant = VARIANTS.get(name, Variant("", kind=name))
    kind, changes = KINDS[variant.kind], dict[str, Any](kind=variant.kind)
    if kind.has_heads:
        changes["markov_head_type"] = "vanilla"
    else:
        changes |= {"markov_rank": 0, "confidence_head": False, "confidence_with_markov": False}
    if not kind.eagle3:
        changes |= EAGLE3_SETTINGS
    if not kind.own_layers:
        changes["layer_sizes"] = {}
    changes |= dict(kind.settings) | {field: value for field, (value, _) in kind.fixed.items()} | dict(variant.drafter)
    if kind.reads_last_layer:
        changes["target_layer_ids"] = ()
    if not kind.needs_mask:
        changes["mask_token_id"] = 0
    if kind.token_by_token:
        changes["init_layers"] = "random"
    loss = config.loss if kind.loss is None else type(config.loss)(**kind.loss)
    rows = {"num_anchors": config.data.max_length} if kind.token_by_token or variant.every_row else {}
    return dataclasses.replace(
        config,
        drafter=dataclasses.replace(config.drafter, **changes),
        loss=dataclasses.replace(loss, **{"extra": dict(loss.extra), **variant.loss}),
        train=dataclasses.replace(config.train, **rows),
    )
