from pathlib import Path

import numpy as np
from matplotlib.image import imread

from dspark_jax.evaluation.acceptance import count, estimate
from dspark_jax.evaluation.calibration import calibrate
from dspark_jax.evaluation.plots import plot_conditional, plot_reliability, plot_survival

RNG = np.random.default_rng(0)


def rounds(quality: float, prompts: int = 20) -> list[np.ndarray]:
    return [(RNG.random((30, 7)) < quality).cumprod(axis=1).sum(axis=1) for _ in range(prompts)]


def drawn(path: Path) -> np.ndarray:
    """The figure's pixels; white on all edges, so nothing is cut off."""
    image = imread(path)[..., :3]
    assert image.shape[0] > 400 and image.shape[1] > 400
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
        assert (edge == 1).all()
    return image


def test_acceptance_figures_show_one_line_per_set(tmp_path: Path):
    sets = {}
    for name, quality in {"math": 0.9, "code": 0.7, "chat": 0.5}.items():
        accepted = rounds(quality)
        counts = count([a + 1 for a in accepted], accepted, [np.full(len(a), 7) for a in accepted], 7)
        sets[name] = estimate(counts, 200, np.random.default_rng(0))
    plot_conditional(sets, "quickstart_dspark, temperature 1.0", tmp_path / "conditional.png")
    plot_survival(sets, "quickstart_dspark, temperature 1.0", tmp_path / "survival.png")
    conditional, survival = drawn(tmp_path / "conditional.png"), drawn(tmp_path / "survival.png")
    assert not np.array_equal(conditional, survival)
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):
        assert np.any(np.all(np.abs(conditional - np.array(colour) / 255) < 0.01, axis=-1))


def test_figures_without_values(tmp_path: Path):
    """A set without rounds, a single prompt (no interval) and a head that was never scored are no errors."""
    nothing = [np.zeros(0, np.int64)]
    empty = estimate(count(nothing, nothing, nothing, 3), 10, np.random.default_rng(0))
    plot_conditional({"empty": empty}, "empty", tmp_path / "conditional.png")
    plot_reliability(calibrate(np.zeros((0, 3)), np.zeros(0), np.zeros(0)), "empty", tmp_path / "reliability.png")
    drawn(tmp_path / "conditional.png")
    drawn(tmp_path / "reliability.png")


def test_reliability_figure(tmp_path: Path):
    logits = RNG.normal(1, 1.5, (3000, 7))
    accepted = (RNG.random((3000, 7)) < 1 / (1 + np.exp(-logits / 1.5))).cumprod(axis=1).sum(axis=1)
    plot_reliability(calibrate(logits, accepted, np.full(3000, 7)), "quickstart, T 1.0", tmp_path / "reliability.png")
    drawn(tmp_path / "reliability.png")
