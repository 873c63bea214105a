"""Compiles what a config trains and decodes with for a TPU slice, on any machine, without weights and without a TPU.

    python -m dspark_jax.plan --config configs/dspark_qwen3_4b.py --topology v5e:4x4
    python -m dspark_jax.plan --topology list

Says what each chip's memory holds, operations, collectives, how long a step, the whole run and the target's answers
(`prepare`) should take, where decoding lives, and whether it fits or what to change. Needs the TPU compiler:
pip install 'dspark-jax[tpu]'. Nothing here has been measured on a TPU: times are the compiler's own estimates and
rooflines.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax
from absl import flags

from dspark_jax import command
from dspark_jax.answering import capacity_for, chunk_for
from dspark_jax.config import Config, InputError
from dspark_jax.json_file import write_json
from dspark_jax.kinds import KINDS
from dspark_jax.planning.compile_job import PROGRAMS, estimate_in_process
from dspark_jax.planning.programs import with_dtypes
from dspark_jax.planning.topology import GIB, devices_of, listing
from dspark_jax.progress import Progress, log
from dspark_jax.run_lock import make_directory
from dspark_jax.sharding import make_mesh

PARTS = tuple(PROGRAMS)
NAMES = {"train": "train step", "decode": "decoding round", "prepare": "answers of the target"}


def plan(
    config: Config,
    workdir: Path,
    *,
    topology: str,
    parts: Sequence[str] = PARTS,
    answers: int = 1_300_000,
    answer_tokens: int = 600,
    prompt_tokens: int = 200,
) -> dict[str, Any]:
    """Plans the programs `parts` of a resolved config on `topology`.

    Of `prepare` that is the time for so many `answers` of so many tokens, to prompts of so many.

    Writes `plan.json`:
      {"topology", "chips", "train": {"hbm_per_chip_bytes", "memory", "flops_per_step", "collectives",
      "estimated_step_seconds", "roofline_seconds", "tokens_per_second", "hours", "chip_hours", "fits", "verdict", ...},
      "decode": {"hbm_per_chip_bytes", "estimated_round_seconds", "placement", ...},
      "prepare": {"estimated_round_seconds", "tokens_per_second", "answers", "hours", "chip_hours", "placement", ...}}
    A part that cannot be planned has {"verdict", and "crashed" or "skipped": why}: decoding, of a target without a
    definition here, and answers that are given or that servers give.

    Raises:
      InputError: the topology or a part is unknown, libtpu is missing, or the mesh or batch does not suit it.
    """
    if not parts or set(parts) - set(PARTS):
        raise InputError(f"--parts {','.join(parts)!r} is unknown; use some of: {','.join(PARTS)}")
    if min(answers, answer_tokens, prompt_tokens) < 1:
        asked = f"--answers={answers} --answer_tokens={answer_tokens} --prompt_tokens={prompt_tokens}"
        raise InputError(f"{asked}: each must be 1 or more")
    jax.config.update("jax_platforms", "cpu")  # the TPU here is only compiled for
    chip, devices = devices_of(topology)
    config = with_dtypes(config)
    mesh = make_mesh(config.mesh, devices)
    make_directory(workdir)
    chips = len(devices) // chip.per_chip
    shape = {name: size for name, size in mesh.shape.items() if size > 1}
    report: dict[str, Any] = {"config": config.name, "topology": topology, "chips": chips, "mesh": shape}
    skipped = {part: why for part in parts if (why := _skipped(config, part))}
    wanted = [part for part in parts if part not in skipped]
    capacity = capacity_for(prompt_tokens + answer_tokens, config.data.max_length)
    chunk = chunk_for(capacity)
    names = " and the ".join(NAMES[part] for part in wanted) or "nothing"
    log(f"compiling the {names} of {config.name} for {topology} ({chips} chips): some minutes")
    for part, found in _estimates(config, topology, wanted, {"prepare": {"capacity": capacity, "chunk": chunk}}):
        if "crashed" not in found:
            found = _of_part(part, found, config, chips, Questions(answers, answer_tokens, prompt_tokens, chunk))
        report[part] = found | {"verdict": verdict(found, config, mesh, part)}
    for part, why in skipped.items():
        report[part] = {"skipped": why, "verdict": f"not planned: {why}"}
    for part in parts:
        print("\n".join(describe(NAMES[part], report[part])), flush=True)
    write_json(workdir / "plan.json", report)
    log(f"written to {workdir / 'plan.json'}")
    return report


@dataclasses.dataclass(frozen=True)
class Questions:
    """What `prepare` has answered: `count` prompts of `prompt` tokens, read `chunk` at a time, with `tokens` each."""

    count: int
    tokens: int
    prompt: int
    chunk: int


def _estimates(
    config: Config, topology: str, parts: Sequence[str], more: Mapping[str, dict[str, int]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parts with what `estimate_in_process` gives of them, in processes side by side; `more` are its arguments."""
    with ThreadPoolExecutor(max(len(parts), 1)) as pool, Progress("plan", len(parts), unit="program") as progress:
        jobs = {pool.submit(estimate_in_process, config, topology, part, **more.get(part, {})): part for part in parts}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
            progress.advance(1)


def _skipped(config: Config, part: str) -> str:
    """Why a part is not planned; empty if it is."""
    unsupported, data = config.target.architecture.unsupported, config.data
    if part == "train":
        return ""
    if part == "prepare" and not data.regenerate:
        return "data.regenerate=False trains on given answers"
    if part == "prepare" and data.answers.endpoints:
        return "servers give the answers (data.answers.endpoints)"
    return f"a {unsupported} has no definition here and cannot run" if unsupported else ""


def _of_part(part: str, found: dict[str, Any], config: Config, chips: int, questions: Questions) -> dict[str, Any]:
    if part == "train":
        return _of_training(found, config, chips)
    if part == "decode":
        return _of_decoding(found, config)
    return _of_answers(found, config, chips, questions)


def _of_training(found: dict[str, Any], config: Config, chips: int) -> dict[str, Any]:
    """Per step, and of the whole run. Tokens are positions: all of `max_length`, padding included."""
    found = found | {"flops_per_step": found["flops"]}
    if "estimated_seconds" in found:
        seconds = found["estimated_step_seconds"] = found.pop("estimated_seconds")
        hours = config.train.steps * seconds / 3600
        found |= {"tokens_per_second": config.train.batch_size * config.data.max_length / seconds}
        found |= {"steps": config.train.steps, "hours": hours, "chip_hours": hours * chips}
    return found


def _of_decoding(found: dict[str, Any], config: Config) -> dict[str, Any]:
    """Per round; tokens per second between one token per round and all drafts accepted."""
    found = found | {"flops_per_round": found["flops"]}
    if "estimated_seconds" in found:
        seconds = found["estimated_round_seconds"] = found.pop("estimated_seconds")
        each = config.eval.batch_size / seconds
        found["tokens_per_second_by_accepted_length"] = {"1": each, "max": each * (config.drafter.block_size + 1)}
    return found


def _of_answers(found: dict[str, Any], config: Config, chips: int, questions: Questions) -> dict[str, Any]:
    """Of all answers: decoded plainly, a token per round, with every slot full; the host's time is not counted."""
    found = found | {"flops_per_round": found["flops"], "answers": questions.count}
    if "estimated_seconds" in found and "chunk_seconds" in found:
        seconds = found["estimated_round_seconds"] = found.pop("estimated_seconds")
        reading = -(-questions.prompt // questions.chunk) * found["chunk_seconds"] / found["copies"]
        each = questions.tokens * seconds / config.data.decode_batch_size + reading
        hours = questions.count * each / 3600
        found |= {"tokens_per_second": questions.tokens / each, "hours": hours, "chip_hours": hours * chips}
    return found


def verdict(found: dict[str, Any], config: Config, mesh: jax.sharding.Mesh, part: str) -> str:
    """One line: fits, or what to change."""
    if "crashed" in found:
        return f"not known, the TPU compiler crashed ({found['crashed']}); try another topology, mesh or libtpu"
    memory, available = found["memory"], found["hbm_available_bytes"]
    used = f"{found['hbm_per_chip_bytes'] / GIB:.2f} of {available / GIB:.2f} GiB per chip"
    if found["fits"]:
        return f"fits: {used}"
    held = sum(size for name, size in memory.items() if name not in ("activations_bytes", "rest_bytes"))
    if part != "train":
        factor = (available - held) / max(found["hbm_per_chip_bytes"] - held, 1)
        fewer = "lower eval.batch_size or eval.max_new_tokens" if part == "decode" else "lower data.decode_batch_size"
        fewer = fewer if factor > 0 else "use a larger slice"
        return f"does not fit ({used}): {fewer}"
    if held > 0.9 * available:
        return f"does not fit ({used}): weights and optimizer alone take {held / GIB:.2f} GiB; use a larger slice"
    keeping_less = " or train.recompute=layers" if config.train.recompute != "layers" else ""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    each = config.train.batch_size // (config.train.accumulate * ways)
    for rows in range(each - 1, 0, -1):
        if each % rows == 0 and memory["activations_bytes"] * rows / each <= 0.9 * (available - held):
            return f"does not fit ({used}): set train.accumulate={config.train.accumulate * each // rows}{keeping_less}"
    less = "set train.recompute=layers, " if keeping_less else ""
    less += "lower " + ("" if KINDS[config.drafter.kind].token_by_token else "train.num_anchors, ")
    less += "train.vocab_chunk or data.max_length"
    return f"does not fit ({used}) even with one sequence per chip: {less}, or use a larger slice"


def describe(name: str, found: dict[str, Any]) -> Iterator[str]:
    """The lines that are printed for one program."""
    yield f"{name}: {found['verdict']}"
    if "memory" not in found:
        return
    if "placement" in found:
        yield f"  {found['placement']}"
    for part, size in found["memory"].items():
        yield f"  {part.removesuffix('_bytes').replace('_', ' '):<20} {size / GIB:8.2f} GiB per chip"
    yield f"  {'operations':<20} {found['flops'] / 1e12:8.1f} TFLOP, {found['flops_per_chip'] / 1e12:.2f} per chip"
    if found.get("hbm_bytes_per_chip") is not None:
        yield f"  {'memory traffic':<20} {found['hbm_bytes_per_chip'] / 1e9:8.1f} GB per chip"
    for kind, traffic in (found.get("collectives") or {}).items():
        yield f"  {kind:<20} {traffic['bytes'] / 1e9:8.2f} GB per chip in {traffic['count']}"
    for one in found.get("operations", ()):
        if one["refusals"]:
            yield f"  {'left to ' + one['implementation']:<20} {one['operation']} ({'; '.join(one['refusals'])})"
    if "roofline" not in found:
        return
    if "compiler_seconds" in found:
        yield f"  {'compiler estimate':<20} {found['compiler_seconds']:8.3f} s, nothing overlapped"
    bounds = ", ".join(f"{bound} {seconds:.3f}" for bound, seconds in found["roofline"].items())
    yield f"  {'roofline':<20} {found['roofline_seconds']:8.3f} s ({bounds})"
    if "incomplete" in found:
        yield f"  {'far too short':<20} {found['incomplete']}"
    if "answers" in found and "hours" in found:
        yield (
            f"  {found['answers']:,} answers {found['hours']:7.1f} h, {found['chip_hours']:.0f} chip-hours, "
            f"{found['tokens_per_second']:.0f} tokens/s, one token per round; a chunk of prompts takes "
            f"{found['chunk_seconds']:.3f} s; data.decode_batch_size could be {found['slots_that_fit']}"
        )
    elif "hours" in found:
        yield (
            f"  {'whole run':<20} {found['hours']:8.1f} h, {found['chip_hours']:.0f} chip-hours, "
            f"{found['tokens_per_second']:.0f} tokens/s" + " at the best" * ("incomplete" in found)
        )
    if "tokens_per_second_by_accepted_length" in found:
        low, high = found["tokens_per_second_by_accepted_length"].values()
        yield f"  {'tokens/s':<20} {low:8.0f} with one token per round, {high:.0f} with all drafts accepted"


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "topology", "v5e:4x4", "The slice, e.g. v5e:4x4, v6e:8x8, v5p:2x2x2; `list` names them.", flag_values=values
    )
    flags.DEFINE_list("parts", list(PARTS), "What to compile: train, decode, prepare.", flag_values=values)
    flags.DEFINE_integer("answers", 1_300_000, "Of prepare: how many answers.", flag_values=values)
    flags.DEFINE_integer("answer_tokens", 600, "Of prepare: tokens of an answer.", flag_values=values)
    flags.DEFINE_integer("prompt_tokens", 200, "Of prepare: tokens of a prompt.", flag_values=values)


if __name__ == "__main__":
    if {"--topology=list", "list"} & set(sys.argv[1:]):
        print(listing())
    else:
        # One file, whole: it may run beside others.
        command.run(plan, define=_define, writes=False, buckets=False)
