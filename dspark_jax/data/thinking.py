"""Which prompts the target is asked to think about: none, all, those whose answers in the file think, or a share."""

import dataclasses
import hashlib
import json
from typing import Any

from dspark_jax.config import DataConfig
from dspark_jax.data.prompts import Prompt

MODES = ("off", "on", "given", "mixed")
"""What `data.thinking` may be."""


@dataclasses.dataclass(frozen=True)
class Thinking:
    """The rule of a config.

    Attributes:
      mode: one of `MODES`.
      share: of the prompts that are asked with thinking, where the mode is mixed.
      seed: of the choice among them.
    """

    mode: str = "off"
    share: float = 0.5
    seed: int = 0

    @classmethod
    def of(cls, data: DataConfig) -> "Thinking":
        """That of `data.thinking`."""
        return cls(data.thinking, data.thinking_share, data.seed)

    def asks(self, prompt: Prompt) -> bool:
        """Whether this prompt is asked with thinking: the same wherever, and beside whatever, it is read."""
        if self.mode == "mixed":
            return _fraction(prompt, self.seed) < self.share
        return self.mode == "on" or (self.mode == "given" and prompt.thinks)

    def settings(self) -> list[Any]:
        """What it depends on."""
        return [self.mode, self.share, self.seed] if self.mode == "mixed" else [self.mode]


NEVER = Thinking()
"""No prompt is."""


def _fraction(prompt: Prompt, seed: int) -> float:
    """A number in [0, 1) that is a function of the user's messages and the seed.

    A prompt that thinks at one share does so at every larger one.
    """
    asked = [message["content"] for message in prompt.messages if message["role"] == "user"]
    digest = hashlib.sha256(json.dumps([seed, asked]).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48  # which a float holds exactly
