"""A bucket for tests: whole objects in a flat folder of this disk, which other processes see, too.

It can do what gcsfs and s3fs can rely on, and nothing else: put an object whole, put one where none is, read, list by
prefix, remove. No folder, no rename, no append. `register()` has fsspec use it for gs:// and s3://.
"""

import errno
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import fsspec
from fsspec.spec import AbstractFileSystem

FOLDER = "FAKE_BUCKET"
"""Environment variable: the folder of the objects."""


class FakeBucket(AbstractFileSystem):
    """Keys are `BUCKET/NAME`."""

    protocol = ("gs", "s3")
    cachable = False
    before: Any = staticmethod(lambda what, key: None)
    """Called before every request, (what, key); may raise or kill."""

    def find(self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **_: Any) -> Any:
        assert maxdepth is None and not withdirs
        self.before("list", path)
        keys = [key for key in _keys() if key.startswith(f"{path}/")]
        return {key: _info(key) for key in keys} if detail else keys

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self.before("info", path)
        return _info(path)

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        self.before("read", path)
        return _place(path).read_bytes()

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        self.before("read", rpath)
        shutil.copyfile(_place(rpath), lpath)

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.before("write", path)
        _put(path, value, exclusive=mode == "create")

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.before("write", rpath)
        _put(rpath, Path(lpath).read_bytes())

    def rm_file(self, path: str) -> None:
        self.before("remove", path)
        _place(path).unlink()


def _place(key: str) -> Path:
    return Path(os.environ[FOLDER]) / quote(key, safe="")


def _keys() -> list[str]:
    return sorted(unquote(path.name) for path in Path(os.environ[FOLDER]).iterdir() if not path.name.startswith("."))


def _info(key: str) -> dict[str, Any]:
    stat = _place(key).stat()
    return {"name": key, "type": "file", "size": stat.st_size, "generation": f"{stat.st_ino} {stat.st_mtime_ns}"}


def _put(key: str, content: bytes, exclusive: bool = False) -> None:
    if not os.path.isdir(os.environ[FOLDER]):
        raise FileNotFoundError(errno.ENOENT, "The specified bucket does not exist", key)
    temporary = Path(os.environ[FOLDER]) / f".{uuid.uuid4().hex}"
    temporary.write_bytes(content)
    if exclusive:
        try:
            os.link(temporary, _place(key))
        finally:
            temporary.unlink()
    else:
        os.replace(temporary, _place(key))


def register() -> None:
    """Has fsspec use it for both kinds of buckets."""
    for scheme in FakeBucket.protocol:
        fsspec.register_implementation(scheme, FakeBucket, clobber=True)


def objects() -> dict[str, bytes]:
    """All there is."""
    return {key: _place(key).read_bytes() for key in _keys()}


def put(key: str, content: bytes) -> None:
    """As somebody else would."""
    _put(key, content)


def wait_for(key: str, seconds: float = 60.0) -> None:
    """Returns when there is an object."""
    ends = time.monotonic() + seconds
    while not _place(key).exists():
        assert time.monotonic() < ends, key
        time.sleep(0.01)
