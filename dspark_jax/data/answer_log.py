"""Answers that are there already, in a file that survives a killed preparation."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.config import InputError


class Rejected(Exception):
    """A conversation that gives no training sample: `reason` is a word that is counted, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class AnswerLog:
    """Answers so far, in a JSONL file that survives a killed preparation.

    One line per part of an answer: {"id": sample id, "turn": 0, "part": 0, "tokens": [...]}, with "text": true if it
    came as text, and one per question that has none: {"id": 3, "turn": 0, "failed": ["server", "content_filter"]}. A
    line that was being written when the process died does not count, and is overwritten.

    Attributes:
      texts: number of answers that came as text.
    """

    def __init__(self, path: Path):
        """Reads what is there and opens the file for more.

        Raises:
          InputError: a whole line of it is damaged.
        """
        self.texts = self._count = 0
        self._parts: dict[tuple[int, int, int], np.ndarray] = {}
        self._failed: dict[tuple[int, int], Rejected] = {}
        self._file = path.open("a+b")
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                self._read(json.loads(line))
            except (ValueError, TypeError, LookupError, OverflowError):
                self._file.close()
                raise InputError(f"{path}:{number}: damaged; remove the lines from it on and run again") from None
            end += len(line)
        self._file.truncate(end)

    def _read(self, entry: Any) -> None:
        if "failed" in entry:
            reason, detail = entry["failed"]
            self._failed[entry["id"], entry["turn"]] = Rejected(reason, detail)
        else:
            self._parts[entry["id"], entry["turn"], entry["part"]] = np.asarray(entry["tokens"], np.int32)
            self._count += entry["part"] == 0
            self.texts += bool(entry.get("text"))

    def __len__(self) -> int:
        """Number of answers, begun or finished."""
        return self._count

    def get(self, sample_id: int, turn: int, part: int) -> np.ndarray | None:
        """Ids of a part of an answer, or None."""
        return self._parts.get((sample_id, turn, part))

    def failure(self, sample_id: int, turn: int) -> Rejected | None:
        """Why a question has no answer, or None."""
        return self._failed.get((sample_id, turn))

    def put(
        self, turn: int, part: int, answers: Mapping[int, Sequence[int] | np.ndarray], *, text: bool = False
    ) -> None:
        """Adds a part of the answers of a batch, by sample id; they are in the file when this returns."""
        entries = []
        for sample_id, answer in answers.items():
            tokens = np.asarray(answer, np.int32).tolist()
            entries.append(
                {"id": sample_id, "turn": turn, "part": part, "tokens": tokens} | ({"text": True} if text else {})
            )
        self._write(entries)

    def put_failure(self, sample_id: int, turn: int, error: "Rejected") -> None:
        """Notes that a question has no answer and is not asked again."""
        self._write([{"id": sample_id, "turn": turn, "failed": [error.reason, str(error)]}])

    def _write(self, entries: Sequence[dict[str, Any]]) -> None:
        self._file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
        self._file.flush()
        for entry in entries:
            self._read(entry)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
