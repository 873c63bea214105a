"""How z-lab's DFlash and DFlash 2 are written into a config.json, and what of them no server has."""

from typing import TYPE_CHECKING, Any

from dspark_jax.config import DrafterConfig, InputError
from dspark_jax.convert.layouts import DFLASH2, DFLASH2_KEYS

if TYPE_CHECKING:
    from dspark_jax.convert.export import Source


def dflash_keys(source: "Source") -> dict[str, Any]:
    """Keys of z-lab's DFlash; its own `dflash_config`, and at the top level what sglang-jax reads there first.

    Raises:
      InputError: servers have no such drafters with these layers.
    """
    drafter, family = source.config, source.family
    if not family.dflash_class:
        raise InputError(
            f"no server has a fill-in DFlash for {family.title}; train with drafter.block_layout='anchor_first', or "
            "with drafter.kind='dspark'"
        )
    own = {"mask_token_id": drafter.mask_token_id, "target_layer_ids": list(drafter.target_layer_ids)}
    second = drafter.kind == "dflash2"
    return {
        "architectures": [DFLASH2 if second else family.dflash_class],
        "mask_token_id": drafter.mask_token_id,
        "block_size": drafter.block_rows,
        "num_anchors": source.num_anchors,
        "dflash_config": own | (dflash2_keys(drafter) if second else {}),
    }


def dflash2_keys(drafter: DrafterConfig) -> dict[str, int]:
    """Sizes of the convolutions and of the selector."""
    sizes = (drafter.conv_kernel_size, drafter.conv_group_size, drafter.markov_rank, drafter.selector_top_k)
    return dict(zip(DFLASH2_KEYS, sizes, strict=True))


def refuse_unknown_parts(drafter: DrafterConfig) -> None:
    """Refuses combinations of parts for which no server has a class: DFlash 2 has convolutions and the selector, and
    nothing else has either."""
    selector, taps = drafter.markov_rank > 0 and drafter.markov_head_type == "selector", drafter.conv_kernel_size
    if drafter.kind == "dflash2":
        if not (selector and taps) or drafter.confidence_head:
            raise InputError(
                "servers know DFlash 2 with convolutions, with the selector and without a confidence head only; this "
                f"drafter has conv_kernel_size={taps}, markov_head_type={drafter.markov_head_type!r}, "
                f"confidence_head={drafter.confidence_head}"
            )
    elif selector or taps:
        part = "a selector" if selector else "convolutions"
        raise InputError(f"no server has a {drafter.kind} with {part}; train with drafter.kind='dflash2'")
