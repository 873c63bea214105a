"""Working directories wherever they are: what commands and the parts that read and write call.

For a local one nothing here does anything but hand it on. For one in a bucket there is a `Mirror`; the functions that
take a path of the local folder find it by that.
"""

import contextlib
import os
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from dspark_jax.buckets.lock import BucketLock
from dspark_jax.buckets.mirror import Mirror
from dspark_jax.buckets.store import Store
from dspark_jax.errors import InputError
from dspark_jax.paths import bucket_url
from dspark_jax.run_lock import locked
from dspark_jax.shown_paths import name_place

_OPEN: dict[Path, Mirror] = {}


@contextlib.contextmanager
def working_directory(workdir: Path, command: str) -> Iterator[Path]:
    """Holds the lock of a working directory; gives the local folder to work in.

    Args:
      workdir: as it was given.
      command: its name, for those who find it locked.

    Raises:
      InputError: another process is writing there, it cannot be written in, or the bucket cannot be used.
    """
    url = bucket_url(workdir)
    if url is None:
        with locked(workdir, command):
            yield workdir
        return
    store, folder = Store(url), cache_folder("runs", url)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(folder, command))
        lock = BucketLock(store, command, folder)
        lock.take()
        stack.callback(lock.release)
        mirror = _OPEN[folder] = Mirror(store, folder, lock)
        stack.callback(_OPEN.pop, folder)
        try:
            yield folder
        except BaseException:
            try:
                mirror.close()
            except InputError as error:  # what ends the command is to be said last
                print(f"warning: {error}", file=sys.stderr)
            raise
        mirror.close()


def reading(workdir: str | os.PathLike[str]) -> Path:
    """A working directory, or any folder, to be read; of one in a bucket the local folder, with what is there now."""
    url = bucket_url(workdir)
    if url is None:
        return Path(workdir)
    folder = cache_folder("read", url)
    folder.mkdir(parents=True, exist_ok=True)
    _OPEN[folder] = Mirror(Store(url), folder)
    return folder


def cache_folder(kind: str, url: str) -> Path:
    """The local folder for an address; of its own for every kind of use.

    Raises:
      InputError: the address names no folder: a working directory is never a whole bucket.
    """
    parent, _, name = url.rpartition("/")
    if (parent.endswith(":/") and kind != "inputs") or name in ("", ".", ".."):
        raise InputError(f"{url}: names no folder in a bucket; write {'/'.join(url.split('/')[:3])}/NAME")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    folder = caches / "dspark_jax" / kind / urllib.parse.quote(parent, safe="") / name
    name_place(str(folder), url)
    return folder


def fetch(path: Path) -> None:
    """Makes sure that a part of a working directory is on this machine, as far as there is such a part."""
    if mirror := _mirror(path):
        mirror.fetch(path)


def publish(path: Path, *, wait: bool = True) -> None:
    """Puts a finished part (data, features, a checkpoint) into the bucket; without waiting as soon as it is there."""
    if mirror := _mirror(path):
        (mirror.publish if wait else mirror.publish_later)(path)


def settle(path: Path) -> None:
    """Waits for what is put into the bucket without waiting; what the folder `path` has lost is removed there."""
    if mirror := _mirror(path):
        mirror.settle()
        mirror.prune(path)


def withdraw(path: Path) -> None:
    """Removes a part from the bucket."""
    if mirror := _mirror(path):
        mirror.withdraw(path)


def begin_logs(path: Path) -> None:
    """Says that `data.partial` begins anew, with an `inputs.json`."""
    if mirror := _mirror(path):
        mirror.begin_logs(path)


def watch(path: Path) -> None:
    """Has the lines of a growing file in `data.partial` put into the bucket, now and then."""
    if mirror := _mirror(path):
        mirror.watch(path)


def _mirror(path: Path) -> Mirror | None:
    if not _OPEN:
        return None
    path = Path(path).absolute()
    return next((mirror for folder, mirror in _OPEN.items() if path.is_relative_to(folder)), None)
