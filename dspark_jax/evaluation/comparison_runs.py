"""What the runs of a comparison were made with, and whether that still holds: settings by field, files by content.

Every run has `settings.json` and `origin.json`. The latter holds the hashes of `contents` and the fingerprint of the
data; it is absent where a comparison was begun before there was one: what is not known is taken as unchanged.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dspark_jax.config import Config, InputError, from_json, to_json
from dspark_jax.data.prompts import content_hashes, read_prompts
from dspark_jax.data.thinking import Thinking
from dspark_jax.evaluation.setup import check_questions
from dspark_jax.json_file import part, read_ours, write_json
from dspark_jax.run import Run, checkpoint_directory
from dspark_jax.training.state import abstract_drafter

GROUPS = ("target", "drafter", "data", "loss", "optim", "train")
"""A trained drafter depends on these, but for the fields of `FREE`."""

FREE = {
    "target": ("path", "architecture"),  # files are compared by content
    "data": ("prompts", "decode_batch_size", "workers"),
    "train": (
        "accumulate",
        "log_every",
        "checkpoint_every",
        "keep_checkpoints",
        "vocab_chunk",
        "recompute",
        "evaluate",
    ),
}
"""Fields that change nothing but the order of sums, or how a run is kept and shown."""


def contents(run: Run) -> dict[str, Any]:
    """Hashes of the files that a comparison reads, by what names them.

    Raises:
      InputError: one of them cannot be used, or `eval` does not say what to measure.
    """
    config = run.config
    check_questions(config)
    if not config.eval.temperatures:
        raise InputError("eval.temperatures is empty; give at least one, e.g. (1.0,)")
    read_prompts(config.eval.prompts, 1, lambda malformed: None)  # refuses a file without any
    return {
        **run.fingerprints,
        "data.prompts": content_hashes(config.data.prompts, "data.prompts"),
        "eval.prompts": content_hashes(config.eval.prompts, "eval.prompts"),
    }


def check_run(folder: Path, workdir: Path, config: Config, now: Mapping[str, Any]) -> None:
    """Refuses to go on with a run that was trained in another way: nothing would be on equal terms any more.

    Args:
      folder: of the run; one without checkpoint or measurement is begun again and may be anything.
      workdir: of the comparison.
      config: of the run, resolved.
      now: what the files are now: `contents`, and "data", the fingerprint, once the data is prepared.

    Raises:
      InputError: the first thing that differs.
    """
    steps = checkpoint_directory(folder)
    trained = steps.is_dir() and any(step.name.isdigit() for step in steps.iterdir())
    if not trained and not (folder / "rounds.npz").exists():
        return
    before = settings(folder)
    if before is None:
        return
    then, wanted = json.loads(to_json(before)), json.loads(to_json(config))
    for group in GROUPS:
        for field, value in wanted[group].items():
            if field not in FREE.get(group, ()) and then[group][field] != value:
                raise InputError(
                    f"{folder}: {group}.{field} was {then[group][field]!r}, now {value!r}; "
                    "compare with the old value, or use another --workdir"
                )
    there = _prepared_from(workdir) | read_ours(folder / "origin.json")
    for what, value in now.items():
        if what != "eval.prompts" and there.get(what, value) != value:
            raise InputError(
                f"{folder}: {_NAMES[what]} changed since it was trained{_changed(there[what], value)}; "
                "compare with the old content, or use another --workdir"
            )


_NAMES = {
    "target": "the weights in target.path",
    "tokenizer": "the tokenizer in target.path",
    "data.prompts": "the content of data.prompts",
    "data": "the prepared data (data/report.json)",
}


def settings(folder: Path) -> Config | None:
    """The config in `settings.json`, with the defaults of fields that are newer; None if there is none.

    Raises:
      InputError: it cannot be read.
    """
    path = folder / "settings.json"
    if not path.exists():
        return None
    try:
        return from_json(path.read_text("utf-8"))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise InputError(f"{path}: not settings of this version ({error}); use another --workdir") from None


def is_measured(folder: Path, config: Config, now: Mapping[str, Any]) -> bool:
    """Whether `rounds.npz` holds what would be measured now."""
    before = settings(folder)
    if before is None or not (folder / "rounds.npz").exists():
        return False
    known = read_ours(folder / "origin.json").get("eval.prompts", now["eval.prompts"])
    return _rounds_depend_on(before) == _rounds_depend_on(config) and known == now["eval.prompts"]


def write_origin(folder: Path, now: Mapping[str, Any]) -> None:
    """Keeps what the files were when the run was made."""
    write_json(folder / "origin.json", now)


def read_times(workdir: Path, config: Config, now: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `times.json` if it was measured as it would be now, else nothing."""
    job = read_ours(workdir / "times_job.json")
    try:
        before = from_json(next(iter(job["runs"].values()))["config"])
    except (ValueError, TypeError, AttributeError, KeyError, StopIteration):  # of another version: measured again
        return {}
    known = job.get("eval.prompts", now["eval.prompts"])
    same = _times_depend_on(before) == _times_depend_on(config) and known == now["eval.prompts"]
    found = read_ours(workdir / "times.json") if same else {}
    return found if all(isinstance(one, dict) for one in found.values()) else {}


def _rounds_depend_on(config: Config) -> list[Any]:
    """Settings that change the rounds of a trained drafter; the content of the prompts is compared separately."""
    asked, data = config.eval, config.data
    prompts = [Path(file).stem for file in asked.prompts]
    thinking = Thinking.of(data).settings() if data.thinking != "off" else []
    prompted = [data.system_prompt, data.max_prompt_length, *thinking]
    return [prompts, *prompted, asked.limit, asked.batch_size, asked.max_new_tokens, asked.temperatures[0], asked.seed]


def _times_depend_on(config: Config) -> list[Any]:
    """Settings that change what `rounds.measure_times` does: at batch 1, with prompts and threads of its own."""
    asked = config.eval
    alone = dataclasses.replace(config, eval=dataclasses.replace(asked, batch_size=1))
    return [*_rounds_depend_on(alone), asked.speed_prompts, asked.speed_threads, dataclasses.astuple(config.mesh)]


def parameters(config: Config) -> int:
    """Trained parameters of a drafter. Nothing is computed: no device is taken from the runs in training."""
    return _parameters(to_json(config))


@functools.cache
def _parameters(config: str) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_drafter(from_json(config))))


def _prepared_from(workdir: Path) -> dict[str, Any]:
    """What the report of the data says of the files it was made from, in the form of `contents`."""
    inputs = part(read_ours(workdir / "data" / "report.json"), "inputs")
    found = {"target": part(inputs, "target").get("weights"), "tokenizer": inputs.get("tokenizer")}
    found["data.prompts"] = inputs.get("prompts")
    return {name: value for name, value in found.items() if value is not None}


def _changed(before: Any, now: Any) -> str:
    """Which files, where there are several."""
    if not isinstance(now, Sequence) or isinstance(now, str):
        return ""
    names = [after[0] for after in now if after not in before] + [old[0] for old in before if old not in now]
    return f" ({', '.join(dict.fromkeys(names))})" if names else " (their order)"
