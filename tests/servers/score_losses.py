"""Runs in the environment of speculators: its losses of given logits, weighted as its DFlash weighs them.

Reads {"arrays": file, "output": file, "losses": [[name, loss, weights], ...], "block": rows} from standard input; the
arrays are logits and targets [1, T, V] and a mask [1, T].
"""

import json
import sys

import numpy as np
import torch
from speculators.losses import resolve_loss_config
from speculators.models.dflash.metrics import compute_metrics


def main() -> None:
    """Writes, by name, each loss and its gradient in the logits."""
    asked = json.load(sys.stdin)
    given = {name: torch.from_numpy(value) for name, value in np.load(asked["arrays"]).items()}
    found = {}
    for name, loss, weights in asked["losses"]:
        logits = given["logits"].clone().requires_grad_()
        value, _ = compute_metrics(
            logits, given["targets"], given["mask"], asked["block"], loss_config=resolve_loss_config(loss, "eager"),
            per_position_loss_weight=weights, sample_from_anchor=True,
        )  # fmt: skip
        value.backward()
        found |= {name: value.detach().numpy(), f"{name} slope": logits.grad.numpy()}
    np.savez(asked["output"], **found)
    print("RESULT {}")


main()
