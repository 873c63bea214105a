"""A scheduler by its name, with what a run's directory knows of costs and calibration."""

from pathlib import Path

from dspark_jax.config import InputError
from dspark_jax.drafter.interface import Drafter, is_confident
from dspark_jax.engine.schedulers import SCHEDULERS, Measured, Scheduler
from dspark_jax.evaluation.calibration import read_calibration
from dspark_jax.evaluation.load import CostTable, read_cost_table, saturating
from dspark_jax.json_file import read_ours
from dspark_jax.registry import find


def run_scheduler(
    name: str, drafter: Drafter, workdir: Path, *, slots: int = 1, confidence: float | None = None
) -> Scheduler:
    """The rule of `SCHEDULERS` with that name, as `generate --scheduler` uses it.

    Args:
      name: of the rule.
      drafter: of the run, or the one that stands for none.
      workdir: of the run, with what `calibrate` and `profile` have written, if anything.
      slots: requests that are going to be decoded together; the cost table of that many is taken.
      confidence: least one of `threshold`; 0.5 if None.

    Raises:
      InputError: there is no such rule; it needs a confidence head; or there are cost tables, but none for `slots`.
    """
    rule, confident, block_size = find(SCHEDULERS, name, "scheduler"), is_confident(drafter), drafter.block_size
    if rule.reads_confidence and not confident:
        raise InputError(
            f"--scheduler={name}: it reads a confidence head, which the drafter in {workdir} does not have; "
            "use --scheduler=fixed, or adaptive, which learns from what is accepted"
        )
    file, table = _cost_table(workdir, slots, block_size)
    return rule.from_run(
        Measured(
            block_size=block_size,
            confident=confident,
            calibration=read_calibration(workdir / "calibration.json", block_size),
            steps_per_second=table.speculative,
            plain_steps_per_second=table.plain,
            cost_file=None if file is None else str(file),
            confidence=0.5 if confidence is None else confidence,
        )
    )


def _cost_table(workdir: Path, slots: int, block_size: int) -> tuple[Path | None, CostTable]:
    """What rounds of `slots` requests cost; without any measurement, an accelerator that has room to spare."""
    first, own = workdir / "cost_table.json", workdir / f"cost_table_s{slots}.json"
    table = read_cost_table(first) if first.exists() else None
    measured = slots if table is None else read_ours(first).get("slots", slots)
    if own.exists() and (table is None or measured != slots):  # where both are of so many, `own` is an earlier one
        return own, read_cost_table(own)
    if table is None:
        return None, saturating(slots * (block_size + 1))
    if slots > 1 and measured != slots:
        raise InputError(
            f"{first}: measured with {measured} requests at a time, and {slots} are going to be decoded together; "
            f"run python -m dspark_jax.profile --slots={measured},{slots}"
        )
    return first, table
