"""`report.html`: one page with the tables and figures of a run, for a phone or a desktop, light or dark.

The page needs nothing but itself: figures are inlined, once per colour scheme, and there is no script. Tables scroll on
their own where a screen is too narrow, never the page.
"""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dspark_jax.evaluation.plots import DARK, LIGHT, Plot
from dspark_jax.evaluation.summary import paper_cell, tau_rows
from dspark_jax.evaluation.traffic import TrafficPoint

STYLE = f"""
:root {{ color-scheme: light dark; --paper: {LIGHT.paper}; --ink: {LIGHT.ink}; --faint: #d9d9d9; --soft: #5a5a5a; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --paper: {DARK.paper}; --ink: {DARK.ink}; --faint: #3a3e47; --soft: #a6abb5; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: var(--paper); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }}
main {{ max-width: 66rem; margin: 0 auto; padding: 1rem; }}
h1 {{ font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--faint); }}
p {{ max-width: 44rem; }}
.soft, figcaption, caption {{ color: var(--soft); font-size: .9rem; }}
.scroll {{ overflow-x: auto; }}
.scroll:focus-visible {{ outline: 2px solid currentColor; outline-offset: 2px; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; margin: .5rem 0; }}
caption {{ text-align: left; padding-bottom: .3rem; }}
caption span {{ display: inline-block; position: sticky; left: 0; max-width: min(40rem, calc(100vw - 2rem)); }}
th, td {{ padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--faint); }}
th {{ font-weight: 600; }}
th[scope=row], thead th:first-child {{ text-align: left; position: sticky; left: 0; background: var(--paper); }}
th[scope=row] {{ white-space: normal; min-width: 6.5rem; max-width: 14rem; }}
@media (max-width: 30rem) {{ th, td {{ padding: .25rem .4rem; }} th[scope=row] {{ max-width: 9.5rem; }} }}
details {{ margin: .5rem 0; }}
summary {{ cursor: pointer; }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem; margin: 1rem 0; }}
dl div {{ border: 1px solid var(--faint); border-radius: .5rem; padding: .6rem .8rem; }}
dt {{ color: var(--soft); font-size: .85rem; }}
dd {{ margin: 0; font-size: 1.3rem; font-weight: 600; }}
dd small {{ display: block; font-size: .8rem; font-weight: 400; color: var(--soft); }}
.figures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }}
figure {{ margin: 0; min-width: 0; max-width: 34rem; }}
figure img {{ width: 100%; height: auto; display: block; }}
figure h3 {{ font-size: 1rem; margin: 0 0 .3rem; }}
"""


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
    name = _text(metrics["name"])
    figures = {plot.name: _figure(plot) for plot in plots}

    def shown(*names: str) -> str:
        found = [figures.pop(name) for name in names if name in figures]
        return '<div class="figures">' + "\n".join(found) + "</div>" if found else ""

    parts = [
        f"<h1>{name}</h1>",
        f'<p class="soft">Speculative decoding of {metrics["prompts"]} held-out prompts, blocks of '
        f"{metrics['block_size']} drafts, up to {metrics['max_new_tokens']} new tokens per answer.</p>",
        _headline(metrics),
        shown("conditional_acceptance", "survival", "threshold"),
    ]
    for one in (metrics, *metrics["temperatures"].values()):
        parts += [f"<h2>Temperature {one['temperature']:g}</h2>", *_temperature(one, metrics["block_size"])]
        if metrics.get("paper") and one["temperature"] == metrics["paper"]["temperature"]:
            parts.append(_paper(metrics, one))
    parts += ["<h2>Losslessness</h2>", _lossless(metrics)]
    if calibration is not None:
        parts += [
            "<h2>What predicts acceptance</h2>",
            shown("reliability", "reliability_sts", "reliability_bias_sts"),
            *_calibration(calibration),
        ]
    if load is not None and any(row["concurrency"] for row in load["curves"].values()):
        parts += ["<h2>Under load</h2>", shown("throughput", "budget"), *_load(load)]
    if traffic:
        parts += ["<h2>Traffic on this machine</h2>", shown("traffic"), _traffic(traffic)]
    parts.append(shown(*figures))
    body = "\n".join(part for part in parts if part)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{name}: evaluation</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n'
        "</html>\n"
    )


def _headline(metrics: Mapping[str, Any]) -> str:
    at = f"temperature {metrics['temperature']:g}"
    entries = [("Accepted length (tau)", _number(metrics["tau"], ".2f"), f"{_range(metrics['tau_ci95'], '.2f')}, {at}")]
    if metrics["tokens_per_second"] is not None:
        entries.append(("Tokens per second", _number(metrics["adaptive_tokens_per_second"], ".0f"), f"batch 1, {at}"))
        for name, what in (
            ("adaptive_speedup", "Speed against plain decoding"),
            ("speedup", "Drafting in every round"),
        ):
            entries.append((what, _number(metrics[name], ".2f") + "×", _range(metrics[f"{name}_ci95"], ".2f")))
    identical = "yes" if metrics["greedy_identical"] else "no"
    entries.append(("Greedy output unchanged", identical, f"{metrics['greedy_compared']} answers compared"))
    items = (f"<div><dt>{term}</dt><dd>{value}<small>{note}</small></dd></div>" for term, value, note in entries)
    return "<dl>" + "".join(items) + "</dl>"


def _temperature(one: Mapping[str, Any], block_size: int) -> list[str]:
    rows = [
        [name, row["prompts"], _number(row["tau"], ".3f"), _range(row["tau_ci95"], ".3f"), row["rounds"],
         _number(row["mean_answer_tokens"], ".1f")]
        for name, row in one["prompt_sets"].items()
    ]  # fmt: skip
    rows += [
        [name, "", _number(row["tau"], ".3f"), _range(row["tau_ci95"], ".3f"), "", ""]
        for name, row in one.get("domains", {}).items()
    ]
    rows.append(
        ["macro average", one["prompts"], _number(one["tau"], ".3f"), _range(one["tau_ci95"], ".3f"), one["rounds"], ""]
    )
    heads = ["prompt set", "prompts", "tau", "95 % interval", "rounds", "tokens per answer"]
    parts = [_table("Accepted length: tokens per round, the bonus token included", heads, rows)]
    positions = ["prompt set", *(str(k) for k in range(1, block_size + 1))]
    for key, caption in (
        ("conditional_acceptance", "Conditional acceptance of draft k, all before it accepted"),
        ("survival", "Survival: drafts 1 to k all accepted"),
    ):
        rates = [[name, *(_number(v, ".2f") for v in row[key])] for name, row in one["prompt_sets"].items()]
        parts.append(_table(caption, positions, rates))
    if one["tokens_per_second"] is not None:
        parts.append(
            f"<p>At batch 1, prefill included: {one['baseline_tokens_per_second']:.0f} tokens per second plain; "
            f"{one['tokens_per_second']:.0f} drafting in every round, ratio {one['speedup']:.2f} "
            f"({_range(one['speedup_ci95'], '.2f')}); {one['adaptive_tokens_per_second']:.0f} drafting where it pays, "
            f"ratio {one['adaptive_speedup']:.2f} ({_range(one['adaptive_speedup_ci95'], '.2f')}).</p>"
        )
    if one["calibration"] is not None:
        scores = (f"{title} {_number(one['calibration'][name], '.3f')}" for name, title in _SCORES.items())
        parts.append(f"<p>Confidence head over all rounds, mean over positions: {', '.join(scores)}.</p>")
    return parts


def _paper(metrics: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    """Accepted lengths beside the paper's."""
    paper, rows = metrics["paper"], []
    for group, name in tau_rows(metrics):
        ours = one[group][name] if group else one
        theirs = _number(paper_cell(metrics, group, name), ".2f")
        rows.append([name, _number(ours["tau"], ".2f"), _range(ours["tau_ci95"], ".2f"), theirs])
    title = f"Beside the figures of the paper, {paper['drafter']} for {paper['target']}"
    return _table(title, ["", "tau", "95 % interval", "paper"], rows)


_SCORES = {"ece": "calibration error", "auc": "AUC", "brier": "Brier score"}


def _lossless(metrics: Mapping[str, Any]) -> str:
    compared, different = metrics["greedy_compared"], metrics["greedy_different"]
    if metrics["greedy_identical"]:
        return f"<p>All {compared} greedy answers are token-identical to plain decoding.</p>"
    rows = [
        [f"{one['file']}:{one['line']}", one["turn"] + 1, one["position"], one["speculative_token"], one["plain_token"],
         _number(one["logit_gap"], ".2g")]
        for one in metrics["greedy_differences"]
    ]  # fmt: skip
    heads = ["prompt", "turn", "position", "token", "plain decoding's", "difference of their logits"]
    found = f"<p>{different} of {compared} greedy answers differ from plain decoding.</p>"
    return found + _table("Where answers first differ", heads, rows)


def _calibration(data: Mapping[str, Any]) -> list[str]:
    predictors = data["predictors"]
    positions = len(next(iter(predictors.values()))["chance_ece"])
    heads = ["predictor", "mean", *(str(k) for k in range(1, positions + 1))]
    parts = [
        f"<p>Fitted on {data['fitted_rounds']} rounds and scored on {data['scored_rounds']} rounds of other prompts. "
        "The head is the trained confidence head; STS scales its logits by one temperature per position; online is "
        "the running estimate from the request's own earlier rounds.</p>"
    ]
    if data["temperatures"] is not None:
        fitted = [
            ["head+STS", "0", *(_number(t, ".2f") for t in data["temperatures"])],
            [
                "head+bias+STS",
                _number(data["bias"], ".2f"),
                *(_number(t, ".2f") for t in data["temperatures_with_bias"]),
            ],
        ]
        parts.append(_table("Fitted temperatures by position", ["predictor", "bias", *heads[2:]], fitted))
    parts += _score_tables(predictors, "prefix", "survival of drafts 1 to k", heads)
    given = _score_tables(predictors, "conditional", "acceptance of draft k, all before it accepted", heads)
    return [*parts, "<details><summary>The same for draft k alone</summary>", *given, "</details>"]


def _score_tables(predictors: Mapping[str, Any], kind: str, what: str, heads: Sequence[str]) -> list[str]:
    tables = []
    for score, title, form, scale in (
        ("ece", "Expected calibration error in %", ".1f", 100),
        ("auc", "Area under the ROC curve", ".3f", 1),
        ("brier", "Brier score", ".3f", 1),
    ):
        rows = []
        for name, row in predictors.items():
            values = (row[kind]["mean"][score], *row[kind][score])
            rows.append([name, *(_number(value, form, scale) for value in values)])
        if (kind, score) == ("prefix", "ece"):
            chance = list(predictors.values())[-1]["chance_ece"]
            rows.append(["left to chance", "", *(_number(value, form, scale) for value in chance)])
        tables.append(_table(f"{title}, {what}", heads, rows))
    return tables


def _load(load: Mapping[str, Any]) -> list[str]:
    curves = load["curves"]
    users = next(iter(curves.values()))["concurrency"]
    heads = ["scheduler", *(str(n) for n in users)]
    parts = [f"<p>Recorded rounds replayed on: {_text(load['cost_table'])}.</p>"]
    for key, caption, form in (
        ("tokens_per_second", "Tokens per second of all users, by number of users", ".0f"),
        ("budget", "Verified tokens per request and step, the anchor included, by number of users", ".2f"),
    ):
        rows = [[name, *(_number(v, form) for v in row[key])] for name, row in curves.items()]
        parts.append(_table(caption, heads, rows))
    least = ("least_ratio_to_plain", "least_ratio_to_fixed", "ratio_to_fixed_at_most_users")
    heads = ["scheduler", "least, to plain decoding", "least, to verifying everything", f"that at {users[-1]} users"]
    rows = [[name, *(_number(row[key], ".3f") for key in least)] for name, row in load["checks"].items()]
    if rows:
        parts.append(_table("Ratios of tokens per second", heads, rows))
    return parts


def _traffic(curves: Mapping[str, Sequence[TrafficPoint]]) -> str:
    heads = ["contender", "requests per second", "served", "refused", "tokens per second", "per user",
             "first token, median (s)", "95 % (s)", "tau", "verified per round"]  # fmt: skip
    rows = [
        [name, f"{one.offered:g}", one.served, one.refused, _defined(one.tokens_per_second, ".1f"),
         _defined(one.per_user, ".1f"), _defined(one.first_token_p50, ".2f"), _defined(one.first_token_p95, ".2f"),
         _defined(one.accepted_length, ".2f"), _defined(one.budget, ".2f")]
        for name, points in curves.items()
        for one in points
    ]  # fmt: skip
    return _table("Requests that arrive at random times, on the serving engine of this machine", heads, rows)


def _figure(plot: Plot) -> str:
    light, dark = (_data_uri(plot.svg(theme)) for theme in (LIGHT, DARK))
    return (
        f"<figure><h3>{_text(plot.title)}</h3><picture>"
        f'<source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{_text(plot.alt)}"></picture><figcaption>{_text(plot.caption)}</figcaption></figure>'
    )


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in its own scrolling box, which the keyboard reaches; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{_text(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>' + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption)}"><table>'
        f"<caption><span>{_text(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "–" if value is None else format(scale * value, form)


def _defined(value: float, form: str) -> str:
    return _number(None if math.isnan(value) else value, form)


def _range(bounds: Sequence[float | None], form: str) -> str:
    return " to ".join(_number(bound, form) for bound in bounds)
