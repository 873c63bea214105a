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
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from dspark_jax import command
from dspark_jax.buckets.places import reading, working_directory
from dspark_jax.config import (
    Config,
    DataConfig,
    InputError,
    MeshConfig,
    TargetArchitecture,
    TargetConfig,
    resolve,
    to_json,
)
from dspark_jax.convert.card import model_card
from dspark_jax.convert.check import VERDICTS, Report, check_directory, other_copies
from dspark_jax.convert.dialect import MASK_TOKENS, Answer
from dspark_jax.convert.export import FORMATS, Source, content, frozen_tensors, write_export
from dspark_jax.convert.hf import import_drafter, read_drafter_config, stored_tensors
from dspark_jax.convert.hub import push
from dspark_jax.convert.layouts import has_stages, layers_config, read_config, read_layout
from dspark_jax.convert.llama_tokenizer import split_to_tell
from dspark_jax.convert.mapping import FROZEN, frozen_names
from dspark_jax.convert.output import SIDE_FILES, check_output, check_repository
from dspark_jax.convert.servers import replay
from dspark_jax.convert.targets import FrozenTensors, fitting, frozen_from_file, frozen_of_target
from dspark_jax.data.chat import load_tokenizer, prompt_tokens
from dspark_jax.data.features import frozen_file
from dspark_jax.data.prompts import Malformed, read_prompts
from dspark_jax.engine.arguments import check_known
from dspark_jax.engine.generate import generate
from dspark_jax.engine.models import Models
from dspark_jax.engine.placement import answering_load, decoding_mesh
from dspark_jax.evaluation.calibration import read_calibration
from dspark_jax.evaluation.load import read_cost_table
from dspark_jax.hub import local_directory, with_architecture
from dspark_jax.json_file import read_object
from dspark_jax.kinds import as_kind
from dspark_jax.paths import check_local, check_path
from dspark_jax.progress import log
from dspark_jax.run import Run, checkpoint_directory
from dspark_jax.sharding import make_mesh, one_device
from dspark_jax.target import families
from dspark_jax.target.interface import LanguageModel
from dspark_jax.target.loading import fingerprint, load_target, read_checkpoint
from dspark_jax.training.best import NEWEST
from dspark_jax.training.checkpoint import Checkpoints, load_step, saved_config
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import init_state, to_params
from dspark_jax.training.vocabulary import FILE as VOCABULARY_FILE


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


def run_source(workdir: Path, options: argparse.Namespace) -> tuple[Source, dict[str, Any]]:
    """A checkpoint of a run, and what else the run has to give.

    Returns:
      The source, and side files by name with `fingerprint`, `data`, `metrics` and `vocabulary` for the card.
    """
    saved = saved_config(workdir, options.checkpoint)
    if saved is None:
        raise InputError(f"{checkpoint_directory(workdir)}: no checkpoint here; train first, or name a trained run")
    stated = dataclasses.replace(saved, target=stated_target(options.target) or saved.target)
    run = Run(stated, workdir, make_mesh(MeshConfig()))
    step, config, drafter = load_step(run, options.checkpoint)
    path, arch = config.target.path, config.target.architecture
    directory = local_directory(path)
    source = Source(
        tensors=functools.partial(stored_tensors, drafter, config.drafter),
        config=config.drafter,
        arch=arch,
        target=read_config(directory),
        frozen={} if arch.unsupported or not frozen_names(config.drafter) else frozen_tensors(directory),
        target_name=options.target_name or path,
        split=split_to_tell(directory),
        num_anchors=config.train.num_anchors,
    )
    if not frozen_names(config.drafter):
        return source, run_files(run, step)
    if arch.unsupported:
        source = with_frozen(source, frozen_from_file(frozen_file(run.feature_folder), directory, arch))
    elif families.of_drafters(arch).name != arch.model_type:
        source = with_frozen(source, frozen_of_target(source.frozen, directory, arch, arch.final_logit_softcapping))
    return slim(source, options), run_files(run, step)


def run_files(run: Run, step: int) -> dict[str, Any]:
    """What a run has besides its drafter: see `run_source`. Figures of an earlier checkpoint are left out."""
    files: dict[str, Any] = {"fingerprint": run.target_fingerprint}
    found = {"data": "data/report.json", "metrics": "eval/metrics.json", "vocabulary": VOCABULARY_FILE} | {
        name: name for name in SIDE_FILES
    }
    for key, name in found.items():
        file = run.workdir / name
        if not file.exists():
            continue
        content = read_object(file, "", "remove it")
        for field, kind in _FIELDS.get(key, {}).items():
            if not isinstance(content.get(field), kind):
                raise InputError(f"{file}: {field} is {content.get(field)!r}; remove it, and make it anew")
        if content.get("step") in (None, step):  # older files do not say
            files[key] = file if key in SIDE_FILES else content
        else:
            log(f"export: {file} is left out: it is of step {content['step']}, the drafter of step {step}")
    return files


_FIELDS = {
    "data": {"samples": int, "tokens": int, "loss_tokens": int, "prompt_sets": dict},
    "metrics": {"temperature": int | float, "prompt_sets": dict},
    "vocabulary": {"tokens": int, "coverage": float},
}
"""What the card takes from the files of a run."""


def directory_source(directory: Path, options: argparse.Namespace) -> tuple[Source, dict[str, Any]]:
    """A drafter directory in any format that can be imported. Its layers keep their shape, whatever the target's is.

    Raises:
      InputError: it cannot be imported, or its vocabulary or width are not the target's.
    """
    place = local_directory(options.target)
    target = TargetArchitecture.of_any_model(place)
    arch, _ = read_drafter_config(directory, target.num_hidden_layers)
    fitting(directory, arch, options.target, target, whole=False)
    tell_other_weights("export", directory, place, target)
    arch = dataclasses.replace(arch, num_hidden_layers=target.num_hidden_layers, unsupported=target.unsupported)
    config, drafter = import_drafter(directory, make_mesh(MeshConfig()), target_layers=target.num_hidden_layers)
    files: dict[str, Any] = {name: directory / name for name in SIDE_FILES if (directory / name).exists()}
    files["fingerprint"] = fingerprint(options.target)
    raw = read_config(place)
    source = Source(
        tensors=functools.partial(stored_tensors, drafter, config),
        config=config,
        arch=arch,
        target=raw,
        frozen={} if arch.unsupported or not frozen_names(config) else frozen_tensors(place),
        target_name=options.target_name or options.target,
        split=split_to_tell(place),
        num_anchors=layers_config(read_config(directory)).get("num_anchors", 512),
    )
    if not frozen_names(config):
        return source, files
    if arch.unsupported:  # the drafter's own copies are right, the target's may lack a scale and have any name
        mine = read_checkpoint(directory)
        frozen = {name: mine[name] for name in FROZEN if name in mine}
        softcap = float(raw.get("text_config", raw).get("final_logit_softcapping") or 0)
        source = with_frozen(source, frozen_of_target(frozen, place, arch, softcap))
    elif families.of_drafters(target).name != target.model_type:
        source = with_frozen(source, frozen_of_target(source.frozen, place, target, target.final_logit_softcapping))
    return slim(source, options), files


def tell_other_weights(action: str, directory: Path, target: Path, architecture: TargetArchitecture) -> None:
    """Says that a drafter was trained for other weights of the target's shape, as far as its copies show that.

    It may be meant: a drafter of a model often serves what was fine-tuned from it, and accepts less there.
    """
    raw = read_config(directory)
    if architecture.unsupported or has_stages(raw):  # names are others; a release is one model
        return
    tensors, own_head = read_checkpoint(directory), read_layout(str(directory), raw).draft_vocab_size > 0
    if not set(FROZEN) & set(tensors):
        return
    for what, _ in other_copies(tensors, frozen_tensors(target), own_head=own_head):
        log(f"{action}: {directory}: {what}; it was trained for other weights and may accept less")


def with_frozen(source: Source, of_target: FrozenTensors) -> Source:
    """A drafter with layers of another family than its target's, with that target's embedding and LM head."""
    return dataclasses.replace(
        source, frozen=of_target.frozen, notes=of_target.notes, own_embedding=of_target.own_embedding
    )


def slim(source: Source, options: argparse.Namespace) -> Source:
    """The source without the target's tensors if `--slim` says so."""
    return dataclasses.replace(source, frozen={}) if options.slim else source


def stated_target(path: str | None) -> TargetConfig | None:
    """The target of `--target`, or None: the one in the checkpoint."""
    if not path:
        return None
    return TargetConfig(path=path, architecture=TargetArchitecture.of_any_model(local_directory(path)))


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
