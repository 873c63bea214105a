"""Files in a bucket that are only read: prompts, and the directories of models. What is needed is kept on this machine.

A file is looked for in the bucket once in a process, and downloaded if it is not the one that was kept.
"""

import fnmatch
import functools
import glob
import json
import os
import re
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path

from dspark_jax.buckets.places import cache_folder
from dspark_jax.buckets.store import Store
from dspark_jax.errors import InputError
from dspark_jax.json_file import written_whole
from dspark_jax.paths import bucket_url


def local_file(path: str) -> Path:
    """A file; one in a bucket is downloaded.

    Raises:
      FileNotFoundError: there is none in the bucket.
      InputError: the bucket cannot be read.
    """
    url = bucket_url(path)
    return Path(path) if url is None else _file(url)


@functools.cache
def _file(url: str) -> Path:
    parent, _, name = url.rpartition("/")
    folder = _kept(parent, (name,))
    if not (folder / name).exists():
        raise FileNotFoundError(2, os.strerror(2), url)
    return folder / name


@functools.cache
def local_folder(url: str, patterns: tuple[str, ...]) -> Path:
    """A folder in a bucket, with those of its files that fit one of the patterns.

    Raises:
      InputError: it has none of them, or the bucket cannot be read.
    """
    folder = _kept(url, patterns)
    if all(path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"{url}: no such folder in the bucket, or none of {', '.join(patterns)} in it; correct it")
    return folder


def files_at(url: str) -> list[str]:
    """Addresses of the files that one stands for: itself, all below it, or those that fit its pattern; none: []."""
    if glob.has_magic(url):
        plain = url[: min(url.find(sign) for sign in "*?[" if sign in url)].rpartition("/")[0]
        found = [f"{plain}/{name}" for name in Store(plain).list() if "/." not in f"/{name}"]
        return sorted(filter(_pattern(url).fullmatch, found))
    parent, _, name = url.rpartition("/")
    below = sorted(f"{url}/{inner}" for inner in Store(url).list())
    is_file = not below and not parent.endswith(":/") and Store(parent).version(name)
    return [url] if is_file else below


_SIGNS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _pattern(url: str) -> re.Pattern[str]:
    """What a pattern means, as a local one does: a star stays in its folder, two are any number of folders."""

    def meaning(part: str) -> str:
        if part.startswith("["):
            return part.replace("[!", "[^", 1)
        return _SIGNS.get(part, re.escape(part))

    return re.compile("".join(map(meaning, re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", url))))


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _kept(url: str, patterns: Sequence[str]) -> Path:
    """The local folder for an address, after its files that fit have been made those of the bucket."""
    store, folder = Store(url), cache_folder("inputs", url)
    folder.mkdir(parents=True, exist_ok=True)
    tags = folder / ".tags.json"
    known = json.loads(tags.read_text("utf-8")) if tags.exists() else {}
    named = {name: store.version(name) for name in patterns if not glob.has_magic(name)}
    if any(map(glob.has_magic, patterns)):
        named |= {name: tag for name, tag in store.list().items() if "/" not in name and _fits(name, patterns)}
    there = {name: tag for name, tag in named.items() if tag is not None}
    for name in set(known) - set(there):
        if _fits(name, patterns):
            (folder / name).unlink(missing_ok=True)
            del known[name]
    changed = {name: tag for name, tag in there.items() if known.get(name) != tag or not (folder / name).exists()}
    store.get((name, folder / name) for name in changed)
    with written_whole(tags, f".{uuid.uuid4().hex}.tmp") as temporary:
        temporary.write_text(json.dumps(known | changed), "utf-8")
    return folder
