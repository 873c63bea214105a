"""A part of a bucket: objects by name, each written and read as a whole. Through fsspec, gcsfs and s3fs.

No rename, no append, no folders: this is all that the rest of `buckets` relies on. A write is there whole or not at
all, and whoever reads after it sees it; Google's and Amazon's stores promise both.
"""

import contextlib
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dspark_jax.errors import InputError, is_full_disk
from dspark_jax.paths import BUCKETS

AT_ONCE = 8
"""Objects that are moved at the same time."""

_VERSION = ("ETag", "etag", "generation", "md5Hash", "mtime", "LastModified", "updated", "size")
"""What stores say of an object that changes with its content; each of them has some of these."""

_LIBRARIES = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "requests.exceptions": ("RequestException",),
}
"""What gcsfs and s3fs raise besides OSError, by module; those that are not loaded have raised nothing."""


class Store:
    """The objects whose names begin with an address; names here are without it.

    Attributes:
      url: the address, e.g. gs://bucket/run.
    """

    def __init__(self, url: str):
        """Opens it; nothing is asked of the store yet.

        Raises:
          InputError: the package for this kind of bucket is not installed, or cannot be used.
        """
        import fsspec

        scheme, _, self._root = url.partition("://")
        self.url = url
        try:
            with self._in_one_line("opened"):
                self._files: Any = fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError:
            extra = BUCKETS[scheme]
            raise InputError(f"{url}: needs a package that is missing; pip install 'dspark-jax[{extra}]'") from None

    def list(self, prefix: str = "") -> dict[str, str]:
        """Names of the objects in a folder, all of them by default, and text that changes with their content."""
        with self._in_one_line("read"):
            try:
                found = self._files.find(self._key(prefix), detail=True)
            except FileNotFoundError:
                return {}
        below = f"{self._key(prefix)}/"
        # A folder that somebody has made in a browser is an empty object whose name ends in a slash.
        keys = [key for key in found if key.startswith(below) and not key.endswith("/")]
        return {key.removeprefix(f"{self._root}/"): _version(found[key]) for key in keys}

    def version(self, name: str) -> str | None:
        """Text that changes with the content of an object; None if there is none."""
        with self._in_one_line("read", name), contextlib.suppress(FileNotFoundError):
            info = self._files.info(self._key(name))
            return _version(info) if info["type"] == "file" else None
        return None

    def read(self, name: str) -> bytes | None:
        """An object; None if there is none."""
        with self._in_one_line("read", name), contextlib.suppress(FileNotFoundError):
            return self._files.cat_file(self._key(name))
        return None

    def write(self, name: str, content: bytes) -> None:
        """Puts an object in the place of what has this name."""
        with self._in_one_line("written", name):
            self._files.pipe_file(self._key(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Puts an object where none is; of several that try at once, the store lets one through. False: another was."""
        with self._in_one_line("written", name):
            try:
                self._files.pipe_file(self._key(name), content, mode="create")
            except FileExistsError:
                return False
        return True

    def put(self, files: Iterable[tuple[Path, str]]) -> None:
        """Uploads local files, each under its name."""

        def one(file: Path, name: str) -> None:
            with self._in_one_line("written", name):
                self._files.put_file(str(file), self._key(name))

        self._all(one, files)

    def get(self, files: Iterable[tuple[str, Path]]) -> None:
        """Downloads objects to local files, each whole or not at all; what the store does not have is left out."""

        def one(name: str, file: Path) -> None:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{uuid.uuid4().hex}.tmp")
            try:
                with self._in_one_line("read", name), contextlib.suppress(FileNotFoundError):
                    self._files.get_file(self._key(name), str(temporary))
                    os.replace(temporary, file)
            finally:
                temporary.unlink(missing_ok=True)

        self._all(one, files)

    def delete(self, names: Iterable[str]) -> None:
        """Removes objects; one that is not there is gone already."""

        def one(name: str) -> None:
            with self._in_one_line("removed", name), contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._key(name))

        self._all(one, ((name,) for name in names))

    def _key(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _all(self, one: Any, arguments: Iterable[tuple[Any, ...]]) -> None:
        """Does one thing for each, several at once; raises the first error when all have ended."""
        with ThreadPoolExecutor(AT_ONCE, "bucket") as pool:
            for done in [pool.submit(one, *each) for each in arguments]:
                done.result()

    @contextlib.contextmanager
    def _in_one_line(self, what: str, name: str = "") -> Iterator[None]:
        """Turns what the store or the way to it raises into one line; absence, existence and a full disk pass."""
        known = [
            getattr(sys.modules[module], error)
            for module, errors in _LIBRARIES.items()
            if module in sys.modules
            for error in errors
        ]
        try:
            yield
        except (FileExistsError, ImportError):
            raise
        except FileNotFoundError as error:
            if what != "written":
                raise
            raise InputError(f"{self.url}: there is no such bucket ({_line(error)}); make it, or correct it") from error
        except (OSError, ValueError, *known) as error:
            if isinstance(error, InputError) or is_full_disk(error):
                raise
            raise InputError(
                f"{self.url}{'/' * bool(name)}{name}: cannot be {what} ({_line(error)}); check the name of the bucket, "
                "the credentials and the network, and run again"
            ) from error


def _version(info: Mapping[str, Any]) -> str:
    return str([str(info.get(key)) for key in _VERSION])


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
