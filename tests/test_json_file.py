"""JSON files that are there whole or not at all."""

from pathlib import Path

import pytest

from dspark_jax.errors import InputError
from dspark_jax.json_file import read_ours, write_json


def test_what_cannot_be_written_leaves_nothing_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a\.json"):
        write_json(tmp_path / "a.json", {"b": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(InputError, match=r"a\.json: cannot be read \(Is a directory\); remove it and run again"):
        read_ours(tmp_path / "a.json")


def test_json_that_is_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"a\.json: not valid JSON \(nested too deeply\); remove it and run again"):
        read_ours(tmp_path / "a.json")
