"""The model card of an exported drafter: what it is, what it was trained on, how well it drafts, how to serve it.

What it says is in `templates/card.md`; here is what of it depends on the drafter.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dspark_jax.convert.dialect import same
from dspark_jax.convert.drafter_files import Verdict
from dspark_jax.convert.export import Content, Source
from dspark_jax.convert.layouts import Layout, read_layout
from dspark_jax.convert.servers import serving
from dspark_jax.hub import is_hub_id
from dspark_jax.kinds import KINDS, served_as
from dspark_jax.templates import render


def model_card(
    name: str,
    source: Source,
    content: Content,
    verdicts: Sequence[Verdict],
    *,
    fingerprint: str = "",
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    vocabulary: Mapping[str, Any] | None = None,
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
      vocabulary: content of `draft_vocabulary.json`.
      side_files: of calibration.json and cost_table.json those that lie in the directory.
    """
    drafter, written = source.config, content.source.config
    block = not KINDS[drafter.kind].token_by_token
    added = [
        *([f"an all-zero Markov head of rank {written.markov_rank}"] if not drafter.markov_rank else []),
        *(["a confidence head that is always certain"] if not drafter.confidence_head else []),
    ]
    return render(
        "card.md",
        name=name,
        target=source.target_name,
        hub_target=is_hub_id(source.target_name),
        drafter=drafter,
        heads=_heads(drafter.markov_rank, drafter.markov_head_type, confidence=drafter.confidence_head),
        block=block,
        fill_in=drafter.block_layout == "fill_in",
        method=served_as(drafter),
        added=added if block and written != drafter else [],
        frozen=source.frozen,
        fingerprint=fingerprint,
        data=_data(data) if data else None,
        metrics=metrics,
        vocabulary=vocabulary,
        vocab_size=source.arch.vocab_size,
        notes=source.notes,
        servers=list(_servers(source, content, verdicts, side_files)),
        cost_table="cost_table.json" in side_files,
    )


def _heads(rank: int, kind: str, *, confidence: bool) -> str:
    """The heads of a drafter in words."""
    if rank and kind == "selector":
        return f"convolutions along the block, and a candidate selector of rank {rank}"
    heads = [f"a {'' if kind == 'vanilla' else f'{kind} '}Markov head of rank {rank}"] if rank else []
    return " and ".join([*heads, *(["a confidence head"] if confidence else [])]) or "no heads"


def _data(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the card says of `data/report.json`."""
    inputs = report.get("inputs", {}).get("data", {})
    return {
        **report,
        "regenerated": inputs.get("regenerate", True),
        "temperature": inputs.get("temperature", 1.0),
    }


def _servers(
    source: Source, content: Content, verdicts: Sequence[Verdict], side_files: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """By server a command and what to know of it, or the reason why there is none, or why that is not known."""
    stated, commands = read_layout("config.json", content.config), _commands(source, content, side_files)
    for verdict in verdicts:
        if verdict.server not in serving():
            continue
        if verdict.unknown and not verdict.refusals:
            yield {"server": verdict.server, "unknown": "; ".join(verdict.unknown), "reason": ""}
            continue
        reason = _refused(verdict, stated)
        if not reason and verdict.server in OWN_EMBEDDING:
            reason = source.own_embedding
        if not reason and verdict.server not in commands:
            continue
        about, code = commands.get(verdict.server, ("", ""))
        notes = [note for note in (about, *verdict.notes) if note]
        yield {"server": verdict.server, "unknown": "", "reason": reason, "notes": notes, "code": code}


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
    method = served_as(source.config) or ""
    settings: dict[str, Any] = {"method": method, "model": "DIR", "num_speculative_tokens": size}
    about = ""
    if method != "eagle3":
        settings |= {"draft_sample_method": "probabilistic"}
        about = "without `probabilistic` drafts are greedy, and fewer are accepted at temperature 1"
    vllm = f"vllm serve {target} --speculative-config '{json.dumps(settings)}'"
    if "speculators_model_type" in content.config:
        vllm += "\nvllm serve DIR  # the target is named in config.json"
    number = "--speculative-num-draft-tokens" if method == "dflash" else "--speculative-dspark-block-size"
    drafting = f"--model-path {target} --speculative-algorithm {method.upper()} --speculative-draft-model-path DIR"
    rows = source.config.block_rows  # for a DSpark its drafts, for a DFlash the rows of its block
    sglang = f"python -m sglang.launch_server {drafting} {number} {rows if method == 'dflash' else size}"
    if "calibration.json" in side_files and method == "dspark":
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
        f"llama-server -m target.gguf -md drafter.gguf --spec-type draft-{method} --spec-draft-n-max {size} -fa on "
        "--jinja"
    )
    commands = {"vLLM": (about, vllm), "SGLang": ("", sglang), "llama.cpp": ("", llama)}
    greedy = {key: value for key, value in settings.items() if key != "draft_sample_method"}
    eager = {"enforce_eager": True} if method == "dspark" else {}
    commands["vllm-ascend"] = ("", f"vllm serve {target} --speculative-config '{json.dumps(greedy | eager)}'")
    if method == "eagle3":
        chain = f"--speculative-num-steps {size} --speculative-eagle-topk 1 --speculative-num-draft-tokens {size + 1}"
        commands["SGLang"] = ("", f"python -m sglang.launch_server {drafting} {chain}")
        commands["sglang-jax"] = ("", f"python -m sgl_jax.launch_server {drafting} {chain}")
        commands["tpu-inference"] = ("", vllm)
        commands["TensorRT-LLM"] = ("in Python", _tensorrt_llm(target, size, "Eagle3DecodingConfig"))
    if method == "dflash":
        commands["tpu-inference"] = ("", f"vllm serve {target} --speculative-config '{json.dumps(greedy)}'")
        chain = f"--speculative-num-draft-tokens {rows} --speculative-num-steps 1 --speculative-eagle-topk 1"
        commands["sglang-jax"] = ("", f"python -m sgl_jax.launch_server {drafting} {chain}")
        commands["TensorRT-LLM"] = ("in Python", _tensorrt_llm(target, size, "DFlashDecodingConfig"))
    return commands


def _tensorrt_llm(target: str, drafts: int, settings: str) -> str:
    """A program: names of its command's settings change from version to version."""
    return (
        "from tensorrt_llm import LLM\n"
        f"from tensorrt_llm.llmapi import {settings}\n"
        f'drafter = {settings}(max_draft_len={drafts}, speculative_model="DIR")\n'
        f'llm = LLM("{target}", speculative_config=drafter)'
    )
