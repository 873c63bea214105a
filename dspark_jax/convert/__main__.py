"""Drafters from and to the formats that others write and serve.

    python -m dspark_jax.convert export --workdir runs/quickstart_dspark --output exports/drafter
    python -m dspark_jax.convert export --drafter DIR --target DIR --output exports/drafter --format speculators
    python -m dspark_jax.convert import --drafter DIR --target DIR --workdir runs/imported
    python -m dspark_jax.convert check --drafter DIR --target DIR

`export` writes a checkpoint of a run (the newest, or that of `--checkpoint`), or converts a directory, to one that
vLLM, SGLang, llama.cpp and transformers load (`universal`), to the reference's own format (`deepspec`), or for the
speculators package. What the run has of calibration, cost table and evaluation goes with it. `import` makes a working
directory of a drafter that was trained elsewhere, so that `evaluate`, `calibrate` and `generate` can use it. `check`
tells what each server would make of a directory, and whether its config says how the drafter was trained: layer ids,
block layout and mask token are scored on greedy answers of the target. Its exit status is 0 if a server drafts with it
as it was trained, 1 if something is wrong or no server can use it, and 3 if that cannot be told: it has a part that is
not implemented here, which servers may know all the same (their rules are replayed), the answers are too short, or next
to nothing is accepted, for which training too little is reason enough.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging

from dspark_jax import command
from dspark_jax.buckets.places import reading, working_directory
from dspark_jax.config import (
    Config,
    InputError,
    TargetArchitecture,
    resolve,
    to_json,
)
from dspark_jax.convert.card import model_card
from dspark_jax.convert.check import VERDICTS, Report
from dspark_jax.convert.check_command import examine, show
from dspark_jax.convert.export import FORMATS, content, write_export
from dspark_jax.convert.hf import import_drafter, read_drafter_config
from dspark_jax.convert.hub import push
from dspark_jax.convert.output import SIDE_FILES, check_output, check_repository
from dspark_jax.convert.servers import replay
from dspark_jax.convert.sources import directory_source, run_source, tell_other_weights
from dspark_jax.convert.targets import fitting
from dspark_jax.engine.arguments import check_known
from dspark_jax.evaluation.calibration import read_calibration
from dspark_jax.evaluation.load import read_cost_table
from dspark_jax.hub import local_directory, with_architecture
from dspark_jax.kinds import as_kind
from dspark_jax.paths import check_local, check_path
from dspark_jax.progress import log
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.training.best import NEWEST
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import init_state, to_params


def export(options: argparse.Namespace) -> Path:
    """Writes the export that the command line asks for, and pushes it if it says so.

    Raises:
      InputError: run, drafter, target or output cannot be used.
    """
    output, workdir = Path(options.output), options.workdir
    if options.config and not workdir:
        workdir = command.default_workdir(command.load_config(options.config))
    if workdir and options.drafter:
        which = "--workdir" if options.workdir else "--config"
        raise InputError(f"{which} and --drafter: only one of the two can be exported; leave one out")
    if workdir:
        source, files = run_source(reading(workdir), options)
    elif options.drafter and options.target:
        source, files = directory_source(local_directory(options.drafter), options)
    else:
        raise InputError("export needs --config or --workdir of a run, or --drafter DIR with --target DIR")
    check_output(output, source.config, overwrite=options.overwrite)
    if options.push:
        check_repository(options.push, source.config)
    made = content(source, options.format, options.dtype)
    contents: dict[str, Any] = {name: files[name] for name in SIDE_FILES if name in files}
    check_side_files(contents, source.config.block_size)
    contents["README.md"] = model_card(
        options.name or output.name,
        source,
        made,
        replay(output.name, made.config, made.shapes, source.arch, source.split),
        fingerprint=files["fingerprint"],
        data=files.get("data"),
        metrics=files.get("metrics"),
        vocabulary=files.get("vocabulary"),
        side_files=tuple(contents),
    )
    write_export(output, source, form=options.format, dtype=options.dtype, files=contents, overwrite=options.overwrite)
    size = sum(file.stat().st_size for file in output.iterdir())
    log(f"export: {output} ({options.format}, {options.dtype}, {size / 1e6:.1f} MB)")
    if options.push:
        log(f"export: pushed to {push(output, options.push, private=options.private)}")
    return output


def check_side_files(files: Mapping[str, Path], block_size: int) -> None:
    """Refuses to pass on what no server could use.

    Args:
      files: those of `SIDE_FILES` that there are, by name.
      block_size: of the drafter.

    Raises:
      InputError: one is damaged, or not of this drafter.
    """
    if "calibration.json" in files:
        read_calibration(files["calibration.json"], block_size)
    if "cost_table.json" in files:
        read_cost_table(files["cost_table.json"])


def export_run(workdir: str | Path, output: str | Path, **options: Any) -> Path:
    """Exports a checkpoint of a run, as `python -m dspark_jax.convert export` does.

    Args:
      workdir: of the run.
      output: directory to write.
      **options: of the command line: `format` ("universal", "deepspec", "speculators"), `checkpoint` ("newest",
        "best" or a step), `dtype`, `slim`, `name`, `target_name`, `overwrite` and so on.

    Returns:
      The directory.

    Raises:
      InputError: an option that does not exist; run, target or output cannot be used.
    """
    given = parser().parse_args(["export", "--workdir", str(workdir), "--output", str(output)])
    for name, value in options.items():
        check_known("export", name, sorted(vars(given)))
        setattr(given, name, value)
    check_paths(given)
    return export(given)


def import_(options: argparse.Namespace) -> Path:
    """Makes a working directory of a drafter directory: checkpoint 0 and config.json.

    Raises:
      InputError: drafter and target do not fit, or there are checkpoints already.
    """
    directory = local_directory(options.drafter)
    of_target = TargetArchitecture.of_any_model(local_directory(options.target))
    depth = of_target.num_hidden_layers
    arch, drafter = read_drafter_config(directory, depth)
    if options.config:
        config = command.load_config(options.config)
    else:
        config = Config(name=Path(options.workdir).name)
        config.data.max_length = min(config.data.max_length, arch.max_position_embeddings)
        config.data.max_prompt_length = min(config.data.max_prompt_length, config.data.max_length // 2)
        config = as_kind(config, drafter.kind)  # its loss, and the rows that it learns from
        if of_target.unsupported:
            config.data.features, config.data.regenerate = "torch", False
    target = dataclasses.replace(config.target, path=options.target, architecture=TargetArchitecture())
    config = resolve(with_architecture(dataclasses.replace(config, drafter=drafter, target=target)))
    fitting(directory, arch, options.target, config.target.architecture, whole=True)
    tell_other_weights("import", directory, local_directory(options.target), of_target)
    imported = import_drafter(directory, make_mesh(config.mesh), target_layers=depth)[1]
    with working_directory(Path(options.workdir), "convert import") as workdir:
        run = Run(config, workdir)
        with Checkpoints(run) as checkpoints:
            if checkpoints.latest() is not None:
                raise InputError(f"{checkpoints.directory}: has checkpoints already; import to another --workdir")
            state = init_state(config, make_optimizer(config.optim, config.train.steps), run.mesh)
            checkpoints.save(0, dataclasses.replace(state, params=to_params(imported)), {})
        (workdir / "config.json").write_text(to_json(config))
    log(f"import: {options.drafter} is checkpoint 0 of {options.workdir}")
    return Path(options.workdir)


def check(options: argparse.Namespace) -> Report:
    """Prints what is to be expected of a drafter directory; ends with a status other than 0 unless that is good.

    Raises:
      InputError: drafter, target or prompts cannot be used.
    """
    if options.json and not Path(options.json).parent.is_dir():
        raise InputError(f"--json {options.json}: {Path(options.json).parent} is no directory; make it first")
    report = examine(options)
    show(report, options.json)
    if not report.good:
        raise SystemExit(VERDICTS[report.verdict])
    return report


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(
        "python -m dspark_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(required=True, metavar="import|export|check")

    def add(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(function=function)
        return sub

    one = add("export", export, "Write a drafter in a format that others serve.")
    one.add_argument("--config", help="NAME|FILE[:ARG] of a run in its default --workdir")
    one.add_argument("--workdir", help="a run; its newest checkpoint is exported. Default: that of --config")
    one.add_argument(
        "--checkpoint",
        default=NEWEST,
        help="newest, best (by accepted length on held-out prompts, see train.evaluate_every), or a step",
    )
    one.add_argument("--drafter", help="a drafter directory or hub id to convert, instead of a run")
    one.add_argument("--target", help="the target's directory or hub id; default: that of the run")
    one.add_argument("--output", required=True, help="directory to write")
    one.add_argument("--format", choices=FORMATS, default="universal")
    one.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    one.add_argument("--slim", action="store_true", help="leave out the copies of the target's embedding and LM head")
    one.add_argument("--name", help="of the drafter, on its card; default: the output's name")
    one.add_argument("--target-name", help="the target's name where it is served, e.g. Qwen/Qwen3-4B")
    one.add_argument("--push", metavar="REPO", help="upload to a repository of the Hugging Face hub")
    one.add_argument("--private", action="store_true", help="make that repository private if it is created")
    one.add_argument("--overwrite", action="store_true", help="replace an export that is there")

    one = add("import", import_, "Make a working directory of a drafter that was trained elsewhere.")
    one.add_argument("--drafter", required=True, help="its directory or hub id")
    one.add_argument("--target", required=True, help="the target's directory or hub id")
    one.add_argument("--workdir", required=True, help="working directory to make")
    one.add_argument("--config", help="NAME|FILE[:ARG] with the other settings: data, evaluation, mesh")

    one = add("check", check, "Tell whether a drafter directory will work where it is served.")
    one.add_argument("--drafter", required=True, help="its directory or hub id")
    one.add_argument("--target", required=True, help="the target's directory or hub id")
    one.add_argument(
        "--prompts", action="append", help="JSONL file of prompts; may be repeated. Default: a few of ours"
    )
    one.add_argument("--limit", type=positive, default=8, help="prompts per file (default: 8)")
    one.add_argument("--tokens", type=positive, default=96, help="tokens of each answer (default: 96)")
    one.add_argument("--json", help="file to write the report to")
    return whole


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> Any:
    """Runs the command line; bad input ends the process with status 2."""
    options = parser().parse_args(argv)
    logging.set_verbosity(logging.ERROR)  # Orbax warns about its own defaults
    with command.reporting_errors():
        check_paths(options)
        return options.function(options)


PATHS = ("workdir", "drafter", "target", "prompts")
"""Options that are paths, here or in a bucket, or ids on the hub."""

LOCAL_PATHS = ("output", "json")
"""Options that are local paths."""


def check_paths(options: argparse.Namespace) -> None:
    """Refuses paths that are none here, whichever option has them."""
    for name in PATHS + LOCAL_PATHS:
        given = getattr(options, name, None) or ()
        for path in [given] if isinstance(given, str) else given:
            (check_path if name in PATHS else check_local)(f"--{name}", path)


if __name__ == "__main__":
    main()
