"""Held-out prompts that are in the training data: word for word, or nearly.

Two prompts are nearly the same if three quarters of the runs of five words of the held-out one are in the other;
punctuation counts as words, upper and lower case are the same. What more than half of a set's prompts share is their
form (an instruction that all of them end with, say), and does not count. Only the held-out prompts are kept in memory,
so that any number of training prompts can be compared.
"""

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from dspark_jax.config import Config, InputError
from dspark_jax.data.prompts import Prompt, content_hashes, read_prompts
from dspark_jax.progress import log

RUN = 5
"""Words in a run; of shorter prompts only those are found that are the same word for word."""

NEAR = 0.75
"""Share of a held-out prompt's runs that a training prompt has at least, to be nearly the same."""

MOST = 20
"""Pairs that are listed; all of them are counted."""

_WORD = re.compile(r"\w+|[^\w\s]")

Words = tuple[str, ...]


@dataclasses.dataclass
class _HeldOut:
    """A held-out prompt, and the training prompt most like it so far."""

    prompt: Prompt
    words: Words
    runs: set[Words]
    share: float = 0.0
    like: Prompt | None = None

    def saw(self, other: Prompt, share: float) -> None:
        if share > self.share and share >= NEAR:
            self.share, self.like = share, other


def compare(held_out: Sequence[Prompt], training: Iterable[Prompt]) -> dict[str, Any]:
    """Which held-out prompts are in the training data.

    Args:
      held_out: prompts of evaluation.
      training: prompts of training.

    Returns:
      `prompts` (held-out ones), `exact` and `near` (numbers of them), `share` (of both together), the same by prompt
      set in `sets`, and in `pairs` the first `MOST` with files, lines and the share of common runs; exact ones have 1.
    """
    asked = [_HeldOut(one, words := _words(one), _runs(words)) for one in held_out]
    _forget_form(asked)
    whole: dict[Words, list[_HeldOut]] = {}
    holders: dict[Words, list[int]] = {}
    for number, one in enumerate(asked):
        if one.words:
            whole.setdefault(one.words, []).append(one)
        for run in one.runs:
            holders.setdefault(run, []).append(number)
    for prompt in training:
        words = _words(prompt)
        for one in whole.get(words, ()):
            one.saw(prompt, 1.0)
        common: Counter[int] = Counter()
        for run in _runs(words):
            common.update(holders.get(run, ()))
        for number, count in common.items():
            one = asked[number]
            if one.words != words:
                one.saw(prompt, min(count / len(one.runs), 0.99))  # 1 says: word for word
    return _counted(asked)


def compare_files(config: Config, known: dict[str, Any]) -> dict[str, Any]:
    """`compare` for the prompts that a config names; warns of held-out ones that are among those of training.

    Args:
      config: its `eval.prompts` and `data.prompts` are compared, as far as their limits go.
      known: what an earlier call has returned, or nothing.

    Returns:
      See `compare`, with a hash `of` what was compared; empty where there are no held-out prompts, or they cannot be
      read: that is for those to refuse who ask them.

    Raises:
      InputError: training prompts cannot be read.
    """
    data, held_out = config.data, config.eval
    if not held_out.prompts:
        return {}
    trained = content_hashes(data.prompts, "data.prompts")
    try:
        asked = content_hashes(held_out.prompts, "eval.prompts")
        stated = json.dumps([trained, data.limit, asked, held_out.limit])
        of = hashlib.sha256(stated.encode()).hexdigest()[:32]
        if known.get("of") == of:
            return known
        # Lines that are no prompts are counted where they are used.
        prompts = read_prompts(held_out.prompts, held_out.limit, lambda line: None)
    except InputError as error:
        log(f"data: held-out prompts are not compared with those of training ({error})")
        return {}
    found = {"of": of, **compare(prompts, read_prompts(data.prompts, data.limit, lambda line: None, tokenised=True))}
    if found["pairs"]:
        first = found["pairs"][0]
        log(
            f"warning: the training prompts have {describe(found)}, e.g. {first['file']}:{first['line']} and "
            f"{first['training_file']}:{first['training_line']}; what is measured on them says little. Take them out "
            "of either (data/report.json lists pairs)"
        )
    return found


def _words(prompt: Prompt) -> Words:
    """What the user says, in words."""
    said = (message["content"] or "" for message in prompt.messages if message["role"] == "user")
    return tuple(_WORD.findall(" ".join(said).casefold()))


def _runs(words: Words) -> set[Words]:
    return {words[start : start + RUN] for start in range(len(words) - RUN + 1)}


def _forget_form(asked: Sequence[_HeldOut]) -> None:
    """Takes out runs that more than half of a set's prompts have; of fewer than four prompts nobody can tell."""
    by_set: dict[str, list[_HeldOut]] = {}
    for one in asked:
        by_set.setdefault(one.prompt.prompt_set, []).append(one)
    for members in by_set.values():
        counts = Counter(run for one in members for run in one.runs)
        form = {run for run, count in counts.items() if len(members) >= 4 and count > len(members) / 2}
        for one in members:
            one.runs -= form


def _counted(asked: Sequence[_HeldOut]) -> dict[str, Any]:
    sets: dict[str, Counter[str]] = {}
    pairs = []
    for one in asked:
        kind = {} if one.like is None else {"exact": 1} if one.share == 1 else {"near": 1}
        counts = sets.setdefault(one.prompt.prompt_set, Counter(prompts=0, exact=0, near=0))
        counts.update(prompts=1, **kind)
        if one.like is not None:
            where = {"file": one.prompt.file, "line": one.prompt.line}
            pairs.append({**where, "training_file": one.like.file, "training_line": one.like.line, "common": one.share})
    total = sum(sets.values(), Counter())
    found = {name: total[name] for name in ("prompts", "exact", "near")}
    share = (found["exact"] + found["near"]) / max(found["prompts"], 1)
    return {
        **found,
        "share": share,
        "sets": {name: dict(counts) for name, counts in sets.items()},
        "pairs": pairs[:MOST],
    }


def describe(found: dict[str, Any]) -> str:
    """What `compare` has found, in words."""
    what = f"{found['exact']} word for word, {found['near']} nearly"
    return f"{found['exact'] + found['near']} of {found['prompts']} held-out prompts ({found['share']:.1%}): {what}"
