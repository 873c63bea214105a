"""Conversations in chunks, each of which becomes samples by itself, on whatever machine.

A folder holds a file with what all chunks need, and of each chunk a file of its conversations, one of its samples and,
last, one of its counts: a chunk that has this is done. They are pickles of our own objects, read by nobody else and
removed when the samples are written. Ids of samples depend on how many samples the conversations before them have, so
within a chunk they count as if it were the first one, and are moved when the counts of all chunks are there.
"""

import contextlib
import dataclasses
import functools
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dspark_jax.config import DataConfig, InputError
from dspark_jax.data.prompts import Prompt
from dspark_jax.data.regenerate import Answered
from dspark_jax.data.samples import Tally, answered_samples, given_samples
from dspark_jax.data.sources import Sample
from dspark_jax.json_file import written_whole
from dspark_jax.tokenizer import ChatTokenizer

SIZE = 500
"""Conversations of a chunk: a second of work or so."""


@dataclasses.dataclass(frozen=True)
class Made:
    """What became of a chunk.

    Attributes:
      tally: its counts.
      set_aside: lines of what gave no sample.
      error: why nothing can be made of any conversation, or ''.
    """

    tally: Tally
    set_aside: list[str]
    error: str = ""


def write_chunks(
    folder: Path, tokenizer: ChatTokenizer, config: DataConfig, items: Sequence[Answered] | Sequence[Prompt]
) -> list[str]:
    """Writes chunks that are to be made into samples; those that are done already stay so.

    Args:
      folder: is created if need be.
      tokenizer: of the target.
      config: says how samples are made.
      items: conversations that the target has answered, or ones that are answered in their files.

    Returns:
      Names of the chunks, in order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _store(folder / "settings", (tokenizer, config))
    names = []
    for start in range(0, len(items), SIZE):
        names.append(f"{start // SIZE:06d}")
        if not (folder / f"{names[-1]}.made").exists():
            _store(folder / f"{names[-1]}.todo", (start, list(items[start : start + SIZE])))
    return names


def read_settings(folder: Path) -> tuple[ChatTokenizer, DataConfig]:
    """What `make_chunk` needs for all chunks."""
    return _load(folder / "settings")


def make_chunk(folder: Path, name: str, settings: tuple[ChatTokenizer, DataConfig]) -> None:
    """Makes the samples of a chunk, unless they are there."""
    if (folder / f"{name}.made").exists():
        return
    tokenizer, config = settings
    start, items = _load(folder / f"{name}.todo")
    samples, error = list[Sample](), ""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "rejected.jsonl"
        with contextlib.closing(Tally(file)) as tally:
            make: Any = answered_samples if config.regenerate else functools.partial(given_samples, start=start)
            try:
                samples += make(tokenizer, items, config, tally)
            except InputError as found:
                error = str(found)
        set_aside = file.read_text("utf-8").split("\n")[:-1]
    _store(folder / f"{name}.samples", samples)
    _store(folder / f"{name}.made", Made(tally, set_aside, error))


def merge_chunks(folder: Path, names: Sequence[str], tally: Tally) -> list[int]:
    """Adds up what chunks have made.

    Args:
      folder: of the chunks.
      names: of all of them, in order.
      tally: of what comes before them.

    Returns:
      By how much the ids of each chunk's samples are to be moved.

    Raises:
      InputError: nothing can be made of any conversation.
    """
    moves = []
    for name in names:
        made: Made = _load(folder / f"{name}.made")
        if made.error:
            raise InputError(made.error)
        moves.append(tally.further)
        tally.merge(made.tally, made.set_aside)
    return moves


def read_chunk(folder: Path, name: str, move: int) -> Iterator[Sample]:
    """The samples of a chunk with their ids moved."""
    for sample in _load(folder / f"{name}.samples"):
        yield dataclasses.replace(sample, sample_id=sample.sample_id + move)


def _store(path: Path, value: Any) -> None:
    with written_whole(path, f"{path.suffix}.tmp") as temporary:
        temporary.write_bytes(pickle.dumps(value))


def _load(path: Path) -> Any:
    return pickle.loads(path.read_bytes())
