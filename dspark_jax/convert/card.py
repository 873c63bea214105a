"""The model card of an exported drafter: what it is, what it was trained on, how well it drafts, how to serve it."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_jax.convert.dialect import same
from dspark_jax.convert.drafter_files import Verdict
from dspark_jax.convert.export import Content, Source, served_as
from dspark_jax.convert.layouts import Layout, read_layout
from dspark_jax.convert.servers import NO_SERVERS
from dspark_jax.hub import is_hub_id
from dspark_jax.kinds import KINDS


def model_card(
    name: str,
    source: Source,
    content: Content,
    verdicts: Sequence[Verdict],
    *,
    fingerprint: str = "",
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    side_files: tuple[str, ...] = (),
) -> str:
    """README.md with the front matter that the Hugging Face hub reads.

    Args:
      name: of the drafter.
      source: the drafter as it was trained.
      content: what is written of it (`export.content`).
      verdicts: of the servers on that (`servers.replay`).
      fingerprint: of the target's weights (`target.loading.fingerprint`).
      data: content of `data/report.json`.
      metrics: content of `eval/metrics.json`.
      side_files: of calibration.json and cost_table.json those that lie in the directory.
    """
    target = source.target_name
    front = [
        "---",
        *([f"base_model: {target}"] if is_hub_id(target) else []),
        "tags:",
        "- speculative-decoding",
        f"- {source.config.kind}",
        "---",
    ]
    sections = [
        "\n".join(front),
        f"# {name}",
        _facts(source, content, fingerprint),
        _training(data),
        _tau(metrics),
        _serving(source, content, verdicts, side_files),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _facts(source: Source, content: Content, fingerprint: str) -> str:
    drafter, written = source.config, content.source.config
    heads = _heads(drafter.markov_rank, drafter.markov_head_type, confidence=drafter.confidence_head)
    layers = f"{drafter.num_layers} layer{'s' if drafter.num_layers > 1 else ''}"
    block = not KINDS[drafter.kind].token_by_token
    lines = [
        f"A draft model ({drafter.kind}) for speculative decoding with `{source.target_name}`. It drafts "
        f"{drafter.block_size} tokens per round; whatever it drafts, the output has the target's distribution.",
        "",
        f"- {layers}, {heads}" + ("; the block begins with its anchor (`sample_from_anchor: true`)" if block else ""),
        f"- reads the outputs of the target's layers {list(drafter.target_layer_ids)} (-1: the embeddings)",
    ]
    added = [
        *([f"an all-zero Markov head of rank {written.markov_rank}"] if not drafter.markov_rank else []),
        *(["a confidence head that is always certain"] if not drafter.confidence_head else []),
    ]
    if block and written != drafter and added:
        lines.insert(3, f"- the file has {' and '.join(added)} besides, which servers want and which change no draft")
    if block:
        lines.append(f"- mask token {drafter.mask_token_id}")
    copies = "the copies of them in the weights are frozen" if source.frozen else "they are not in the weights"
    lines.append(f"- embedding and LM head are the target's; {copies}")
    if fingerprint:
        lines.append(f"- trained for target weights with fingerprint `{fingerprint}`")
    return "\n".join(lines)


def _heads(rank: int, kind: str, *, confidence: bool) -> str:
    """The heads of a drafter in words."""
    heads = [f"a {'' if kind == 'vanilla' else f'{kind} '}Markov head of rank {rank}"] if rank else []
    return " and ".join([*heads, *(["a confidence head"] if confidence else [])]) or "no heads"


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
        "95 % bootstrap intervals over prompts, and the share of rounds in which the first k drafts are accepted. "
        "Drafts are sampled as the target is; a server that drafts greedily accepts fewer at temperatures above 0.",
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


def _serving(source: Source, content: Content, verdicts: Sequence[Verdict], side_files: tuple[str, ...]) -> str:
    """By server a command, or the reason why there is none."""
    lines = [
        "## Serving",
        "",
        "`DIR` is this directory. Keep `dflash` and `eagle3` out of its path unless that is the method; vLLM reads it.",
    ]
    if not source.arch.unsupported:  # check scores a drafter on its target, which has to run here
        tells = "tells beforehand what will work."
        lines[-1] += f" `python -m dspark_jax.convert check --drafter DIR --target TARGET` {tells}"
    if source.notes:
        lines += ["", *source.notes]
    stated, commands = read_layout("config.json", content.config), _commands(source, content, side_files)
    for verdict in verdicts:
        if verdict.server in NO_SERVERS:
            continue
        reason = _refused(verdict, stated)
        if not reason and verdict.server in OWN_EMBEDDING:
            reason = source.own_embedding
        if reason:
            lines += ["", f"{verdict.server} cannot serve it: {reason}."]
            continue
        if verdict.server not in commands:
            continue
        about, code = commands[verdict.server]
        notes = "; ".join(note for note in (about, *verdict.notes) if note)
        lines += ["", verdict.server + (f" ({notes})" if notes else "") + ":", "", f"```\n{code}\n```"]
        if verdict.server == "SGLang":
            lines += ["", SGLANG_COSTS]
            lines += [OUR_COSTS] if "cost_table.json" in side_files else []
    return "\n".join(lines)


SGLANG_COSTS = (
    "With `SGLANG_RAGGED_VERIFY_MODE=compact` it verifies as many drafts as pay, if it knows what its own steps cost: "
    "start it once with `SGLANG_DSPARK_ENABLE_SPS_RECORD=1 SGLANG_SIMULATE_ACC_LEN=1.0`, record a table with "
    "`python -m sglang.benchmark.dspark_sps_profiler all`, and give it with `--speculative-dspark-sps-table-path`."
)
OUR_COSTS = (
    "`cost_table.json` is no such table, though it has the layout: it holds the rounds per second of dspark_jax on the "
    "device that it names."
)

OWN_EMBEDDING = ("SGLang", "llama.cpp")
"""Servers that take the embedding from the target, whatever is in the file."""


def _refused(verdict: Verdict, stated: Layout) -> str:
    """Why a server refuses the file, or computes something else than what was trained; empty if neither."""
    if verdict.refusals or verdict.wrong:
        return "; ".join(verdict.refusals or verdict.wrong)
    assert verdict.reading is not None
    return "" if same(verdict.reading, stated) else "it understands the file's block layout or layer ids differently"


def _commands(source: Source, content: Content, side_files: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """By server what to know of its command, and the command."""
    target, size = source.target_name, source.config.block_size
    method = served_as(source.config)
    settings: dict[str, Any] = {"method": method, "model": "DIR", "num_speculative_tokens": size}
    about = ""
    if method == "dspark":
        settings |= {"draft_sample_method": "probabilistic"}
        about = "without `probabilistic` drafts are greedy, and fewer are accepted at temperature 1"
    vllm = f"vllm serve {target} --speculative-config '{json.dumps(settings)}'"
    if "speculators_model_type" in content.config:
        vllm += "\nvllm serve DIR  # the target is named in config.json"
    sglang = (
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm DSPARK "
        f"--speculative-draft-model-path DIR --speculative-dspark-block-size {size}"
    )
    if "calibration.json" in side_files:
        sglang += " --speculative-dspark-confidence-sts-path DIR/calibration.json"
    here, fetch = target, ""
    if is_hub_id(target):  # the converter wants a directory
        here, fetch = "target", f"hf download {target} --local-dir target\n"
    tell = ""
    if source.split:  # its converter knows tokenizers by their ids alone
        tell = f"sed -i '/def get_vocab_base_pre/a\\        return \"{source.split}\"' conversion/base.py\n"
    llama = (
        f"{fetch}{tell}python convert_hf_to_gguf.py {here} --outtype bf16 --outfile target.gguf\n"
        f"python convert_hf_to_gguf.py DIR --target-model-dir {here} --outtype bf16 --outfile drafter.gguf\n"
        f"llama-server -m target.gguf -md drafter.gguf --spec-type draft-dspark --spec-draft-n-max {size} -fa on "
        "--jinja"
    )
    return {"vLLM": (about, vllm), "SGLang": ("", sglang), "llama.cpp": ("", llama)}
