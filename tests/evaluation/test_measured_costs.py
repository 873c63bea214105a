"""Round times that come with the package, as tables on which load is replayed."""

import json
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.config import InputError
from dspark_jax.evaluation.load import CONCURRENCIES
from dspark_jax.evaluation.measured_costs import INVENTED, as_cost_table, cost_tables, costs_for, measured_with
from dspark_jax.kinds import KINDS

FILES = cost_tables()


def content(**other: object) -> dict:
    return {
        "name": "a card",
        "source": "Measured.",
        "limits": "Nothing else.",
        "drafted_rounds": [{"rows": 4, "milliseconds": 2.0}, {"rows": 8, "milliseconds": 4.0}],
        "plain_rounds": [{"requests": 1, "milliseconds": 1.0}, {"requests": 3, "milliseconds": 2.0}],
        **other,
    }


@pytest.mark.parametrize("file", FILES, ids=[one["name"] for one in FILES])
def test_files_say_how_they_were_measured(file: dict) -> None:
    assert {"name", "source", "limits", "device", "versions"} <= set(file)
    assert file["kinds"] and set(file["kinds"]) <= set(KINDS) and file["block_size"] > 0
    for points, key in ((file["drafted_rounds"], "rows"), (file["plain_rounds"], "requests")):
        assert [one[key] for one in points] == sorted({one[key] for one in points})
        assert all(one["milliseconds"] > 0 for one in points)


@pytest.mark.parametrize("file", FILES, ids=[one["name"] for one in FILES])
def test_what_was_measured_stands_in_the_table(file: dict) -> None:
    table = as_cost_table(file)
    for one in file["drafted_rounds"]:
        assert table.speculative[one["rows"]] == pytest.approx(1e3 / one["milliseconds"])
    for one in file["plain_rounds"]:
        assert table.without_drafts[one["requests"]] == pytest.approx(1e3 / one["milliseconds"])
    rows = file["block_size"] + 1
    requests = file["plain_rounds"][-1]["requests"]
    assert table.covers(requests, rows) and not table.covers(requests + 1, rows)
    assert file["limits"] in table.about and not table.invented


def test_times_between_are_on_a_line() -> None:
    table = as_cost_table(content())
    np.testing.assert_allclose(1e3 / table.speculative, [2, 2, 2, 2, 2, 2.5, 3, 3.5, 4])
    np.testing.assert_allclose(1e3 / table.without_drafts, [1, 1, 1.5, 2])


def test_load_is_replayed_on_what_was_measured_with_such_drafters_or_on_what_is_asked_for(tmp_path: Path) -> None:
    card = costs_for(None, "dspark", 7)
    assert "H100" in card.name and not card.invented
    for given, kind in ((None, "eagle3"), (INVENTED, "dspark")):
        table = costs_for(given, kind, 7)
        assert table.invented and table.covers(max(CONCURRENCIES), 8)
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"sample_batch_tokens": [1], "sample_steps_per_sec": [9.0]}))
    own = costs_for(str(file), "dspark", 7)
    assert (own.name, own.invented) == ("own.json", False)
    with pytest.raises(InputError, match="missing.json: cannot be read"):
        costs_for(str(tmp_path / "missing.json"), "dspark", 7)


def test_a_table_is_of_the_kind_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGLE-3 drafts token by token, and longer blocks in other times: nothing measured says in which."""
    assert measured_with("dspark", 7) is not None and measured_with("dflash", 7) is not None
    assert measured_with("eagle3", 7) is None and measured_with("dspark", 16) is None
    files = [content(kinds=["mtp"], block_size=3, name=name) for name in ("first", "second")]
    monkeypatch.setattr("dspark_jax.evaluation.measured_costs.cost_tables", lambda: files)
    table = measured_with("mtp", 3)
    assert table is not None and table.name == "first"
