"""The demo: wrong flags are told before anything is loaded. What it records is in `test_live.py`, with the engines."""

from pathlib import Path
from typing import Any

import pytest

from dspark_jax.config import InputError
from dspark_jax.demo import demo
from dspark_jax.serve.pool import Pool
from tests.serve.live import Make

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
