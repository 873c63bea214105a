"""Figures of an evaluation, as PNG files, readable with any colour vision: the palette is safe and markers differ too.

Figures are built without pyplot: nothing global is touched and no display is needed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dspark_jax.evaluation.acceptance import Acceptance
from dspark_jax.evaluation.calibration import PositionCalibration

# The palette of Okabe and Ito without its yellow, which is hard to see on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

FEW = 10
"""Bins of a reliability diagram with fewer predictions are mostly chance: pale, and not connected."""


def plot_conditional(sets: Mapping[str, Acceptance], title: str, path: Path) -> None:
    """Conditional acceptance by position, one line with its 95 % interval per prompt set (paper, figure 2)."""
    values = {name: (one.conditional, one.conditional_interval) for name, one in sets.items()}
    _plot_positions(values, title, "accepted, given that all before it were", path)


def plot_survival(sets: Mapping[str, Acceptance], title: str, path: Path) -> None:
    """Survival of the draft prefix by position, one line with its 95 % interval per prompt set."""
    values = {name: (one.survival, one.survival_interval) for name, one in sets.items()}
    _plot_positions(values, title, "accepted, together with all before it", path)


def plot_reliability(scores: Sequence[PositionCalibration], title: str, path: Path) -> None:
    """Reliability diagram (paper, figure 6): predicted against observed survival, one line per block position."""
    figure, axes = _figure(title, 5.0, 5.0)
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfect")
    shades = matplotlib.colormaps["cividis"](np.linspace(0, 0.9, max(len(scores), 1)))
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
    axes.plot([], [], " ", label=f"(pale: fewer than {FEW})")
    axes.set(xlabel="predicted survival of the prefix", ylabel="observed survival of the prefix")
    axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), aspect="equal")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _plot_positions(values: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str, label: str, path: Path) -> None:
    figure, axes = _figure(title, 6.0, 4.0)
    for number, (name, (mean, bounds)) in enumerate(values.items()):
        positions = np.arange(1, len(mean) + 1)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(positions, mean, color=colour, marker=marker, markersize=5, linewidth=1.5, label=name)
        axes.fill_between(positions, bounds[0], bounds[1], color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="draft position in the block", ylabel=label, ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path)


def _figure(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    """An empty figure of `width` x `height` inches with one light set of axes."""
    figure = Figure(figsize=(width, height), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    return figure, axes
