"""The model card of an exported drafter: what it is, what it was trained on, how well it drafts, how to serve it."""

import json
from collections.abc import Mapping
from typing import Any

from dspark_jax.config import DrafterConfig


def model_card(
    name: str,
    drafter: DrafterConfig,
    target: str,
    *,
    form: str,
    fingerprint: str = "",
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    side_files: tuple[str, ...] = (),
) -> str:
    """README.md with the front matter that the Hugging Face hub reads.

    Args:
      name: of the drafter.
      drafter: its settings.
      target: name or path of the model it drafts for.
      form: the export's format, which decides who can serve it.
      fingerprint: of the target's weights (`target.loading.fingerprint`).
      data: content of `data/report.json`.
      metrics: content of `eval/metrics.json`.
      side_files: of calibration.json and cost_table.json those that lie in the directory.
    """
    hub = target if target.count("/") == 1 and not target.startswith((".", "/")) else ""
    front = [
        "---",
        *([f"base_model: {hub}"] if hub else []),
        "tags:",
        "- speculative-decoding",
        f"- {drafter.kind}",
        "---",
    ]
    sections = [
        "\n".join(front),
        f"# {name}",
        _facts(drafter, target, fingerprint),
        _training(data),
        _tau(metrics),
        _serving(drafter, target, form, side_files),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _facts(drafter: DrafterConfig, target: str, fingerprint: str) -> str:
    heads = "no heads"
    if drafter.markov_rank:
        kind = "" if drafter.markov_head_type == "vanilla" else f"{drafter.markov_head_type} "
        heads = f"a {kind}Markov head of rank {drafter.markov_rank}"
        heads += " and a confidence head" if drafter.confidence_head else ""
    lines = [
        f"A {drafter.kind} draft model for speculative decoding with `{target}`. It drafts {drafter.block_size} tokens "
        "per round; whatever it drafts, the output has the target's distribution.",
        "",
        f"- {drafter.num_layers} layers, {heads}; the block begins with its anchor (`sample_from_anchor: true`)",
        f"- reads the outputs of the target's layers {list(drafter.target_layer_ids)} (-1: the embeddings)",
        f"- mask token {drafter.mask_token_id}",
        "- embedding and LM head are the target's; copies of them in the weights are frozen",
    ]
    if fingerprint:
        lines.append(f"- trained for target weights with fingerprint `{fingerprint}`")
    return "\n".join(lines)


def _training(data: Mapping[str, Any] | None) -> str:
    if not data:
        return ""
    inputs = data.get("inputs", {}).get("data", {})
    answers = "answers that came with the prompts"
    if inputs.get("regenerate", True):
        answers = f"answers of the target at temperature {inputs.get('temperature', 1.0):g}"
    lines = [
        "## Training data",
        "",
        f"{data['samples']} conversations with {answers}: {data['tokens']} tokens, {data['loss_tokens']} of them "
        "supervised.",
        "",
        "| prompt set | samples | tokens | supervised |",
        "|---|---|---|---|",
    ]
    for name, counts in data["prompt_sets"].items():
        lines.append(f"| {name} | {counts['samples']} | {counts['tokens']} | {counts['loss_tokens']} |")
    return "\n".join(lines)


def _tau(metrics: Mapping[str, Any] | None) -> str:
    if not metrics:
        return ""
    lines = [
        "## Accepted length",
        "",
        f"Tokens per round (tau, the bonus token included) at temperature {metrics.get('temperature', 1.0):g}, with "
        "95 % bootstrap intervals over prompts, and the share of rounds in which the first k drafts are accepted.",
        "",
        "| prompt set | tau | 95 % | k = 1 | k = last |",
        "|---|---|---|---|---|",
    ]
    for name, row in metrics["prompt_sets"].items():
        low, high = row["tau_ci95"]
        survival = row["survival"]
        lines.append(f"| {name} | {row['tau']:.2f} | {low:.2f}-{high:.2f} | {survival[0]:.2f} | {survival[-1]:.2f} |")
    if metrics.get("tau") is not None:
        low, high = metrics["tau_ci95"]
        lines.append(f"| all | {metrics['tau']:.2f} | {low:.2f}-{high:.2f} | | |")
    return "\n".join(lines)


def _serving(drafter: DrafterConfig, target: str, form: str, side_files: tuple[str, ...]) -> str:
    """Commands for each server that can load this; the reason for each that cannot."""
    size, method = drafter.block_size, "eagle3" if drafter.kind == "eagle3" else "dspark"
    settings: dict[str, Any] = {"method": method, "model": "DIR", "num_speculative_tokens": size}
    if method == "dspark":
        settings |= {"draft_sample_method": "probabilistic"}
    vllm = f"vllm serve {target} --speculative-config '{json.dumps(settings)}'"
    if form == "speculators":
        vllm += "\nvllm serve DIR  # the target is named in config.json"
    lines = [
        "## Serving",
        "",
        "`DIR` is this directory. Keep `dflash` and `eagle3` out of its path unless that is the method: vLLM goes by "
        "it. `python -m dspark_jax.convert check --drafter DIR --target TARGET` tells beforehand what will work.",
    ]
    vanilla = drafter.markov_head_type == "vanilla"
    if vanilla:
        lines += ["", "vLLM (without `probabilistic` drafts are greedy, and fewer are accepted at temperature 1):", ""]
        lines.append(_code(vllm))
    else:
        lines += ["", f"vLLM and llama.cpp have no {drafter.markov_head_type} Markov head and cannot serve it."]
    if form == "universal" and method == "dspark":
        sglang = (
            f"python -m sglang.launch_server --model-path {target} --speculative-algorithm DSPARK "
            f"--speculative-draft-model-path DIR --speculative-dspark-block-size {size}"
        )
        if "calibration.json" in side_files:
            sglang += " --speculative-dspark-confidence-sts-path DIR/calibration.json"
        if "cost_table.json" in side_files:
            sglang += " --speculative-dspark-sps-table-path DIR/cost_table.json"
        lines += ["", "SGLang:", "", _code(sglang)]
    if form == "universal" and method == "dspark" and vanilla:
        llama = (
            f"python convert_hf_to_gguf.py DIR --target-model-dir {target} --outtype bf16 --outfile drafter.gguf\n"
            f"llama-server -m target.gguf -md drafter.gguf --spec-type draft-dspark --spec-draft-n-max {size} -fa on"
        )
        lines += ["", "llama.cpp:", "", _code(llama)]
    return "\n".join(lines)


def _code(text: str) -> str:
    return f"```\n{text}\n```"
