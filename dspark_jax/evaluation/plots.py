"""Figures: drawn once for a light and once for a dark page, readable with any colour vision (markers differ too).

A `Plot` knows how to draw itself in a theme, what it shows in words, and the numbers that it draws. Figures are built
without pyplot: nothing global is touched and no display is needed. They are small, so that they stay readable on a
phone.
"""

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_jax.evaluation.acceptance import Acceptance
from dspark_jax.evaluation.calibration import PositionCalibration
from dspark_jax.evaluation.load import LoadPoint
from dspark_jax.evaluation.predictors import CALIBRATED, DESCRIBED, HEAD, SHIFTED, Calibration
from dspark_jax.evaluation.threshold import ThresholdSweep
from dspark_jax.evaluation.traffic import TrafficPoint
from dspark_jax.json_file import write_json


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a page.

    Attributes:
      paper: the background of the figure.
      ink: text and axes.
      faint: grid.
      lines: one colour per line, in turn.
      shades: part of the colour map `cividis` for lines that are ordered.
    """

    paper: str
    ink: str
    faint: str
    lines: tuple[str, ...]
    shades: tuple[float, float]


# The palette of Okabe and Ito without its yellow; pale colours darkened for white, all lightened for the dark page.
LIGHT = Theme(
    paper="#ffffff",
    ink="#1c1c1c",
    faint="#e4e4e4",
    lines=("#0072B2", "#D55E00", "#009E73", "#C26B9B", "#2E93CC", "#B37A00", "#000000"),
    shades=(0.0, 0.85),
)
DARK = Theme(
    paper="#16181d",
    ink="#e8e8e8",
    faint="#33363d",
    lines=("#4BA3E3", "#FF8A4C", "#2CC79A", "#E6A3C8", "#A5DCFF", "#F2C14E", "#FFFFFF"),
    shades=(0.42, 1.0),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "-", "-", "-", "-", (0, (4, 2)), (0, (1, 1)))  # where lines coincide, both are seen

FEW = 10
"""Bins of a reliability diagram with fewer predictions are mostly chance: pale, and not connected."""


@dataclasses.dataclass(frozen=True)
class Plot:
    """A figure.

    Attributes:
      name: stem of its files.
      title: what it is.
      caption: how to read it.
      alt: what it shows, for those who do not see it.
      data: the numbers, as they are written to JSON.
      draw: draws it.
    """

    name: str
    title: str
    caption: str
    alt: str
    data: Mapping[str, Any]
    draw: Callable[[Theme], Figure]

    def write(self, folder: Path) -> None:
        """Writes NAME.png and NAME.json."""
        with matplotlib.rc_context(_rc(LIGHT)):
            self.draw(LIGHT).savefig(folder / f"{self.name}.png", dpi=160)
        write_json(folder / f"{self.name}.json", self.data)

    def svg(self, theme: Theme) -> str:
        """The figure as SVG; letters are shapes, so that it needs no font."""
        text = io.StringIO()
        with matplotlib.rc_context({**_rc(theme), "svg.fonttype": "path", "svg.hashsalt": self.name}):
            self.draw(theme).savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        return text.getvalue()


def conditional_plot(sets: Mapping[str, Acceptance], title: str) -> Plot:
    """Conditional acceptance by position, one line with its 95 % interval per prompt set (paper, figure 2)."""
    values = {name: (one.conditional, one.conditional_interval) for name, one in sets.items()}
    caption = "Share of drafts accepted where all before them were. Bands: 95 % intervals over prompts."
    label = "accepted, given that all before it were"
    return _position_plot("conditional_acceptance", "Conditional acceptance", caption, values, label, title)


def survival_plot(sets: Mapping[str, Acceptance], title: str) -> Plot:
    """Survival of the draft prefix by position, one line with its 95 % interval per prompt set."""
    values = {name: (one.survival, one.survival_interval) for name, one in sets.items()}
    caption = "Share of rounds in which a draft and all before it were accepted. Bands: 95 % intervals over prompts."
    label = "accepted, together with all before it"
    return _position_plot("survival", "Survival of the draft prefix", caption, values, label, title)


def reliability_plot(scores: Sequence[PositionCalibration], what: str, title: str, name: str) -> Plot:
    """Reliability diagram (paper, figure 6): predicted against observed survival, one line per block position.

    Args:
      scores: by position.
      what: predicted it.
      title: of the run.
      name: stem of its files.
    """

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(f"{title}\n{what}", theme, 4.7)
        _draw_reliability(axes, scores, theme)
        return figure

    errors = [one.ece for one in scores if one.weight]
    mean = f"{100 * np.mean(errors):.1f} %" if errors else "not defined"
    bins = [{"ece": one.ece, "weight": one.weight, **vars(one.reliability)} for one in scores]
    return Plot(
        name=name,
        title=f"Reliability of the predicted survival, {what}",
        caption="On the dashed line, what is predicted comes true. Larger markers stand for more rounds; pale ones for "
        f"fewer than {FEW}. Calibration error, mean over positions: {mean}.",
        alt=f"Reliability diagram {what}, by draft position: mean calibration error {mean}.",
        data={"predictor": what, "positions": bins},
        draw=draw,
    )


def reliability_plots(calibration: Calibration, title: str, suffix: str = "") -> list[Plot]:
    """The head's reliability before and after calibration; nothing without a head. `suffix` ends the names."""
    names = {HEAD: "reliability", CALIBRATED: "reliability_sts", SHIFTED: "reliability_bias_sts"}
    return [
        reliability_plot(calibration.predictors[one].prefix, DESCRIBED[one], title, name + suffix)
        for one, name in names.items()
        if one in calibration.predictors
    ]


def threshold_plot(sweeps: Mapping[str, ThresholdSweep], title: str) -> Plot:
    """Acceptance rate against the confidence threshold, one line per prompt set (paper, figure 5)."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(title, theme)
        for number, (name, one) in enumerate(sweeps.items()):
            band = one.acceptance_rate_interval
            _line(axes, theme, number, one.thresholds, one.acceptance_rate, name, band)
        axes.set(xlabel="confidence threshold", ylabel="accepted / verified drafts", ylim=(0, 1.02))
        axes.legend()
        return figure

    ends = [
        f"{name} rises from {_percent(one.acceptance_rate[0])} to {_percent(one.acceptance_rate[-1])}"
        for name, one in sweeps.items()
    ]
    return Plot(
        name="threshold",
        title="Acceptance rate against the confidence threshold",
        caption="Drafts from the first one below the threshold are not verified. Bands: 95 % intervals over prompts.",
        alt="Acceptance rate for thresholds from 0 to 0.8. " + "; ".join(ends) + ".",
        data={name: vars(one) for name, one in sweeps.items()},
        draw=draw,
    )


def throughput_plot(curves: Mapping[str, Sequence[LoadPoint]], title: str, table: str) -> Plot:
    """Throughput against the speed of one user, one line per scheduler (paper, figure 7)."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(title, theme, 4.6)
        for number, (name, points) in enumerate(curves.items()):
            speeds = [point.per_user for point in points]
            _line(axes, theme, number, speeds, [point.tokens_per_second for point in points], name)
        axes.set(xlabel="tokens per second of one user", ylabel="tokens per second of all users", yscale="log")
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    return Plot(
        name="throughput",
        title="Throughput against per-user speed",
        caption=f"Recorded rounds replayed on: {table}. Along a line, users increase from right to left.",
        alt="Throughput of all users against the speed of one, for " + _extremes(curves) + ".",
        data={name: [vars(point) for point in points] for name, points in curves.items()},
        draw=draw,
    )


def budget_plot(curves: Mapping[str, Sequence[LoadPoint]], title: str, table: str) -> Plot:
    """Verified tokens per request and step against the number of users, one line per scheduler (paper, figure 8)."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(title, theme, 4.6)
        for number, (name, points) in enumerate(curves.items()):
            _line(axes, theme, number, [p.concurrency for p in points], [p.budget for p in points], name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="concurrent users", ylabel="verified tokens per request and step", ylim=(0, None))
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    shown = [
        f"{name} from {points[0].budget:.1f} at {points[0].concurrency} to {points[-1].budget:.1f} at "
        f"{points[-1].concurrency} users"
        for name, points in curves.items()
    ]
    return Plot(
        name="budget",
        title="Verification budget against concurrency",
        caption=f"Tokens in the verification batch per request, the anchor included. Replayed on: {table}.",
        alt="Verified tokens per request and step: " + "; ".join(shown) + ".",
        data={name: [vars(point) for point in points] for name, points in curves.items()},
        draw=draw,
    )


def traffic_plot(curves: Mapping[str, Sequence[TrafficPoint]], title: str) -> Plot:
    """Throughput against the speed of one user under open-loop traffic, one line per contender, on this machine."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(title, theme, 4.6)
        for number, (name, points) in enumerate(curves.items()):
            _line(axes, theme, number, [p.per_user for p in points], [p.tokens_per_second for p in points], name)
        axes.set(xlabel="tokens per second of one user (median)", ylabel="tokens per second of all users")
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    rates = [point.offered for point in next(iter(curves.values()))]
    shown = "; ".join(
        f"{name}: {points[-1].tokens_per_second:.0f} tokens per second at {points[-1].offered:g} requests per second"
        for name, points in curves.items()
    )
    return Plot(
        name="traffic",
        title="Open-loop traffic on this machine",
        caption=f"The serving engine under Poisson arrivals of {', '.join(f'{rate:g}' for rate in rates)} requests per "
        "second, one marker each. The same requests for every line.",
        alt=f"Throughput of all users against the speed of one under open-loop traffic. {shown}.",
        data={name: [vars(point) for point in points] for name, points in curves.items()},
        draw=draw,
    )


def cost_plot(measured: Sequence[Mapping[str, Any]], title: str) -> Plot:
    """Milliseconds of a round against verified tokens, one line per number of slots and context (`profile`)."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    several = len({row["context"] for row in measured}) > 1
    for row in measured:
        name = f"{row['slots']} slot{'s' if row['slots'] > 1 else ''}"
        groups.setdefault(name + (f", {row['context']} tokens" if several else ""), []).append(row)

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(title, theme, 4.6)
        for number, (name, rows) in enumerate(groups.items()):
            drafting = [row for row in rows if row["tokens"]]
            times = [row["milliseconds"] for row in drafting]
            _line(axes, theme, number, [row["tokens"] for row in drafting], times, name)
            for row in rows:
                if not row["tokens"]:
                    colour = theme.lines[number % len(theme.lines)]
                    axes.axhline(row["milliseconds"], color=colour, linestyle=":", linewidth=1)
        axes.set(xlabel="verified tokens", ylabel="milliseconds per round", xscale="log", yscale="log")
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    slowest = max(measured, key=lambda row: row["milliseconds"])
    return Plot(
        name="cost",
        title="Cost of a round",
        caption="Rounds with drafts, by the tokens that are verified; dotted: rounds without drafts.",
        alt=f"Time of a round against verified tokens, up to {slowest['milliseconds']:.1f} milliseconds for "
        f"{slowest['tokens']} tokens of {slowest['slots']} requests.",
        data={name: [dict(row) for row in rows] for name, rows in groups.items()},
        draw=draw,
    )


def _position_plot(
    name: str, title: str, caption: str, values: Mapping[str, tuple[np.ndarray, np.ndarray]], label: str, subject: str
) -> Plot:
    """Rates [G] with intervals [2, G] by draft position."""

    def draw(theme: Theme) -> Figure:
        figure, axes = _figure(subject, theme)
        for number, (line, (mean, bounds)) in enumerate(values.items()):
            _line(axes, theme, number, np.arange(1, len(mean) + 1), mean, line, bounds)
        axes.set(xlabel="draft position in the block", ylabel=label, ylim=(0, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        return figure

    ends = [f"{line} goes from {_percent(mean[0])} to {_percent(mean[-1])}" for line, (mean, _) in values.items()]
    data = {line: {"value": mean, "ci95": bounds.T} for line, (mean, bounds) in values.items()}
    return Plot(name, title, caption, f"{title} by draft position. " + "; ".join(ends) + ".", data, draw)


def _draw_reliability(axes: Axes, scores: Sequence[PositionCalibration], theme: Theme) -> None:
    axes.plot([0, 1], [0, 1], color=theme.ink, alpha=0.5, linestyle="--", linewidth=1)
    shades = matplotlib.colormaps["cividis"](np.linspace(*theme.shades, max(len(scores), 1)))
    for k, one in enumerate(scores):
        bins, marker = one.reliability, MARKERS[k % len(MARKERS)]
        if not one.weight:
            continue
        many = bins.weight >= FEW
        axes.plot(bins.predicted[many], bins.observed[many], color=shades[k], linewidth=1)
        axes.plot([], [], color=shades[k], marker=marker, markersize=4, linewidth=1, label=f"position {k + 1}")
        # The area of a marker is the share of the position's predictions that fall in its bin.
        area = 4 + 120 * bins.weight / one.weight
        colours = np.where(many[:, None], shades[k], [*shades[k][:3], 0.25])
        axes.scatter(bins.predicted, bins.observed, s=area, c=colours, marker=marker, linewidth=0)
    axes.set(xlabel="predicted survival of the prefix", ylabel="observed survival of the prefix")
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), aspect="equal")
    if any(one.weight for one in scores):
        axes.legend(loc="upper left")


def _line(axes: Axes, theme: Theme, number: int, x: Any, y: Any, label: str, band: np.ndarray | None = None) -> None:
    colour, marker = theme.lines[number % len(theme.lines)], MARKERS[number % len(MARKERS)]
    dashes = DASHES[number % len(DASHES)]
    axes.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.5, linestyle=dashes, label=label)
    if band is not None:
        axes.fill_between(x, band[0], band[1], color=colour, alpha=0.18, linewidth=0)


def _figure(title: str, theme: Theme, height: float = 3.6) -> tuple[Figure, Axes]:
    """An empty figure of `height` inches with one set of axes."""
    figure = Figure(figsize=(4.5, height), layout="constrained", facecolor=theme.paper)
    axes = figure.add_subplot()
    axes.set_title(title)
    _style(axes, theme)
    return figure, axes


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.faint, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)


def _rc(theme: Theme) -> dict[Any, Any]:
    """Settings for everything that matplotlib draws while a figure is built and saved."""
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "axes.titlecolor")
    sizes = {"font.size": 9.5, "axes.titlesize": 9.5, "legend.fontsize": 8.5, "legend.frameon": False}
    return {**dict.fromkeys(names, theme.ink), **sizes}


def _extremes(curves: Mapping[str, Sequence[LoadPoint]]) -> str:
    return "; ".join(
        f"{name}: {points[0].tokens_per_second:.0f} tokens per second with {points[0].concurrency} users, "
        f"{points[-1].tokens_per_second:.0f} with {points[-1].concurrency}"
        for name, points in curves.items()
    )


def _percent(share: float) -> str:
    return "nothing" if np.isnan(share) else f"{100 * share:.0f} %"
