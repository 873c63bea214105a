"""Measures what decoding rounds cost here, for schedulers that weigh what drafts gain against what they cost.

    python -m dspark_jax.profile --config configs/quickstart.py --workdir runs/quickstart_dspark

times rounds of the target and the newest drafter of the working directory, in the programs that the engine runs: with
drafts, over the numbers of verified tokens that these programs have sizes for, and without, for every number of slots
in `--slots` and every length in `--contexts`. The tokens are arbitrary; nothing else should run meanwhile.

Writes `cost_table.json` in the layout that SGLang reads (`--speculative-dspark-sps-table-path`): steps per second
against tokens in the verified batch, for the first number of slots and the first length, and `cost_table_s8.json` and
so on for other numbers of slots. Beside it is what rounds without drafts cost, which `--scheduler=adaptive` of
`generate` needs. `generate` and `evaluate --cost_table` read the file; everything that was measured goes to
`eval/cost.json`, and `eval/cost.png` shows it. The costs are those of the engine and the device that the file names:
SGLang has its own, which it records itself (`SGLANG_DSPARK_ENABLE_SPS_RECORD`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh

from dspark_jax import command
from dspark_jax.config import Config, InputError
from dspark_jax.engine.cost import RoundShape, round_seconds
from dspark_jax.engine.sizes import ladder_below
from dspark_jax.evaluation.decoding import Decoder
from dspark_jax.evaluation.plots import cost_plot
from dspark_jax.evaluation.setup import decoding_run, open_decoder, refuse_timing
from dspark_jax.json_file import write_json
from dspark_jax.progress import Progress, log
from dspark_jax.run import Run


def profile(
    config: Config,
    workdir: Path,
    *,
    mesh: Mesh | None = None,
    decoder: Decoder | None = None,
    slots: Sequence[str | int] = (1, 8, 32),
    contexts: Sequence[str | int] = (256,),
    rounds: int = 12,
) -> dict[int, dict[str, Any]]:
    """Profiles the newest checkpoint of `workdir`, or models that are loaded already.

    Args:
      config: resolved; `target` is used.
      workdir: of the training run; `cost_table.json` and `eval/cost.*` are written there.
      mesh: of the models; that of `config.mesh.decode` if None.
      decoder: models that are loaded already, or None to load the newest checkpoint.
      slots: requests at a time.
      contexts: tokens of a request.
      rounds: timed together.

    Returns:
      Number of slots -> content of its cost table.

    Raises:
      InputError: there is no checkpoint for this target, or a number is out of range.
    """
    sizes, lengths = command.positive_integers("slots", slots), command.positive_integers("contexts", contexts)
    if rounds < 1:
        raise InputError(f"--rounds={rounds} times nothing; use 1 or more")
    refuse_timing(config, "profile")
    run = decoding_run(Run(config, Path(workdir), mesh))
    decoder = open_decoder(run) if decoder is None else decoder
    most, block = decoder.models.arch.max_position_embeddings, decoder.models.block_size
    if most and max(lengths) + block + 1 > most:
        raise InputError(
            f"--contexts={max(lengths)} exceeds the target's {most} positions; use up to {most - block - 1}"
        )
    shapes = [
        RoundShape(count, context, tokens)
        for context in lengths
        for count in sizes
        for tokens in (0, *rungs(count * (block + 1)))
    ]
    measured = []
    with Progress("profile", len(shapes), unit="shape") as progress, jax.set_mesh(run.mesh):
        for shape in shapes:
            seconds = round_seconds(decoder.models, shape, rounds=rounds)
            measured.append({**vars(shape), "milliseconds": 1e3 * seconds})
            progress.advance(1)
    where = {"engine": "dspark_jax", "device": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}"}
    tables = {count: cost_table(measured, count, lengths[0]) | where for count in sizes}
    if jax.process_index() == 0:
        folder = run.eval_folder
        folder.mkdir(parents=True, exist_ok=True)
        for count in sizes:
            suffix = "" if count == sizes[0] else f"_s{count}"
            tables[count] = write_json(run.workdir / f"cost_table{suffix}.json", tables[count])
        cost_plot(measured, config.name).write(folder)
        print(describe(measured), flush=True)
        log(f"profile: wrote {run.workdir / 'cost_table.json'} for {sizes[0]} slots, and {folder / 'cost.png'}")
    return tables


def rungs(most: int) -> tuple[int, ...]:
    """Numbers of verified tokens that are measured: the sizes that the engine has programs for."""
    return (*ladder_below(most), most)


def cost_table(measured: Sequence[dict[str, Any]], slots: int, context: int) -> dict[str, Any]:
    """What was measured for some slots and context in the layout of SGLang, and rounds without drafts beside it."""
    rows = [row for row in measured if (row["slots"], row["context"]) == (slots, context)]
    drafting: dict[int, float] = {}
    for row in rows:
        if row["tokens"]:  # a batch of this size takes whatever the one before does not hold
            rate = 1e3 / row["milliseconds"]
            drafting |= {max(drafting, default=0) + 1: rate} | {row["tokens"]: rate}
    plain = [1e3 / row["milliseconds"] for row in rows if not row["tokens"]]
    return {
        "sample_batch_tokens": list(drafting),
        "sample_steps_per_sec": list(drafting.values()),
        "max_batch_tokens": max(drafting),
        "plain_batch_tokens": [slots],
        "plain_steps_per_sec": plain,
        "slots": slots,
        "context": context,
    }


def describe(measured: Sequence[dict[str, Any]]) -> str:
    """The table that is printed: milliseconds per round."""
    lines = []
    for context in dict.fromkeys(row["context"] for row in measured):
        rows = [row for row in measured if row["context"] == context]
        lines += ["", f"milliseconds per round at {context} tokens of context, by verified tokens of all slots"]
        for slots in dict.fromkeys(row["slots"] for row in rows):
            own = [row for row in rows if row["slots"] == slots]
            names = [f"{row['tokens']} verified" if row["tokens"] else "no drafts" for row in own]
            lines.append(f"{slots:>3} slots  " + "".join(f"{name:>14}" for name in names))
            lines.append(" " * 11 + "".join(f"{row['milliseconds']:>14.2f}" for row in own))
    return "\n".join(lines[1:])


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_list(
        "slots", ["1", "8", "32"], "Requests at a time; cost_table.json is for the first.", flag_values=values
    )
    flags.DEFINE_list("contexts", ["256"], "Tokens of a request; the tables are for the first.", flag_values=values)
    flags.DEFINE_integer("rounds", 12, "Rounds that are timed together.", flag_values=values)


if __name__ == "__main__":
    command.run(profile, define=_define)
