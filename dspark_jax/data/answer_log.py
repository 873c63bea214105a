"""Answers that are there already, in a file that survives a killed preparation."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.buckets.places import watch
from dspark_jax.config import InputError


class Rejected(Exception):
    """A conversation that gives no training sample: `reason` is a word that is counted, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


class AnswerLog:
    """Answers so far, in a JSONL file that survives a killed preparation.

    One line per answer: {"id": sample id, "turn": 0, "tokens": [...]}, with "text": true if it came as text. One line
    per question that has none: {"id": 3, "turn": 0, "failed": ["server", "content_filter"]}. A line that was being
    written when the process died does not count, and is overwritten.

    Attributes:
      texts: number of answers that came as text.
    """

    def __init__(self, path: Path):
        """Reads what is there and opens the file for more.

        Raises:
          InputError: a whole line of it is damaged.
        """
        self.texts = 0
        self._answers: dict[tuple[int, int], np.ndarray] = {}
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
        watch(path)

    def _read(self, entry: Any) -> None:
        if "failed" in entry:
            reason, detail = entry["failed"]
            self._failed[entry["id"], entry["turn"]] = Rejected(reason, detail)
        else:
            self._answers[entry["id"], entry["turn"]] = np.asarray(entry["tokens"], np.int32)
            self.texts += bool(entry.get("text"))

    def __len__(self) -> int:
        """Number of answers."""
        return len(self._answers)

    def get(self, sample_id: int, turn: int) -> np.ndarray | None:
        """Ids of an answer, or None."""
        return self._answers.get((sample_id, turn))

    def failure(self, sample_id: int, turn: int) -> Rejected | None:
        """Why a question has no answer, or None."""
        return self._failed.get((sample_id, turn))

    def put(self, sample_id: int, turn: int, answer: np.ndarray, *, text: bool = False) -> None:
        """Adds an answer; it is in the file when this returns."""
        entry = {"id": sample_id, "turn": turn, "tokens": answer.tolist()}
        self._write(entry | ({"text": True} if text else {}))

    def put_failure(self, sample_id: int, turn: int, error: "Rejected") -> None:
        """Notes that a question has no answer and is not asked again."""
        self._write({"id": sample_id, "turn": turn, "failed": [error.reason, str(error)]})

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write((json.dumps(entry) + "\n").encode())
        self._file.flush()
        self._read(entry)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
