"""What a checkpoint says of itself, and whether a run, or a target, fits to it."""

import contextlib
import json
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from dspark_jax.config import InputError, from_json, to_json
from dspark_jax.kinds import KINDS
from dspark_jax.run import Run
from dspark_jax.training.best import HeldOut
from dspark_jax.training.integrity import Damaged, digest, naming_damage


def about_of(run: Run) -> dict[str, Any]:
    """The resolved config, and fingerprints of its target."""
    return {"config": json.loads(to_json(run.config)), **run.fingerprints}


def read_about(manager: ocp.CheckpointManager, where: Path) -> dict[str, Any]:
    """What a checkpoint says of itself. Raises Damaged."""
    with naming_damage(where, ("about",)):
        about = manager.restore(int(where.name), args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        stated = {name: value for name, value in about.items() if name != "digest"}
        if about.get("digest", digest(stated)) != digest(stated) or not set(about) >= _ABOUT:
            raise Damaged(f"{where / 'about'}: damaged (it is not what was saved)")
        from_json(json.dumps(about["config"]))
    return about


_ABOUT = {"config", "target", "tokenizer"}


def check_target(where: Path, saved: dict[str, Any], present: dict[str, Any], path: str) -> None:
    """Refuses a checkpoint of another target: its drafter would run, and accept next to nothing."""
    for what, part in {"target": "weights", "tokenizer": "tokenizer"}.items():
        if saved[what] != present[what]:
            raise InputError(
                f"{where}: made for another target, {part} {saved[what][:12]} but {path} has {present[what][:12]}; "
                "use its own target.path, or another --workdir"
            )


def check_about(where: Path, about: dict[str, Any], present: dict[str, Any], path: str) -> None:
    """Refuses what a run cannot go on from; `about` may be older and have less in it."""
    check_target(where, about, present, path)
    saved = json.loads(to_json(from_json(json.dumps(about["config"]))))  # fields that are newer have their defaults
    imported = where.name == "0"
    _check_config(where, saved, present["config"], imported=imported)
    before, now = about.get("data"), present.get("data")
    if before and now and before != now and not imported:
        raise InputError(
            f"{where}: trained on data with the fingerprint {before[:12]}, the config's has {now[:12]}; resume "
            "with the old data.*, train.refresh_*, prompts and tokenizer (see data/report.json), or use another "
            "--workdir"
        )


def _check_config(where: Path, saved: dict[str, Any], present: dict[str, Any], *, imported: bool) -> None:
    """Refuses what cannot be resumed: another drafter, or another order of the data and its random numbers."""
    masked = KINDS[present["drafter"]["kind"]].needs_mask
    free = {"dtype", "initializer_range", "init_layers", *([] if masked else ["mask_token_id"])}
    fixed = [("drafter", name) for name in present["drafter"] if name not in free]
    if present["train"]["init_from"]:  # what began elsewhere goes on without naming it, too
        fixed += [("train", "init_from")]
    if not imported:
        fixed += [("train", "seed"), ("train", "batch_size"), ("data", "pack"), ("data", "max_length")]
        fixed += [("optim", "kind")]
    for group, name in fixed:
        before, now = saved[group][name], present[group][name]
        if before != now:
            raise InputError(
                f"{where}: {group}.{name} was {before!r}, now {now!r}; resume with the old value, or use another "
                "--workdir"
            )


def read_measured(manager: ocp.CheckpointManager, directory: Path) -> dict[int, HeldOut]:
    """What the checkpoints say of themselves on held-out prompts, by step."""
    found = {}
    for step in manager.all_steps():
        # Who reads the rest of a damaged one will say it.
        with contextlib.suppress(Damaged):
            measured = HeldOut.of(read_about(manager, directory / str(step)))
            if measured is not None:
                found[step] = measured
    return found
