"""Rows of prompt files: what `data.prompts` may name, unpacked and taken apart, whatever it is stored as.

An entry is a file, a directory or a pattern such as `sets/*.jsonl`, here or in a bucket, or a data set of the hub:

    hub:OWNER/NAME?split=train&name=SUBSET&column=question
    hub:OWNER/NAME?file=FILE,FILE

or a name in `benchmarks.TRAINING`, which stands for such a data set where there is no file of that name.

How a file is packed and stored is found by its first bytes, never by its name. `PACKINGS` and `STORES` have one entry
per format.
"""

import codecs
import dataclasses
import glob
import gzip
import hashlib
import importlib
import io
import json
import os
import re
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dspark_jax.benchmarks import TRAINING
from dspark_jax.buckets.inputs import files_at, local_file
from dspark_jax.errors import InputError
from dspark_jax.hub import data_file, data_set_commit
from dspark_jax.paths import bucket_url

HUB = "hub:"
"""Begins an entry that names a data set of the hub."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
PACKED_SUFFIXES = (".gz", ".zst")
"""Files of a directory that are read; a file that is named itself may have any name."""

_SHARD = re.compile(r"-\d{5}-of-\d{5}$")


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a file, or an entry of a list or a table.

    Attributes:
      number: 1-based line or entry.
      record: what it holds, None if it cannot be read.
      text: as it is in the file; of tables as JSON.
      error: why it cannot be read and what to do, or ''.
    """

    number: int
    record: dict[str, Any] | None
    text: str
    error: str = ""


def prompt_files(entries: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Files and hub data sets that entries of `data.prompts` stand for, those of an entry in order of their names.

    Raises:
      InputError: a directory or pattern without any file.
    """
    found: list[str] = []
    for entry in map(str, entries):
        if not entry:
            raise InputError("an entry of the prompts is empty; name a file, or leave it out")
        if entry in TRAINING and not Path(entry).exists():
            entry = TRAINING[entry]
        if entry.startswith(HUB):
            found.append(entry)
        elif url := bucket_url(entry):
            found += _files_in_bucket(url)
        elif Path(entry).is_dir():
            found_there = (path for path in Path(entry).rglob("*") if not path.is_dir())  # Spark's `a.json/` is one
            files = sorted(path for path in found_there if _is_prompt_file(path.relative_to(entry)))
            if not files:
                kinds = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
                raise InputError(f"{entry}: a directory without prompt files ({kinds}, also .gz and .zst); add one")
            found += map(str, files)
        elif glob.has_magic(entry) and not Path(entry).exists():
            files = sorted(path for path in glob.glob(entry, recursive=True) if Path(path).is_file())
            if not files:
                raise InputError(f"{entry}: no file matches this pattern; correct it")
            found += files
        else:
            found.append(entry)
    return found


def _files_in_bucket(entry: str) -> list[str]:
    """The same of an address in a bucket."""
    files = files_at(entry)
    if files == [entry] or glob.has_magic(entry):
        found = files
    else:
        found = [file for file in files if _is_prompt_file(Path(file.removeprefix(f"{entry}/")))]
    if not found:
        raise InputError(f"{entry}: no prompt file there in the bucket; correct it")
    return found


def _is_prompt_file(path: Path) -> bool:
    """Whether a directory's file is read: hidden ones, and those of other kinds (a README, say), are not."""
    name = Path(path.stem) if path.suffix in PACKED_SUFFIXES else path
    return name.suffix in SUFFIXES and not any(part.startswith(".") for part in path.parts)


def set_name(file: str) -> str:
    """Name of the prompt set of a file: without folder, suffixes and number of a shard; of the hub, the data set's."""
    if file.startswith(HUB):
        return HubSet.parse(file).path.rpartition("/")[2]
    path = Path(file)
    stem = Path(path.stem).stem if path.suffix in PACKED_SUFFIXES else path.stem
    return _SHARD.sub("", stem)


def content_hashes(files: Iterable[str], field: str) -> list[list[str]]:
    """Prompt set and hash of the content of every file that `files` stand for, in their order.

    Raises:
      InputError: a file that the config's `field` names cannot be read.
    """
    found = []
    for file in prompt_files(files):
        if file.startswith(HUB):
            digest = HubSet.parse(file).digest()
        else:
            try:
                digest = hashlib.sha256(local_file(file).read_bytes()).hexdigest()
            except OSError as error:
                raise InputError(f"{file}: cannot be read ({error.strerror}); correct {field}") from None
        found.append([set_name(file), digest[:32]])
    return found


def rows(file: str) -> Iterator[Row]:
    """Rows of a file or hub data set of `prompt_files`.

    Raises:
      InputError: it cannot be read, is damaged, is stored in a way that is not known, or a package that reads it is
        not installed.
    """
    if file.startswith(HUB):
        yield from HubSet.parse(file).rows()
        return
    try:
        content = local_file(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); give a JSONL file of prompts") from None
    for magic, unpack in PACKINGS.items():
        if content.startswith(magic):
            content = unpack(file, content)
    yield from next(read for fits, read in STORES.values() if fits(content))(file, content)


def _package(name: str, file: str, purpose: str) -> ModuleType:
    """An optional package, or one line that says how it is installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(f"{file}: {purpose} needs the package {package}; pip install {package}") from None


def _gunzip(file: str, content: bytes) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{file}: damaged gzip data ({error}); get it again") from None


def _unzstd(file: str, content: bytes) -> bytes:
    zstandard = _package("zstandard", file, "a zstd file")
    try:
        reader = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content), read_across_frames=True)
        return reader.read()
    except zstandard.ZstdError as error:
        raise InputError(f"{file}: damaged zstd data ({error}); get it again") from None


PACKINGS: dict[bytes, Callable[[str, bytes], bytes]] = {b"\x1f\x8b": _gunzip, b"\x28\xb5\x2f\xfd": _unzstd}
"""First bytes of packed data, and what unpacks it."""


def _lines(file: str, content: bytes) -> Iterator[Row]:
    """One JSON object per line; a byte order mark before a line and blank lines are skipped."""
    _refuse_one_object(file, content)
    for number, line in enumerate(content.splitlines(), start=1):
        line = line.removeprefix(codecs.BOM_UTF8)  # also of a file that was appended to another one
        if line.strip():
            text = line.decode("utf-8", "replace")
            try:
                yield Row(number, _decode(line), text)
            except ValueError as error:
                yield Row(number, None, text, str(error))


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_one_object(file: str, content: bytes) -> None:
    """Refuses a JSON object that is spread over lines: it may be one row, or hold many under a name of its own."""
    first, _, rest = content.removeprefix(codecs.BOM_UTF8).strip().partition(b"\n")
    if rest and first.startswith(b"{") and not _is_json(first) and _is_json(content):
        names = ", ".join(map(repr, list(json.loads(content.decode("utf-8-sig")))[:8]))
        raise InputError(
            f"{file}: one JSON object over several lines ({names}); write its rows one on each line, or as a JSON list"
        )


def _is_list(content: bytes) -> bool:
    """Whether content is a JSON list, and not lines of which the first one is a list."""
    first, _, rest = content.removeprefix(codecs.BOM_UTF8).strip().partition(b"\n")
    return first.startswith(b"[") and not (rest and _is_json(first))


def _array(file: str, content: bytes) -> Iterator[Row]:
    """A JSON list of objects."""
    try:
        entries = _parsed(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{file}: begins as a JSON list, but is none ({str(error).split(':')[0]}); "
            'correct it, or write one JSON object on each line, e.g. {"prompt": "..."}'
        ) from None
    yield from _table(entries)


def _table(entries: Iterable[Any]) -> Iterator[Row]:
    """Rows of entries that have been read already."""
    for number, entry in enumerate(entries, start=1):
        text = json.dumps(entry, ensure_ascii=False, default=str)
        try:
            yield Row(number, _object(entry), text)
        except ValueError as error:
            yield Row(number, None, text, str(error))


def _parquet(file: str, content: bytes) -> Iterator[Row]:
    parquet = _package("pyarrow.parquet", file, "a parquet file")
    failures = _package("pyarrow", file, "a parquet file").ArrowException
    try:
        batches = parquet.ParquetFile(io.BytesIO(content)).iter_batches()
        yield from _table(row for batch in batches for row in batch.to_pylist())
    except (failures, OSError) as error:
        raise InputError(f"{file}: damaged parquet data ({str(error).splitlines()[0]}); get it again") from None


STORES: dict[str, tuple[Callable[[bytes], bool], Callable[[str, bytes], Iterator[Row]]]] = {
    "parquet": (lambda content: content.startswith(b"PAR1"), _parquet),
    "JSON list": (_is_list, _array),
    "JSON lines": (lambda content: True, _lines),
}
"""Whether content is stored so, and what reads it; the first one that fits is taken."""


EXAMPLE = '{"prompt": "..."}'
_WHOLE = "write one whole JSON object on each line"


def _decode(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; a ValueError says what is wrong with it and what to do."""
    try:
        return _object(_parsed(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}; save the file as UTF-8 text") from None
    except json.JSONDecodeError as error:
        text = "" if line.lstrip()[:1] in b"{[" else f", a line of text belongs in {EXAMPLE}"
        raise ValueError(f"not valid JSON at column {error.colno} ({error.msg}); {_WHOLE}{text}") from None
    except RecursionError:
        raise ValueError(f"not valid JSON (nested too deeply); {_WHOLE}") from None


def _parsed(text: str) -> Any:
    """The value of JSON; a ValueError where an object has a field twice, of which `json` would take the last."""
    return json.loads(text, object_pairs_hook=_fields)


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice; take one out")
    return found


def _object(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict):
        kind = type(entry).__name__
        raise ValueError(f"a JSON {kind} where an object is needed; {_WHOLE}, e.g. {EXAMPLE}, not in a list")
    return entry


@dataclasses.dataclass(frozen=True)
class HubSet:
    """A data set that the package `datasets` loads.

    Attributes:
      entry: as it is in the config.
      path: OWNER/NAME.
      split: of the data set.
      name: of its subset, or ''.
      column: that holds the question or the conversation, where its name is none that `layouts` knows; or ''.
      file: names of its files, separated by commas, that are read as files are here; or '': `datasets` reads it.
      streaming: 'true': rows are read while they are downloaded, and no more of them than are asked for.
    """

    entry: str
    path: str
    split: str = "train"
    name: str = ""
    column: str = ""
    file: str = ""
    streaming: str = ""

    @classmethod
    def parse(cls, entry: str) -> "HubSet":
        """Reads an entry of `data.prompts`.

        Raises:
          InputError: it names no data set, or an option that is not known.
        """
        path, _, query = entry.removeprefix(HUB).partition("?")
        options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        unknown = sorted(set(options) - {"split", "name", "column", "file", "streaming"})
        if not path or unknown:
            what = f"unknown {', '.join(unknown)}" if unknown else "names no data set"
            raise InputError(f"{entry}: {what}; write hub:OWNER/NAME?split=train&name=SUBSET&column=FIELD")
        if options.get("file") and {"split", "name"} & set(options):
            raise InputError(f"{entry}: a file has neither split nor name; leave out one or the other")
        if options.get("file") and "streaming" in options:
            raise InputError(f"{entry}: a file is not streamed; leave out one or the other")
        if options.get("streaming", "true") != "true":
            raise InputError(f"{entry}: streaming={options['streaming']}; write streaming=true, or leave it out")
        return cls(entry, path, **options)

    def local_files(self) -> list[Path]:
        """The files that it names, downloaded if need be."""
        return [data_file(self.path, name) for name in self.file.split(",") if name]

    def load(self) -> Any:
        """The data set, downloaded into the cache of `datasets` if it is not there."""
        datasets = _package("datasets", self.entry, "a data set of the hub")
        try:
            more = {"streaming": True} if self.streaming else {}
            return datasets.load_dataset(self.path, self.name or None, split=self.split, **more)
        except (ValueError, OSError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            if getattr(error, "errno", None) is not None:  # a full disk, say
                raise
            why = " ".join(str(error).split())[:200]
            raise InputError(f"{self.entry}: cannot be loaded ({why}); correct it, or give a local file") from None

    def digest(self) -> str:
        """Hash of its content, which is in Arrow files of the cache; of one that is streamed, of its commit."""
        digest = hashlib.sha256(f"{self.split} {self.name} {self.column}".encode())
        if self.streaming:
            digest.update(data_set_commit(self.path).encode())
            return digest.hexdigest()
        cached = self.local_files() or [Path(file["filename"]) for file in self.load().cache_files]
        for file in cached:
            digest.update(file.read_bytes())
        return digest.hexdigest()

    def rows(self) -> Iterator[Row]:
        """Its rows; the column takes the place of the field whose form it has."""
        if self.file:
            found = (row for file in self.local_files() for row in rows(str(file)))
            for number, row in enumerate(found, start=1):
                record = row.record and self._renamed(row.record)
                yield dataclasses.replace(row, number=number, record=record)
            return
        data = self.load()
        if self.column and data.column_names and self.column not in data.column_names:  # a stream may not know them
            names = ", ".join(data.column_names)
            raise InputError(f"{self.entry}: it has no column {self.column!r}, but {names}; correct it")
        yield from _table(map(self._renamed, data))

    def _renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        if not self.column or self.column not in row:
            return row
        value = row[self.column]
        field = "prompt"
        if isinstance(value, list):
            field = "turns" if all(isinstance(one, str) for one in value) else "messages"
        return {field: value, **{name: other for name, other in row.items() if name not in (self.column, field)}}
