"""The families of targets that run here, one file each.

A family is added by its file and one line in `FAMILIES`; docs/adding.md has the recipe.
"""

from typing import TYPE_CHECKING

from dspark_jax.config_fields import Unsupported
from dspark_jax.target.families.deepseek_v4 import DeepseekV4
from dspark_jax.target.families.family import Family
from dspark_jax.target.families.gemma4 import Gemma4
from dspark_jax.target.families.gpt_oss import GptOss
from dspark_jax.target.families.llama import Llama
from dspark_jax.target.families.qwen2 import Qwen2
from dspark_jax.target.families.qwen3 import Qwen3
from dspark_jax.target.families.qwen3_5 import Qwen35
from dspark_jax.target.families.qwen3_5_moe import Qwen35Moe
from dspark_jax.target.families.qwen3_moe import Qwen3Moe

if TYPE_CHECKING:
    from dspark_jax.architecture import TargetArchitecture

FAMILIES: dict[str, Family] = {}
"""The families by name."""


def register(family: Family) -> None:
    """Makes a family known.

    Raises:
      ValueError: its name, or a `model_type` that it claims, is another one's.
    """
    taken = {family.name} & FAMILIES.keys() | {name for name in family.configs if claiming(name)}
    if taken:
        raise ValueError(f"the target family {family.name} claims what another one has: {', '.join(sorted(taken))}")
    FAMILIES[family.name] = family


def known() -> str:
    """The families' names, for messages."""
    return ", ".join(FAMILIES)


def claiming(model_type: object) -> Family | None:
    """The family of a config.json with this `model_type`; None if there is none."""
    return next((family for family in FAMILIES.values() if model_type in [*family.configs]), None)


def of_config(model_type: object, where: str) -> Family:
    """As `claiming`.

    Raises:
      Unsupported: there is none; lists those that there are.
    """
    family = claiming(model_type)
    if family is None:
        raise Unsupported(where, f"model_type {model_type!r}", f"use one of: {known()}")
    return family


def of_shape(arch: "TargetArchitecture") -> Family:
    """The family of a target of this shape."""
    return FAMILIES[arch.model_type]


def of_drafters(arch: "TargetArchitecture") -> Family:
    """The family whose layers a drafter for a target of this shape has."""
    return of_shape(of_shape(arch).drafter_shape(arch))


for _family in (
    Qwen3(), Gemma4(), Llama(), Qwen2(), Qwen3Moe(), Qwen35(), Qwen35Moe(), GptOss(), DeepseekV4()
):  # fmt: skip
    register(_family)
