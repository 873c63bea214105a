"""The model card beside the embedded target, with the figures of the build that made it."""

from typing import Any

from tests.quickstart.builder.corpus import DOMAINS
from tests.quickstart.builder.packing import MIXTURE, ROW_LENGTH

_CARD = """\
# dspark_jax quickstart target

A language model of the Qwen3 architecture with {parameters:,} parameters ({megabytes:.1f} MB in bfloat16), trained
from scratch. It exists so that every command of dspark_jax runs offline, on a CPU, against a target that behaves like a
real one: it loads, tokenises and templates exactly like a larger Qwen3.

## What it can do

It answers three kinds of prompts in the manner of its training data: generated arithmetic and word problems with worked
steps, functions of the Python standard library from signature and docstring, and explanations of Python. It ends its
turns. Per-token entropy at temperature 1 differs between the three, which is what makes it useful for speculative
decoding.

## What it is not

It is not an assistant and knows nothing else. Its explanations sound like documentation and are often wrong; its code
is often only plausible; its arithmetic is mostly wrong. Use it to exercise drafters, not to learn from. It has had no
safety training. Figures of drafters on it say nothing about drafters on a large model.

## Training

| | |
|---|---|
| data | CPython {python}: `pydoc_data.topics`, docstrings and functions of the library; generated math |
| mixture of tokens | {mixture} |
| tokens trained on | {tokens:,} (repeats of the code and documentation included) |
| steps | {step:,} of {batch_rows} rows x {row_length} tokens |
| wall time | {minutes:.0f} minutes on two shared CPU cores |
| optimizer | Muon for the matrices, Adam for embedding and norms; linear decay by wall clock |

{note}Held-out items (functions, documentation sections, problems, chosen by a hash of their text) were not trained on.

| domain | held-out loss, nats per answer token | entropy | on training prompts | ends in 256 tokens | mean answer |
|---|---|---|---|---|---|
{rows}

Share of held-out single problems answered correctly, sampled at temperature 1: {accuracy:.0%}.

Entropy (nats per token), ends and lengths are of answers sampled at temperature 1 to the first turns of 64 prompts per
set; the held-out set unless it says otherwise.

## Format

Byte-level BPE, 4096 rows of which the last 16 are unused; numbers are split into digits; ChatML template without a
default system prompt; `<|im_end|>` ends a turn. Context seen in training: {row_length} tokens.

## Rebuild

    python -m tests.quickstart.builder.build --out DIR --minutes 75

## Licence

The weights and prompt sets derive from CPython's sources and documentation, (c) Python Software Foundation, used
under the PSF License Agreement; the prompt sets quote signatures and docstrings from it. Everything else is under this
repository's licence.
"""


def model_card(figures: dict[str, Any]) -> str:
    """The README of the target directory from the figures that `build` measured."""
    rows = []
    for domain in DOMAINS:
        held, seen = figures["sampled"][f"{domain}.heldout"], figures["sampled"][f"{domain}.train"]
        rows.append(
            f"| {domain} | {figures['heldout_loss'][domain]:.2f} | {held['entropy']:.2f} | {seen['entropy']:.2f} "
            f"| {held['stop_rate']:.0%} | {held['mean_length']:.0f} tokens |"
        )
    return _CARD.format(
        **{key: figures[key] for key in ("parameters", "python", "tokens", "step", "batch_rows")},
        megabytes=figures["parameters"] * 2 / 1e6,
        mixture=", ".join(f"{domain} {share:.0%}" for domain, share in MIXTURE.items()),
        minutes=figures["seconds"] / 60,
        row_length=ROW_LENGTH,
        note=figures["note"] + "\n\n" if figures["note"] else "",
        rows="\n".join(rows),
        accuracy=figures["math_accuracy"],
    )
