"""The figures of `compare`: acceptance by position, depth, draft length and time per round, of all drafters."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_jax.evaluation.comparison_seeds import TauEstimate
from dspark_jax.evaluation.plots import Plot, Theme, _figure, _line, conditional_plot


def conditional_plots(estimates: Mapping[str, TauEstimate]) -> list[Plot]:
    """Conditional acceptance by position, a line per drafter and a figure per prompt set (paper, figure 2)."""
    names = list(dict.fromkeys(name for one in estimates.values() for name in one.sets))
    plots = []
    for name in names:
        plot = conditional_plot({kind: one.sets[name] for kind, one in estimates.items() if name in one.sets}, name)
        caption = _caption(plot.caption, any(one.trainings for one in estimates.values()))
        plots.append(dataclasses.replace(plot, name=f"conditional_acceptance_{name}", caption=caption))
    return plots


def tau_plot(entries: Mapping[str, Mapping[str, Any]], title: str) -> Plot:
    """Tau with its 95 % interval, a line per drafter, and a small mark per seed.

    Args:
      entries: of the main table, by drafter: tau, tau_ci95, tau_by_seed.
      title: what tau is the mean of.
    """
    names = list(entries)

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(title, theme, 1.6 + 0.3 * len(names))
        for row, entry in enumerate(entries.values()):
            tau, *bounds = _floats((entry["tau"], *entry["tau_ci95"]))
            seeds = _floats(entry["tau_by_seed"].values())
            axes.plot(bounds, [row, row], color=theme.lines[0], linewidth=2, alpha=0.5)
            axes.plot(seeds, [row] * len(seeds), "|", color=theme.ink, markersize=8)
            axes.plot(tau, row, "o", color=theme.lines[0], markersize=5)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel="accepted length (tau)")
        return figure

    taus = zip(names, _floats(entry["tau"] for entry in entries.values()), strict=True)
    shown = ("tau", "tau_ci95", "tau_by_seed")
    return Plot(
        name="accepted_length",
        title=title,
        caption="Points: means over the seeds. Bars: 95 % intervals over seeds and prompts. Strokes: single seeds.",
        alt=f"{title}: " + ", ".join(f"{name} {tau:.2f}" for name, tau in taus) + ".",
        data={name: {field: entry[field] for field in shown} for name, entry in entries.items()},
        draw=draw,
    )


def study_plot(points: Sequence[Mapping[str, Any]], label: str, title: str) -> Plot:
    """Tau against depth or draft length, one line with its 95 % interval per drafter (paper, figures 3 and 4).

    Args:
      points: drafter, the value of `label`, tau, tau_ci95.
      label: depth or length.
      title: what the study is about.
    """
    kinds = list(dict.fromkeys(point["drafter"] for point in points))
    lines = {kind: sorted((p for p in points if p["drafter"] == kind), key=lambda p: p[label]) for kind in kinds}

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(title, theme)
        for number, (kind, found) in enumerate(lines.items()):
            band = np.asarray([_floats(point["tau_ci95"]) for point in found]).T
            _line(axes, theme, number, [p[label] for p in found], _floats(p["tau"] for p in found), kind, band)
        axes.set(xlabel={"depth": "draft layers", "length": "draft length"}[label], ylabel="accepted length (tau)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        return figure

    ends = {kind: _floats((found[0]["tau"], found[-1]["tau"])) for kind, found in lines.items()}
    shown = [f"{kind} from {first:.2f} to {last:.2f}" for kind, (first, last) in ends.items()]
    return Plot(
        name=label,
        title=title,
        caption=_caption(
            "Mean over the prompt sets. Bands: 95 % intervals over prompts.",
            any("tau_by_seed" in point for point in points),
        ),
        alt=f"{title}: " + "; ".join(shown) + ".",
        data={kind: list(found) for kind, found in lines.items()},
        draw=draw,
    )


def time_plot(times: Mapping[str, Mapping[str, float]], title: str) -> Plot:
    """Milliseconds per decoding round at batch 1, a bar per drafter."""
    names = list(times)
    values = [times[name]["round_ms"] for name in names]

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(title, theme, 1.6 + 0.3 * len(names))
        axes.barh(names, values, color=theme.lines[0])
        axes.invert_yaxis()
        axes.set(xlabel="milliseconds per round, prefill included")
        return figure

    shown = ", ".join(f"{name} {value:.2f}" for name, value in zip(names, values, strict=True))
    return Plot(
        name="round_time",
        title=title,
        caption="Draft, verification by the target and acceptance; a round of plain decoding is one token.",
        alt=f"Milliseconds per round: {shown}.",
        data={name: dict(one) for name, one in times.items()},
        draw=draw,
    )


def _caption(text: str, seeds: bool) -> str:
    """With what the intervals are of, where there are several seeds."""
    return text.replace("over prompts", "over seeds and prompts") if seeds else text


def _floats(numbers: Iterable[float | None]) -> list[float]:
    """With NaN for what is not defined: a drafter without any round has no tau."""
    return [float("nan") if number is None else number for number in numbers]
