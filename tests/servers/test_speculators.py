"""The speculators package loads an export in its format: all tensors, and the settings that the drafter has."""

import pytest

from tests.servers.conftest import serve

pytestmark = pytest.mark.servers


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_its_own_classes_load_the_export(given, exported, kind):
    """Served as DSpark in either case; layer ids count inputs there, so they are one higher."""
    directory = exported(kind, "speculators")
    found = serve(given("--speculators-python"), "read_speculators.py", {"drafter": str(directory)})
    assert found["class"] == "DSparkDraftModel" and found["other"] == [] and found["missing"] == []
    assert found["config"] == {
        "block_size": 7, "mask_token_id": 4095, "aux_hidden_state_layer_ids": [1, 2, 3, 4, 5],
        "sample_from_anchor": True, "markov_rank": 64 if kind == "dspark" else 16,
    }  # fmt: skip
