"""Runs in the environment of speculators: loads an export with the package's own classes.

Reads {"drafter": directory} from standard input.
"""

import json
import sys

import torch
from safetensors.torch import load_file
from speculators import SpeculatorModel


def main() -> None:
    """Prints the class, what its config says, and which tensors of the file are not the model's."""
    directory = json.load(sys.stdin)["drafter"]
    model = SpeculatorModel.from_pretrained(directory)
    state, stored = model.state_dict(), load_file(f"{directory}/model.safetensors")
    other = [name for name, value in stored.items() if name not in state or not torch.equal(state[name].float(), value)]
    names = ("block_size", "mask_token_id", "aux_hidden_state_layer_ids", "sample_from_anchor", "markov_rank")
    config = {name: getattr(model.config, name, None) for name in names}
    missing = [name for name in state if name not in stored and not name.startswith("verifier")]
    found = {"class": type(model).__name__, "config": config, "other": other, "missing": missing}
    print("RESULT " + json.dumps(found))


main()
