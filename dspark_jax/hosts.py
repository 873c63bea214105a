"""Several hosts that work as one: their shares of the work, and meetings at which nobody may be missing.

They meet through small files in the working directory, which all of them see, and not through JAX: a host may work for
hours between two meetings, and where one is gone JAX ends the others with a page of text. Each host writes
`data.hosts/NUMBER.json`: how far it has come, why it failed if it did, and a count that grows as long as it lives.
Host 0 reads the files of all others, and they read that of host 0.

Files of an earlier run may still be there. So every host invents a token when it begins, and repeats the tokens that it
has read: a file counts for those hosts whose token it has.
"""

import contextlib
import dataclasses
import json
import math
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import jax

from dspark_jax.config import DecodeMeshConfig, MeshConfig
from dspark_jax.errors import HostLost, InputError
from dspark_jax.json_file import write_json

FOLDER = "data.hosts"
BEAT = 10.0
"""Seconds between two signs of life, and between two looks at other hosts while there is work to do."""
PATIENCE = 90.0
"""Seconds without one after which a host is taken for dead; NFS and gcsfuse keep what they have read for up to 60."""
COMING = 300.0
"""Seconds in which all hosts have to come; `jax.distributed.initialize` waits as long."""

_AGAIN = "start the same command on all hosts again, it goes on with what is there"


class Hosts:
    """This host among those of a run; to be entered. A host that is alone writes nothing and waits for nobody.

    Attributes:
      index: number of this host.
      count: number of hosts.
    """

    def __init__(self, workdir: Path, index: int | None = None, count: int | None = None):
        """`index` and `count` are those of JAX unless they are given."""
        self.index = jax.process_index() if index is None else index
        self.count = jax.process_count() if count is None else count
        self._others = range(1, self.count) if self.first else range(1)
        self._folder = workdir / FOLDER
        self._state: dict[str, Any] = {"token": secrets.token_hex(8), "heard": {}, "met": 0, "facts": {}, "beat": 0}
        self._known: dict[int, str] = {}  # tokens of the hosts that have answered
        self._signs: dict[int, tuple[Any, float]] = {}  # their last sign of life, and when it was new here
        self._begun = self._looked = time.monotonic()
        self._writing, self._ended = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    @property
    def first(self) -> bool:
        """Whether this host does what only one may do."""
        return self.index == 0

    def owns(self, number: int) -> bool:
        """Whether item `number` of the work is this host's."""
        return number % self.count == self.index

    def __enter__(self) -> Self:
        """Waits until all hosts are here: from then on each hears why another one fails. Raises as `meet`."""
        if self.count > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write()
            self._thread.start()
            try:
                self.meet()
            except BaseException:
                self._stand_still()
                raise
        elif self._folder.is_dir():  # left behind by hosts that failed
            shutil.rmtree(self._folder)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Waits for the others, or tells them why this host ends before them."""
        if self.count == 1:
            return
        try:
            if error is None:
                self.meet()
                self._part()
        finally:
            self._stand_still()
        if error is not None:
            ours = isinstance(error, InputError | HostLost)
            why = str(error) if ours else f"ended before its work was done ({type(error).__name__}); {_AGAIN}"
            with contextlib.suppress(OSError):  # a full disk may be why it failed
                self._write(failed=why, lost=not isinstance(error, InputError))

    def _part(self) -> None:
        """Host 0 removes the files when the others write in them no more."""
        if not self.first:
            self._stand_still()
            self._write(met=self._state["met"] + 1)
            return
        with contextlib.suppress(HostLost):  # all work is done
            self.meet()
        self._stand_still()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _stand_still(self) -> None:
        self._ended.set()
        self._thread.join()

    def meet(self, **facts: Any) -> list[Mapping[str, Any]]:
        """Waits until all hosts have come as far as this one.

        Args:
          facts: what the others are told, JSON-able.

        Returns:
          On host 0 the facts of all hosts in their order; on the others those of host 0 only.

        Raises:
          InputError: another host cannot use what it was given.
          HostLost: another host is gone.
        """
        if self.count == 1:
            return [facts]
        number, wait, told = self._state["met"] + 1, 0.02, dict[int, Mapping[str, Any]]()
        if not self.first:
            self._write(met=number, facts=facts)
        while True:
            for other in self._others:
                said = self._look(other)
                if said is not None and said["met"] >= number:
                    told.setdefault(other, said["facts"])
            if len(told) == len(self._others):
                break
            time.sleep(wait)
            wait = min(2 * wait, 1.0)
        if self.first:  # last of all: who sees that host 0 has come knows that everybody has
            self._write(met=number, facts=facts)
        found = [told[other] for other in self._others]
        return [facts, *found] if self.first else found

    def check(self) -> None:
        """Looks for failures of other hosts now and then; to be called often while there is work. Raises as `meet`."""
        if self.count > 1 and time.monotonic() - self._looked >= BEAT:
            self._looked = time.monotonic()
            for other in self._others:
                self._look(other)

    def _look(self, other: int) -> dict[str, Any] | None:
        """What another host says; None where it has not come yet, or its file cannot be read now. Raises as `meet`."""
        found, now = _read(self._folder / f"{other}.json"), time.monotonic()
        if found is not None and self._known.get(other, found["token"]) != found["token"]:
            raise HostLost(f"host {other} has begun once more; {_AGAIN}")
        if found is not None and self._state["heard"].get(str(other)) != found["token"]:
            self._write(heard={**self._state["heard"], str(other): found["token"]})
        if found is not None and found["heard"].get(str(self.index)) == self._state["token"]:
            self._known[other] = found["token"]
            if self._signs.get(other, ("", 0))[0] != found["beat"]:
                self._signs[other] = found["beat"], now
            if found.get("failed"):
                why = found["failed"] if found["failed"].startswith("host ") else f"host {other}: {found['failed']}"
                raise HostLost(why) if found["lost"] else InputError(why)
        elif other not in self._known:
            if now - self._begun > COMING:
                where = f"--workdir has to be one that all hosts see, and is {self._folder.parent} here"
                raise HostLost(f"host {other} has not come within {COMING:.0f} s; {where}; {_AGAIN}")
            return None
        if now - self._signs[other][1] > PATIENCE:
            raise HostLost(f"host {other} has shown no sign of life for {PATIENCE:.0f} s; {_AGAIN}")
        return found

    def _write(self, **changes: Any) -> None:
        with self._writing:
            self._state |= changes
            write_json(self._folder / f"{self.index}.json", self._state)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):  # the next one may succeed
                self._write(beat=self._state["beat"] + 1)


def _read(path: Path) -> dict[str, Any] | None:
    """A host's file; None where there is none, or another process is just replacing it."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"token", "heard", "met", "facts", "beat"} <= set(found) else None


def wait_for_files(lengths: Mapping[Path, int]) -> None:
    """Returns when files that other hosts have written are as long here as they are there; network file systems lag.

    Args:
      lengths: of files, in bytes.

    Raises:
      HostLost: they are not within `PATIENCE` seconds.
    """
    ends = time.monotonic() + PATIENCE
    for path, length in lengths.items():
        while not path.exists() or path.stat().st_size < length:
            if time.monotonic() > ends:
                raise HostLost(f"{path}: is not here as the host that wrote it has it ({length} bytes); {_AGAIN}")
            time.sleep(1)


MeshOrDecodeMesh = TypeVar("MeshOrDecodeMesh", MeshConfig, DecodeMeshConfig)


def mesh_of_one_host(config: MeshOrDecodeMesh, devices: int) -> MeshOrDecodeMesh:
    """Where a host computes alone: axes as long as those of all hosts together, as far as its devices go.

    Args:
      config: of all hosts.
      devices: number of this host's.
    """
    sizes, left = {}, devices
    for name in ("tensor", "fsdp", "data"):
        size = getattr(config, name)
        sizes[name] = math.gcd(size, left) if size > 0 else size
        left //= max(sizes[name], 1)
    if min(sizes.values()) > 0:
        sizes["data"] *= left
    return dataclasses.replace(config, **sizes)
