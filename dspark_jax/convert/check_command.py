"""What `check` does: greedy answers of the target, on which a drafter directory is judged, and its report."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dspark_jax.config import Config, DataConfig, InputError, TargetArchitecture, TargetConfig
from dspark_jax.convert.check import Report, check_directory
from dspark_jax.convert.dialect import MASK_TOKENS, Answer
from dspark_jax.convert.layouts import read_config, read_layout
from dspark_jax.data.chat import load_tokenizer, prompt_tokens
from dspark_jax.data.prompts import Malformed, read_prompts
from dspark_jax.engine.generate import generate
from dspark_jax.engine.models import Models
from dspark_jax.engine.placement import answering_load, decoding_mesh
from dspark_jax.hub import local_directory
from dspark_jax.progress import log
from dspark_jax.sharding import one_device
from dspark_jax.target.interface import LanguageModel
from dspark_jax.target.loading import load_target


def examine(options: argparse.Namespace, *, mesh: Mesh | None = None, target: LanguageModel | None = None) -> Report:
    """What is to be expected of a drafter directory, for those who want it as an object.

    Args:
      options: of `check`, see `parser`.
      mesh: of the models; where decoding lives (`engine.placement`) if None.
      target: the model in `options.target`, or None to load it.

    Raises:
      InputError: drafter, target or prompts cannot be used.
    """
    directory = local_directory(options.drafter)
    read_layout(options.drafter, read_config(directory))  # before anything large is loaded
    options.target = str(local_directory(options.target))
    architecture = TargetArchitecture.of_any_model(options.target) if target is None else target.arch
    mesh = _checking_mesh(options, architecture) if mesh is None else mesh
    with jax.set_mesh(mesh):
        if target is None:
            target = load_target(TargetConfig(path=options.target, architecture=architecture), mesh)
        prompts, masks = check_prompts(options, target.arch.vocab_size)
        written = generate(Models(target), prompts, max_new_tokens=options.tokens, batch_size=len(prompts)).tokens
        answers = [
            Answer(np.asarray([*prompt, *tokens], np.int32), len(prompt))
            for prompt, tokens in zip(prompts, written, strict=True)
        ]
        return check_directory(directory, target, Path(options.target), answers, mesh, masks=masks)


def _checking_mesh(options: argparse.Namespace, architecture: TargetArchitecture) -> Mesh:
    """Where `check` decodes with a target of this shape."""
    if architecture.unsupported:
        return one_device()
    config = Config(target=TargetConfig(architecture=architecture), data=DataConfig(decode_batch_size=options.limit))
    return decoding_mesh(config.mesh.decode, answering_load(config))


def show(report: Report, file: str | None) -> None:
    """Prints a report, then writes it to a JSON file if there is to be one.

    Raises:
      InputError: the file cannot be written.
    """
    print("\n".join(report.lines()))
    if file:
        try:
            Path(file).write_text(json.dumps(report.to_json(), indent=1) + "\n", "utf-8")
        except OSError as error:
            raise InputError(
                f"--json {file}: cannot be written ({error.strerror}); give a file in a folder that exists"
            ) from None


def check_prompts(options: argparse.Namespace, vocabulary: int) -> tuple[list[list[int]], list[int]]:
    """Prompts in the target's template, and tokens that might be a mask; random prompts where it has no tokenizer."""
    masks = [*MASK_TOKENS.values(), vocabulary - 1, 0]
    if not (Path(options.target) / "tokenizer_config.json").exists():
        log(f"check: {options.target} has no tokenizer; the prompts are random tokens")
        rng = np.random.default_rng(0)
        return rng.integers(0, vocabulary, (options.limit, 12)).tolist(), masks
    tokenizer = load_tokenizer(options.target)
    masks += [len(tokenizer), *tokenizer.all_special_ids]
    if options.prompts:
        malformed: list[Malformed] = []
        read = read_prompts(options.prompts, options.limit, malformed.append)
        if malformed:
            first = malformed[0]
            log(
                f"check: {len(malformed)} lines are no prompts and are left out, "
                f"the first is {first.file}:{first.line}: {first.reason}"
            )
        asked = [prompt.messages for prompt in read]
    else:
        asked = [({"role": "user", "content": text},) for text in PROMPTS[: options.limit]]
    return [prompt_tokens(tokenizer, first_turn(messages)) for messages in asked], masks


def first_turn(messages: Sequence[Any]) -> tuple[Any, ...]:
    """A conversation up to its first question."""
    last = next(i for i, message in enumerate(messages) if message["role"] == "user")
    return tuple(messages[: last + 1])


PROMPTS = (
    "What is 17 + 25?",
    "Write a function that adds two numbers.",
    "Tell me about yourself.",
    "Tom has 12 apples and gives 5 of them away. How many apples are left?",
    "Write a function that returns the largest element of a list.",
    "What is the capital of France, and why is it well known?",
    "Explain in simple words how a bicycle works.",
    "List the days of the week.",
)
