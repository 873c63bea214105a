"""What servers look at in a drafter directory, and what each of them makes of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dspark_jax.config import TargetArchitecture
from dspark_jax.convert.layouts import Layout, architecture, is_llama, layers_config


@dataclasses.dataclass(frozen=True)
class Files:
    """A drafter directory without its numbers.

    Attributes:
      path: as it would be given to a server.
      config: content of config.json.
      shapes: of all tensors.
      target: shape of the target.
      stated: what the config says by its own dialect's rules.
      split: what llama.cpp's converter has to be told of the target's tokenizer (`llama_tokenizer.split_to_tell`).
    """

    path: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    target: TargetArchitecture
    stated: Layout
    split: str = ""

    @property
    def architecture(self) -> str:
        """Class name that servers look up."""
        return architecture(self.config)

    @property
    def speculators(self) -> bool:
        """Whether it is in the speculators format."""
        return "speculators_model_type" in self.config

    @property
    def gemma(self) -> bool:
        """Whether it drafts for Gemma 4."""
        layers = layers_config(self.config)
        return self.architecture.startswith("Gemma4") or str(layers.get("model_type", "")).startswith("gemma4")

    @property
    def llama(self) -> bool:
        """Whether its layers are Llama's, without query and key norms; the default of EAGLE-3 in the field."""
        if any(name.endswith(("q_norm.weight", "k_norm.weight")) for name in self.shapes):
            return False
        return is_llama(self.config)

    @property
    def has_vocabulary_map(self) -> bool:
        """Whether it drafts from a part of the vocabulary."""
        return any(name.endswith(("d2t", "t2d")) for name in self.shapes)

    def nested(self, *names: str) -> Mapping[str, Any]:
        """A nested dict of the config, the first of `names` that is there; else an empty one."""
        return next((self.config[name] for name in names if self.config.get(name)), {})

    def head_tensors(self) -> set[str]:
        """Which of markov, gate_proj, joint_proj, confidence the file has tensors of."""
        marks = {"markov": "markov_w1", "gate_proj": "markov_head.gate_proj", "joint_proj": "markov_head.joint_proj"}
        marks["confidence"] = "confidence_head.proj"
        return {mark for mark, part in marks.items() if any(part in name for name in self.shapes)}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a server does with a directory.

    Attributes:
      server: its name.
      refusals: why it does not load; empty if it does.
      wrong: what it computes differently from training although it loads.
      notes: how to start it, and what is lost.
      reading: how it understands the file; None if it does not load.
      greedy: whether it drafts greedily at every temperature.
      unknown: why it is not known whether it loads the file; empty if it is, or if it is known to refuse it.
    """

    server: str
    refusals: tuple[str, ...]
    wrong: tuple[str, ...]
    notes: tuple[str, ...]
    reading: Layout | None
    greedy: bool = False
    unknown: tuple[str, ...] = ()


GREEDY = "its drafts are greedy: at temperature 1 fewer are accepted than of sampled ones, of which `evaluate` tells"


def path_word(path: str) -> str:
    """By which word in the path vLLM guesses a drafter's method, the first of these; empty if there is none."""
    return next((word for word in ("eagle3", "dflash", "dspark") if word in path.lower()), "")
