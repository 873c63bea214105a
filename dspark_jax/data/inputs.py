"""What decides which samples `prepare` makes: from it comes the fingerprint of the data."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from dspark_jax.config import AnswersConfig, Config, DataConfig, InputError
from dspark_jax.data.chat import load_tokenizer, stop_tokens
from dspark_jax.data.files import HUB
from dspark_jax.data.parts import count_parts
from dspark_jax.data.prompts import content_hashes, prompt_files

FORMAT = 2
"""Raised when the same inputs would give other samples."""

_READ_SINCE_3 = re.compile(
    rb'"(tools?|functions?|tool_calls|function_call|observation|developer|instruction|input_ids)"'
    rb'|"type": ?"(input_|output_)?text"'
)
"""Names in rows of JSON that format 2 sets aside and format 3 reads."""

FIELDS = (
    "limit",
    "regenerate",
    "repeats",
    "system_prompt",
    "max_prompt_length",
    "max_length",
    "min_loss_tokens",
    "temperature",
    "seed",
)
"""Fields of `config.data` that the samples depend on, besides the prompts."""

LATER_FIELDS = ("thinking", "supervised")
"""The same, but data that was made before there were any is that of their defaults."""

SAMPLING_FIELDS = ("top_p", "top_k", "min_p", "max_new_tokens")
"""Fields of `config.data.answers` that the samples depend on."""

SERVER_FIELDS = ("model", "mode")
"""The same, where servers answer."""


def read_inputs(config: Config, weights: str | None, tokenizer: str) -> dict[str, Any]:
    """Everything that decides what the samples are, in hashes and plain values.

    Args:
      config: resolved.
      weights: fingerprint of the target's weights; None where it does not answer (`data.regenerate` is off).
      tokenizer: fingerprint of its tokenizer.

    Raises:
      InputError: a prompt file or the tokenizer cannot be read, or fields contradict each other.
    """
    data, path = config.data, config.target.path
    if not data.prompts:
        raise InputError("data.prompts is empty; name at least one file of prompts")
    if not data.regenerate and data.repeats > 1:
        raise InputError(f"data.repeats={data.repeats} needs data.regenerate=True; given answers exist once")
    prompts = content_hashes(data.prompts, "data.prompts")
    later = {name: getattr(data, name) for name in LATER_FIELDS if getattr(data, name) != getattr(DataConfig(), name)}
    if data.thinking == "mixed":
        later["thinking_share"] = data.thinking_share
    later |= _answer_fields(data) if data.regenerate else {}
    return {
        "format": _format(config),
        "target": {"weights": weights, "dtype": config.target.dtype} if data.regenerate else {},
        "tokenizer": tokenizer,
        "stop_tokens": list(stop_tokens(path, load_tokenizer(path))),
        "prompts": prompts,
        "data": {name: getattr(data, name) for name in FIELDS} | later,
        **({"parts": count_parts(config)} if count_parts(config) > 1 else {}),
    }


def _answer_fields(data: DataConfig) -> dict[str, Any]:
    """Fields of `data.answers` that the samples depend on, where they are not those of their defaults.

    Which server it was, and how it was asked, does not count: it serves the target.
    """
    default = AnswersConfig()
    names = SAMPLING_FIELDS + (SERVER_FIELDS if data.answers.endpoints else ())
    changed = {name: getattr(data.answers, name) for name in names}
    found = {f"answers.{name}": value for name, value in changed.items() if value != getattr(default, name)}
    return found | ({"answers.endpoints": "servers"} if data.answers.endpoints else {})


def _format(config: Config) -> int:
    """3 where more conversations are read than in format 2; all others keep their samples, and so their fingerprint.

    Those are given ones (they end where they can be trained to) and those with tools, Alpaca's columns and so on.
    """
    files = [file for file in prompt_files(config.data.prompts) if not file.startswith(HUB)]
    more = not config.data.regenerate or any(_READ_SINCE_3.search(Path(file).read_bytes()) for file in files)
    return 3 if more else FORMAT


def digest(inputs: dict[str, Any]) -> str:
    """The fingerprint of data that was made of these inputs."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]
