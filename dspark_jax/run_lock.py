"""One command at a time writes in a working directory: it holds `lock.json` there from beginning to end.

The file is locked with flock, which the system releases when the process ends, however it ends: on one machine, what a
dead process has left behind is taken over at once. Between machines flock may not reach (a bucket mounted with gcsfuse,
NFS without locks). So the file also says who holds it, and that process writes the time into it every few seconds. A
time that does not change is that of a dead process, and is taken over after a while.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dspark_jax.errors import InputError, is_full_disk

FILE = "lock.json"
BEAT = 10.0
"""Seconds between two signs of life."""
PATIENCE = 90.0
"""Seconds without one after which a process on another machine is taken for dead; NFS and gcsfuse keep what they have
read for up to 60."""


@contextlib.contextmanager
def locked(workdir: Path, command: str, *, option: str = "--workdir") -> Iterator[None]:
    """Holds the lock of a directory, which is made if need be; when nothing was written in it, it is gone afterwards.

    A process that the holder has started writes on the holder's behalf and passes.

    Args:
      workdir: the directory.
      command: its name, for those who find it locked.
      option: where the user can name another directory.

    Raises:
      InputError: another process is writing there, or nothing can be written there.
    """
    made = make_directory(workdir, option)
    try:
        file = _acquire(workdir / FILE, Holder.this(command), option)
        if file is None:  # our parent's
            yield
            return
        try:
            yield
        finally:
            file.release()
    finally:
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()


def make_directory(workdir: Path, option: str = "--workdir") -> list[Path]:
    """Makes a directory that can be written in; returns those that were not there, innermost first.

    Raises:
      InputError: it cannot be made or written in.
    """
    try:
        made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(workdir, error, option) from error
    if not os.access(workdir, os.W_OK | os.X_OK):
        raise InputError(f"{option} {workdir}: cannot be written in; change its permissions or choose another place")
    return made


def _refused(workdir: Path, error: OSError, option: str) -> InputError:
    """Says where a directory cannot be made or written in; lets a full disk go on to where that has its own line."""
    if is_full_disk(error):
        raise error
    for folder in (*reversed(workdir.parents), workdir):
        if os.path.lexists(folder) and not folder.is_dir():
            return InputError(f"{option} {workdir}: {folder} is no directory; choose another place")
    return InputError(f"{option} {workdir}: cannot be written in ({error.strerror}); choose another place")


class Holder(dict[str, Any]):
    """The content of a lock file: command, host, boot (the running system), process, since, alive (both times)."""

    @classmethod
    def this(cls, command: str) -> "Holder":
        """For this process."""
        boot = Path("/proc/sys/kernel/random/boot_id")  # containers of one system share it, whatever their host names
        host, since = socket.gethostname(), now()
        system = boot.read_text().strip() if boot.exists() else host
        return cls(command=command, host=host, boot=system, process=os.getpid(), since=since, alive=since)

    @classmethod
    def read(cls, path: Path) -> "Holder | None":
        """Of a lock file; None where there is none, or nothing (yet) in it."""
        try:
            found = json.loads(path.read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return cls(found) if isinstance(found, dict) and set(cls.this("")) <= set(found) else None

    def is_same(self, other: "Holder | None") -> bool:
        """Whether it is of the same process, at whatever time."""
        return other is not None and self | {"alive": ""} == other | {"alive": ""}

    def is_parent(self) -> bool:
        """Whether it is of the process that started this one."""
        return (self["process"], self["boot"]) == (os.getppid(), self.this("")["boot"])

    def __str__(self) -> str:
        """For those who find it locked."""
        return f"{self['command']} (process {self['process']} on {self['host']}, since {self['since']})"


def now() -> str:
    """The time, as it is in lock files."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class _Held:
    """A lock file that this process holds, and the thread that writes the time into it."""

    def __init__(self, path: Path, descriptor: int, holder: Holder):
        """Writes that it is ours."""
        self.path, self.descriptor, self.holder = path, descriptor, holder
        os.ftruncate(descriptor, 0)
        self._write()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()

    def release(self) -> None:
        """Removes the file."""
        self.ended.set()
        self.thread.join()
        if self.holder.is_same(Holder.read(self.path)):
            self.path.unlink(missing_ok=True)
        os.close(self.descriptor)

    def _write(self) -> None:
        self.holder["alive"] = now()  # always of the same length
        os.pwrite(self.descriptor, json.dumps(self.holder).encode() + b"\n", 0)
        os.fsync(self.descriptor)

    def _beat(self) -> None:
        while not self.ended.wait(BEAT):
            with contextlib.suppress(OSError):  # the next one may succeed
                there = Holder.read(self.path)
                if there is not None and not self.holder.is_same(there):
                    print(f"error: {self.path}: this process stood still, and was taken for dead by {there}; it ends",
                          file=sys.stderr, flush=True)  # fmt: skip
                    os._exit(2)
                self._write()


def _acquire(path: Path, ours: Holder, option: str) -> _Held | None:
    """Waits, if that decides it, and takes the file; None if the process that started this one has it."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another process has just removed the directory as one that it had made for nothing
            make_directory(path.parent, option)
            continue
        except OSError as error:
            raise _refused(path.parent, error, option) from error
        kept = False
        try:
            alone = _flock(descriptor)
            there = Holder.read(path)
            if alone is not True and there is not None and there.is_parent():
                return None
            if alone is False:
                raise _in_use(path, there, option)
            if not _is_at(path, descriptor):
                continue  # its holder has just removed it
            dead = alone and (there is None or there["boot"] == ours["boot"])
            if there is not None and not dead:
                _wait_for_death(path, there, option)
            kept = True
            return _Held(path, descriptor, ours)
        finally:
            if not kept:
                os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _flock(descriptor: int) -> bool | None:
    """Whether nobody else had it locked; None where the file system cannot lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _wait_for_death(path: Path, there: Holder, option: str) -> None:
    """Returns when the holder, which flock says nothing about, has given no sign of life for `PATIENCE` seconds."""
    print(
        f"{path}: held by {there}, of which nothing else is known here; if it shows no sign of life for "
        f"{PATIENCE:.0f} s, this command goes on",
        file=sys.stderr,
        flush=True,
    )
    ends = time.monotonic() + PATIENCE
    while time.monotonic() < ends:
        time.sleep(min(BEAT / 4, PATIENCE / 4))
        now = Holder.read(path)
        if now is None:
            return  # it has ended
        if now != there:
            raise _in_use(path, now, option)


def _in_use(path: Path, there: Holder | None, option: str) -> InputError:
    here = there is None or there["boot"] == Holder.this("")["boot"]
    otherwise = "" if here else f"; if it has ended, remove {path}"
    who = there or "another process"
    return InputError(f"{path.parent}: in use by {who}; wait for its end, or use another {option}{otherwise}")
