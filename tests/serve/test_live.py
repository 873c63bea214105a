"""The live routes: what they send is the engine's trace, what is wrong is refused, and nobody is left behind."""

import http.client
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.demo import demo
from dspark_jax.evaluation.measured_costs import shown_costs
from dspark_jax.serve import background
from dspark_jax.serve.pool import Pool
from dspark_jax.serve.server import running
from dspark_jax.serve.service import Limits
from dspark_jax.serve.watch import Ask, Watch
from tests.serve.live import PROMPTS, Client, Make, events, with_prompts
from tests.serve.test_answers import paused, until
from tests.serve.test_page import Elements

ASK: dict[str, Any] = {"model": "tiny", "domain": "math", "index": 1, "max_tokens": 30, "scheduler": "threshold"}


@pytest.fixture(scope="module")
def pool(make_pool: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with with_prompts(make_pool(), tmp_path_factory.mktemp("prompts")) as pool:
        yield pool


@pytest.fixture(scope="module")
def client(pool: Pool) -> Iterator[Client]:
    with running(pool, limits=Limits(body=2000)) as (url, _):
        yield Client(url)


def without_times(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in event.items() if "seconds" not in name} for event in found]


def test_state(client: Client, pool: Pool) -> None:
    status, state = client.ask("GET", "/live/state")
    assert status == 200 and state["domains"] == PROMPTS
    assert [model["name"] for model in state["models"]] == list(pool.names)
    tiny, plain = state["models"][0], state["models"][-1]
    assert (tiny["kind"], tiny["block_size"], tiny["confident"]) == ("dspark", 3, True)
    assert "early_stop" in tiny["schedulers"] and plain["schedulers"] == ["fixed"] and plain["block_size"] == 0
    assert (state["default"], state["plain"], state["slots"]) == ("tiny", "plain", pool.sizes.slots)
    assert state["device"] == pool.device and state["limits"]["users"] == 64
    assert state["costs"] == shown_costs()


def test_a_run_is_the_engines_trace(client: Client, pool: Pool) -> None:
    """The first one compiles, and says so; numbers are those of the request's own metrics."""
    first, *found = client.run(ASK)
    assert "Compiling tiny with the scheduler threshold" in first["preparing"]
    watch = Watch(pool)
    request = watch.submit(Ask("tiny", "threshold", None, "math", 1, max_tokens=30))
    own = json.loads(json.dumps([*watch.events(request)]))
    assert without_times(found) == without_times(own)
    assert found[-1]["done"] and found[-1]["tau"] == request.metrics.emitted / request.metrics.rounds
    assert any(event["admitted"] < 3 for event in found[1:-1])  # the scheduler cuts
    text = "".join(event["text"] for event in found)
    plain = client.run({"model": "plain", "prompt": PROMPTS["math"][1], "max_tokens": 30})
    assert text == "".join(event["text"] for event in plain if "preparing" not in event)
    assert all(not event["drafted"] for event in plain if "round" in event)


@pytest.mark.slow  # for its compiling
def test_a_sampled_run_follows_its_seed(client: Client) -> None:
    def texts(seed: int) -> str:
        found = client.run(ASK | {"temperature": 1.0, "seed": seed, "max_tokens": 20})
        return "".join(event.get("text", "") for event in found)

    assert texts(1) == texts(1) != texts(2)


def test_who_goes_away_cancels(client: Client, pool: Pool) -> None:
    engine = pool.engine("tiny", "threshold")
    client.run(ASK)
    before = engine.metrics.finished["cancelled"]
    with client.asking("POST", "/live/runs", ASK | {"max_tokens": 150}) as response:
        assert next(events(response))["round"] == 0
    until(lambda: engine.metrics.finished["cancelled"] == before + 1 or not engine.running)
    assert engine.metrics.finished["cancelled"] == before + 1
    with paused(engine), client.asking("POST", "/live/runs", ASK):  # one that has no token yet
        until(lambda: engine.waiting == 1)
    until(lambda: engine.metrics.finished["cancelled"] == before + 2)


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "big"}, 404, "there is no model"),
    ({"scheduler": "best"}, 400, "scheduler"),
    ({"scheduler": 3}, 400, "scheduler is a JSON int"),
    ({"domain": "poems"}, 400, "there are math, code"),
    ({"index": 2}, 400, "index=2: math has prompts 0 to 1"),
    ({"prompt": "hello"}, 400, "not both"),
    ({"domain": None}, 400, "give prompt"),
    ({"domain": None, "prompt": "  "}, 400, "prompt is empty"),
    ({"domain": None, "prompt": "sum " * 300}, 400, "capacity"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"max_tokens": 513}, 400, "max_tokens=513: at most 512"),
    ({"seed": -1}, 400, "seed"),
    ({"tokens": 4}, 400, "did you mean max_tokens?"),
]


def test_what_is_wrong_is_refused_by_name(client: Client) -> None:
    client.run(ASK)
    for change, expected, words in WRONG:
        status, said = client.ask("POST", "/live/runs", ASK | change)
        assert (status, words in said["error"]["message"]) == (expected, True), (change, said)
    for body, words in (({}, "users is missing"), ({"users": 65}, "at most 64"), ({"users": 1, "a": 2}, "no such")):
        status, said = client.ask("PUT", "/live/load", body)
        assert (status, words in said["error"]["message"]) == (400, True), said
    assert client.ask("PUT", "/live/runs", {})[0] == 405
    with client.asking("POST", "/live/runs") as response:  # no JSON: a page from elsewhere cannot send it unasked
        assert response.status == 415


def test_a_full_queue_is_429(client: Client, pool: Pool) -> None:
    client.run(ASK)
    engine = pool.engine("tiny", "threshold")
    with paused(engine):
        waiting = [engine.submit([1], max_new_tokens=1) for _ in range(engine.max_queue)]
        with client.asking("POST", "/live/runs", ASK) as response:
            assert (response.status, response.getheader("retry-after")) == (429, "1")
            assert "the queue is full" in json.loads(response.read())["error"]["message"]
    for request in waiting:
        request.result()


def metrics(client: Client) -> Iterator[dict[str, Any]]:
    with client.asking("GET", "/live/metrics") as response:
        yield from events(response)


def test_background_users_and_figures(client: Client, pool: Pool) -> None:
    client.run(ASK)
    engine = pool.engine("tiny", "threshold")
    load = {"users": 5, "model": "tiny", "scheduler": "threshold"}
    assert client.ask("PUT", "/live/load", load) == (200, {"users": 5})
    seen = metrics(client)
    figure = next(one for one in seen if one["running"] == 3 and one["queue"] and one["tokens_per_second"])
    assert figure["users"] == 5 and 1 <= figure["accepted_length"] <= 4 and 1 <= figure["budget"] <= 4
    (own,) = [one for one in figure["engines"] if one["scheduler"] == "threshold"]
    assert (own["model"], own["slots"], own["running"]) == ("tiny", 3, 3)
    watched = client.run(ASK)  # in between, with others in its rounds
    assert max(event["running"] for event in watched[1:-1]) == 3
    client.ask("PUT", "/live/load", load | {"users": 2})
    assert next(one for one in seen if one["users"] == 2)
    client.ask("PUT", "/live/load", {"users": 1, "model": "plain"})  # they go where they are wanted
    until(lambda: not engine.running and not engine.waiting)
    assert client.ask("DELETE", "/live/load") == (200, {"users": 0})
    assert next(one for one in seen if not one["users"] and not one["running"])


def test_the_file_of_the_demo_holds_what_was_recorded(
    pool: Pool, make_pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pool, "open", lambda *_, **__: with_prompts(make_pool(), tmp_path))
    watch = Watch(pool)
    request = watch.submit(Ask("tiny", "threshold", domain="math", max_tokens=16))
    own = json.loads(json.dumps([*watch.events(request)]))
    file = tmp_path / "demo.html"
    flags: dict[str, Any] = {"schedulers": ["threshold"], "users": ["2", "0"], "temperatures": ["0"], "tokens": 16}
    recording = demo(pool.config, tmp_path, out=str(file), **flags)
    said = capsys.readouterr().err
    assert "demo: wrote" in said and f"{file.stat().st_size / 1e6:.1f} MB" in said

    (text,) = [text for tag, text in Elements(file.read_text("utf-8")).inside if '"runs"' in text and tag == "script"]
    found = json.loads(text)
    assert found == json.loads(json.dumps(recording))
    state = found["state"]
    assert (state["users"], state["temperatures"], state["schedulers"]) == ([0, 2], [0.0], ["fixed", "threshold"])
    assert state["domains"] == {name: texts[:1] for name, texts in PROMPTS.items()}
    keys = [(run["model"], run["scheduler"], run["domain"], run["users"]) for run in found["runs"]]
    drafters = [(name, "threshold") for name in ("tiny", "other")]
    models = [*drafters, ("plain", "fixed")]
    assert keys == [(*one, domain, users) for one in models for users in (0, 2) for domain in PROMPTS]

    alone, loaded = (run["events"] for run in found["runs"][:3:2])
    for one, other in zip(alone, own, strict=True):
        assert {name: one.get(name) for name in ("text", "accepted", "admitted", "next")} == {
            name: other.get(name) for name in ("text", "accepted", "admitted", "next")
        }
        for short, long in zip(one.get("drafted", ()), other.get("drafted", ()), strict=True):
            assert short["id"] == long["id"] and short["confidence"] == pytest.approx(long["confidence"], abs=1e-4)
    assert max(event["running"] for event in loaded[:-1]) == 3  # with the background users
    assert [event["text"] for event in loaded] == [event["text"] for event in alone]


def test_users_whom_nobody_asks_for_leave(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "LEASE", 0.3)
    users = background.Background(pool, lambda: [[1, 2, 3]])
    users.set(2, pool.engine("tiny", "threshold"))
    assert users.count == 2
    until(lambda: users.count == 0)


def test_a_server_that_shuts_down_is_not_kept(make_pool: Make, tmp_path: Path) -> None:
    """Neither by streams of figures nor by its own users, which end when draining begins."""
    with with_prompts(make_pool(), tmp_path) as pool, running(pool) as (url, _):
        client, engine = Client(url), pool.engine("tiny", "threshold")
        client.ask("PUT", "/live/load", {"users": 2, "model": "tiny", "scheduler": "threshold"})
        seen = metrics(client)
        assert next(one for one in seen if one["running"])
        pool.draining = True
        end = time.monotonic() + 10
        assert all(time.monotonic() < end for _ in seen)
        until(lambda: not engine.running and not engine.waiting)


def test_a_key_is_asked_for_but_not_for_the_page(make_pool: Make, tmp_path: Path) -> None:
    with with_prompts(make_pool(), tmp_path) as pool, running(pool, api_key="secret") as (url, _):
        with Client(url).asking("GET", "/") as response:
            assert response.status == 200
        for method, path in (("GET", "/live/state"), ("POST", "/live/runs"), ("GET", "/live/metrics")):
            assert Client(url).ask(method, path, {} if method == "POST" else None)[0] == 401
        assert Client(url, {"Authorization": "Bearer secret"}).ask("GET", "/live/state")[0] == 200


def test_without_prompts_ones_own_text_can_be_asked(make_pool: Make) -> None:
    with make_pool() as pool:  # the config names no files
        assert Watch(pool).state()["domains"] == {}
        assert len(Watch(pool).ids(Ask("tiny", "fixed", "one and one"))) > 3


def test_a_client_that_takes_nothing_ends(client: Client) -> None:
    """A connection that is closed while the page's stream of figures is open."""
    connection = http.client.HTTPConnection(client.url.removeprefix("http://"), timeout=10)
    connection.request("GET", "/live/metrics")
    connection.getresponse().readline()
    connection.close()
    assert client.ask("GET", "/live/state")[0] == 200
