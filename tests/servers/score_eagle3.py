"""Runs in the environment of speculators: what the package's own EAGLE-3 computes of given features.

Reads {"drafter": directory, "arrays": file, "output": file, "steps": number} from standard input. The arrays: features,
tokens and last_hidden of one sequence, the target's embedding and head, and the ids of the draft vocabulary.
"""

import json
import sys

import numpy as np
import torch
from speculators import SpeculatorModel
from speculators.losses import resolve_loss_config
from speculators.losses.eager import kl_div_loss
from speculators.models.attention import create_float_mask
from speculators.models.eagle3 import core

DECAY = 0.8


def main() -> None:
    """Writes the logits of every step, its mean loss, and every gradient of the summed loss.

    The sum is over rows and steps, without the package's own denominators, which differ from step to step.
    """
    asked = json.load(sys.stdin)
    given = {name: torch.from_numpy(value) for name, value in np.load(asked["arrays"]).items()}
    model = SpeculatorModel.from_pretrained(asked["drafter"]).float()
    model.config.transformer_layer_config._attn_implementation = "eager"  # which has gradients on a CPU
    model._attn_impl, model._create_mask_fn = "eager", create_float_mask
    model.verifier_norm = torch.nn.Identity()  # the states are normed already
    model.embed_tokens.weight = torch.nn.Parameter(given["embedding"], requires_grad=False)
    model.verifier_lm_head.weight = torch.nn.Parameter(given["head"][given["ids"]], requires_grad=False)
    found, theirs, sums = {}, core.compute_metrics, []

    def recorded(logits, targets, loss_mask, prev_correct, step, decay, loss_config=None):  # noqa: ANN001, ANN202
        found[f"logits{step}"] = logits[0]
        mean, metrics = theirs(logits, targets, loss_mask, prev_correct, step, decay, loss_config=loss_config)
        found[f"loss{step}"] = mean
        rows = slice(None, logits.shape[1] - step)
        sums.append(decay**step * kl_div_loss(logits[:, rows], targets[:, step:]).sum())
        return mean, metrics

    core.compute_metrics = recorded
    rows = len(given["tokens"]) - 1  # as the package shifts them: feature t stands with token t + 1
    model(
        given["features"][None, :-1],
        given["tokens"][None, 1:],
        torch.zeros(1, rows, dtype=torch.long),
        loss_mask=torch.ones(1, rows, dtype=torch.bool),
        verifier_last_hidden_states=given["last_hidden"][None, 1:],
        ttt_steps=asked["steps"],
        ttt_step_loss_decay=DECAY,
        loss_config=resolve_loss_config("kl_div", "eager"),
    )
    found["loss"] = torch.stack(sums).sum()
    found["loss"].backward()
    found |= {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    maps = {name: getattr(model, name) for name in ("d2t", "t2d") if getattr(model, name) is not None}
    np.savez(asked["output"], **{name: value.detach().numpy() for name, value in {**found, **maps}.items()})
    print("RESULT " + json.dumps({"class": type(model).__name__}))


main()
