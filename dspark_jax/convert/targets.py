"""What a drafter has of its target: a shape in common, embedding and LM head."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.convert.mapping import FROZEN
from dspark_jax.target import families
from dspark_jax.target.frozen import read_frozen
from dspark_jax.target.loading import read_checkpoint

SHARED = ("model_type", "vocab_size", "hidden_size")
"""What a drafter and its target's drafters cannot differ in: embedding, LM head and hidden states are the target's."""


def fitting(
    directory: Path, drafter: TargetArchitecture, path: str, target: TargetArchitecture, *, whole: bool
) -> None:
    """Refuses a drafter that is for another target.

    Args:
      directory: of the drafter, for messages.
      drafter: the shape of its layers.
      path: of the target, for messages.
      target: its shape.
      whole: also where only its layers have another shape. A run builds them in the target's shape.

    Raises:
      InputError: the first field that differs.
    """
    wanted = families.of_shape(target).drafter_shape(target)
    for name in (*SHARED, *(families.of_shape(wanted).drafter_fields if whole else ())):
        here, there = getattr(drafter, name), getattr(wanted, name)
        if here != there:
            remedy = "this drafter is for another target"
            if name not in SHARED:
                remedy += ", or its layers have a shape of their own, which is not supported"
            raise InputError(f"{directory}: {name} is {here}, that of {path} is {there}; {remedy}")


@dataclasses.dataclass(frozen=True)
class FrozenTensors:
    """What a target whose drafters are a Qwen3's gives a drafter, and what servers make of it.

    Attributes:
      frozen: embedding and LM head by the names of `mapping.FROZEN`.
      notes: what is to be known about serving the drafter.
      own_embedding: why a server goes wrong that takes the embedding from the target, or empty.
    """

    frozen: Mapping[str, np.ndarray]
    notes: tuple[str, ...]
    own_embedding: str


def frozen_from_file(file: Path, target: Path, arch: TargetArchitecture) -> FrozenTensors:
    """What a run was trained with.

    Args:
      file: `features/frozen.safetensors` of the run.
      target: the target's directory.
      arch: its shape.

    Raises:
      InputError: the file or the target's weights are missing or damaged.
    """
    if not file.exists():
        raise InputError(
            f"{file}: no such file; it has what a {arch.unsupported}, which has no definition here, gave for training; "
            "prepare the features again"
        )
    embedding, head, softcap = read_frozen(file, arch)
    return frozen_of_target(dict(zip(FROZEN, (embedding, head), strict=True)), target, arch, softcap)


def frozen_of_target(
    frozen: Mapping[str, np.ndarray], target: Path, arch: TargetArchitecture, softcap: float
) -> FrozenTensors:
    """Compares embedding and logits of training with what servers, for which the drafter is a Qwen3, would compute."""
    notes = [
        f"The target is a {arch.unsupported or families.of_shape(arch).title}, the drafter's layers are Qwen3's: a "
        "server has to hand over the hidden states of this target's layers to its class of drafters for Qwen3."
    ]
    own = ""
    scale = embedding_scale(frozen[FROZEN[0]], target) if frozen else 1.0
    if scale != 1:
        how = f"multiplies its embedding by {scale:.4g}" if scale else "changes its embedding before its first layer"
        own = f"the target {how}, and a server that takes the embedding from it without that drafts other tokens"
        notes.append(f"The target {how}; `embed_tokens.weight` in the file is what comes of it.")
    if softcap:
        notes.append(
            f"The target caps its logits at {softcap:g}, and so did training; the Qwen3 class of drafters does not cap "
            "its own, so a server accepts fewer tokens."
        )
    return FrozenTensors(frozen, tuple(notes), own)


def embedding_scale(embedding: np.ndarray, target: Path) -> float | None:
    """The factor between a target's stored embedding and what its layers get; None if there is no such number.

    Args:
      embedding: [V, D] as the layers get it.
      target: the directory with its weights; the stored one is found by its values, whatever its name is.
    """
    vocabulary, width = embedding.shape
    step = max(vocabulary // 512, 1)
    mine = np.asarray(embedding[::step], np.float32)
    for tensor in read_checkpoint(target).values():
        if tensor.ndim != 2 or tensor.shape[1] != width or len(tensor) < vocabulary:
            continue
        stored = np.asarray(tensor[:vocabulary:step], np.float32)
        scale = float(np.vdot(mine, stored) / max(np.vdot(stored, stored), 1e-30))
        if np.abs(mine - scale * stored).max() <= 2**-7 * np.abs(mine).max():  # as far as bfloat16 rounds
            return 1.0 if abs(scale - 1) < 2**-7 else scale
    return None
