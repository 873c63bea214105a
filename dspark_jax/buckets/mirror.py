"""A working directory in a bucket: a local folder that commands work in, and what of it lies in the bucket.

The bucket has the same files under the same names, so that it can be looked at and copied. What it says counts: a
command begins with what is there, and what the local folder has besides is removed. Three kinds of things are in it:

    sets    data, refresh/1, features, checkpoints/500: files that belong together. `manifests/checkpoints/500.json`
            lists them and is written last: without it there is no set. What a manifest lists is never overwritten; a
            file that has changed gets another name in the bucket. Fetched when they are needed, and only the part
            that is.
    logs    data.partial: `inputs.json`, and files that grow. A bucket cannot append, so every `INTERVAL` seconds the
            new lines become an object of their own, `data.partial/answers.jsonl/000000000000000`, named after the
            byte that it begins with.
    files   everything else (config.json, metrics.jsonl, tensorboard/, eval/...): each of them is whole by itself. They
            are put into the bucket with every set and when the command ends; metrics.jsonl and tensorboard/ also every
            `INTERVAL` seconds.

The local folder keeps what was fetched for the next command on this machine, and can be removed when none runs.
"""

import contextlib
import json
import os
import re
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dspark_jax.buckets.lock import CLAIM, BucketLock
from dspark_jax.buckets.store import Store
from dspark_jax.errors import InputError
from dspark_jax.json_file import written_whole
from dspark_jax.run_lock import FILE as LOCK

INTERVAL = 60.0
"""Seconds after which growing files are put into the bucket; longer where that takes over a twentieth of the time."""

LOGS = "data.partial"
INPUTS = f"{LOGS}/inputs.json"
"""Says what the logs are of; without it there are none."""

STATE = ".mirror.json"
"""Local file: which versions of the bucket's files lie in the folder, with their sizes and times of change."""

_SET = re.compile(r"(data|features|(checkpoints|refresh)/[^/]+)/.+")
_MANIFEST = re.compile(r"manifests/(.+)\.json")
_HEADS = re.compile(
    r"(data|refresh/[^/]+)/report\.json|features/manifest\.json|checkpoints/[^/]+/(?!params/|optimizer/).*"
)
"""Files of sets that are always fetched: small ones that say what the rest is."""
_GROWING = re.compile(r"metrics\.jsonl|tensorboard/.*")
_NO_FILE = re.compile(rf"({LOGS}|data\.old|manifests|wandb|checkpoints)/.*|{LOCK}|{CLAIM}.*|(.*/)?\.[^/]*|.*\.tmp")
"""What is neither a file of a set nor a file of its own: the logs, what is ours, and what is only this machine's."""


class Mirror:
    """The local folder of a working directory in a bucket. Paths that its methods take lie in the folder.

    Attributes:
      store: the one in the bucket.
      folder: the local one.
      sets: by name, what is whole in the bucket: file -> its object there, a word for its version, and its size.
    """

    def __init__(self, store: Store, folder: Path, lock: BucketLock | None = None):
        """Fetches the files and the heads of the sets; what else the folder has is removed.

        Args:
          store: of the working directory.
          folder: is made if need be.
          lock: of the bucket, held by this process; None where nothing is written.

        Raises:
          InputError: the bucket cannot be read.
        """
        self.store, self.folder, self._lock = store, folder, lock
        self._mutex = threading.RLock()
        self._state = _read_state(folder / STATE)
        self._logs: dict[str, int] = {}  # bytes of each that are in the bucket
        self._background = ThreadPoolExecutor(1, "bucket")
        self._publishing: list[Future[None]] = []
        self._ended = threading.Event()
        listing = store.list()
        found = (_MANIFEST.fullmatch(name) for name in listing)
        self.sets: dict[str, dict[str, Any]] = {match[1]: self._read_manifest(match[0]) for match in found if match}
        self._tell_unfinished(listing)
        files = {name: tag for name, tag in listing.items() if _is_file(name)}
        self._remove_others(files)
        wanted = {name: tag for name, tag in files.items() if not name.startswith("tensorboard/")}
        self._get((name, name, tag) for name, tag in wanted.items())
        self._stamps = {name: stamp for name in wanted if (stamp := _stamp(folder / name))}
        self._fetch(_HEADS)
        self._ticking = threading.Thread(target=self._tick, daemon=True)
        if lock is not None:
            self._ticking.start()

    def fetch(self, path: Path) -> None:
        """Downloads what of a set, or of the logs, the bucket has at or below `path` and the folder does not."""
        name = self._name(path)
        with self._mutex:
            if name == LOGS:
                self._fetch_logs()
            else:
                self._fetch(re.compile(rf"{re.escape(name)}(/.*)?", re.DOTALL))

    def publish(self, path: Path) -> None:
        """Puts a finished set into the bucket; when this returns, it is there in the place of what was before.

        Raises:
          InputError: the bucket cannot be written.
        """
        name = self._name(path)
        with self._mutex:
            self.put_files()
            before, now, uploads = self.sets.get(name, {}), dict[str, Any](), list[tuple[Path, dict[str, Any]]]()
            taken = {entry["object"] for entry in before.values()}
            for file in _files_below(path):
                inner, size = file.relative_to(path).as_posix(), file.stat().st_size
                entry = before.get(inner)
                if entry is None or not self._is_here(self._name(file), entry["version"]):
                    plain, version = self._name(file), uuid.uuid4().hex[:12]
                    place = f"{plain}~{version}" if plain in taken else plain
                    entry = {"object": place, "version": version, "size": size}
                    uploads.append((file, entry))
                now[inner] = entry
            self.store.put((file, entry["object"]) for file, entry in uploads)
            self._write_manifest(name, now)
            for file, entry in uploads:
                self._note(self._name(file), entry["version"])
            self._write_state()
            self.store.delete(set(self.store.list(name)) - {entry["object"] for entry in now.values()})

    def publish_later(self, path: Path) -> None:
        """`publish` in the background, as soon as the set has its name; `settle` waits for it."""

        def publish() -> None:
            while not path.exists():
                if self._ended.wait(0.05):
                    return
            self.publish(path)

        self._publishing.append(self._background.submit(publish))

    def settle(self) -> None:
        """Waits until all that was given to `publish_later` is in the bucket; raises what kept it from there."""
        waiting, self._publishing = self._publishing, []
        for future in waiting:
            future.result()

    def withdraw(self, path: Path) -> None:
        """Removes a set or the logs from the bucket, first of all what says that they are whole."""
        name = self._name(path)
        with self._mutex:
            self._check_lock()
            self.store.delete([INPUTS if name == LOGS else _manifest(name)])
            self.sets.pop(name, None)
            self._logs = {log: done for log, done in self._logs.items() if not log.startswith(f"{name}/")}
            self.store.delete(self.store.list(name))

    def prune(self, path: Path) -> None:
        """Removes from the bucket the sets of a folder that are not in the local one any more."""
        parent = self._name(path)
        for name in list(self.sets):
            if name.startswith(f"{parent}/") and not (self.folder / name).exists():
                self.withdraw(self.folder / name)

    def begin_logs(self, path: Path) -> None:
        """Replaces the logs in the bucket by none, with the `inputs.json` of the local folder."""
        with self._mutex:
            self.withdraw(path)
            self.store.put([(self.folder / INPUTS, INPUTS)])

    def watch(self, path: Path) -> None:
        """From now on the lines of a growing file of the logs are put into the bucket."""
        with self._mutex:
            self._logs.setdefault(self._name(path), 0)

    def put_lines(self) -> None:
        """Puts the lines of the logs into the bucket that are not there yet."""
        with self._mutex:
            for log, done in self._logs.items():
                path = self.folder / log
                if not path.exists() or path.stat().st_size <= done:
                    continue
                with path.open("rb") as file:
                    file.seek(done)
                    lines = file.read()
                if lines := lines[: lines.rfind(b"\n") + 1]:
                    self._check_lock()
                    self.store.write(f"{log}/{done:015d}", lines)
                    self._logs[log] = done + len(lines)

    def put_files(self, *, growing: bool = False) -> None:
        """Puts the files into the bucket that have changed, or only those that grow; removes those that are gone."""
        with self._mutex:
            stamps = {self._name(file): _stamp(file) for file in _files_below(self.folder)}
            stamps = {name: stamp for name, stamp in stamps.items() if _is_file(name)}
            if growing:
                stamps = {name: stamp for name, stamp in stamps.items() if _GROWING.fullmatch(name)}
            changed = {name: stamp for name, stamp in stamps.items() if self._stamps.get(name) != stamp}
            self.store.put((self.folder / name, name) for name in changed)
            self._stamps |= changed
            if not growing:
                gone = set(self._stamps) - set(stamps)
                self.store.delete(gone)
                self._stamps = {name: stamp for name, stamp in self._stamps.items() if name not in gone}

    def close(self) -> None:
        """Puts everything that is finished into the bucket and stops; raises what keeps it from there."""
        self._ended.set()
        self._background.shutdown()
        if self._lock is not None:
            self._ticking.join()
            self.put_lines()
            self.put_files()
        self.settle()

    def _tick(self) -> None:
        """Puts what grows into the bucket now and then."""
        pause = INTERVAL
        while not self._ended.wait(pause):
            began = time.monotonic()
            try:
                with contextlib.suppress(FileNotFoundError):  # what was listed is renamed or removed: the next turn's
                    self.put_lines()
                    self.put_files(growing=True)
            except InputError as error:
                print(f"warning: {error}; it is tried again", file=sys.stderr, flush=True)
            pause = max(INTERVAL, 20 * (time.monotonic() - began))

    def _name(self, path: Path) -> str:
        return path.absolute().relative_to(self.folder).as_posix()

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

    def _read_manifest(self, name: str) -> dict[str, Any]:
        content = self.store.read(name)
        try:
            files = json.loads(content or b"")["files"]
            assert all({"object", "version", "size"} <= set(entry) for entry in files.values())
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError):
            raise InputError(
                f"{self.store.url}/{name}: not what this program has written; remove it, and what it is of is not used"
            ) from None
        return files

    def _write_manifest(self, name: str, files: dict[str, Any]) -> None:
        self._check_lock()
        self.store.write(_manifest(name), json.dumps({"files": files}, indent=1).encode() + b"\n")
        self.sets[name] = files

    def _tell_unfinished(self, listing: Iterable[str]) -> None:
        found = {match[1] for name in listing if (match := _SET.fullmatch(name))}
        for name in sorted(found - set(self.sets)):
            print(
                f"{self.store.url}/{name}: left out, it has no {_manifest(name)}; it was not finished, or copied there",
                file=sys.stderr,
                flush=True,
            )

    def _remove_others(self, files: Iterable[str]) -> None:
        """Removes what is in the folder and not, or not like this, in the bucket."""
        kept = set(files) | {LOCK, STATE}
        for name, entry in self._entries():
            if self._is_here(name, entry["version"]):
                kept.add(name)
        for folder, _, names in os.walk(self.folder, topdown=False):
            for file in (Path(folder) / name for name in names):
                if self._name(file) not in kept:
                    file.unlink()
            if Path(folder) != self.folder and not os.listdir(folder):
                os.rmdir(folder)

    def _entries(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and entry of every file of every set."""
        for name, files in self.sets.items():
            for inner, entry in files.items():
                yield f"{name}/{inner}", entry

    def _fetch(self, names: re.Pattern[str]) -> None:
        """Downloads files of sets."""
        self._get((name, e["object"], e["version"]) for name, e in self._entries() if names.fullmatch(name))

    def _get(self, files: Iterable[tuple[str, str, str]]) -> None:
        """Downloads (name, object, version) as far as they are not here."""
        missing = [entry for entry in files if not self._is_here(entry[0], entry[2])]
        self.store.get((place, self.folder / name) for name, place, _ in missing)
        for name, _, version in missing:
            self._note(name, version)
        if missing:
            self._write_state()

    def _fetch_logs(self) -> None:
        """Puts the logs together from their pieces."""
        shutil.rmtree(self.folder / LOGS, ignore_errors=True)
        listing = self.store.list(LOGS)
        if INPUTS not in listing:
            return
        self.store.get([(INPUTS, self.folder / INPUTS)])
        for piece in sorted(set(listing) - {INPUTS}):
            log, _, start = piece.rpartition("/")
            content, path = self.store.read(piece) or b"", self.folder / log
            if not start.isdigit() or int(start) != self._logs.get(log, 0):
                raise InputError(
                    f"{self.store.url}/{piece}: a piece before it is missing; remove {self.store.url}/{LOGS}"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.write(content)
            self._logs[log] = int(start) + len(content)

    def _is_here(self, name: str, version: str) -> bool:
        """Whether this version of a file lies in the folder."""
        stamp = _stamp(self.folder / name)
        return stamp is not None and self._state.get(name) == [version, *stamp]

    def _note(self, name: str, version: str) -> None:
        if stamp := _stamp(self.folder / name):
            self._state[name] = [version, *stamp]

    def _write_state(self) -> None:
        # Several readers may share the folder, each with a temporary name of its own.
        with written_whole(self.folder / STATE, f".{uuid.uuid4().hex}.tmp") as temporary:
            temporary.write_text(json.dumps(self._state), "utf-8")


def _manifest(name: str) -> str:
    return f"manifests/{name}.json"


def _is_file(name: str) -> bool:
    """Whether it is a file that is whole by itself."""
    return not _SET.fullmatch(name) and not _NO_FILE.fullmatch(name)


def _files_below(folder: Path) -> list[Path]:
    """Files with their names, without those that are being written."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp")


def _stamp(file: Path) -> tuple[int, int] | None:
    """Size and time of change of a file; None where there is none."""
    try:
        stat = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_size, stat.st_mtime_ns


def _read_state(path: Path) -> dict[str, list[Any]]:
    """What the folder has; of a file that is damaged nothing, and all is fetched again."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
