"""Parts of the prompts, where they are answered one after the other (`train.refresh_every`).

Part p of P has the prompts p, p + P, p + 2 P, ...: a little of every file. The first part is what `prepare` writes;
each further one is a folder `refresh/p` that appears whole, and never changes then.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from dspark_jax.config import Config

Prompt = TypeVar("Prompt")


def count_parts(config: Config) -> int:
    """Into how many parts the prompts of a config are divided."""
    return config.train.refresh_parts if config.train.refresh_every else 1


def part_of(prompts: Sequence[Prompt], part: int, parts: int) -> list[Prompt]:
    """The prompts of a part."""
    return list(prompts[part::parts])


def part_folder(workdir: Path, part: int) -> Path:
    """Where a part that training has added lies, from 1 on."""
    return workdir / "refresh" / str(part)
