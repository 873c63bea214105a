"""Rebuilds the embedded target and its prompt sets from this CPython installation: no download, two CPU cores, ~75 min.

    python -m tests.quickstart.builder.build --out my_quickstart --minutes 75
    python -m tests.quickstart.builder.build --out my_quickstart --resume        # after a kill
    python -m tests.quickstart.builder.build --out my_quickstart --export-only   # the latest checkpoint, at any time

Writes OUT/target (a Hugging Face directory) and OUT/prompts; the checkpoint and the tokenizer lie in WORK.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import jax
from tokenizers import Tokenizer

from dspark_jax.errors import InputError
from dspark_jax.paths import check_local
from tests.quickstart.builder import pretrain
from tests.quickstart.builder.card import model_card
from tests.quickstart.builder.corpus import DOMAINS, Library, conversations, libraries
from tests.quickstart.builder.export import write_target
from tests.quickstart.builder.packing import MIXTURE, Rows, rows
from tests.quickstart.builder.prompt_sets import write_prompt_sets
from tests.quickstart.builder.report import math_accuracy, measure
from tests.quickstart.builder.stdlib_items import python_version
from tests.quickstart.builder.tokenizer import save_tokenizer, train_tokenizer

TOKENIZER_SAMPLE = {"math": 3000, "code": 9000, "chat": 6000}  # conversations


def prepare_tokenizer(work: Path, library: Library, seed: int) -> Tokenizer:
    """The tokenizer of this build: learned once, from training conversations only."""
    path = work / "tokenizer" / "tokenizer.json"
    if not path.exists():
        sample = [c for d, n in TOKENIZER_SAMPLE.items() for c in islice(conversations(d, library, seed), n)]
        save_tokenizer(train_tokenizer(text for c in sample for text in c.messages), path.parent)
    return Tokenizer.from_file(str(path))


def heldout_rows(tokenizer: Tokenizer, library: Library, batch: int, count: int = 2) -> dict[str, list[Rows]]:
    """A fixed set of held-out rows of each domain."""
    return {d: list(islice(rows(tokenizer, library, {d: 1.0}, batch, seed=1), count)) for d in DOMAINS}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.quickstart.builder.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder that gets target/ and prompts/")
    add("--work", type=Path, help="folder of the checkpoint and the tokenizer (default: OUT/work)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--minutes", type=float, default=75.0, help="wall-clock budget; the learning rate follows it (default: 75)"
    )
    length.add_argument("--steps", type=int, help="train for this many steps instead")
    add("--batch", type=int, default=8, help="rows of 384 tokens per step (default: 8)")
    add("--rate", type=float, default=4e-3, help="peak learning rate (default: 0.004)")
    add("--seed", type=int, default=0, help="of initialisation, data order and prompt sets (default: 0)")
    add("--resume", action="store_true", help="go on from the checkpoint in WORK; its time counts towards --minutes")
    add(
        "--export-only",
        action="store_true",
        help="no training: export the latest checkpoint, also while another run trains",
    )
    add("--note", default="", help="a sentence for the model card about what was special in this build")
    add("--no-report", action="store_true", help="skip sampling answers; report held-out losses only")
    args = parser.parse_args(arguments)
    args.work = args.work or args.out / "work"
    try:
        check_local("--out", args.out)
        check_local("--work", args.work)
    except InputError as error:
        parser.error(str(error))
    exists = checkpoint_of(args.work).exists()
    if args.export_only and not exists:
        parser.error(f"--export-only: no checkpoint in {args.work}; train first, or give its folder with --work")
    if exists and not (args.resume or args.export_only):
        parser.error(f"{args.work} holds a checkpoint; add --resume to go on from it, or choose another --work")
    return args


def checkpoint_of(work: Path) -> Path:
    """Where a build keeps its training state."""
    return work / "checkpoint.npz"


def main(arguments: list[str] | None = None) -> None:
    """Corpus, tokenizer, training, export, prompt sets, report."""
    args = parse(arguments)
    work, checkpoint = args.work, checkpoint_of(args.work)
    work.mkdir(parents=True, exist_ok=True)
    split = libraries()
    tokenizer = prepare_tokenizer(work, split["train"], args.seed)
    heldout = heldout_rows(tokenizer, split["heldout"], args.batch)
    if args.export_only:
        params, state = pretrain.fresh(args.seed)
        params, _, progress = pretrain.load(checkpoint, params, state)
    else:

        def batches(first_step: int) -> Iterator[Rows]:
            return rows(tokenizer, split["train"], MIXTURE, args.batch, args.seed + 1000 * first_step)

        budget = pretrain.Budget(None if args.steps else args.minutes, args.steps, args.rate)
        params, progress = pretrain.train(batches, heldout, checkpoint, budget, seed=args.seed, resume=args.resume)
    model = pretrain.model_of(params)
    write_target(model, tokenizer, args.out / "target")
    write_prompt_sets(tokenizer, split, args.out / "prompts", args.seed)
    figures = asdict(progress) | {
        "note": args.note,
        "python": python_version(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "heldout_loss": {d: pretrain.heldout_loss(params, sets) for d, sets in heldout.items()},
    }
    if not args.no_report:
        figures["math_accuracy"] = math_accuracy(model, tokenizer, split["heldout"])
        figures["sampled"] = measure(model, tokenizer, args.out / "prompts")
        (args.out / "target" / "README.md").write_text(model_card(figures), "utf-8")
    (work / "report.json").write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    examples = [e for v in figures.get("sampled", {}).values() for e in v.pop("examples")[:2]]
    for prompt, text in examples:
        print(f"--- {prompt}\n{text}")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
