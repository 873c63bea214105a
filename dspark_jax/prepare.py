"""Prepares training data: prompts -> answers by the target -> tokens and loss mask -> ArrayRecord.

    python -m dspark_jax.prepare --config configs/quickstart.py

writes `data/` in the working directory: the samples, `report.json` (what they were made of, counts, lengths, and which
held-out prompts are among the training prompts) and `rejected.jsonl` (every line and conversation that gave no sample,
with its file, line and reason). All of it is built
in `data.partial/` and renamed at the end. A preparation that was killed continues with the answers it has; one whose
inputs are unchanged is skipped. With `--distributed` every host answers its share of the prompts, and host 0 makes the
samples of all answers: the same as one host makes, in the same order, and a feature cache with its own devices. Where a
host fails, all end with one line, and the same command goes on.

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
from dspark_jax.benchmarks import BENCHMARKS
from dspark_jax.buckets import places
from dspark_jax.config import Config, InputError
from dspark_jax.data import benchmark_prompts, overlap, statistics
from dspark_jax.data.answer_log import log_files
from dspark_jax.data.chat import load_tokenizer
from dspark_jax.data.inputs import digest
from dspark_jax.data.mask_token import mask_warning
from dspark_jax.data.regenerate import (
    Decode,
)
from dspark_jax.data.samples import (
    Tally,
    answered_samples,
    describe,
    describe_thinking,
    describe_unused,
    given_samples,
)
from dspark_jax.data.sources import SampleReader, write_samples
from dspark_jax.data.thinking import Thinking
from dspark_jax.errors import UNWRITABLE, is_full_disk
from dspark_jax.hosts import Hosts
from dspark_jax.json_file import part, read_ours, write_json
from dspark_jax.kinds import KINDS
from dspark_jax.prepare_answers import answer_share, gather_answers, training_prompts
from dspark_jax.progress import log
from dspark_jax.run import Run
from dspark_jax.training.feature_cache import check_features, prepare_features

CHUNKS = "chunks"
"""Folder in `data.partial` for what lies between Beam's pipelines."""

ANSWERS = 2
"""Raised when `answers.jsonl` is written in another way."""


def prepare(
    config: Config,
    workdir: Path,
    decode: Decode | None = None,
    benchmarks: str | None = None,
    beam: str | None = None,
) -> dict[str, Any]:
    """Makes `workdir/data`, and `workdir/features` if the config wants a cache, unless they are there; see the parts.

    Args:
      config: resolved.
      workdir: of the run.
      decode: answers batches of prompts; the config's target does when there is none.
      benchmarks: fetch the prompts of these, separated by commas, and do nothing else; `all`: of those that the config
        names, or all nine.
      beam: make and write the samples through Apache Beam, with these options of it.

    Returns:
      The content of `data/report.json`; of benchmarks the files.

    Raises:
      InputError: as the parts; before any of them runs if there is a feature cache of something else.
    """
    if benchmarks is not None:
        names = [] if benchmarks == "all" else [name.strip() for name in benchmarks.split(",")]
        files = benchmark_prompts.places(names, config.eval.prompts)
        if jax.process_index() == 0:
            with _disk_errors(workdir):
                benchmark_prompts.fetch(files)
        return {name: str(file) for name, file in files.items()}
    if beam is not None:
        _check_beam(beam)
    return prepare_run(Run(config, Path(workdir)), decode, beam)


def prepare_run(
    run: Run, decode: Decode | None = None, beam: str | None = None, hosts: Hosts | None = None
) -> dict[str, Any]:
    """The same of a run that a command has already, without benchmarks; all hosts call it.

    Args:
      run: its working directory is created if need be.
      decode: answers questions; the config's target does when there is none.
      beam: options of Apache Beam, through which samples are then made and written.
      hosts: of this run; those of JAX when there are none.

    Returns:
      The content of `data/report.json`.

    Raises:
      HostLost: another host is gone.
      InputError: prompts, tokenizer or target cannot be used, no sample is left, there is a feature cache of something
        else, or the disk is full.
    """
    cached = run.config.data.features != "online"
    if cached:
        check_features(run)
    for folder in (run.data_folder, run.workdir / "data.partial", run.workdir / "data.old"):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: not a directory; remove it, or use another --workdir")
    with hosts or Hosts(run.workdir) as hosts:
        report = _prepare_samples(run, decode, beam, hosts)
        if cached and hosts.first:  # with its own devices; the others wait until it is done
            with _disk_errors(run.workdir):
                prepare_features(run)
    return report


def _prepare_samples(run: Run, decode: Decode | None, beam: str | None, hosts: Hosts) -> dict[str, Any]:
    """Makes `workdir/data`, unless it is there and made of the same inputs; gives its report."""
    config, workdir, final = run.config, run.workdir, run.data_folder
    inputs = run.data_inputs
    _warn_of_mask(config)
    found = read_ours(final / "report.json")
    held_out, done = {}, False
    if hosts.first:  # it decides for all
        held_out = overlap.compare_files(config, part(found, "held_out"))
        done = found.get("fingerprint") == run.data_fingerprint and _complete(final, found.get("samples"))
    parts = {name: digest({name: value}) for name, value in inputs.items()}
    said = hosts.meet(inputs=parts, done=done)[0]
    others = [name.replace("_", " ") for name in parts if said["inputs"].get(name) != parts[name]]
    if others:
        what = f"host {hosts.index} reads another {', '.join(others)} than host 0"
        raise InputError(f"{what}; give all hosts the same config, target and files")
    if said["done"]:
        if not hosts.first:
            return found
        shutil.rmtree(workdir / "data.old", ignore_errors=True)  # left behind by a kill during the last step
        log(f"data: {found['samples']} samples in {final} are up to date")
        if held_out != part(found, "held_out"):
            with _disk_errors(workdir):
                found = write_json(final / "report.json", found | {"held_out": held_out})
                places.publish(final)
        return found
    if found:
        log(f"data: preparing again, {_difference(part(found, 'inputs'), inputs)}")
    with _disk_errors(workdir):
        _make(run, held_out, decode, beam, hosts)
    report = read_ours(final / "report.json")
    _summarise(report, final)
    return report


def _make(run: Run, held_out: dict[str, Any], decode: Decode | None, beam: str | None, hosts: Hosts) -> None:
    """Makes `data`, which is there when this returns: all hosts answer, host 0 does everything else."""
    final, partial, fingerprint = run.data_folder, run.workdir / "data.partial", run.data_fingerprint
    whole = hosts.first and read_ours(partial / "report.json").get("fingerprint") == fingerprint
    if hosts.first and not whole:
        _open_partial(partial, fingerprint)
    whole = hosts.meet(whole=whole)[0]["whole"]
    if not whole and run.config.data.regenerate and hosts.count > 1:
        answer_share(run, partial, decode, hosts)
    if hosts.first:
        if not whole:
            report = _build(run, partial, decode, beam) | ({"held_out": held_out} if held_out else {})
            write_json(partial / "report.json", {"fingerprint": fingerprint, "inputs": run.data_inputs, **report})
        for file in (*log_files(partial), partial / "inputs.json"):
            file.unlink(missing_ok=True)
        shutil.rmtree(partial / CHUNKS, ignore_errors=True)
        _publish(partial, final)
        places.publish(final)
        places.withdraw(partial)
    hosts.meet()


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


def _build(run: Run, partial: Path, decode: Decode | None, beam: str | None) -> dict[str, Any]:
    """Writes samples and rejected.jsonl into `partial`, with Beam's options through Beam; returns the counts."""
    config, started = run.config, time.monotonic()
    data = config.data
    tokenizer, rows = load_tokenizer(config.target.path), config.target.architecture.vocab_size
    if len(tokenizer) > rows:
        raise InputError(
            f"{config.target.path}: the tokenizer has {len(tokenizer)} ids, the model {rows} rows; "
            "use the tokenizer of this very model"
        )
    with contextlib.closing(Tally(partial / "rejected.jsonl")) as tally:
        prompts = training_prompts(config, tally)
        tally.read(prompts, Thinking.of(data))
        given: Any = prompts
        if data.regenerate:
            given = gather_answers(run, tokenizer, prompts, partial, decode, tally, Hosts(partial, 0, 1))
        if beam is not None:
            from dspark_jax.data.beam import pipeline_options, write_with_beam

            write_with_beam(partial, partial / CHUNKS, tokenizer, data, given, tally, pipeline_options(beam))
        else:
            make = answered_samples if data.regenerate else given_samples
            samples = make(tokenizer, given, data, tally)
            first = next(samples, None)
            if first is not None:
                write_samples(partial, itertools.chain([first], samples))
        if not tally.prompt_sets:
            why, where = describe(tally.rejected), partial / "rejected.jsonl"
            raise InputError(
                f"no sample is left of {len(prompts)} prompts: {why}; see {where} and the limits in data.*"
            )
        return {"prompts": len(prompts), **tally.report(), "seconds": round(time.monotonic() - started, 1)}


def _open_partial(partial: Path, digest: str) -> None:
    """An empty `data.partial`, or the one of a preparation with the same inputs that did not end."""
    places.fetch(partial)
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
    places.begin_logs(partial)


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


def _check_beam(options: str) -> None:
    """Refuses options of Beam that cannot be used, before anything is answered.

    Raises:
      InputError: the package is missing, or see `beam.pipeline_options`.
    """
    try:
        from dspark_jax.data.beam import pipeline_options
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "apache_beam":
            raise
        raise InputError("--beam needs the package apache-beam; pip install 'dspark-jax[beam]'") from None
    pipeline_options(options)


class _Optional(flags.Flag):
    """A flag with or without a value: `--benchmarks` and `--benchmarks=gsm8k,mbpp`."""

    def __init__(self, name: str, text: str, without: str):
        """`without` is its value where it is given without one."""
        self.without = without
        super().__init__(flags.ArgumentParser(), None, name, None, text, boolean=True)

    def parse(self, argument: Any) -> None:
        """Takes a value; absl gives 'true' where there is none."""
        super().parse(self.without if argument == "true" else None if argument == "false" else argument)


def _define(values: flags.FlagValues) -> None:
    text = (
        "Fetch prompts of the paper's benchmarks from the hub, and do nothing else: names separated by commas; without "
        f"a value those that eval.prompts has. Known here: {', '.join(BENCHMARKS)}."
    )
    flags.DEFINE_flag(_Optional("benchmarks", text, "all"), flag_values=values)
    text = (
        "Make and write the samples through Apache Beam (needs .[beam]): without a value on this machine, else with "
        "these options of Beam, e.g. --beam='--runner=FlinkRunner --flink_master=HOST:8081'."
    )
    flags.DEFINE_flag(_Optional("beam", text, ""), flag_values=values)


if __name__ == "__main__":
    command.run(prepare, define=_define, together=False)
