"""Round times that come with the package, as tables on which load is replayed."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dspark_jax.config import InputError
from dspark_jax.evaluation.load import CONCURRENCIES
from dspark_jax.evaluation.measured_costs import INVENTED, as_card, cost_files, costs_for, shown_costs
from dspark_jax.kinds import KINDS

FILES = cost_files()


def content(**other: object) -> dict:
    return {
        "name": "a card",
        "source": "Measured.",
        "limits": "Nothing else.",
        "kinds": ["mtp"],
        "block_size": 3,
        "device": "another one",
        "drafted_rounds": [
            {"requests": 1, "rows": 4, "milliseconds": 2.3},
            {"requests": 3, "rows": 12, "milliseconds": 4.9},
        ],
        "plain_rounds": [{"requests": 1, "milliseconds": 1.0}, {"requests": 3, "milliseconds": 3.0}],
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
def test_what_was_measured_is_what_a_card_says(file: dict) -> None:
    """Two rounds with drafts exactly; more of them are fitted."""
    card, most = as_card(file), 1e-3 if len(file["drafted_rounds"]) == 2 else 0.25
    for one in file["drafted_rounds"]:
        rate = card.at(one["requests"]).speculative[one["rows"]]
        assert rate == pytest.approx(1e3 / one["milliseconds"], rel=most)
    for one in file["plain_rounds"]:
        table = card.at(one["requests"])
        assert table.without_drafts[one["requests"]] == pytest.approx(1e3 / one["milliseconds"])
    rows, requests = file["block_size"] + 1, file["plain_rounds"][-1]["requests"]
    assert card.covers(requests, rows) and not card.covers(requests + 1, rows) and not card.covers(requests, rows + 1)
    assert file["limits"] in card.about and not card.invented


def test_what_lies_between_follows_from_the_rule() -> None:
    """Plain rounds of 1, 2, 3 ms; drafting takes 1 ms and a draft 0.1: 1 + 1 + 3 x 0.1, and 3 + 1 + 9 x 0.1."""
    card = as_card(content())
    assert (card.draft, card.row) == (pytest.approx(1e-3), pytest.approx(1e-4))
    two = card.at(2)
    np.testing.assert_allclose(1e3 / two.speculative[2:9], 3 + 0.1 * np.arange(7))
    assert 1e3 / two.without_drafts[2] == pytest.approx(2)
    assert len(two.speculative) == 13


def test_the_page_replays_by_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspark_jax.evaluation.measured_costs.cost_files", lambda: (content(),))
    (shown,) = shown_costs()
    assert shown == content(draft_milliseconds=pytest.approx(1.0), row_milliseconds=pytest.approx(0.1))


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


def test_costs_are_of_the_drafter_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGLE-3 drafts token by token, and longer blocks in other times: nothing measured says in which."""
    assert not costs_for(None, "dflash", 7).invented and costs_for(None, "dspark", 16).invented
    files = tuple(content(name=name) for name in ("first", "second"))
    monkeypatch.setattr("dspark_jax.evaluation.measured_costs.cost_files", lambda: files)
    assert costs_for(None, "mtp", 3).name == "first"
    files = (*files, content(name="of this machine", device=jax.devices()[0].device_kind))
    assert costs_for(None, "mtp", 3).name == "of this machine"


def test_a_card_of_ones_own(tmp_path: Path) -> None:
    """As `released.py --card` writes it, wherever it lies; what is wrong in it is one line."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(content(name="mine")))
    assert (card := costs_for(str(file), "dspark", 7)).name == "mine" and card.at(2).draft_seconds > 0
    wrong = content(drafted_rounds=[{"requests": 1}]), content(plain_rounds=[]), content(plain_rounds=3)
    plain = [{"requests": count, "milliseconds": time} for count, time in ((1, 1.0), (2, -1.0), (3, 3.0))]
    slow = [{"requests": count, "milliseconds": time} for count, time in ((1, 1.0), (3, 9.0))]  # more rows, less time
    fast = [{"requests": count, "rows": 4 * count, "milliseconds": time} for count, time in ((1, 0.1), (3, 4.9))]
    for one in (*wrong, content(plain_rounds=plain), content(plain_rounds=slow), content(drafted_rounds=fast)):
        file.write_text(json.dumps(one))
        with pytest.raises(InputError, match="mine.json: .*; measure it again with released.py --card"):
            costs_for(str(file), "dspark", 7)
