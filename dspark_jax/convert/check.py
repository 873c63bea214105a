"""Will a drafter directory work where it is going to be served? The report of `convert check`."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dspark_jax.architecture import Unsupported
from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.convert.dialect import Answer, Dialect, find_dialect, same
from dspark_jax.convert.drafter_files import Verdict
from dspark_jax.convert.export import frozen_tensors
from dspark_jax.convert.hf import drafter_config, drafter_shape, load_tensors, of_tensors
from dspark_jax.convert.layouts import (
    STAGES,
    Layout,
    default_taps,
    has_stages,
    layers_config,
    read_config,
    read_layout,
    unsupported_parts,
)
from dspark_jax.convert.llama_tokenizer import split_to_tell
from dspark_jax.convert.mapping import FROZEN, VOCABULARY_MAPS
from dspark_jax.convert.servers import replay, servers, serving
from dspark_jax.target.in_torch import runs_in_torch
from dspark_jax.target.interface import LanguageModel
from dspark_jax.target.loading import read_checkpoint

_PART = 1 << 22
"""Values that are looked at together."""


_TENSORS = re.compile(
    r"(model\.)?("
    r"(embed_tokens|lm_head|fc|norm|hidden_norm)\.weight|d2t|t2d"
    r"|(markov_head|confidence_head|candidate_selector)\..*"
    r"|(layers\.\d+|midlayer)\.(self_attn\.([qkvo]_proj|[qk]_norm)\.weight|mlp\.(gate|up|down)_proj\.weight"
    r"|\w*layernorm\.weight|hidden_norm\.weight|(attention|mlp)_conv\..*|layer_scalar)"
    r"|mtp\.\d+\..*"
    r")"
)
"""Names of tensors of which this package knows what they are: one too many of these is a mistake in the file."""

WORKS, WRONG, UNKNOWN = "works", "wrong", "not known here"
VERDICTS = {WORKS: 0, WRONG: 1, UNKNOWN: 3}
"""What is said of a drafter in the end, and the exit status that says it; 2 is bad input, as everywhere."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that was found out about a directory.

    Attributes:
      stated: what its config says.
      problems: what is wrong with it wherever it is served: tensors, frozen copies, dialect.
      unsupported: what of it has no implementation here, so that it cannot be scored; empty if all has.
      dialect: the scores, or None where the drafter could not be loaded here.
      verdicts: one per server.
    """

    stated: Layout
    problems: tuple[str, ...]
    unsupported: tuple[str, ...]
    dialect: Dialect | None
    verdicts: tuple[Verdict, ...]

    @property
    def verdict(self) -> str:
        """One of `VERDICTS`."""
        words = {self.served(verdict)[0] for verdict in self.verdicts if verdict.server in serving()}
        if self.problems:
            return WRONG
        if words <= {"refuses", "unknown"}:  # of those whose rules are known none loads it
            return UNKNOWN if self.unsupported and "unknown" in words else WRONG
        if self.unknown:
            return UNKNOWN
        return WORKS if "serves" in words else WRONG

    @property
    def good(self) -> bool:
        """Nothing is wrong with the drafter, and a server drafts with it as it was trained."""
        return self.verdict == WORKS

    @property
    def unknown(self) -> str:
        """Why it cannot be told whether the drafter is good; empty if it can."""
        if self.unsupported:
            return f"not implemented here, so it is not scored: {', '.join(self.unsupported)}"
        return self.dialect.unknown or self.dialect.weak or self.dialect.close if self.dialect else "it is not scored"

    def served(self, verdict: Verdict) -> tuple[str, str]:
        """(serves, loads, differs, refuses or unknown; why) for one server; it loads a drafter that is not scored."""
        if verdict.refusals:
            return "refuses", "; ".join(verdict.refusals)
        if verdict.unknown:
            return "unknown", "; ".join(verdict.unknown)
        assert verdict.reading is not None
        reasons = [*verdict.wrong]
        if not self.dialect:
            reading = f"it reads {describe(verdict.reading)}"
            return ("differs" if reasons else "loads"), "; ".join([*reasons, reading])
        score, best = self.dialect.of(verdict.reading), self.dialect.best
        told = not self.dialect.unknown
        if not same(verdict.reading, best.layout) and (score is None or not told or best.beats(score)):
            shown = f"; {score.tau:.2f} tokens per round instead of {best.tau:.2f}" if score and told else ""
            reasons.append(f"it reads {describe(verdict.reading)}{shown}")
        if reasons:
            return "differs", "; ".join(reasons)
        tau = score and (score.greedy_tau if verdict.greedy else score.tau)
        return "serves", f"{tau:.2f} tokens per round" if tau else ""

    def lines(self) -> list[str]:
        """The report as text."""
        found = [f"{self.stated.dialect} dialect: {describe(self.stated)}"]
        if self.dialect:
            found.append(
                f"accepts {self.dialect.stated.tau:.2f} tokens per round as stated (expected at temperature 1)"
            )
        found += [f"WRONG: {problem}" for problem in self.problems]
        found += [f"UNKNOWN: {self.unknown}"] if self.unknown else []
        for verdict in self.verdicts:
            word, why = self.served(verdict)
            found.append(f"{verdict.server:<12} {word:<8} {why}".rstrip())
            found += [f"{'':<21} {note}" for note in verdict.notes if word not in ("refuses", "unknown")]
        return [*found, f"verdict: {self.verdict}"]

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        scores = [
            {"taps": list(s.layout.taps), "mask_token_id": s.layout.mask_token_id}
            | {"anchor_first": s.layout.anchor_first, "tau": s.tau}
            for s in (self.dialect.scores if self.dialect else ())
        ]
        read = {one.name: {"version": one.version, "date": one.date.isoformat()} for one in servers()}
        told = {}
        for verdict in self.verdicts:
            word, why = self.served(verdict)
            told[verdict.server] = {"verdict": word, "why": why, "notes": list(verdict.notes)} | read[verdict.server]
        found = {"verdict": self.verdict, "good": self.good, "problems": list(self.problems), "unknown": self.unknown}
        return found | {"scores": scores, "servers": told}


def describe(layout: Layout) -> str:
    """A reading in one line."""
    if layout.family == "eagle3":
        taps = f"outputs of layers {list(layout.taps)}" if layout.taps else "layers left to the server"
        parts = ["EAGLE-3" if layout.qk_norms else "EAGLE-3 with a layer of Llama", taps, *layout.eagle3_norms]
        return ", ".join([*parts, *([f"{layout.draft_vocab_size} tokens"] if layout.draft_vocab_size else [])])
    order = "anchor-first" if layout.anchor_first else "fill-in"
    heads = f"{layout.markov_head_type} Markov head of rank {layout.markov_rank}" if layout.markov_rank else "no heads"
    if layout.markov_head_type == "selector":
        heads = f"convolutions, and a selector of rank {layout.markov_rank} among {layout.selector_top_k}"
    return (
        f"{order} blocks of {layout.block_size}, outputs of layers {list(layout.taps)}, mask token "
        f"{layout.mask_token_id}, {heads}"
    )


def check_directory(
    directory: Path,
    target: LanguageModel,
    target_directory: Path,
    answers: Sequence[Answer],
    mesh: Mesh,
    *,
    masks: Sequence[int] = (),
) -> Report:
    """Replays the servers' rules on a directory and scores the dialects it may be in.

    Args:
      directory: of the drafter.
      target: the loaded target.
      target_directory: where its files are.
      answers: greedy answers of the target.
      mesh: to load the drafter on.
      masks: tokens that might be the mask, besides the stated one.

    Raises:
      InputError: there is no drafter in the directory, or it is damaged.
    """
    raw = read_config(directory)
    stated = read_layout(str(directory / "config.json"), raw)
    if not stated.taps:
        stated = dataclasses.replace(stated, taps=default_taps(target.arch.num_hidden_layers))
    tensors = read_checkpoint(directory)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    if has_stages(raw):  # the rest is the target
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(STAGES)}
    verdicts = replay(str(directory), raw, shapes, target.arch, split_to_tell(target_directory))
    own_head = stated.draft_vocab_size > 0
    problems = [*value_problems(tensors), *frozen_problems(tensors, lent(target, target_directory), own_head=own_head)]
    others = list(other_target(raw, stated, target.arch))
    problems += others
    unsupported, dialect = unsupported_parts(raw), None
    if not (unsupported or others):
        try:
            drafter = _load(directory, raw, stated, mesh, target.dtype)
        except Unsupported as error:
            unsupported.append(error.what)
        except InputError as error:
            strange = [name for name in tensors if not _TENSORS.fullmatch(name)]
            if strange:  # a part that this package has never heard of
                unsupported.append(f"tensor {strange[0]}")
            else:
                problems.append(str(error))
        else:
            dialect = find_dialect(drafter, target, stated, answers, masks)
            problems += dialect.findings()
    return Report(stated, tuple(problems), tuple(unsupported), dialect, tuple(verdicts))


def _load(directory: Path, raw: Mapping[str, Any], stated: Layout, mesh: Mesh, dtype: Any) -> Any:
    """The drafter, or `InputError`."""
    path = directory / "config.json"
    arch, config = drafter_shape(path, raw, stated), drafter_config(str(path), stated, raw)
    if stated.family == "eagle3":
        config = of_tensors(directory, config, arch, read_checkpoint(directory))
    if stated.family == "block":  # scoring is by readings; what the module knows of them only tells executables
        config = dataclasses.replace(
            config,
            block_size=stated.block_size,
            block_layout="anchor_first",
            target_layer_ids=tuple(range(len(stated.taps))),
            mask_token_id=0,
        )
    return load_tensors(directory, arch, config, mesh, dtype=dtype, finite=False)


def other_target(raw: Mapping[str, Any], stated: Layout, target: TargetArchitecture) -> Iterator[str]:
    """In what a drafter's shape shows that it is for another target, with which it cannot even be tried."""
    layers = layers_config(raw)
    width = raw.get("target_hidden_size") or layers.get("hidden_size")
    for name, mine in (("hidden_size", width), ("vocab_size", layers.get("vocab_size"))):
        other = getattr(target, name)
        if mine not in (None, other):
            yield f"it is for another target: {name.replace('_', ' ')} {mine}, the target has {other}"
    last = target.num_hidden_layers - 1
    if not all(-1 <= i <= last for i in stated.taps):
        yield f"it is for another target: layer ids {list(stated.taps)}, the target's are -1..{last}"
    if stated.family != "block":
        return
    if not 0 <= stated.mask_token_id < target.vocab_size:
        yield f"mask_token_id {stated.mask_token_id} is outside the target's vocabulary 0..{target.vocab_size - 1}"
    if stated.block_size > target.max_position_embeddings:
        yield f"block_size {stated.block_size} exceeds the target's {target.max_position_embeddings} positions"


def value_problems(tensors: Mapping[str, np.ndarray]) -> Iterator[str]:
    """Names tensors with values that are not finite."""
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        parts = (flat[i : i + _PART] for i in range(0, flat.size, _PART))
        if not all(np.isfinite(part).all() for part in parts):
            yield f"tensor {name} holds values that are not finite: train or download it again"


def lent(target: LanguageModel, directory: Path) -> Mapping[str, np.ndarray]:
    """Embedding and LM head of a target by the names of `FROZEN`: those in its files, whose names differ in models that
    have no definition here; of these, what drafters are trained with."""
    if runs_in_torch(target):
        every = target.embed(jnp.arange(target.arch.vocab_size))
        return dict(zip(FROZEN, map(np.asarray, (every, target.head)), strict=True))
    return frozen_tensors(directory)


def frozen_problems(
    tensors: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], *, own_head: bool = False
) -> list[str]:
    """Compares the copies of embedding and LM head in a drafter with the target's (some thousand rows of each).

    An LM head that is the drafter's own is left out.
    """
    ends = {True: "the drafter is for other weights; servers would use this copy", False: "it is for another target"}
    return [f"{what}: {ends[fits]}" for what, fits in other_copies(tensors, theirs, own_head=own_head)]


def other_copies(
    tensors: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], *, own_head: bool = False
) -> Iterator[tuple[str, bool]]:
    """Copies that are not the target's: what is the matter, and whether the shape at least is the target's."""
    for name in FROZEN[:1] if own_head else FROZEN:
        if name not in tensors:
            continue
        mine, other = tensors[name], theirs[name]
        if len(mine) < len(other) and set(VOCABULARY_MAPS) & set(tensors):
            continue  # a part of the target's rows
        if mine.shape != other.shape:
            yield f"{name} has shape {mine.shape}, the target's has {other.shape}", False
            continue
        step = max(len(mine) // 2048, 1)
        a, b = (np.asarray(x[::step], np.float32) for x in (mine, other))
        tolerance = 2**-7 * max(float(np.abs(b).max()), 1e-30)  # as far as bfloat16 rounds
        if not np.abs(a - b).max() <= tolerance:  # also where one of them is NaN
            yield f"{name} is not the target's", True
