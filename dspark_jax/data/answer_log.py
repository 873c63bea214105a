"""Answers that are there already, in files that survive a killed preparation."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dspark_jax.buckets.places import watch
from dspark_jax.config import InputError


class Rejected(Exception):
    """A conversation that gives no training sample: `reason` is a word that is counted, the message says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def log_file(folder: Path, host: int = 0) -> Path:
    """The file in which a host writes its answers."""
    return folder / (f"answers-{host}.jsonl" if host else "answers.jsonl")


def log_files(folder: Path) -> list[Path]:
    """Those of all hosts that have written one, of however many there were."""
    return sorted(folder.glob("answers*.jsonl"))


class AnswerLog:
    """Answers so far, in JSONL files that survive a killed preparation: one of this host, and those of other hosts.

    One line per answer: {"id": sample id, "turn": 0, "tokens": [...]}, with "text": true if it came as text. One line
    per question that has none: {"id": 3, "turn": 0, "failed": ["server", "content_filter"]}. A line that was being
    written when the process died does not count, and is overwritten.

    Attributes:
      texts: number of answers that came as text.
    """

    def __init__(self, path: Path, owns: Callable[[int], bool] = lambda sample_id: True):
        """Reads what is there, in the files of all hosts, and opens the file for more.

        Args:
          path: the file of this host, see `log_file`.
          owns: whether the answers to a conversation are wanted here; others are passed over.

        Raises:
          InputError: a whole line is damaged.
        """
        self.texts = 0
        self._owns = owns
        self._answers: dict[tuple[int, int], np.ndarray] = {}
        self._failed: dict[tuple[int, int], Rejected] = {}
        for other in log_files(path.parent):
            if other != path:
                with other.open("rb") as file:
                    self._read_lines(file, other)
        self._file = path.open("a+b")
        self._file.seek(0)
        try:
            end = self._read_lines(self._file, path)
        except InputError:
            self._file.close()
            raise
        self._file.truncate(end)
        watch(path)

    def _read_lines(self, file: BinaryIO, path: Path) -> int:
        """Takes in all whole lines; returns where the last one ends."""
        end = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                if self._owns(entry["id"]):
                    self._read(entry)
            except (ValueError, TypeError, LookupError, OverflowError):
                raise InputError(f"{path}:{number}: damaged; remove the lines from it on and run again") from None
            end += len(line)
        return end

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

    @property
    def entries(self) -> int:
        """Number of questions that need not be asked any more: those with an answer, and those that have none."""
        return len(self._answers) + len(self._failed)

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
