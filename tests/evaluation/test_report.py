"""The page as a browser's parser sees it: nothing from outside, real tables, texts for every picture."""

import base64
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from matplotlib.figure import Figure

from dspark_jax.evaluation.plots import DARK, LIGHT, Plot, Theme
from dspark_jax.evaluation.report import report
from dspark_jax.evaluation.traffic import TrafficPoint

VOID = {"meta", "link", "img", "source", "br"}


class Page(HTMLParser):
    """Elements in order, with the text inside them; fails on tags that do not match."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[int] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for index in self.open:
            self.elements[index][2].append(data)

    def all(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, "".join(text)) for name, attributes, text in self.elements if name == tag]


def draw(theme: Theme) -> Figure:
    figure = Figure(figsize=(2, 2), facecolor=theme.paper)
    figure.add_subplot().plot([1, 2], color=theme.lines[0])
    return figure


def plot(name: str) -> Plot:
    return Plot(name, f"Title of {name}", "caption <1>", f'alt of "{name}"', {}, draw)


def at_temperature(temperature: float) -> dict[str, Any]:
    row = {
        "tau": 2.5, "tau_ci95": [2.25, 2.75], "rounds": 40, "tokens": 100, "prompts": 7, "mean_answer_tokens": 33.0,
        "conditional_acceptance": [0.81, None], "survival": [0.81, 0.42],
    }  # fmt: skip
    return {
        "temperature": temperature, "prompts": 7, "prompt_sets": {"a<b": row}, "tau": 2.5, "tau_ci95": [None, None],
        "rounds": 40, "tokens_per_second": 300.0, "baseline_tokens_per_second": 100.0, "speedup": 3.0,
        "speedup_ci95": [2.5, 3.5], "adaptive_tokens_per_second": 320.0, "adaptive_speedup": 3.2,
        "adaptive_speedup_ci95": [2.6, 3.6], "calibration": {"ece": 0.0456, "auc": 0.789, "brier": None},
    }  # fmt: skip


def make_metrics() -> dict[str, Any]:
    return {
        "name": "run <x>", "block_size": 2, "max_new_tokens": 16, **at_temperature(1.0), "greedy_identical": False,
        "greedy_compared": 9, "greedy_different": 2, "greedy_differences": make_differences(),
        "temperatures": {"0.0": at_temperature(0.0) | {"calibration": None}},
    }  # fmt: skip


def make_differences() -> list[dict[str, Any]]:
    one = {"file": "a.jsonl", "turn": 0, "plain_token": 71, "logit_gap": None}
    return [one | {"line": 4, "position": 17, "speculative_token": 72}, one | {"line": 5, "position": 0} |
            {"speculative_token": 73, "logit_gap": 1e-7}]  # fmt: skip


def make_calibration() -> dict[str, Any]:
    scores = {"mean": {"ece": 0.0123, "auc": 0.9, "brier": 0.1}, "ece": [0.0345, None], "auc": [0.9, None]}
    scores["brier"] = [0.1, 0.1]
    one = {"chance_ece": [0.005, 0.006], "prefix": scores, "conditional": scores}
    return {
        "fitted_rounds": 11, "scored_rounds": 12, "temperatures": [1.25, 0.8], "bias": -0.3,
        "temperatures_with_bias": [1.0, 1.0], "predictors": {"head": one, "online": one},
    }  # fmt: skip


def make_load() -> dict[str, Any]:
    row = {"concurrency": [1, 2], "tokens_per_second": [51.4, 99.6], "budget": [1.0, 2.5]}
    ratios = ("least_ratio_to_plain", "least_ratio_to_fixed", "ratio_to_fixed_at_most_users")
    checks = {"early stop, head": dict(zip(ratios, (1.0625, 0.9375, 6.54), strict=True))}
    return {"cost_table": "table & co", "about": "how <it> was measured", "curves": {"plain": row}, "checks": checks}


def make_traffic() -> dict[str, list[TrafficPoint]]:
    nothing = float("nan")
    point = TrafficPoint(2.0, 58, 3, 123.4, nothing, 0.27, 0.58, 0.1, 1.97, 4.5)
    return {"plain": [], "fixed 2": [point]}


@pytest.fixture(scope="module")
def text() -> str:
    plots = [plot(name) for name in ("conditional_acceptance", "reliability", "throughput", "another")]
    return report(make_metrics(), make_calibration(), make_load(), make_traffic(), plots)


def test_language_headings_and_viewport(text: str):
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html")[0][0]["lang"] == "en"
    assert page.all("title")[0][1] == "run <x>: evaluation"
    assert [heading for _, heading in page.all("h1")] == ["run <x>"]
    assert len(page.all("h2")) == 6 and len(page.all("main")) == 1
    assert any(one.get("name") == "viewport" and "width=device-width" in one["content"] for one, _ in page.all("meta"))


def test_nothing_comes_from_outside(text: str):
    page = Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script", text)
    for _, attributes, _ in page.elements:
        for name in ("src", "srcset", "href"):
            assert (attributes.get(name) or "data:").startswith("data:")


def test_every_figure_has_words_and_a_dark_version(text: str):
    page = Page(text)
    pictures, dark = page.all("img"), page.all("source")
    names = ("conditional_acceptance", "reliability", "throughput", "another")
    assert [one["alt"] for one, _ in pictures] == [f'alt of "{name}"' for name in names]
    assert len(dark) == 4 and all(one["media"] == "(prefers-color-scheme: dark)" for one, _ in dark)
    for (light, _), (other, _), theme in zip(pictures, dark, [LIGHT] * 4, strict=True):
        drawn = [base64.b64decode((one or "").split(",")[1]).decode() for one in (light["src"], other["srcset"])]
        assert theme.lines[0].lower() in drawn[0] and DARK.lines[0].lower() in drawn[1]
    assert [caption for _, caption in page.all("figcaption")] == ["caption <1>"] * 4


def test_tables_have_captions_and_headings_and_the_numbers(text: str):
    page = Page(text)
    tables = page.all("table")
    assert len(tables) == len(page.all("caption")) == 2 * 3 + 1 + 1 + 6 + 3 + 1
    scopes = [one.get("scope") for one, _ in page.all("th")]
    assert set(scopes) == {"col", "row"}
    assert all(
        one["tabindex"] == "0" and one["aria-label"] for one, _ in page.all("div") if one.get("class") == "scroll"
    )
    rows = [heading for one, heading in page.all("th") if one["scope"] == "row"]
    assert rows.count("a<b") == 6 and "plain" in rows and "head" in rows
    cells = [cell for _, cell in page.all("td")]
    for shown in ("2.500", "2.250 to 2.750", "0.81", "0.42", "1.25", "-0.30", "3.5", "1.2", "51", "100", "2.50", "–"):
        assert shown in cells, shown
    everything = "".join(part for _, _, parts in page.elements[:1] for part in parts)
    assert "2 of 9 greedy answers differ" in everything and "320 drafting where it pays, ratio 3.20" in everything
    assert "table & co" in everything
    for shown in ("1.062", "0.938", "6.540", "123.4", "58", "0.27", "4.50", "17", "72", "71", "1e-07"):
        assert shown in cells, shown
    assert "a.jsonl:4" in rows and "early stop, head" in rows and "fixed 2" in rows
    assert "calibration error 0.046, AUC 0.789, Brier score –" in everything


def test_a_run_without_speed_calibration_load_and_figures():
    metrics = make_metrics()
    for one in (metrics, metrics["temperatures"]["0.0"]):
        one.update(dict.fromkeys(("tokens_per_second", "baseline_tokens_per_second", "speedup", "speedup_ci95")))
    metrics.update(greedy_identical=True, greedy_different=0)
    page = Page(report(metrics, None, None, {}, []))
    assert not page.all("img") and len(page.all("table")) == 6
    everything = "".join(page.elements[0][2])
    assert "All 9 greedy answers are token-identical" in everything and "None" not in everything


def test_both_colour_schemes_are_readable(text: str):
    """Contrast (WCAG) of text and of the lines of figures against their page."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    soft = re.findall(r"--soft: (#\w{6})", text)
    for theme, quiet in zip((LIGHT, DARK), soft, strict=True):
        assert contrast(theme.ink, theme.paper) > 7 and contrast(quiet, theme.paper) > 4.5
        assert all(contrast(line, theme.paper) > 3 for line in theme.lines)
