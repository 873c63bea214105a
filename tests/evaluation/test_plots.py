import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from dspark_jax.evaluation.acceptance import Acceptance, count, estimate
from dspark_jax.evaluation.calibration import calibrate
from dspark_jax.evaluation.load import LoadPoint
from dspark_jax.evaluation.plots import (
    DARK,
    LIGHT,
    Plot,
    budget_plot,
    conditional_plot,
    reliability_plot,
    survival_plot,
    threshold_plot,
    throughput_plot,
)
from dspark_jax.evaluation.threshold import ThresholdSweep

TITLE = "quickstart_dspark, temperature 1"


def acceptance(qualities: dict[str, float]) -> dict[str, Acceptance]:
    rng, sets = np.random.default_rng(0), {}
    for name, quality in qualities.items():
        accepted = [(rng.random((30, 7)) < quality).cumprod(axis=1).sum(axis=1) for _ in range(20)]
        counts = count([a + 1 for a in accepted], accepted, [np.full(len(a), 7) for a in accepted], 7)
        sets[name] = estimate(counts, 200, rng)
    return sets


def all_plots() -> list[Plot]:
    sets = acceptance({"math": 0.9, "code": 0.7, "chat": 0.5})
    rng = np.random.default_rng(1)
    logits = rng.normal(1, 1.5, (3000, 7))
    accepted = (rng.random((3000, 7)) < 1 / (1 + np.exp(-logits / 1.5))).cumprod(axis=1).sum(axis=1)
    scores = calibrate(logits, accepted, np.full(3000, 7))
    rates = np.linspace(0.5, 0.9, 5)
    sweep = ThresholdSweep(np.linspace(0, 0.8, 5), rates, np.stack([rates - 0.05, rates + 0.05]), rates, rates)
    points = [LoadPoint(n, 50.0 * n, 50.0, 8 / n, 2.0) for n in (1, 2, 4)]
    curves = {"plain": points, "early stop, head": points}
    return [
        conditional_plot(sets, TITLE),
        survival_plot(sets, TITLE),
        reliability_plot(scores, "as trained", TITLE, "reliability"),
        threshold_plot({"math": sweep}, TITLE),
        throughput_plot(curves, TITLE, "a table"),
        budget_plot(curves, TITLE, "a table"),
    ]


def close_to(image: np.ndarray, colour: str) -> np.ndarray:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.all(np.abs(image - wanted) < 0.01, axis=-1)


@pytest.mark.parametrize("plot", all_plots(), ids=lambda plot: plot.name)
def test_files_and_themes(plot: Plot, tmp_path: Path):
    plot.write(tmp_path)
    image = imread(tmp_path / f"{plot.name}.png")[..., :3]
    assert image.shape[0] > 400 and image.shape[1] > 400
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert close_to(edge, LIGHT.paper).all()  # nothing is cut off
    content = json.loads((tmp_path / f"{plot.name}.json").read_text())
    assert content and json.dumps(content) != "{}"
    light, dark = plot.svg(LIGHT), plot.svg(DARK)
    assert light == plot.svg(LIGHT)  # the same file for the same numbers
    for svg, theme, other in ((light, LIGHT, DARK), (dark, DARK, LIGHT)):
        assert f"fill: {theme.paper}" in svg and f"fill: {other.paper}" not in svg
        assert theme.ink in svg.lower() and other.ink not in svg.lower()
        # Namespaces and the document type are names, not addresses; nothing is loaded.
        assert not re.search(r"(href|src)=\"(?!#)", svg)
        assert "<text" not in svg and "font-family" not in svg
    assert plot.alt and plot.caption and plot.title


def test_lines_are_in_the_palette_and_alt_texts_have_the_numbers(tmp_path: Path):
    sets = acceptance({"math": 0.9, "code": 0.7, "chat": 0.5})
    plot = conditional_plot(sets, TITLE)
    plot.write(tmp_path)
    image = imread(tmp_path / "conditional_acceptance.png")[..., :3]
    assert all(close_to(image, colour).any() for colour in LIGHT.lines[:3])
    assert not close_to(image, LIGHT.lines[3]).any()
    for name, one in sets.items():
        assert f"{name} goes from {100 * one.conditional[0]:.0f} % to {100 * one.conditional[-1]:.0f} %" in plot.alt
    data = json.loads((tmp_path / "conditional_acceptance.json").read_text())
    np.testing.assert_allclose(data["math"]["value"], sets["math"].conditional)
    np.testing.assert_allclose(data["math"]["ci95"], sets["math"].conditional_interval.T)


def test_figures_without_values(tmp_path: Path):
    """A set without rounds, a single prompt (no interval) and a head that was never scored are no errors."""
    nothing = [np.zeros(0, np.int64)]
    empty = estimate(count(nothing, nothing, nothing, 3), 10, np.random.default_rng(0))
    conditional_plot({"empty": empty}, "empty").write(tmp_path)
    assert json.loads((tmp_path / "conditional_acceptance.json").read_text())["empty"]["value"] == [None] * 3
    unscored = reliability_plot(calibrate(np.zeros((0, 3)), np.zeros(0), np.zeros(0)), "x", "empty", "reliability")
    unscored.write(tmp_path)
    assert "not defined" in unscored.alt
    assert (tmp_path / "reliability.png").stat().st_size > 5000
