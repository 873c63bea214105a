"""What `evaluate` and `calibrate` begin with: a checkpoint as a decoder, and prompts that can be asked."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from dspark_jax.buckets.places import reading
from dspark_jax.config import Config, InputError
from dspark_jax.data.chat import load_tokenizer, stop_tokens
from dspark_jax.data.prompts import prompt_files, read_prompts, set_name
from dspark_jax.data.regenerate import Conversation, Rejected, conversations
from dspark_jax.data.samples import Tally, describe, describe_unused
from dspark_jax.data.thinking import Thinking
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.drafter.none import NoDrafter
from dspark_jax.engine.models import Models, when_loaded
from dspark_jax.engine.placement import decoding_mesh, evaluation_load
from dspark_jax.evaluation.decoding import Decoder, Requests, first_requests, position_limit
from dspark_jax.kinds import KINDS
from dspark_jax.progress import log
from dspark_jax.run import Run, checkpoint_directory
from dspark_jax.sharding import one_device
from dspark_jax.target.interface import LanguageModel
from dspark_jax.target.loading import load_target
from dspark_jax.tokenizer import ChatTokenizer
from dspark_jax.training.best import NEWEST
from dspark_jax.training.checkpoint import load_step, saved_config


def open_decoder(
    run: Run,
    *,
    target: LanguageModel | None = None,
    drafter: DrafterModule | NoDrafter | None = None,
    tokenizer: ChatTokenizer | None = None,
    checkpoint: str = NEWEST,
) -> Decoder:
    """A checkpoint of a run with its target, or models that are loaded already.

    Args:
      run: of its config, `target` and `eval` are used.
      target: the target, or None to load it.
      drafter: the drafter, or None to load it.
      tokenizer: the target's, or None to load it.
      checkpoint: `newest`, `best` or a step, see `training.checkpoint.load_drafter`.

    Raises:
      InputError: as `open_drafter`; or target or tokenizer cannot be used.
    """
    config, step = run.config, None
    if drafter is None:
        step, drafter = open_drafter(run, checkpoint)
        drafter = when_loaded(drafter)
    target = when_loaded(load_target(config.target, run.mesh)) if target is None else target
    tokenizer = load_tokenizer(config.target.path) if tokenizer is None else tokenizer
    return Decoder(
        models=Models(target, drafter),
        tokenizer=tokenizer,
        stop_tokens=stop_tokens(config.target.path, tokenizer),
        max_new_tokens=config.eval.max_new_tokens,
        batch_size=config.eval.batch_size,
        seed=config.eval.seed,
        step=step,
        system_prompt=config.data.system_prompt,
        thinking=config.data.thinking == "on",
        workdir=run.workdir,
    )


def load_run(workdir: str | Path, checkpoint: str = NEWEST) -> Decoder:
    """A checkpoint of a training run with its target, tokenizer and settings, ready to decode.

    Args:
      workdir: of the run, here or in a bucket.
      checkpoint: `newest`, `best` (by accepted length on held-out prompts, if the run measured it) or a step.

    Raises:
      InputError: there is no such checkpoint, or its target cannot be loaded.
    """
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # Orbax warns about its own defaults; what fails is raised
    try:
        folder = reading(workdir)
        config = saved_config(folder, checkpoint)
        if config is None:
            raise InputError(f"{checkpoint_directory(folder)}: no checkpoint here; name the --workdir of a run")
        return open_decoder(decoding_run(Run(config, folder)), checkpoint=checkpoint)
    finally:
        logging.set_verbosity(before)


def decoding_run(run: Run) -> Run:
    """The run with its models where decoding lives, unless its mesh was given; says in one line where that is.

    A target that PyTorch runs decodes on one device.

    Raises:
      InputError: see `engine.placement.place`.
    """
    if run.given_mesh is not None:
        return run
    if run.config.target.architecture.unsupported:
        return run.on(one_device())
    return run.on(decoding_mesh(run.config.mesh.decode, evaluation_load(run.config)))


def refuse_timing(config: Config, what: str) -> None:
    """Refuses to take the time of a target that PyTorch runs.

    Args:
      config: resolved.
      what: asks for it, e.g. a command.

    Raises:
      InputError: it has such a target.
    """
    if kind := config.target.architecture.unsupported:
        raise InputError(
            f"{what}: a {kind} has no definition in JAX and is run by PyTorch, request after request, which says "
            "nothing about the time of a server's rounds; measure it where the target is served"
        )


def open_drafter(run: Run, checkpoint: str = NEWEST) -> tuple[int, DrafterModule]:
    """A checkpoint's step and drafter.

    Raises:
      InputError: there is no such checkpoint for the config's target, or its drafter is another one than the config
        states.
    """
    step, saved, drafter = load_step(run, checkpoint)
    unused = {"initializer_range", "init_layers", *([] if KINDS[saved.drafter.kind].needs_mask else ["mask_token_id"])}
    if not run.config.drafter.draft_vocabulary:  # `train` has filled it
        unused.add("draft_vocabulary")
    for field in dataclasses.fields(saved.drafter):
        there, stated = getattr(saved.drafter, field.name), getattr(run.config.drafter, field.name)
        if there != stated and field.name not in unused:
            raise InputError(
                f"{run.checkpoint_folder / str(step)}: drafter.{field.name} is {there!r} there and {stated!r} "
                f"in the config; use --config {run.workdir / 'config.json'}, or the --workdir of such a drafter"
            )
    return step, drafter


def check_questions(config: Config) -> None:
    """Refuses prompts of `eval.prompts` of which nothing can be asked, before a training that would end with them.

    Raises:
      InputError: see `check_prompt_files` and `read_questions`.
    """
    check_prompt_files(config.eval.prompts, "eval.prompts")
    tokenizer, settings = load_tokenizer(config.target.path), config.eval
    with contextlib.closing(Tally(Path(os.devnull))) as tally:  # evaluation says what is left out
        first_questions(config, tokenizer, settings.max_new_tokens, tally, settings.prompts, settings.limit)


def read_questions(
    config: Config, decoder: Decoder, tally: Tally, files: Sequence[str], limit: int
) -> tuple[list[Conversation], Requests]:
    """Reads prompt files; returns the prompts that can be asked, and their first questions.

    Args:
      config: `data` has the system prompt and the longest prompt, `target` the number of positions.
      decoder: its tokenizer and longest answer decide what can be asked.
      tally: counts those that cannot, and fields that are not used.
      files: JSONL files of prompts.
      limit: prompts per file; 0 = all.

    Raises:
      InputError: a file cannot be read, or none of its prompts can be asked.
    """
    return first_questions(config, decoder.tokenizer, decoder.max_new_tokens, tally, files, limit)


def first_questions(
    config: Config, tokenizer: ChatTokenizer, max_new_tokens: int, tally: Tally, files: Sequence[str], limit: int
) -> tuple[list[Conversation], Requests]:
    """As `read_questions`, where no models are loaded, or others than the config's decode.

    Raises:
      InputError: likewise.
    """
    prompts = read_prompts(files, limit, tally.malformed)
    tally.read(prompts)

    def reject(conversation: Conversation, error: Rejected) -> None:
        tally.reject(conversation.sample_id, conversation.prompt, error)

    todo = conversations(prompts, 1, config.data.system_prompt, Thinking.of(config.data))
    longest = min(config.data.max_prompt_length, position_limit(config.target.architecture, max_new_tokens))
    asked, first = first_requests(tokenizer, todo, longest, reject)
    left = {one.prompt.file for one in asked}
    for file in prompt_files(files):
        if file not in left:
            raise InputError(
                f"{file}: none of its prompts can be asked ({describe(tally.rejected)}); "
                f"raise data.max_prompt_length={config.data.max_prompt_length} or change the prompts"
            )
    return asked, first


def tell_left_out(command: str, tally: Tally, rejected: Path | None = None) -> None:
    """Says which prompts were set aside, and which fields of the others are not used.

    Args:
      command: its name, for the line.
      tally: of `read_questions`.
      rejected: its file, which is removed if nothing is in it; None where there is none.
    """
    if tally.rejected:
        log(f"{command}: set aside{f' in {rejected}' if rejected else ''}: {describe(tally.rejected)}")
    elif rejected:
        rejected.unlink()
    if tally.unused:
        log(f"{command}: {describe_unused(tally.unused)}")


def check_prompt_files(files: Sequence[str], field: str) -> None:
    """Refuses what cannot be decoded before anything is loaded.

    Raises:
      InputError: no file, or two of the same name: results are reported by it.
    """
    if not files:
        raise InputError(f"{field} is empty; name at least one file of prompts")
    names = [set_name(file) for file in prompt_files(files)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{field} has two files named {name}; results are reported by name, rename one")
