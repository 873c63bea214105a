"""What the samples of a preparation are like, counted while they are made: lengths and sources."""

import itertools
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

SHORTEST = 16
"""Upper end of a histogram's first bin in tokens; every further bin ends at twice as many."""


LETTERS = 32
"""Letters at the beginning of a text by which its script is told."""


def script(text: str) -> str:
    """The script of most of a text's first letters, in Unicode's words ("latin", "cjk", "cyrillic"); '' without any."""
    letters = itertools.islice(filter(str.isalpha, text), LETTERS)
    found = Counter(unicodedata.name(letter, "").partition(" ")[0].lower() for letter in letters)
    return found.most_common(1)[0][0] if found else ""


class Histogram:
    """Lengths in tokens, in bins whose ends double: up to 16, up to 32, ..."""

    def __init__(self) -> None:
        self.bins: Counter[int] = Counter()
        self.total = self.longest = 0

    def add(self, length: int) -> None:
        """Counts one."""
        self.bins[max((length - 1) // SHORTEST, 0).bit_length()] += 1
        self.total += length
        self.longest = max(self.longest, length)

    def merge(self, other: "Histogram") -> None:
        """Counts what another one has counted."""
        self.bins.update(other.bins)
        self.total += other.total
        self.longest = max(self.longest, other.longest)

    def report(self) -> dict[str, Any]:
        """`up_to` (upper ends of the bins), `samples` in each, `mean` and `longest`."""
        bins = range(max(self.bins, default=0) + 1)
        count = max(sum(self.bins.values()), 1)
        ends, samples = [SHORTEST << number for number in bins], [self.bins[number] for number in bins]
        return {"up_to": ends, "samples": samples, "mean": self.total / count, "longest": self.longest}


def table(report: Mapping[str, Any]) -> list[str]:
    """The lines that `prepare` shows of its report: prompt sets with their counts, and lengths.

    Args:
      report: content of `data/report.json`.
    """
    names = [*report["sources"]]
    width = max(10, *map(len, names))
    columns = {"prompts": "prompts", "set aside": "set_aside", "samples": "samples", "tokens": "tokens"}
    columns["supervised"] = "loss_tokens"
    rows = [[f"{'prompt set':{width}}", *(f"{title:>11}" for title in columns)]]
    for name in names:
        counts = report["sources"][name] | report["prompt_sets"].get(name, {})
        rows.append([f"{name:{width}}", *(f"{counts.get(key, 0):11}" for key in columns.values())])
    return (
        ["".join(row) for row in rows]
        + _scripts(report.get("scripts", {}))
        + _lengths(report["lengths"], report["samples"])
    )


def _scripts(scripts: Mapping[str, int]) -> list[str]:
    """A line where prompts are in more than one."""
    total = sum(scripts.values())
    shares = ", ".join(f"{name or 'without letters'} {count / total:.1%}" for name, count in scripts.items())
    return [f"scripts of the prompts: {shares}"] if len(scripts) > 1 else []


def _lengths(lengths: Mapping[str, Mapping[str, Any]], samples: int) -> list[str]:
    """One line per histogram, in shares of the samples."""
    ends: Sequence[int] = max((one["up_to"] for one in lengths.values()), key=len)
    lines = ["tokens up to     " + "".join(f"{end:>7}" for end in ends) + "   mean  longest"]
    for name, one in lengths.items():
        shares = [f"{count / max(samples, 1):>7.0%}" for count in one["samples"]]
        shares += [f"{'':7}"] * (len(ends) - len(shares))
        lines.append(f"{name:17}" + "".join(shares) + f"{one['mean']:7.0f}  {one['longest']:7}")
    return lines
