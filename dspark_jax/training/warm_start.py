"""Warm start: a fresh training state with the parameters of another drafter, of its kind or of a related one.

What both have is taken over, heads and convolutions that only the new one has begin as they always do, and what only
the old one has is left out, so that a DFlash can become a DSpark, and that one a DSpark with convolutions. The backbone
has to be the same in every shape.
"""

import dataclasses
from collections.abc import Collection, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.config import DrafterConfig, InputError
from dspark_jax.training.state import Params, TrainState, to_params
from dspark_jax.training.vocabulary import HEAD as OWN_HEAD

BACKBONE, HEAD, CONFIDENCE, CONVOLUTIONS = "backbone", "sequential head", "confidence head", "convolutions"
"""Parts of a drafter."""

_SETTINGS = (
    "block_layout", "block_size", "target_layer_ids", "mask_token_id", "sliding_window", "layer_types", "rope_type",
    "rope_scaling", "selector_top_k", "eagle3_norms",
)  # fmt: skip
"""Fields of `DrafterConfig` that no parameter's shape depends on, but what the parameters were trained for."""

_STRUCTURE = ("num_layers", "qk_norms", "eagle3_norms", "draft_vocab_size", "layer_sizes")
"""Fields that decide which parameters a drafter's backbone has."""


@dataclasses.dataclass(frozen=True)
class Takeover:
    """What becomes of another drafter's parameters.

    Attributes:
      taken: part -> what is to be said of it.
      new: likewise, parts that begin as in a fresh run.
      left_out: parts that only the other drafter has.
      changed: settings that differ, in words.
    """

    taken: dict[str, str]
    new: dict[str, str]
    left_out: tuple[str, ...]
    changed: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """What a user should know."""
        for words, parts in (("taken over", self.taken), ("starting new", self.new)):
            named = [f"{part} ({note})" if note else part for part, note in parts.items()]
            if named:
                yield f"{words}: {', '.join(named)}"
        if self.left_out:
            yield f"left out: {', '.join(self.left_out)}"
        yield from (f"trained with another setting: {text}" for text in self.changed)


def part_of(name: str) -> str:
    """The part that a parameter belongs to."""
    if name.startswith("markov."):
        return HEAD
    if name.startswith("confidence."):
        return CONFIDENCE
    return CONVOLUTIONS if ".around_" in name else BACKBONE


def stand_ins(params: Params) -> set[str]:
    """Heads of an export that are there for servers only: all zero but for an offset, so that they change nothing."""
    found = set()
    for part, names in ((HEAD, ("markov.w1", "markov.w2")), (CONFIDENCE, ("confidence.weight",))):
        here = [params[name] for name in names if name in params]
        if here and not any(np.any(np.asarray(value)) for value in here):
            found.add(part)
    return found


def plan_takeover(
    found: Params, wanted: Params, source: DrafterConfig, config: DrafterConfig, without: Collection[str] = ()
) -> Takeover:
    """Compares the parameters of a drafter with those of the config's; shapes will do.

    Args:
      found: of the other drafter.
      wanted: of the config's.
      source: what the other one is.
      config: what is going to be trained.
      without: parts of the other one that do not count, see `stand_ins`.

    Raises:
      InputError: a part that both have does not fit, the backbone is another one, or convolutions would be left out.
    """
    theirs = {part_of(name) for name in found} - set(without)
    ours = {part_of(name) for name in wanted}
    layers = f"{config.num_layers} layer{'s' * (config.num_layers > 1)}"
    if OWN_HEAD in found and OWN_HEAD in wanted:
        layers += f", LM head of {config.draft_vocab_size} tokens"
    taken, new = {BACKBONE: layers}, dict[str, str]()
    for part in (HEAD, CONVOLUTIONS, CONFIDENCE):
        if part not in ours:
            continue
        reason = _why_new(part, source, config, theirs, new)
        (taken if reason is None else new)[part] = reason or _note(part, config)
    if CONVOLUTIONS in theirs - ours:
        raise InputError(
            "its backbone was trained with convolutions, the config's has none; set drafter.conv_kernel_size="
            f"{source.conv_kernel_size}"
        )
    _refuse_other_shapes(found, wanted, taken, source, config)
    changed = [
        f"{name} {getattr(source, name)!r} there, {getattr(config, name)!r} here{_MEANING.get(name, '')}"
        for name in _SETTINGS
        if getattr(source, name) != getattr(config, name)
        and (name != "selector_top_k" or {source.markov_head_type, config.markov_head_type} == {"selector"})
    ]
    return Takeover(taken, new, tuple(part for part in (HEAD, CONFIDENCE) if part in theirs - ours), tuple(changed))


_MEANING = {
    "block_layout": ": every row predicts another token than it was trained for",
    "target_layer_ids": ": the same matrix reads other features",
}


def _why_new(
    part: str, source: DrafterConfig, config: DrafterConfig, theirs: Collection[str], new: dict[str, str]
) -> str | None:
    """Why a part of the config's drafter is not taken over; None if it is."""
    if part not in theirs:
        return "as the identity" if part == CONVOLUTIONS else _note(part, config)
    if part == HEAD and source.markov_head_type != config.markov_head_type:
        return f"{config.markov_head_type}; it was {source.markov_head_type}"
    if part == CONFIDENCE and source.confidence_with_markov != config.confidence_with_markov:
        return "the other one reads the token before, this one does not" if source.confidence_with_markov else (
            "the other one does not read the token before, this one does"
        )  # fmt: skip
    if part == CONFIDENCE and config.confidence_with_markov and HEAD in new:
        return "it reads the sequential head, which starts new"
    return None


def _note(part: str, config: DrafterConfig) -> str:
    return f"{config.markov_head_type}, rank {config.markov_rank}" if part == HEAD else ""


def _refuse_other_shapes(
    found: Params, wanted: Params, taken: Collection[str], source: DrafterConfig, config: DrafterConfig
) -> None:
    """Refuses a part that is taken over and does not fit, by its first parameter that does not."""
    mine = {name: leaf for name, leaf in wanted.items() if part_of(name) in taken}
    others = {name: leaf for name, leaf in found.items() if part_of(name) in taken}
    for name in [*mine, *others]:
        part = part_of(name)
        if name not in others or name not in mine:
            side = "only the config's has" if name in mine else "only the other one has"
            raise InputError(f"its {part} is another one: {side} {name}; {_other_kind(source, config)}")
        if others[name].shape != mine[name].shape:
            raise InputError(
                f"its {part} does not fit: {name} has shape {tuple(others[name].shape)}, the config gives "
                f"{tuple(mine[name].shape)}; configure a drafter of its shape ({_sizes(source)})"
            )


def _other_kind(source: DrafterConfig, config: DrafterConfig) -> str:
    """What to do about parameters that one of two drafters has not."""
    if source.kind != config.kind:
        return f"a drafter of kind {source.kind!r} cannot become one of kind {config.kind!r}, configure one of its kind"
    settings = [
        f"drafter.{name}={getattr(source, name)!r}"
        for name in _STRUCTURE
        if getattr(source, name) != getattr(config, name)
    ]
    return f"configure a drafter like it ({', '.join(settings or [f'drafter.num_layers={source.num_layers}'])})"


def _sizes(source: DrafterConfig) -> str:
    """Settings that shapes depend on."""
    found = f"drafter.num_layers={source.num_layers}, {len(source.target_layer_ids)} drafter.target_layer_ids"
    found += f", drafter.draft_vocab_size={source.draft_vocab_size}" if source.draft_vocab_size else ""
    return found + (f", drafter.markov_rank={source.markov_rank}" if source.markov_rank else "")


def warm_start(
    state: TrainState, drafter: nnx.Module, source: DrafterConfig, config: DrafterConfig, *, exported: bool = False
) -> tuple[TrainState, Takeover]:
    """The state with what of `drafter` can be taken over, on the shards that it has.

    Args:
      state: of step 0.
      drafter: it may have been trained for another target.
      source: what it is.
      config: what is going to be trained.
      exported: it comes from an export, which may have heads that are none (`stand_ins`).

    Raises:
      InputError: see `plan_takeover`.
    """
    found = to_params(drafter)
    takeover = plan_takeover(found, state.params, source, config, stand_ins(found) if exported else ())
    params = {
        name: jax.device_put(jnp.asarray(found[name], wanted.dtype), wanted.sharding)
        if part_of(name) in takeover.taken
        else wanted
        for name, wanted in state.params.items()
    }
    return dataclasses.replace(state, params=params), takeover
