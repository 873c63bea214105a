"""The page in a real browser: each control does what it says, and numbers are the engine's.

Needs a Chromium (Debian's package `chromium`) and Playwright's Python package (the extra
`test-browser`); skipped without them. `python -m pytest -m slow tests/serve/test_browser.py`
"""

import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.demo import Wanted, record
from dspark_jax.evaluation.measured_costs import as_card, shown_costs
from dspark_jax.serve.document import document
from dspark_jax.serve.pool import Pool
from dspark_jax.serve.server import running
from dspark_jax.serve.watch import Ask, Watch
from tests.serve.live import PROMPTS, Client, Make, with_prompts
from tests.serve.test_answers import paused, until

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60e3  # milliseconds that anything may take here

COMPILED = (("tiny", "fixed"), ("tiny", "threshold"), ("plain", "fixed"))
"""Models and schedulers that most tests use; they are waited for once."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"there is no {' or '.join(BROWSERS)} here")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed (the extra test-browser)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pool(make_pool: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with with_prompts(make_pool(), tmp_path_factory.mktemp("prompts")) as pool:
        yield pool


@pytest.fixture(scope="module")
def url(pool: Pool) -> Iterator[str]:
    with running(pool) as (url, _):
        for model, rule in COMPILED:
            Client(url).run({"model": model, "scheduler": rule, "domain": "math", "max_tokens": 2})
        yield url


class Page:
    """A page, and what the browser had to say about it."""

    def __init__(self, browser: Any, url: str, **options: Any):
        from playwright.sync_api import expect

        expect.set_options(timeout=SECONDS)
        self.expect, self.url = expect, url
        self.page = browser.new_page(**({"viewport": {"width": 1280, "height": 900}} | options))
        self.page.set_default_timeout(SECONDS)
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#model option", state="attached")

    def text(self, name: str) -> str:
        return self.page.text_content(f"#{name}") or ""

    def slide(self, name: str, value: int) -> None:
        self.page.locator(f"#{name}").fill(str(value))

    def go(self) -> None:
        self.page.click("#go")

    def finish(self) -> None:
        """Shows the rest as fast as it was, and waits for the end."""
        self.slide("speed", 6)
        self.expect(self.page.locator("#verdict")).not_to_be_empty()

    def close(self) -> None:
        """Nothing went wrong, and nobody else was asked."""
        assert self.errors == []
        assert all(one.startswith((self.url, "data:")) for one in self.requests), self.requests
        self.page.close()


@pytest.fixture
def page(browser: Any, url: str) -> Iterator[Page]:
    page = Page(browser, url)
    yield page
    page.close()


def own_run(pool: Pool, ask: Ask) -> list[dict[str, Any]]:
    watch = Watch(pool)
    return [*watch.events(watch.submit(ask))]


def test_numbers_are_the_engines(page: Page, pool: Pool) -> None:
    page.page.select_option("#scheduler", "threshold")
    page.page.select_option("#index", "1")
    page.page.fill("#tokens", "40")
    page.go()
    page.finish()
    request = Watch(pool).submit(Ask("tiny", "threshold", None, "math", 1, max_tokens=40))
    result, metrics = request.result(), request.metrics
    assert page.text("tau") == f"{metrics.emitted / metrics.rounds:.2f}"
    assert page.text("drafted-tokens") == page.text("plain-tokens") == str(len(result.tokens))
    assert page.text("drafted-passes") == str(metrics.rounds)
    assert page.text("plain-passes") == str(len(result.tokens) - 1)
    assert page.text("drafted-text") == page.text("plain-text") == result.text
    assert page.text("budget") == f"{1 + metrics.admitted / metrics.rounds:.2f}"  # it was alone
    assert page.page.locator("#rounds li:not([hidden])").count() == metrics.rounds + 1
    assert "Both texts are the same." in page.text("verdict")
    # A round that is chosen from the list shows what the engine has noted about it.
    pieces = [piece.round for piece in request.pieces]
    number = next(at for at, entry in enumerate(pieces) if entry and entry.admitted < len(entry.drafted))
    entry = pieces[number]
    assert entry is not None
    page.page.click(f"#rounds li:nth-child({number + 1}) button")
    assert page.text("stage-title").startswith(f"Round {number} of {metrics.rounds}")
    for fate, count in {
        "accepted": entry.accepted,
        "rejected": int(entry.accepted < entry.admitted),
        "void": max(entry.admitted - entry.accepted - 1, 0),
        "skipped": len(entry.drafted) - entry.admitted,
        "own": 1,
    }.items():
        assert page.page.locator(f"#block .chip.{fate}").count() == count, fate
    confidences = page.page.locator("#block .sure").all_text_contents()
    assert confidences == [one["confidence"] for one in _percent(request, pool, number)]


def _percent(request: Any, pool: Pool, number: int) -> list[dict[str, str]]:
    event = [*Watch(pool).events(request)][number]
    return [{"confidence": f"{int(100 * one['confidence'] + 0.5)} %"} for one in event["drafted"]]


def test_playing(page: Page) -> None:
    page.slide("speed", 1)
    page.go()
    page.page.click("#pause")  # waits until there is a round
    page.expect(page.page.locator("#pause")).to_have_text("Go on")
    shown = page.text("stage-title")
    page.page.wait_for_timeout(1300)
    assert page.text("stage-title") == shown

    def number() -> int:
        found = re.search(r"Round (\d+)", page.text("stage-title"))
        return int(found[1]) if found else 0

    before = number()
    page.page.click("#step")
    page.page.click("#step")
    assert number() == before + 2
    assert page.page.get_attribute("#story", "aria-live") == "polite"
    page.page.click("#back")
    assert number() == before + 1
    assert page.page.locator("#drafted-text .given").count() == before + 2
    page.page.click("#again")
    page.expect(page.page.locator("#pause")).to_have_text("Pause")
    assert page.page.get_attribute("#story", "aria-live") == "off"
    page.finish()
    assert page.page.is_disabled("#step") and page.page.is_disabled("#pause")


def test_choices(page: Page, pool: Pool) -> None:
    assert page.page.locator("#model option").all_text_contents() == ["tiny", "other"]
    assert page.page.locator("#domain option").all_text_contents() == [*PROMPTS, "your own text"]
    page.page.select_option("#domain", "code")
    assert page.page.input_value("#prompt") == PROMPTS["code"][0]
    assert not page.page.is_editable("#prompt")
    page.slide("temperature", 8)
    assert page.text("temperature-value") == "0.8"
    page.slide("users", 12)
    assert page.text("users-value") == "12" and "3 requests are decoded" in page.text("users-note")
    page.slide("users", 0)
    page.page.select_option("#scheduler", "threshold")
    assert "below one half" in page.text("scheduler-note")
    page.slide("temperature", 0)
    page.page.select_option("#domain", "own")
    page.page.fill("#prompt", "one and two")
    page.page.fill("#tokens", "12")
    page.go()
    page.finish()
    own = own_run(pool, Ask("tiny", "threshold", "one and two", max_tokens=12))
    assert page.text("drafted-text") == "".join(event["text"] for event in own)


def test_a_sampled_run_has_its_seed(page: Page, pool: Pool) -> None:
    page.slide("temperature", 10)
    page.page.fill("#seed", "5")
    page.page.fill("#tokens", "20")
    page.go()
    page.finish()
    own = own_run(pool, Ask("tiny", "fixed", None, "math", 0, temperature=1.0, seed=5, max_tokens=20))
    assert page.text("drafted-text") == "".join(event["text"] for event in own)
    assert "draw from the same distribution" in page.text("verdict")


def test_replay_on_a_measured_table(page: Page, pool: Pool) -> None:
    page.page.fill("#tokens", "40")
    page.go()
    page.finish()
    assert not page.page.is_visible("#clock-note")
    page.page.select_option("#clock", "0")
    (table,) = shown_costs()
    assert page.page.is_visible("#clock-note") and table["name"] in page.text("clock-text")
    assert table["source"] in page.text("clock-source")
    own = own_run(pool, Ask("tiny", "fixed", None, "math", 0, max_tokens=40))
    rounds = own[1:-1]
    costs = as_card(table).at(1).speculative
    rate = sum(event["committed"] for event in rounds) / sum(1 / costs[event["rows"]] for event in rounds)
    assert float(page.text("drafted-speed")) == pytest.approx(rate, abs=0.51)
    plain = 1e3 / table["plain_rounds"][0]["milliseconds"]
    assert float(page.text("plain-speed")) == pytest.approx(plain, abs=0.51)
    assert f"On {table['name']}: {rate / plain:.2f} times the speed" in page.text("verdict")


def test_background_users_come_and_go(page: Page, pool: Pool) -> None:
    page.slide("users", 5)
    page.page.fill("#tokens", "30")
    with paused(pool.engine("tiny", "fixed")):
        page.go()
        page.expect(page.page.locator("#server-users")).to_have_text("5")
        until(lambda: pool.engine("tiny", "fixed").waiting == 6)
    page.finish()
    page.expect(page.page.locator("#server-users")).to_have_text("0")
    assert "3 requests together" in "".join(page.page.locator("#gain").all_text_contents() + [_gains(page)])


def _gains(page: Page) -> str:
    """What is said about every round."""
    said = []
    for number in range(page.page.locator("#rounds li").count()):
        page.page.click(f"#rounds li:nth-child({number + 1}) button")
        said.append(page.text("gain"))
    return " ".join(said)


def test_stop_cancels(page: Page, pool: Pool) -> None:
    engine = pool.engine("tiny", "fixed")
    before = engine.metrics.finished["cancelled"]
    page.page.fill("#tokens", "150")
    with paused(engine):
        page.go()
        until(lambda: engine.waiting == 1)
        page.page.click("#stop")
        page.expect(page.page.locator("#status")).to_have_text("Stopped.")
        until(lambda: engine.metrics.finished["cancelled"] == before + 1)
    page.expect(page.page.locator("#go")).to_be_enabled()


def test_errors_are_told(browser: Any, url: str, pool: Pool) -> None:
    page = Page(browser, url)
    page.page.select_option("#domain", "own")
    page.go()
    page.expect(page.page.locator("#error")).to_contain_text("prompt is empty")
    engine = pool.engine("tiny", "fixed")
    page.page.select_option("#domain", "math")
    with paused(engine):
        waiting = [engine.submit([1], max_new_tokens=1) for _ in range(engine.max_queue)]
        page.go()
        page.expect(page.page.locator("#error")).to_contain_text("the queue is full")
        page.expect(page.page.locator("#error")).to_contain_text("(in 1 s)")
    for request in waiting:
        request.result()
    page.go()
    page.expect(page.page.locator("#error")).to_be_hidden()
    page.finish()
    assert all("status of 4" in error for error in page.errors)  # the browser's own words for what was refused
    page.page.close()


def test_a_server_that_goes_and_one_with_a_key(browser: Any, make_pool: Make, tmp_path: Path) -> None:
    with with_prompts(make_pool(), tmp_path) as pool, running(pool, api_key="secret") as (url, _):
        page = browser.new_page()
        page.goto(url)
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model option", state="attached")
        assert page.is_hidden("#error")
    page.wait_for_selector("#error:has-text('The server does not answer')")
    page.close()


def test_keyboard_alone(page: Page) -> None:
    """From the top of the page to the end of a run, without a mouse; what has the focus is seen."""
    keys = page.page.keyboard

    def focused() -> str:
        return page.page.evaluate("document.activeElement.id")

    def tab_to(name: str) -> None:
        for _ in range(60):
            keys.press("Tab")
            if focused() == name:
                style = page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert style == "solid", name
                return
        raise AssertionError(f"{name} is not reached by Tab")

    keys.press("Tab")
    assert page.page.evaluate("document.activeElement.className") == "skip"
    tab_to("theme")
    keys.press("ArrowDown")
    keys.press("ArrowDown")
    assert page.page.evaluate("document.documentElement.dataset.theme") == "dark"
    tab_to("model")
    tab_to("scheduler")
    keys.press("ArrowDown")
    assert page.page.input_value("#scheduler") == "threshold"
    tab_to("users")
    keys.press("ArrowRight")
    assert page.text("users-value") == "1"
    keys.press("ArrowLeft")
    tab_to("go")
    keys.press("Enter")
    page.expect(page.page.locator("#pause")).to_be_enabled()
    tab_to("pause")
    keys.press("Enter")
    tab_to("step")
    shown = page.text("stage-title")
    keys.press("Space")
    assert page.text("stage-title") != shown
    tab_to("speed")
    for _ in range(4):
        keys.press("ArrowRight")
    tab_to("clock")
    keys.press("ArrowDown")
    assert page.page.is_visible("#clock-note")
    page.page.locator("#pause").focus()
    keys.press("Enter")
    page.expect(page.page.locator("#verdict")).not_to_be_empty()


def test_hints(page: Page) -> None:
    page.page.focus("[data-hint=scheduler]")
    page.expect(page.page.locator("#tip")).to_contain_text("how many guesses")
    assert page.page.get_attribute("[data-hint=scheduler]", "aria-describedby") == "tip"
    page.page.keyboard.press("Escape")
    page.expect(page.page.locator("#tip")).to_be_hidden()
    page.page.hover("[data-hint=tau]")
    page.expect(page.page.locator("#tip")).to_contain_text("Plain decoding has 1")


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_window(browser: Any, url: str, width: int, scheme: str) -> None:
    page = Page(browser, url, viewport={"width": width, "height": 850}, color_scheme=scheme)
    page.page.select_option("#scheduler", "threshold")
    page.page.select_option("#clock", "0")
    page.go()
    page.finish()
    assert page.page.evaluate("document.documentElement.scrollWidth") == width
    wide = (
        """() => [...document.querySelectorAll(".chip")].filter((chip) => chip.scrollWidth > chip.clientWidth).length"""
    )
    for number in range(1, 4):
        page.page.click(f"#rounds li:nth-child({number}) button")
        assert page.page.evaluate(wide) == 0
    assert page.page.evaluate(CONTRAST) == []
    page.close()


CONTRAST = """() => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255)
      .map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (!/, 0\\)$/.test(colour) && colour !== "transparent") return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const low = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    const ignored = node.closest(":disabled, option, script, i");
    if (ignored || !node.checkVisibility() || !walker.currentNode.data.trim()) continue;
    const pair = [luminance(getComputedStyle(node).color), luminance(ground(node))].sort((a, b) => b - a);
    const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (contrast < 4.5) low.push([node.className || node.tagName, contrast, node.textContent.slice(0, 30)]);
  }
  return low;
}"""
"""Texts whose contrast with what is behind them is below 4.5 to 1."""


def test_a_recording_from_a_file(browser: Any, pool: Pool, tmp_path: Path) -> None:
    recording = record(pool, Wanted(("fixed", "threshold"), (0, 1), (0.0,), 1, 24))
    file = tmp_path / "demo.html"
    file.write_text(document(recording), "utf-8")
    page = Page(browser, file.as_uri())  # it plays by itself
    page.page.select_option("#model", "other")
    page.page.select_option("#scheduler", "threshold")
    page.page.select_option("#domain", "code")
    page.slide("users", 1)
    assert page.text("users-value") == "1" and page.page.is_disabled("#temperature")
    page.go()
    page.finish()
    asked = {"model": "other", "scheduler": "threshold", "domain": "code", "users": 1}
    (run,) = [one for one in recording["runs"] if asked.items() <= one.items()]
    *rounds, end = run["events"]
    assert page.text("drafted-passes") == str(end["rounds"]) and page.text("tau") == f"{end['tau']:.2f}"
    assert page.text("drafted-text") == "".join(event["text"] for event in rounds)
    assert page.text("source") == recording["about"] and page.page.is_hidden("#server")
    assert page.requests == [file.as_uri()]
    assert json.loads(page.text("recording"))["runs"] == json.loads(json.dumps(recording["runs"]))
    page.close()
