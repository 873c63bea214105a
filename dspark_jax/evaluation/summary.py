"""From decoded answers to the numbers of `eval/metrics.json` and what is printed of them."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.benchmarks import PAPER_TEMPERATURE, by_domain, paper_tau
from dspark_jax.data.regenerate import Conversation
from dspark_jax.engine.result import DecodeResult
from dspark_jax.evaluation.acceptance import (
    Acceptance,
    Counts,
    estimate,
    interval,
    macro_average,
    ratio,
    resample_weights,
)
from dspark_jax.evaluation.calibration import (
    PositionCalibration,
    score_survival,
    survival_probabilities,
    weighted_mean,
)
from dspark_jax.evaluation.decoding import Difference, Requests
from dspark_jax.evaluation.speed import Speed
from dspark_jax.evaluation.traces import Traces

MOST_DIFFERENCES = 20
"""Differences between greedy answers that are listed; all of them are counted."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was decoded at one temperature.

    Attributes:
      temperature: of drafter and target.
      conversations: N held-out prompts.
      requests: what was decoded, one per conversation and turn.
      result: the answers to `requests`.
      counts: round statistics per conversation.
      speed: at batch 1, or None if it was not measured.
      traces: the rounds of `result`, or None if they were not traced.
    """

    temperature: float
    conversations: Sequence[Conversation]
    requests: Requests
    result: DecodeResult
    counts: Counts
    speed: Speed | None
    traces: Traces | None

    def members(self) -> dict[str, np.ndarray]:
        """Indices of the conversations of each prompt set."""
        names = [one.prompt.prompt_set for one in self.conversations]
        return {name: np.flatnonzero([other == name for other in names]) for name in dict.fromkeys(names)}

    def acceptance(self, resamples: int, seed: int, chosen: np.ndarray | None = None) -> dict[str, Acceptance]:
        """Acceptance by prompt set, of all or of the `chosen` [N] bool; the resamples are the same at every call."""
        sets = {}
        for number, (name, members) in enumerate(self.members().items()):
            members = members if chosen is None else members[chosen[members]]
            fields = {f.name: getattr(self.counts, f.name)[members] for f in dataclasses.fields(self.counts)}
            sets[name] = estimate(Counts(**fields), resamples, np.random.default_rng([seed, number]))
        return sets

    def ways(self) -> dict[str, np.ndarray]:
        """[N] bool: which conversations were asked with thinking, and which without; empty where all were alike."""
        thinks = np.asarray([one.options.thinking for one in self.conversations])
        return {"with thinking": thinks, "without thinking": ~thinks} if 0 < thinks.sum() < len(thinks) else {}

    def by_way(self, resamples: int, seed: int) -> dict[str, list[Acceptance]]:
        """Acceptance of the prompt sets in each of these ways."""
        ways = self.ways().items()
        return {name: list(self.acceptance(resamples, seed, chosen).values()) for name, chosen in ways}

    def calibration(self) -> list[PositionCalibration] | None:
        """Scores of the confidence head as it is over all rounds, or None where confidences were not traced."""
        traces = self.traces
        if traces is None or traces.confidence is None:
            return None
        return score_survival(survival_probabilities(traces.confidence), traces.accepted, traces.usable)


def metrics_at(measured: Measured, resamples: int, seed: int) -> dict[str, Any]:
    """The metrics of one temperature; NaN where something is not defined.

    Keys: temperature, prompts, prompt_sets, domains (means over the paper's benchmarks of each, where there are some),
    ways (means over the prompt sets of the prompts asked with thinking, and without, where there are both),
    tau (mean over the prompt sets), tau_ci95, rounds, tokens, and those of `speed_metrics` and `calibration_metrics`.
    """
    sets = measured.acceptance(resamples, seed)
    tau, bounds = macro_average(list(sets.values()))
    domains = {name: macro_average(members) for name, members in by_domain(sets).items()}
    asked = {name: int(chosen.sum()) for name, chosen in measured.ways().items()}
    ways = {name: macro_average(members) for name, members in measured.by_way(resamples, seed).items()}
    owners = measured.requests.owners
    lengths = np.asarray([len(ids) for ids in measured.result.tokens])
    described = {}
    for name, members in measured.members().items():
        one, answers = sets[name], np.isin(owners, members)
        described[name] = {
            "tau": one.tau,
            "tau_ci95": one.tau_interval,
            "rounds": one.rounds,
            "tokens": one.tokens,
            "prompts": len(members),
            "answers": int(answers.sum()),
            "mean_answer_tokens": float(lengths[answers].mean()),
            "stopped": float(measured.result.stopped[answers].mean()),
            "conditional_acceptance": one.conditional,
            "conditional_acceptance_ci95": one.conditional_interval.T,
            "survival": one.survival,
            "survival_ci95": one.survival_interval.T,
        }
    return {
        "temperature": measured.temperature,
        "prompts": len(measured.conversations),
        "prompt_sets": described,
        "domains": {name: {"tau": one, "tau_ci95": of_it} for name, (one, of_it) in domains.items()},
        "ways": {name: {"tau": one, "tau_ci95": of_it, "prompts": asked[name]} for name, (one, of_it) in ways.items()},
        "tau": tau,
        "tau_ci95": bounds,
        "rounds": sum(one.rounds for one in sets.values()),
        "tokens": sum(one.tokens for one in sets.values()),
        **speed_metrics(measured.speed, resamples, seed),
        "calibration": calibration_metrics(measured.calibration()),
    }


def speed_metrics(speed: Speed | None, resamples: int, seed: int) -> dict[str, Any]:
    """Tokens per second at batch 1, and ratios with their intervals over prompts; None where it was not measured.

    `speedup` is that of drafting in every round, `adaptive_speedup` that of drafting where it pays, both over plain
    decoding. `round_cost` is the time of a round with drafts over that of a plain one.
    """
    names = ("baseline_tokens_per_second", "tokens_per_second", "adaptive_tokens_per_second")
    if speed is None:
        ratios = ("speedup", "speedup_ci95", "adaptive_speedup", "adaptive_speedup_ci95", "round_cost")
        return dict.fromkeys((*names, *ratios))
    weights = resample_weights(len(speed.tokens), resamples, np.random.default_rng([seed, len(speed.tokens)]))
    rates = ratio(speed.tokens.sum(axis=0), speed.seconds.sum(axis=0))
    draws = ratio(weights @ speed.tokens, weights @ speed.seconds)
    return {
        **{name: float(rate) for name, rate in zip(names, rates, strict=True)},
        "speedup": float(rates[1] / rates[0]),
        "speedup_ci95": interval(draws[:, 1] / draws[:, 0]),
        "adaptive_speedup": float(rates[2] / rates[0]),
        "adaptive_speedup_ci95": interval(draws[:, 2] / draws[:, 0]),
        "round_cost": speed.round_cost,
        "speed_prompts": len(speed.tokens),
    }


def calibration_metrics(scores: Sequence[PositionCalibration] | None) -> dict[str, Any] | None:
    """Means over positions, weighted by their rounds, and the scores by position."""
    if scores is None:
        return None
    names = ("ece", "auc", "brier", "predicted", "observed")
    means: dict[str, Any] = {name: weighted_mean(scores, name) for name in names}
    columns = {name: [getattr(one, name) for one in scores] for name in (*names, "weight")}
    bins = [{name: getattr(one.reliability, name) for name in BINS} for one in scores]
    return {**means, "by_position": columns, "reliability": bins}


BINS = ("lower", "upper", "predicted", "observed", "weight")


def paper_metrics(target: str, drafter: str, prompt_sets: Iterable[str]) -> dict[str, Any] | None:
    """What the paper reports for the same target and kind of drafter; None where it has no such benchmark.

    Args:
      target: id of the released target, '' if it is none.
      drafter: kind of drafter.
      prompt_sets: that were measured; `domains` and `tau` are means over those of them that the paper has.
    """
    reported = paper_tau(target, drafter)
    sets = {name: reported[name] for name in prompt_sets if name in reported}
    if not sets:
        return None
    domains = {name: float(np.mean(members)) for name, members in by_domain(sets).items()}
    where = {"target": target, "drafter": drafter, "temperature": PAPER_TEMPERATURE}
    return {**where, "prompt_sets": sets, "domains": domains, "tau": float(np.mean(list(sets.values())))}


def greedy_metrics(
    differences: Sequence[Difference], requests: Requests, conversations: Sequence[Conversation]
) -> dict[str, Any]:
    """Whether all greedy answers equal those of plain decoding, and where they first do not."""
    listed = []
    for one in differences[:MOST_DIFFERENCES]:
        item = requests.items[one.request]
        prompt = conversations[item.owner].prompt
        listed.append(
            {
                "prompt": item.owner,
                "turn": item.turn,
                "position": one.position,
                "plain_token": one.tokens[0],
                "speculative_token": one.tokens[1],
                "logit_gap": one.gap,
                "file": prompt.file,
                "line": prompt.line,
            }
        )
    return {
        "greedy_identical": not differences,
        "greedy_compared": len(requests.items),
        "greedy_different": len(differences),
        "greedy_differences": listed,
    }


def overview(metrics: Mapping[str, Any], report: Path, load: Mapping[str, Any] | None = None) -> str:
    """What `evaluate` ends in: accepted length, speed, losslessness, and where the rest is.

    Args:
      metrics: content of `eval/metrics.json`.
      report: the page with everything.
      load: content of `eval/load.json`, if there is one; shown where it was replayed on times that were measured.
    """
    every = [metrics, *metrics["temperatures"].values()]
    width = max(23, *(len(name) for name in metrics["prompt_sets"]))

    def row(name: str, cells: Sequence[str]) -> str:
        return f"{name:{width}}" + "".join(f"  {cell:23}" for cell in cells).rstrip()

    def cell(value: float | None, bounds: Sequence[float | None]) -> str:
        low, high = (_number(bound, ".2f", 0) for bound in bounds)
        return f"{_number(value, '.2f', 0)} ({low} to {high})"

    lines = [
        f"{metrics['name']}, step {metrics['step']}: {metrics['prompts']} held-out prompts, up to "
        f"{metrics['max_new_tokens']} new tokens",
        "",
        row("tokens per round (tau)", [f"temperature {one['temperature']:g}" for one in every] + _paper_title(metrics)),
    ]
    for group, name in tau_rows(metrics):
        rows = [one[group][name] if group else one for one in every]
        paper = _number(paper_cell(metrics, group, name), ".2f", 0) if metrics.get("paper") else ""
        lines.append(row(name, [*(cell(one["tau"], one["tau_ci95"]) for one in rows), paper]))
    if load is not None and not load["invented"] and load["curves"]["plain"]["concurrency"]:
        lines += ["", *_load_lines(load, metrics, row)]
    if metrics["tokens_per_second"] is not None:
        plain = [f"{one['baseline_tokens_per_second']:.0f} tokens/s" for one in every]
        lines += ["", row("plain here, one request", plain)]
        for name, what in (("speedup", "drafting every round"), ("adaptive_speedup", "drafting where it pays")):
            lines.append(row(what, ["x " + cell(one[name], one[f"{name}_ci95"]) for one in every]))
    elif metrics.get("target_runs_in"):
        lines += ["", f"speed is not measured, as the target runs in {metrics['target_runs_in']}"]
    return "\n".join([*lines, "", _greedy_line(metrics), f"in brackets: 95 % intervals; everything else: {report}"])


def _load_lines(
    load: Mapping[str, Any], metrics: Mapping[str, Any], row: Callable[[str, Sequence[str]], str]
) -> list[str]:
    """What the recorded rounds would bring at the times of the cost table, with the fewest and with the most users."""
    plain, drafted = (load["curves"][name] for name in ("plain", f"fixed {metrics['block_size']}"))
    users: Sequence[int] = plain["concurrency"]
    ends = [0, len(users) - 1] if len(users) > 1 else [0]

    def cell(curve: Mapping[str, Any], at: int, unit: str = "") -> str:
        each = f", {curve['per_user'][at]:.0f} each" if users[at] > 1 else ""
        return f"{curve['tokens_per_second'][at]:.0f}{unit}{each}"

    def gain(at: int) -> str:
        return f"x {drafted['tokens_per_second'][at] / plain['tokens_per_second'][at]:.2f}"

    return [
        f"these rounds at the times of {load['cost_table']} (temperature {metrics['temperature']:g})",
        row("", [f"{users[at]} user{'s' if users[at] > 1 else ''}" for at in ends]),
        row("plain", [cell(plain, at, " tokens/s") for at in ends]),
        row("drafting every round", [f"{cell(drafted, at)}, {gain(at)}" for at in ends]),
    ]


def tau_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of a table of accepted lengths: (key of a group in the metrics, name in it); the last one has no group."""
    sets = [("prompt_sets", name) for name in metrics["prompt_sets"]]
    groups = [(group, name) for group in ("domains", "ways") for name in metrics.get(group, {})]
    return [*sets, *groups, ("", "macro average")]


def paper_cell(metrics: Mapping[str, Any], group: str, name: str) -> float | None:
    """The paper's figure for one of `tau_rows`; None where it has none."""
    paper = metrics.get("paper") or {}
    return paper.get(group, {}).get(name) if group else paper.get("tau")


def _paper_title(metrics: Mapping[str, Any]) -> list[str]:
    """Heading of the column with the paper's figures, if there is one."""
    paper = metrics.get("paper")
    return [f"paper, T={paper['temperature']:g}"] if paper else []


def _greedy_line(metrics: Mapping[str, Any]) -> str:
    compared = metrics["greedy_compared"]
    if metrics["greedy_identical"]:
        return f"greedy: all {compared} answers are token-identical to plain decoding"
    first = metrics["greedy_differences"][0]
    gap = f"{first['logit_gap']:.2g}" if first["logit_gap"] is not None else "-"
    return (
        f"greedy: {metrics['greedy_different']} of {compared} answers differ from plain decoding, the first at "
        f"prompt {first['prompt']} ({first['file']}:{first['line']}), token {first['position']}: "
        f"{first['speculative_token']} instead of {first['plain_token']} (difference of their logits: {gap})"
    )


def table(metrics: Mapping[str, Any]) -> str:
    """Everything that `eval/metrics.json` has by prompt set; `evaluate --details` prints it."""
    every = (metrics, *metrics["temperatures"].values())
    return "\n\n".join("\n".join(_temperature_lines(one, metrics)) for one in every)


def _temperature_lines(one: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    width = max(13, *(len(name) for name in (*one["prompt_sets"], *one.get("ways", {}))))
    lines = [
        f"{metrics['name']}: temperature {one['temperature']}, up to {metrics['max_new_tokens']} new tokens",
        f"{'prompt set':{width}}  prompts    tau  95 % interval   rounds  tokens/answer  "
        f"conditional acceptance of draft 1..{metrics['block_size']}",
    ]
    for name, row in one["prompt_sets"].items():
        rates = " ".join(_number(value, ".2f", 4) for value in row["conditional_acceptance"])
        lines.append(
            f"{name:{width}}  {row['prompts']:7d}  {_number(row['tau'], '.3f', 5)}  {_interval(row['tau_ci95'])}  "
            f"{row['rounds']:7d}  {_number(row['mean_answer_tokens'], '.1f', 13)}  {rates}"
        )
    for name, row in {**one.get("domains", {}), **one.get("ways", {})}.items():
        prompts = row.get("prompts", "")
        lines.append(f"{name:{width}}  {prompts:>7}  {_number(row['tau'], '.3f', 5)}  {_interval(row['tau_ci95'])}")
    lines.append(
        f"{'macro average':{width}}  {one['prompts']:7d}  {_number(one['tau'], '.3f', 5)}  "
        f"{_interval(one['tau_ci95'])}  {one['rounds']:7d}"
    )
    if one["tokens_per_second"] is not None:
        plain = one["baseline_tokens_per_second"]
        lines.append(f"speed at batch 1, prefill included, in tokens/s: {plain:.0f} plain")
        for name, what in (("", "drafting in every round"), ("adaptive_", "drafting where it pays")):
            low, high = (_number(bound, ".2f", 0) for bound in one[f"{name}speedup_ci95"])
            rate, gain = one[f"{name}tokens_per_second"], one[f"{name}speedup"]
            lines[-1] += f"; {rate:.0f} {what}, ratio {gain:.2f} ({low} to {high})"
    if one["calibration"] is not None:
        ece, auc, brier = (_number(one["calibration"][name], ".3f", 0) for name in ("ece", "auc", "brier"))
        lines.append(f"confidence, mean over positions: ECE {ece}, AUC {auc}, Brier {brier}")
    return lines


def _number(value: float | None, form: str, width: int) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def _interval(bounds: Sequence[float | None]) -> str:
    low, high = (_number(bound, ".3f", 5) for bound in bounds)
    return f"{low} .. {high}"
