"""Rows and time of the rounds of a busy `Engine`, by scheduler: what fewer admitted drafts save.

    python tests/benchmarks/serving.py --workdir runs/quickstart_dspark --slots 8

Every scheduler serves the same requests, in turns; the best of `--repeats` counts. The cost table is that of the run
(`profile --slots 8`), or, without one, of a machine whose rounds take as long as their rows.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np

import dspark_jax
from dspark_jax import schedulers
from dspark_jax.data.prompts import read_prompts
from dspark_jax.evaluation.load import read_cost_table


def served(run, scheduler, prompts, slots: int, budget: int) -> dict[str, float]:
    """Figures of one engine that serves all prompts."""
    capacity = max(map(len, prompts)) + budget
    options = {"slots": slots, "capacity": capacity, "scheduler": scheduler, "max_queue": len(prompts)}
    engine = dspark_jax.Engine(run.models, stop_tokens=run.stop_tokens, **options)
    engine.warm_up(sampled=False)
    handles = [engine.submit(prompt, max_new_tokens=budget) for prompt in prompts]
    began = time.perf_counter()
    while engine.step():
        pass
    seconds, totals = time.perf_counter() - began, engine.metrics
    emitted = sum(one.metrics.emitted for one in handles) / sum(one.metrics.rounds for one in handles)
    return {
        "rounds": totals.rounds,
        "rows_per_round": totals.rows / totals.rounds,
        "milliseconds_per_round": 1e3 * seconds / totals.rounds,
        "tokens_per_second": totals.tokens / seconds,
        "accepted_length": emitted,
    }


def main() -> None:
    """The table, and with `--json` the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="of a run with a confidence head")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=8, help="of each evaluation set (default: 8)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most (default: 64)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run = dspark_jax.load_run(arguments.workdir)
    config = dspark_jax.load_config(str(Path(arguments.workdir) / "config.json"))
    asked = [one for file in config.eval.prompts for one in read_prompts([file], arguments.prompts, print)]
    prompts = [run.prompt(str(one.messages[0]["content"])) for one in asked]
    rows, file = arguments.slots * run.models.rows, Path(arguments.workdir) / f"cost_table_s{arguments.slots}.json"
    table = read_cost_table(file).speculative if file.exists() else 1.0 / np.maximum(1, np.arange(rows + 1))
    prior = 0.7 ** np.arange(1, run.models.block_size + 1)
    rules = {
        "fixed": schedulers.fixed(),
        "threshold 0.5": schedulers.threshold(0.5),
        "early_stop": schedulers.early_stop(table),
        "lagged": schedulers.lagged(table, prior),
    }
    found: dict[str, dict[str, float]] = {}
    for _ in range(arguments.repeats):
        for name, rule in rules.items():
            one = served(run, rule, prompts, arguments.slots, arguments.tokens)
            if name not in found or one["milliseconds_per_round"] < found[name]["milliseconds_per_round"]:
                found[name] = one
    costs = file.name if file.exists() else "a round costs its rows"
    print(f"{jax.devices()[0].device_kind}, {arguments.slots} slots, {len(prompts)} requests, {costs}")
    print(f"{'':14}" + "".join(f"{name:>24}" for name in next(iter(found.values()))))
    for name, one in found.items():
        print(f"{name:14}" + "".join(f"{value:24.2f}" for value in one.values()))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
