"""Runs in the environment of speculators: what the package's own classes compute of given features.

Reads {"drafter": directory, "arrays": file, "output": file} from standard input. The arrays: features, tokens,
loss_mask and last_hidden of one sequence, anchors, and the target's embedding and head.
"""

import json
import sys

import numpy as np
import torch
from speculators import SpeculatorModel
from speculators.losses import resolve_loss_config
from speculators.models.attention import create_float_mask
from speculators.models.dflash import core


def chosen(model: SpeculatorModel, hidden: torch.Tensor, logits: torch.Tensor, given: dict) -> dict:
    """Candidates of every row and their scores after the true token before, [A, rows, K]; and the greedy walk."""
    size, anchors, selector = model.block_size, given["anchors"], model.candidate_selector
    hidden, logits = (values.reshape(len(anchors), size, -1) for values in (hidden, logits))
    rows = anchors[:, None] + torch.arange(size)
    before = given["tokens"][torch.cat([rows[:, :1], rows[:, :-1]], dim=1)]
    ids, scores = selector.select(logits, hidden, before)
    walk, previous = [], given["tokens"][anchors]
    for row in range(1, size):
        candidates, edges = selector.select(logits[:, row], hidden[:, row], previous)
        previous = candidates.gather(-1, edges.argmax(-1, keepdim=True))[:, 0]
        walk.append(previous)
    return {"candidates": ids, "scores": scores, "walk": torch.stack(walk, dim=1)}


def main() -> None:
    """Writes hidden states, logits, the loss (KL with the target, and what the kind adds) and every gradient."""
    asked = json.load(sys.stdin)
    given = {name: torch.from_numpy(value) for name, value in np.load(asked["arrays"]).items()}
    model = SpeculatorModel.from_pretrained(asked["drafter"]).float()
    model.config.transformer_layer_config._attn_implementation = "eager"  # which has gradients on a CPU
    model._create_mask_fn = create_float_mask
    model.verifier_norm = torch.nn.Identity()  # the states are normed already
    for module, weight in {"embed_tokens": "embedding", "lm_head": "head", "verifier_lm_head": "head"}.items():
        getattr(model, module).weight = torch.nn.Parameter(given[weight], requires_grad=False)
    core.select_anchors = lambda *_: (given["anchors"], torch.ones(len(given["anchors"]), dtype=torch.bool))
    batch = {name: given[name][None] for name in ("features", "tokens", "loss_mask", "last_hidden")}
    inputs = (batch["features"], batch["tokens"], batch["loss_mask"], batch["last_hidden"], 0 * batch["tokens"])
    hidden, logits, _, mask, _ = model._backbone_forward(*inputs, max_anchors=len(given["anchors"]))
    found = {"hidden": hidden, "logits": logits, "mask": mask}
    if type(model).__name__ != "DSparkDraftModel":
        loss: dict = {"loss_config": resolve_loss_config("kl_div", "eager")}
        if hasattr(model, "candidate_selector"):
            loss["tv_loss_fn"] = resolve_loss_config("tv", "eager")["tv"][0]
            found |= chosen(model, hidden, logits, given)
        _, found["loss"], _ = model(*inputs, max_anchors=len(given["anchors"]), **loss)
        found["loss"].backward()
        found |= {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    np.savez(asked["output"], **{name: value.detach().numpy() for name, value in found.items()})
    print("RESULT " + json.dumps({"class": type(model).__name__}))


main()
