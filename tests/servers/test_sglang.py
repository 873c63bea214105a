"""SGLang's own reading of an export's config.json, from its wheel: the settings that the drafter was trained with."""

import json

import pytest
from safetensors.numpy import load_file

from tests.servers.conftest import serve

pytestmark = pytest.mark.servers


@pytest.mark.parametrize("kind", ["dspark", "dflash"])
def test_its_parser_reads_what_was_trained(given, exported, kind):
    directory, python = exported(kind), given("--sglang-python")
    found = serve(python, "read_sglang.py", {"source": str(given("--sglang-source")), "drafter": str(directory)})
    raw, read = json.loads((directory / "config.json").read_text()), found["config"]
    for name in ("target_layer_ids", "mask_token_id", "markov_rank", "markov_head_type", "num_hidden_layers"):
        assert read[name] == raw[name], name
    assert read["gamma"] == raw["block_size"] == 7 and read["sample_from_anchor"] is True
    assert set(found["heads"]) == {"markov_head.", "confidence_head."}
    names = set(load_file(directory / "model.safetensors"))
    assert {name for name in names if name.startswith(tuple(found["heads"]))} == {
        "markov_head.markov_w1.weight", "markov_head.markov_w2.weight", "confidence_head.proj.weight",
        "confidence_head.proj.bias",
    }  # fmt: skip
