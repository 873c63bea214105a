"""The prompts of the paper's benchmarks, fetched from the hub and written as files of prompts."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dspark_jax.benchmarks import BENCHMARKS, Benchmark
from dspark_jax.data.files import HUB, HubSet, set_name
from dspark_jax.errors import InputError
from dspark_jax.json_file import written_whole
from dspark_jax.paths import bucket_url
from dspark_jax.progress import log
from dspark_jax.registry import listed

FOLDER = Path("eval_datasets")
"""Where the prompts of a benchmark are written that the config has no file for."""


def places(asked: Iterable[str], entries: Iterable[str]) -> dict[str, Path]:
    """Benchmarks and the files that they are to be in.

    Args:
      asked: names of benchmarks; none: those that `entries` has, or all if it has none of them.
      entries: of `eval.prompts`; a file with the name of a benchmark is its place.

    Raises:
      InputError: a name that is none, or a place in a bucket.
    """
    known = {set_name(entry): Path(entry) for entry in entries if not entry.startswith(HUB)}
    wanted = list(asked) or [name for name in BENCHMARKS if name in known] or list(BENCHMARKS)
    for name in wanted:
        if name not in BENCHMARKS:
            raise InputError(f"--benchmarks has {name!r}, which is unknown; use {listed(BENCHMARKS)}")
        if url := bucket_url(known.get(name, "")):
            raise InputError(f"eval.prompts has {url}: prompts are fetched into local files; name one")
    return {name: known.get(name, FOLDER / f"{name}.jsonl") for name in wanted}


def fetch(files: Mapping[str, Path]) -> None:
    """Writes the prompts of benchmarks, each file whole or not at all; files that are there stay as they are.

    Args:
      files: by name of the benchmark.

    Raises:
      InputError: the hub cannot be reached, the package `datasets` is missing, or rows are not what they were.
    """
    for name, file in files.items():
        if file.exists():
            log(f"{name}: {file} is there already; remove it to fetch it again")
            continue
        benchmark = BENCHMARKS[name]
        lines = list(convert(benchmark))
        if len(lines) != benchmark.prompts:
            log(
                f"warning: {name}: {benchmark.source} has {len(lines)} prompts now, the paper's had {benchmark.prompts}"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as temporary:
            temporary.write_text("".join(lines), "utf-8")
        log(f"{name}: {len(lines)} prompts in {file}")


def convert(benchmark: Benchmark) -> Iterator[str]:
    """The lines of its file of prompts.

    Raises:
      InputError: as `fetch`.
    """
    for row in HubSet.parse(benchmark.source).rows():
        try:
            turns = benchmark.turns(_record(row.record, row.error))
        except (KeyError, ValueError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{benchmark.source}: row {row.number}: {why}; this data set has changed") from None
        yield json.dumps({"turns": turns}, ensure_ascii=False) + "\n"


def _record(record: dict[str, Any] | None, error: str) -> dict[str, Any]:
    if record is None:
        raise ValueError(error.partition(";")[0])
    return record
