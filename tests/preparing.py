"""What the tests of `prepare` share: prompts of which some cannot be used, and a target that can be killed."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dspark_jax.config import Config, DataConfig, DrafterConfig, TargetConfig, resolve
from dspark_jax.data.regenerate import Question

STOP = 294


def prompts_config(target: Path, folder: Path, prompts: int = 11, **data: Any) -> Config:
    """So many prompts, every second one with two turns, then one that is too long; the fifth line is malformed."""
    file = folder / "math.jsonl"
    lines = [
        json.dumps({"turns": ["how much is " + "one and " * (i % 5) + "one"] * (1 + i % 2)}) for i in range(prompts)
    ]
    file.write_text("\n".join([*lines[:4], "{broken", *lines[4:], json.dumps({"prompt": "x" * 200})]) + "\n")
    limits = {"max_prompt_length": 120, "max_length": 140, "min_loss_tokens": 4}
    return resolve(
        Config(
            name="tiny",
            target=TargetConfig(path=str(target)),
            drafter=DrafterConfig(num_layers=1, target_layer_ids=(0,), mask_token_id=319),
            data=DataConfig(prompts=(str(file),), **(limits | data)),
        )
    )


class Decoder:
    """Answers by sample id only; that of 3 stops at once. May be killed after some questions.

    Attributes:
      asked: sample id and turn of every question.
    """

    def __init__(self, kill_after: int = 10**9):
        self.kill_after, self.asked = kill_after, list[tuple[int, int]]()

    @property
    def streams(self) -> list[int]:
        """Sample ids of the questions."""
        return [stream for stream, _ in self.asked]

    def __call__(self, ask: Callable[[], Question | None]) -> Iterator[tuple[Question, list[int]]]:
        while question := ask():
            if len(self.asked) == self.kill_after:
                raise KeyboardInterrupt
            stream = question.conversation.sample_id
            self.asked.append((stream, question.turn))
            yield question, [STOP] if stream == 3 else [*range(65, 71 + stream), STOP]


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def changed(config: Config, **fields: Any) -> Config:
    """The config with other settings of `data`."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))
