"""Where an export comes from: a checkpoint of a run, or a directory in a format that can be imported."""

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import Any

from dspark_jax.config import DrafterConfig, InputError, MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert.check import other_copies
from dspark_jax.convert.export import Source, frozen_tensors
from dspark_jax.convert.hf import import_drafter, read_drafter_config, stored_tensors
from dspark_jax.convert.layouts import has_stages, layers_config, read_config, read_layout
from dspark_jax.convert.llama_tokenizer import split_to_tell
from dspark_jax.convert.mapping import FROZEN, frozen_names
from dspark_jax.convert.output import SIDE_FILES
from dspark_jax.convert.targets import FrozenTensors, fitting, frozen_from_file, frozen_of_target
from dspark_jax.data.features import frozen_file
from dspark_jax.hub import local_directory
from dspark_jax.json_file import read_object
from dspark_jax.progress import log
from dspark_jax.run import Run, checkpoint_directory
from dspark_jax.sharding import make_mesh
from dspark_jax.target import families
from dspark_jax.target.loading import fingerprint, read_checkpoint
from dspark_jax.training.checkpoint import load_step, saved_config
from dspark_jax.training.vocabulary import FILE as VOCABULARY_FILE


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
        frozen=target_copies(config.drafter, arch, directory),
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
        frozen=target_copies(config, arch, place),
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


def target_copies(config: DrafterConfig, arch: TargetArchitecture, directory: Path) -> dict[str, Any]:
    """The target's tensors that an export of this drafter brings along, if they have their usual names."""
    return {} if arch.unsupported or not frozen_names(config) else frozen_tensors(directory)


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
