"""The demo: one file that holds what was recorded; wrong flags are told before anything is loaded."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.config import InputError
from dspark_jax.demo import demo
from dspark_jax.serve.pool import Pool
from dspark_jax.serve.watch import Ask, Watch
from tests.serve.live import PROMPTS, Make, with_prompts
from tests.serve.test_page import Elements


@pytest.fixture
def pool(make_pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pool]:
    """What `demo` opens."""
    with with_prompts(make_pool(), tmp_path) as pool:
        monkeypatch.setattr(Pool, "open", lambda *_, **__: pool)
        yield pool


def test_the_file_holds_what_was_recorded(pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"users": ["many"]}, "--users has 'many'"),
    ({"users": ["65"]}, "0 to 64"),
    ({"users": []}, "--users is empty"),
    ({"temperatures": ["nan"]}, "--temperatures has 'nan'"),
    ({"schedulers": ["best"]}, "--schedulers"),
    ({"schedulers": []}, "--schedulers is empty"),
    ({"prompts": 0}, "--prompts=0"),
    ({"tokens": 1000}, "--tokens=1000"),
    ({"out": "nowhere/demo.html"}, "--out=nowhere/demo.html"),
    ({"out": "."}, "--out=.: no file can be there"),
    ({"drafter": ["x"]}, "a name and a working directory are needed"),
]


def test_wrong_flags(served_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pool, "open", lambda *_, **__: pytest.fail("it was loaded"))
    for flags, words in WRONG:
        with pytest.raises(InputError) as error:
            demo(served_config, tmp_path, **flags)
        assert words in str(error.value) and "\n" not in str(error.value), flags
    assert not [*tmp_path.iterdir()]


def test_without_prompts_nothing_is_recorded(make_pool: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_pool() as pool:
        monkeypatch.setattr(Pool, "open", lambda *_, **__: pool)
        with pytest.raises(InputError, match="no prompt of eval.prompts"):
            demo(pool.config, tmp_path, out=str(tmp_path / "demo.html"))
    assert not (tmp_path / "demo.html").exists()
