"""`report.html`: one page with the tables and figures of a run, for a phone or a desktop, light or dark.

The page needs nothing but itself: figures are inlined, once per colour scheme, and there is no script. Tables scroll on
their own where a screen is too narrow, never the page. What it says and how it looks is in `templates/report.html`;
here are the rows of its tables.
"""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_jax.evaluation.plots import DARK, LIGHT, Plot
from dspark_jax.evaluation.summary import paper_cell, tau_rows
from dspark_jax.evaluation.traffic import TrafficPoint
from dspark_jax.templates import number, number_range, render

Rows = list[list[Any]]


def report(
    metrics: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
    load: Mapping[str, Any] | None,
    traffic: Mapping[str, Sequence[TrafficPoint]],
    plots: Sequence[Plot],
) -> str:
    """The page.

    Args:
      metrics: content of `eval/metrics.json`.
      calibration: `predictors.calibration_data`, None entries where a score is not defined; None without traces.
      load: `load.load_data`, or None.
      traffic: measured points by contender; empty if it was not asked for.
      plots: the figures, in their order.
    """
    left = {plot.name: plot for plot in plots}

    def figures(*names: str) -> list[dict[str, Any]]:
        """Those of these names that there are, each of them once; all that are left without names."""
        found = [left.pop(name) for name in names or tuple(left) if name in left]
        return [{"plot": one, "light": _data_uri(one.svg(LIGHT)), "dark": _data_uri(one.svg(DARK))} for one in found]

    tables: dict[str, Any] = {"temperature_rows": [], "prefix_tables": [], "conditional_tables": []}
    if calibration is not None:
        tables = {
            "temperature_rows": _temperature_rows(calibration),
            "prefix_tables": _score_tables(calibration["predictors"], "prefix", "survival of drafts 1 to k"),
            "conditional_tables": _score_tables(
                calibration["predictors"], "conditional", "acceptance of draft k, all before it accepted"
            ),
        }
    replayed = load is not None and any(row["concurrency"] for row in load["curves"].values())
    return render(
        "report.html",
        light=LIGHT,
        dark=DARK,
        figures=figures,
        metrics=metrics,
        positions=[str(k) for k in range(1, metrics["block_size"] + 1)],
        temperatures=[_at_temperature(metrics, one) for one in (metrics, *metrics["temperatures"].values())],
        difference_rows=_difference_rows(metrics.get("greedy_differences", ())),
        calibration=calibration,
        **tables,
        load=_load(load) if load is not None and replayed else None,
        traffic_rows=_traffic_rows(traffic) if traffic else None,
    )


def _at_temperature(metrics: Mapping[str, Any], one: Mapping[str, Any]) -> dict[str, Any]:
    """The results at a temperature, with the rows of their tables."""
    sets = one["prompt_sets"]
    tau = [[name, *_tau_cells(row), number(row["mean_answer_tokens"], ".1f")] for name, row in sets.items()]
    tau += [
        [name, row.get("prompts", ""), number(row["tau"], ".3f"), number_range(row["tau_ci95"], ".3f"), "", ""]
        for name, row in {**one.get("domains", {}), **one.get("ways", {})}.items()
    ]
    rates = {
        key: [[name, *(number(value, ".2f") for value in row[key])] for name, row in sets.items()]
        for key in ("conditional_acceptance", "survival")
    }
    return {
        **one,
        "tau_rows": [*tau, ["macro average", *_tau_cells(one), ""]],
        "conditional_rows": rates["conditional_acceptance"],
        "survival_rows": rates["survival"],
        "paper_rows": _paper_rows(metrics, one),
    }


def _paper_rows(metrics: Mapping[str, Any], one: Mapping[str, Any]) -> Rows:
    """Accepted lengths beside the paper's; none where it has nothing to compare with."""
    if not metrics.get("paper") or one["temperature"] != metrics["paper"]["temperature"]:
        return []
    rows = []
    for group, name in tau_rows(metrics):
        ours = one[group][name] if group else one
        theirs = number(paper_cell(metrics, group, name), ".2f")
        rows.append([name, number(ours["tau"], ".2f"), number_range(ours["tau_ci95"], ".2f"), theirs])
    return rows


def _tau_cells(row: Mapping[str, Any]) -> list[Any]:
    return [row["prompts"], number(row["tau"], ".3f"), number_range(row["tau_ci95"], ".3f"), row["rounds"]]


def _difference_rows(differences: Sequence[Mapping[str, Any]]) -> Rows:
    return [
        [f"{one['file']}:{one['line']}", one["turn"] + 1, one["position"], one["speculative_token"], one["plain_token"],
         number(one["logit_gap"], ".2g")]
        for one in differences
    ]  # fmt: skip


def _temperature_rows(data: Mapping[str, Any]) -> Rows:
    if data["temperatures"] is None:
        return []
    with_bias = (number(value, ".2f") for value in data["temperatures_with_bias"])
    return [
        ["head+STS", "0", *(number(value, ".2f") for value in data["temperatures"])],
        ["head+bias+STS", number(data["bias"], ".2f"), *with_bias],
    ]


def _score_tables(predictors: Mapping[str, Any], kind: str, what: str) -> list[tuple[str, Rows]]:
    """(caption, rows) of every score; under the calibration error of prefixes what finitely many rounds leave of it."""
    tables = []
    for score, title, form, scale in (
        ("ece", "Expected calibration error in %", ".1f", 100),
        ("auc", "Area under the ROC curve", ".3f", 1),
        ("brier", "Brier score", ".3f", 1),
    ):
        rows = []
        for name, row in predictors.items():
            values = (row[kind]["mean"][score], *row[kind][score])
            rows.append([name, *(number(value, form, scale) for value in values)])
        if (kind, score) == ("prefix", "ece"):
            chance = list(predictors.values())[-1]["chance_ece"]
            rows.append(["left to chance", "", *(number(value, form, scale) for value in chance)])
        tables.append((f"{title}, {what}", rows))
    return tables


def _load(load: Mapping[str, Any]) -> dict[str, Any]:
    curves = load["curves"]
    least = ("least_ratio_to_plain", "least_ratio_to_fixed", "ratio_to_fixed_at_most_users")
    columns = (
        ("tokens_per_second", "Tokens per second of all users, by number of users", ".0f"),
        ("budget", "Verified tokens per request and step, the anchor included, by number of users", ".2f"),
    )
    return {
        "cost_table": load["cost_table"],
        "about": load["about"],
        "users": [str(count) for count in next(iter(curves.values()))["concurrency"]],
        "tables": [
            (caption, [[name, *(number(value, form) for value in row[key])] for name, row in curves.items()])
            for key, caption, form in columns
        ],
        "ratio_rows": [[name, *(number(row[key], ".3f") for key in least)] for name, row in load["checks"].items()],
    }


def _traffic_rows(curves: Mapping[str, Sequence[TrafficPoint]]) -> Rows:
    return [
        [name, f"{one.offered:g}", one.served, one.refused, number(one.tokens_per_second, ".1f"),
         number(one.per_user, ".1f"), number(one.first_token_p50, ".2f"), number(one.first_token_p95, ".2f"),
         number(one.accepted_length, ".2f"), number(one.budget, ".2f")]
        for name, points in curves.items()
        for one in points
    ]  # fmt: skip


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()
