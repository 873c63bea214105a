"""One command at a time writes in a working directory in a bucket: the object `lock.json`, as `run_lock` has a file.

What is guaranteed: of commands that find no lock, the store lets exactly one create it. A holder writes the time into
it every few seconds; when that stands still for `PATIENCE` seconds, the holder is taken for dead, and of those that
waited for it the store lets exactly one take its place. A holder that was only cut off from the store sees that when it
is back, and ends: before it says that anything is whole (`check`), and at its next sign of life. What it uploads until
then lies in the bucket under names that nothing refers to, or is a file of its own (metrics, figures). Of a store that
creates without the condition (some that only resemble Amazon's), two commands that begin in the same second may both
go on, until the next sign of life of the one that was overwritten: it ends.
"""

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from pathlib import Path

from dspark_jax import run_lock
from dspark_jax.buckets.store import Store
from dspark_jax.errors import InputError
from dspark_jax.run_lock import FILE, Holder

CLAIM = "lock.claim-"
"""Begins the name of the object with which one of several that wait says that it takes a dead holder's place."""


class BucketLock:
    """The lock of a working directory in a bucket. `take` and `release` it."""

    def __init__(self, store: Store, command: str, folder: Path):
        """`folder` is the local one, whose own lock this process holds."""
        self.store = store
        # Whoever holds the lock of this very folder knows that an earlier process that worked in it is dead.
        stat = folder.stat()
        self.holder = Holder.this(command) | {"folder": f"{stat.st_dev}:{stat.st_ino}", "token": uuid.uuid4().hex}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def take(self) -> None:
        """Returns when it is ours.

        Raises:
          InputError: another process is writing there.
        """
        # What is read decides: the store's answer may be lost on its way, and one that knows no condition overwrites.
        while (there := self._read()) is None or there["token"] != self.holder["token"]:
            if there is None:
                self.store.create(FILE, self._content())
                continue
            if (there["boot"], there["folder"]) != (self.holder["boot"], self.holder["folder"]):
                self._wait_for_death(there)
            self._follow(there)
        self._thread.start()

    def check(self) -> None:
        """Ends this process if another one has taken it for dead."""
        there = self._read()
        if there is not None and there["token"] != self.holder["token"]:
            print(
                f"error: {self.store.url}/{FILE}: this process stood still, and was taken for dead by {there}; it ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(2)

    def release(self) -> None:
        """Removes it, if it is ours."""
        self._ended.set()
        self._thread.join()
        there = self._read()
        if there is not None and there["token"] == self.holder["token"]:
            self.store.delete([FILE])

    def _content(self) -> bytes:
        return json.dumps(self.holder | {"alive": run_lock.now()}).encode() + b"\n"

    def _read(self) -> Holder | None:
        content = self.store.read(FILE)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict) or set(self.holder) - set(found):
            raise InputError(f"{self.store.url}/{FILE}: not the lock of a command; remove it if nothing runs there")
        return Holder(found)

    def _beat(self) -> None:
        while not self._ended.wait(run_lock.BEAT):
            with contextlib.suppress(InputError):  # the store cannot be reached; the next one may succeed
                self.check()
                self.store.write(FILE, self._content())

    def _wait_for_death(self, there: Holder) -> None:
        """Returns when the holder has given no sign of life for `PATIENCE` seconds, or has released it."""
        patience = run_lock.PATIENCE
        print(
            f"{self.store.url}/{FILE}: held by {there}; if it shows no sign of life for {patience:.0f} s, this "
            "command goes on",
            file=sys.stderr,
            flush=True,
        )
        ends = time.monotonic() + patience
        while time.monotonic() < ends:
            time.sleep(min(run_lock.BEAT / 4, patience / 4))
            seen = self._read()
            if seen is None:
                return
            if seen != there:
                raise self._in_use(seen)

    def _follow(self, dead: Holder) -> None:
        """Takes the place of a dead holder, unless another one does or the lock is gone."""
        claim = CLAIM + dead["token"]
        if not self.store.create(claim, self._content()):
            time.sleep(run_lock.BEAT / 4)
            if self._read() == dead:
                raise InputError(
                    f"{self.store.url}/{claim}: another command is taking the place of {dead}; if none runs, "
                    f"remove it and {FILE}"
                )
            return
        try:
            # Whoever had the claim before has removed it only after the dead holder's name had gone.
            if self._read() == dead:
                self.store.write(FILE, self._content())
        finally:
            self.store.delete([claim])

    def _in_use(self, there: Holder) -> InputError:
        return InputError(
            f"{self.store.url}: in use by {there}; wait for its end, or use another --workdir; if it has ended, "
            f"remove {self.store.url}/{FILE}"
        )
