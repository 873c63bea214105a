"""Prepares training data: prompts -> answers by the target -> tokens and loss mask -> ArrayRecord.

    python -m dspark_jax.prepare --config configs/quickstart.py

writes `data/` in the working directory: the samples, `report.json` (what they were made of, counts, lengths, and which
held-out prompts are among the training prompts) and `rejected.jsonl` (every line and conversation that gave no sample,
with its file, line and reason). All of it is built
in `data.partial/` and renamed at the end. A preparation that was killed continues with the answers it has; one whose
inputs are unchanged is skipped. It runs in one process; several hosts share its result through their file system.

    python -m dspark_jax.prepare --config dspark_qwen3_4b --benchmarks

fetches the prompts of the paper's benchmarks that the config names instead, and writes them where it names them.

With `data.features=cache` or `torch` the target's features of all samples are written to `features/` as well, so that
training does not run the target. That, too, says beforehand how much it takes, and continues where it was killed.
"""

import contextlib
import itertools
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags

from dspark_jax import command
from dspark_jax.answering import target_decoder
from dspark_jax.benchmarks import BENCHMARKS
from dspark_jax.config import Config, InputError
from dspark_jax.data import overlap, statistics
from dspark_jax.data.benchmark_prompts import fetch, places
from dspark_jax.data.chat import load_tokenizer, stop_tokens
from dspark_jax.data.mask_token import mask_warning
from dspark_jax.data.parts import count_parts, part_of
from dspark_jax.data.prompts import Prompt, read_prompts
from dspark_jax.data.regenerate import (
    Answered,
    AnswerLog,
    Conversation,
    Decode,
    Dialogues,
    Limits,
    Rejected,
    conversations,
    regenerate,
)
from dspark_jax.data.samples import (
    Tally,
    answered_samples,
    describe,
    describe_thinking,
    describe_unused,
    given_samples,
)
from dspark_jax.data.servers import ask_servers
from dspark_jax.data.sources import SampleReader, write_samples
from dspark_jax.data.thinking import Thinking
from dspark_jax.errors import UNWRITABLE, is_full_disk
from dspark_jax.json_file import part, read_ours, write_json
from dspark_jax.kinds import KINDS
from dspark_jax.progress import Progress, log
from dspark_jax.run import Run
from dspark_jax.tokenizer import ChatTokenizer
from dspark_jax.training.feature_cache import check_features, prepare_features

ANSWERS = 2
"""Raised when `answers.jsonl` is written in another way."""


def prepare(
    config: Config, workdir: Path, decode: Decode | None = None, benchmarks: str | None = None
) -> dict[str, Any]:
    """Makes `workdir/data`, and `workdir/features` if the config wants a cache, unless they are there; see the parts.

    Args:
      config: resolved.
      workdir: of the run.
      decode: answers batches of prompts; the config's target does when there is none.
      benchmarks: fetch the prompts of these, separated by commas, and do nothing else; `all`: of those that the config
        names, or all nine.

    Returns:
      The content of `data/report.json`; of benchmarks the files.

    Raises:
      InputError: as the parts; before any of them runs if there is a feature cache of something else.
    """
    if benchmarks is not None:
        names = [] if benchmarks == "all" else [name.strip() for name in benchmarks.split(",")]
        files = places(names, config.eval.prompts)
        with _disk_errors(workdir):
            fetch(files)
        return {name: str(file) for name, file in files.items()}
    return prepare_run(Run(config, Path(workdir)), decode)


def prepare_run(run: Run, decode: Decode | None = None) -> dict[str, Any]:
    """The same of a run that a command has already, without benchmarks."""
    cached = run.config.data.features != "online"
    if cached:
        check_features(run)
    report = prepare_samples(run, decode)
    if cached:
        with _disk_errors(run.workdir):
            prepare_features(run)
    return report


def prepare_samples(run: Run, decode: Decode | None = None) -> dict[str, Any]:
    """Makes `workdir/data`, unless it is there and made of the same inputs.

    Args:
      run: its working directory is created if need be.
      decode: answers questions; the config's target does when there is none.

    Returns:
      The content of `data/report.json`.

    Raises:
      InputError: prompts, tokenizer or target cannot be used, no sample is left, or the disk is full.
    """
    config, workdir = run.config, run.workdir
    final, partial = run.data_folder, workdir / "data.partial"
    for folder in (final, partial, workdir / "data.old"):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: not a directory; remove it, or use another --workdir")
    inputs, digest = run.data_inputs, run.data_fingerprint
    _warn_of_mask(config)
    found = read_ours(final / "report.json")
    held_out = part(found, "held_out")
    if jax.process_count() == 1:
        held_out = overlap.compare_files(config, held_out)
    if found.get("fingerprint") == digest and _complete(final, found.get("samples")):
        shutil.rmtree(workdir / "data.old", ignore_errors=True)  # left behind by a kill during the last step
        log(f"data: {found['samples']} samples in {final} are up to date")
        if held_out != part(found, "held_out"):
            with _disk_errors(workdir):
                found = write_json(final / "report.json", found | {"held_out": held_out})
        return found
    if jax.process_count() > 1:
        raise InputError(
            f"{final}: not prepared for this config; run python -m dspark_jax.prepare on one host first, "
            "with a --workdir that all hosts see"
        )
    if found:
        log(f"data: preparing again, {_difference(part(found, 'inputs'), inputs)}")
    with _disk_errors(workdir):
        if read_ours(partial / "report.json").get("fingerprint") != digest:
            _open_partial(partial, digest)
            report = _build(run, partial, decode) | ({"held_out": held_out} if held_out else {})
            write_json(partial / "report.json", {"fingerprint": digest, "inputs": inputs, **report})
        (partial / "answers.jsonl").unlink(missing_ok=True)
        (partial / "inputs.json").unlink(missing_ok=True)
        _publish(partial, final)
    report = read_ours(final / "report.json")
    _summarise(report, final)
    return report


def _warn_of_mask(config: Config) -> None:
    """Says so if the drafter's mask token is a part of texts."""
    if KINDS[config.drafter.kind].needs_mask:
        rows = config.target.architecture.vocab_size
        warning = mask_warning(load_tokenizer(config.target.path), config.drafter.mask_token_id, rows)
        if warning:
            log(f"warning: {warning}")


def _complete(final: Path, samples: int | None) -> bool:
    """Whether the samples that the report speaks of are there; says what is wrong with them."""
    try:
        return len(SampleReader(final)) == samples
    except InputError as error:
        log(f"data: {str(error).rpartition(';')[0]}")  # without the remedy, which follows
        return False


def _build(run: Run, partial: Path, decode: Decode | None) -> dict[str, Any]:
    """Writes samples and rejected.jsonl into `partial`; returns the counts for the report."""
    config, started = run.config, time.monotonic()
    data = config.data
    tokenizer, rows = load_tokenizer(config.target.path), config.target.architecture.vocab_size
    if len(tokenizer) > rows:
        raise InputError(
            f"{config.target.path}: the tokenizer has {len(tokenizer)} ids, the model {rows} rows; "
            "use the tokenizer of this very model"
        )
    with contextlib.closing(Tally(partial / "rejected.jsonl")) as tally:
        prompts = read_prompts(
            data.prompts,
            data.limit,
            tally.malformed,
            tokenised=not data.regenerate,
            reasoning=data.thinking != "off",
        )
        prompts = part_of(prompts, 0, count_parts(config))
        tally.read(prompts, Thinking.of(data))
        if data.regenerate:
            answered = _answers(run, tokenizer, prompts, partial, decode, tally)
            samples = answered_samples(tokenizer, answered, data, tally)
        else:
            samples = given_samples(tokenizer, prompts, data, tally)
        first = next(samples, None)
        if first is None:
            why, where = describe(tally.rejected), partial / "rejected.jsonl"
            raise InputError(
                f"no sample is left of {len(prompts)} prompts: {why}; see {where} and the limits in data.*"
            )
        write_samples(partial, itertools.chain([first], samples))
        return {"prompts": len(prompts), **tally.report(), "seconds": round(time.monotonic() - started, 1)}


def _answers(
    run: Run, tokenizer: ChatTokenizer, prompts: list[Prompt], partial: Path, decode: Decode | None, tally: Tally
) -> list[Answered]:
    """Conversations answered by the target; those that were before a kill are read back."""
    config, data = run.config, run.config.data
    todo = conversations(prompts, data.repeats, data.system_prompt, Thinking.of(data))
    turns = sum(len(conversation.questions) for conversation in todo)
    limits = Limits(
        max_prompt_length=data.max_prompt_length,
        max_length=data.max_length,
        max_new_tokens=data.answers.max_new_tokens,
    )
    stops = stop_tokens(config.target.path, tokenizer)

    def reject(conversation: Conversation, error: Rejected) -> None:
        tally.reject(conversation.sample_id, conversation.prompt, error)

    with (
        contextlib.closing(AnswerLog(partial / "answers.jsonl")) as answers,
        Progress("prepare", turns, unit="answer") as progress,
    ):
        if len(answers):
            log(f"data: continuing with {len(answers)} answers that are there already")
        if not data.answers.endpoints:
            decoder = decode or (lambda ask: target_decoder(run)(ask))  # loads the target if there is a question
            return regenerate(tokenizer, todo, decoder, stops, limits, answers, reject, progress.advance)

        started, before = time.monotonic(), len(answers)

        def advance(turns: int, failures: int) -> None:
            rate = (len(answers) - before) / max(time.monotonic() - started, 1e-3)
            progress.advance(turns, {"answers/s": rate, "failed": failures})

        dialogues = Dialogues(tokenizer, stops, limits, progress.advance)
        found = ask_servers(todo, config, dialogues, answers, reject, advance, progress.print)
        tally.counts["answers_as_text"] = answers.texts
        return found


def _open_partial(partial: Path, digest: str) -> None:
    """An empty `data.partial`, or the one of a preparation with the same inputs that did not end."""
    found = read_ours(partial / "inputs.json")
    stated = found.get("fingerprint")
    if stated == digest and found.get("answers") == ANSWERS:
        return
    if stated is not None:
        log("data: the inputs have changed since the preparation that did not end; its answers are not used")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    write_json(partial / "inputs.json", {"fingerprint": digest, "answers": ANSWERS})


def _publish(partial: Path, final: Path) -> None:
    """Makes a complete `data.partial` the new `data`; at every moment one of the two is complete."""
    old = final.with_name("data.old")
    if old.exists():
        shutil.rmtree(old)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    if old.exists():
        shutil.rmtree(old)


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What has changed between two sets of inputs, in one line."""
    fields, new = part(before, "data"), now["data"]
    changed = [
        f"data.{name}={_value(new, name)}, was {_value(fields, name)}"
        for name in {**new, **fields}
        if _value(new, name) != _value(fields, name)
    ]
    others = [name for name in now if name != "data" and before.get(name) != now[name]]
    changed += [f"the {name.replace('_', ' ')} changed" for name in others]
    return "; ".join(changed) or "the samples in it are not complete"


def _value(fields: dict[str, Any], name: str) -> str:
    """A field as text; fields that were added later are left out where they have their default."""
    return repr(fields[name]) if name in fields else "its default"


def _summarise(report: dict[str, Any], final: Path) -> None:
    """Says what was made and what was left out."""
    sets = ", ".join(f"{name} {counts['samples']}" for name, counts in report["prompt_sets"].items())
    log(
        f"data: {report['samples']} samples ({sets}), {report['tokens']} tokens, {report['loss_tokens']} supervised, "
        f"in {final} ({report['seconds']:.0f} s)"
    )
    if parts := report["inputs"].get("parts"):
        log(f"data: that is the first of {parts} parts of the prompts; the others are answered while it is trained")
    if report["cut_answers"] or report["shortened"]:
        log(
            f"data: {report['cut_answers']} answers ran into data.max_length; "
            f"{report['shortened']} conversations end before their last turn"
        )
    if report.get("answers_as_text"):
        log(f"data: servers gave {report['answers_as_text']} answers as text, which is tokenised here")
    if report["thoughts_cut"]:
        log(f"data: of {report['thoughts_cut']} conversations the chat template leaves think blocks out")
    log("\n".join(statistics.table(report)))
    held_out = part(report, "held_out")
    among = f"; among the training prompts are {overlap.describe(held_out)}" if held_out else ""
    log(f"data: {describe_thinking(report['thinking'])}{among}")
    if report["unused"]:
        log(f"data: {describe_unused(report['unused'])}")
    if report["rejected"]:
        log(f"data: set aside in {final / 'rejected.jsonl'}: {describe(report['rejected'])}")


@contextlib.contextmanager
def _disk_errors(workdir: Path) -> Iterator[None]:
    """Turns a full disk, or a place that cannot be written, into an InputError; other errors are not the user's."""
    try:
        yield
    except OSError as error:
        if is_full_disk(error):
            remedy = "make room"
        elif error.errno in UNWRITABLE:
            remedy = "make it writable"
        else:
            raise
        raise InputError(
            f"{error.filename or workdir}: {error.strerror}; {remedy} or choose another --workdir, and run again: "
            "answers that are decoded already are kept"
        ) from None


class _Names(flags.Flag):
    """A flag with or without a value: `--benchmarks` and `--benchmarks=gsm8k,mbpp`."""

    def parse(self, argument: Any) -> None:
        """Takes a value; absl gives 'true' where there is none."""
        super().parse("all" if argument == "true" else None if argument == "false" else argument)


def _define(values: flags.FlagValues) -> None:
    text = (
        "Fetch prompts of the paper's benchmarks from the hub, and do nothing else: names separated by commas; without "
        f"a value those that eval.prompts has. Known here: {', '.join(BENCHMARKS)}."
    )
    flag = _Names(flags.ArgumentParser(), None, "benchmarks", None, text, boolean=True)
    flags.DEFINE_flag(flag, flag_values=values)


if __name__ == "__main__":
    command.run(prepare, define=_define)
