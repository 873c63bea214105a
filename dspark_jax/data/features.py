"""The feature cache: what the target gives for every token of the samples, on disk, so that it runs once.

    features/manifest.json       what they are of (target, tokenizer, samples, taps), how they are stored, the shards
    features/shard-00000.array_record   one record per sample, in the samples' order
    features/frozen.safetensors  the target's embedding and LM head, which training needs besides

A record holds the rows [length, (M+1) D] of a sample, the M tapped layers and the last hidden states, as in
`data.feature_codec`.

Shards are written under another name and renamed; the manifest lists those that are whole. After a kill the writer goes
on after the last one. ArrayRecord keeps a hash of every record, the manifest one of every shard and of the frozen
matrices.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  (no type stubs)
from array_record.python.array_record_data_source import ArrayRecordDataSource

from dspark_jax.config import InputError
from dspark_jax.data.feature_codec import AGAIN, REMEDY, Coded, FeatureSample, Identity, decode, encode
from dspark_jax.data.sources import Sample, Samples
from dspark_jax.errors import as_os_error, is_full_disk
from dspark_jax.json_file import read_object

FORMAT = 1
SHARD_BYTES = 256 << 20

PASS_TOKENS = 32768
"""Of a pass at a time, padding included: bounds what a device holds of it, whatever the number of samples."""

Pass = Callable[[np.ndarray, np.ndarray], Callable[[], Iterable[Coded]]]
"""(tokens [B, S], lengths [B]) -> (() -> the features of the B samples). The first call starts the pass, the second one
waits for it. What is past a length, and samples of length 0, may be anything."""


def frozen_file(directory: Path) -> Path:
    """The file of the target's embedding and LM head in a feature directory."""
    earlier = directory / "lender.safetensors"  # versions up to 0.1 named it so
    return earlier if earlier.exists() else directory / "frozen.safetensors"


def _frozen_digest(manifest: Mapping[str, Any]) -> str | None:
    """Of the file of `frozen_file`; versions up to 0.1 gave it another name, or none."""
    return manifest.get("frozen", manifest.get("lender"))


def write_features(
    directory: Path,
    identity: Identity,
    samples: Samples,
    lengths: Sequence[int],
    compute: Callable[[], Pass],
    *,
    batch_size: int,
    pass_tokens: int = PASS_TOKENS,
    progress: Callable[[int], None] = lambda count: None,
) -> None:
    """Writes the features of all samples, or of those that are missing yet.

    Args:
      directory: of the cache.
      identity: what they are of.
      samples: in the order of the records.
      lengths: their numbers of tokens.
      compute: makes the pass, and puts the frozen matrices beside the shards; only called if something is missing.
      batch_size: samples at a time, at most.
      pass_tokens: tokens at a time, at most, but for a single sample that is longer.
      progress: called with the numbers of samples done.

    Raises:
      InputError: there is a cache of something else, or not enough room on the disk, at the beginning or in the end.
    """
    check_identity(directory, identity)
    shards = _open_partial(directory)
    done = sum(len(shard["lengths"]) for shard in shards)
    left = sum(lengths[done:])
    check_room(directory, identity, left)
    progress(done)
    run = compute() if done < len(lengths) or not (frozen_file(directory)).exists() else None
    frozen = _frozen_digest(read_manifest(directory)) if run is None else _digest(frozen_file(directory))
    computed = _computed(samples, lengths, done, run, batch_size, pass_tokens) if run is not None else iter(())
    while done < len(lengths):
        name = f"shard-{len(shards):05d}.array_record"
        temporary = directory / (name + ".tmp")
        written, size = list[int](), 0
        with _full_disk_in_one_line(temporary):
            writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
            while done < len(lengths) and size < SHARD_BYTES:
                batch, found = next(computed)
                for sample, coded in zip(batch, found, strict=False):  # after the batch, there may be padding
                    record = encode(sample, coded, identity)
                    writer.write(record)
                    size += len(record)
                written += [len(sample.tokens) for sample in batch]
                done += len(batch)
                progress(len(batch))
            writer.close()
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        entry = {"file": name, "bytes": temporary.stat().st_size, "sha256": _digest(temporary), "lengths": written}
        shards.append(entry)
        temporary.rename(directory / name)
        _write_manifest(directory, identity, shards, frozen, complete=done == len(lengths))
    _write_manifest(directory, identity, shards, frozen, complete=True)


def _digest(path: Path) -> str | None:
    """Hash of a file; None where there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _full_disk_in_one_line(shard: Path) -> Iterator[None]:
    """Turns the failure of a shard for lack of space, of which ArrayRecord speaks when it is closed, into one line."""
    try:
        yield
    except RuntimeError as error:
        if not is_full_disk(error):
            if (found := as_os_error(error, shard)) is None:
                raise
            raise found from error
        shard.unlink(missing_ok=True)
        raise InputError(
            f"{shard.with_suffix('')}: the disk is full; the shards before it are kept, free space and run again"
        ) from error


def estimate(identity: Identity, tokens: int) -> tuple[int, int]:
    """Bytes of a cache of so many tokens, as configured and as bfloat16."""
    return identity.bytes_per_token * tokens, 2 * identity.width * tokens


def check_room(directory: Path, identity: Identity, tokens: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
      InputError: less than the estimate and a twentieth is free.
    """
    needed, free = estimate(identity, tokens)[0], shutil.disk_usage(directory).free
    if needed * 1.05 > free:
        raise InputError(
            f"{directory}: features of {tokens} tokens take {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "make room, use fewer samples, or train with data.features=online"
        )


def _computed(
    samples: Samples, lengths: Sequence[int], first: int, run: Pass, batch_size: int, pass_tokens: int
) -> Iterator[tuple[list[Sample], Iterable[Coded]]]:
    """The samples from `first` on in batches, with their features; one is computed while the last one is written."""
    waiting = None
    for members, size in cut_batches(lengths, first, batch_size, pass_tokens):
        batch = [samples[index] for index in members]
        rows = min(1 << (len(batch) - 1).bit_length(), batch_size)  # few shapes, so few executables
        tokens, counts = np.zeros((rows, size), np.int32), np.zeros(rows, np.int32)
        for row, sample in enumerate(batch):
            tokens[row, : len(sample.tokens)] = sample.tokens
            counts[row] = len(sample.tokens)
        started = run(tokens, counts)
        if waiting is not None:
            yield waiting[0], waiting[1]()
        waiting = batch, started
    if waiting is not None:
        yield waiting[0], waiting[1]()


def cut_batches(lengths: Sequence[int], first: int, batch_size: int, pass_tokens: int) -> Iterator[tuple[range, int]]:
    """Batches of consecutive samples: their indices, and the length S to which they are padded.

    Args:
      lengths: tokens of all samples.
      first: sample to begin with.
      batch_size: samples of a batch, at most.
      pass_tokens: padded tokens of a batch, at most, but for a single sample that is longer.
    """
    while first < len(lengths):
        end, size = first + 1, _padded(lengths[first])
        while end < min(len(lengths), first + batch_size):
            wider = max(size, _padded(lengths[end]))
            if (end + 1 - first) * wider > pass_tokens:
                break
            end, size = end + 1, wider
        yield range(first, end), size
        first = end


def _padded(length: int) -> int:
    """A power of two from 32 to 256, or a multiple of 256: few shapes, so few executables."""
    return max(1 << (length - 1).bit_length(), 32) if length <= 256 else -(-length // 256) * 256


class CachedSamples:
    """Samples with their features: random access, safe to use from several threads.

    Attributes:
      lengths: tokens of every sample.
      identity: what the features are of.
    """

    def __init__(self, samples: Samples, directory: Path, identity: Identity):
        """Opens a complete cache.

        Raises:
          InputError: there is none, or it is of something else.
        """
        check_identity(directory, identity)
        manifest = read_manifest(directory)
        if not manifest.get("complete"):
            raise InputError(
                f"{directory}: no complete feature cache; run python -m dspark_jax.prepare with this config"
            )
        self.identity = identity
        self.lengths = [length for shard in manifest["shards"] for length in shard["lengths"]]
        if len(self.lengths) != len(samples):
            raise InputError(f"{directory}: {len(self.lengths)} records for {len(samples)} samples; {REMEDY}")
        self._samples, self._directory = samples, directory
        self._files = [shard["file"] for shard in manifest["shards"]]
        self._firsts = np.cumsum([0, *(len(shard["lengths"]) for shard in manifest["shards"])])
        for shard in manifest["shards"]:
            if not _is_whole(directory, shard):
                raise InputError(f"{directory / shard['file']}: missing or not of {shard['bytes']} bytes; {AGAIN}")
        frozen = _frozen_digest(manifest)
        if frozen is not None and _digest(frozen_file(directory)) not in (None, frozen):
            raise InputError(f"{frozen_file(directory)}: damaged (it has changed since it was written); {REMEDY}")
        try:
            self._records = ArrayRecordDataSource([str(directory / file) for file in self._files])
        except RuntimeError as error:  # ArrayRecord's own kind for damaged files
            raise InputError(f"{directory}: damaged ({error}); {REMEDY}") from None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> FeatureSample:
        """The sample at `index` in 0..len-1; its features are read when they are asked for."""
        sample = self._samples[index]
        fields = {field.name: getattr(sample, field.name) for field in dataclasses.fields(Sample)}
        return FeatureSample(**fields, identity=self.identity, read=functools.partial(self._read, index, sample))

    def _read(self, index: int, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Values and scales of a sample.

        Raises:
          InputError: its record is damaged; names shard and record.
        """
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        where = f"{self._directory / self._files[shard]}: record {index - self._firsts[shard]}"
        try:
            record = self._records[index]
        except RuntimeError as error:
            raise InputError(f"{where} is damaged ({error}); {REMEDY}") from None
        return decode(record, sample, self.identity, where)

    def __repr__(self) -> str:
        """Names the data, and only that: grain prints it in its error messages."""
        return f"CachedSamples({str(self._directory)!r})"


def read_manifest(directory: Path) -> dict[str, Any]:
    """Content of a cache's manifest; empty where there is none.

    Raises:
      InputError: it is damaged.
    """
    path = directory / "manifest.json"
    if not path.exists():
        return {}
    manifest = read_object(path, REMEDY, REMEDY)
    identity, shards = manifest.get("identity"), manifest.get("shards")
    if not isinstance(identity, dict) or not isinstance(shards, list) or not all(map(_is_shard, shards)):
        raise InputError(f"{path}: damaged (not an identity and a list of shards); {REMEDY}")
    identity.setdefault("target_dtype", "auto")  # of older versions
    return manifest


def _is_shard(entry: Any) -> bool:
    """Whether this is what a manifest says of a shard."""
    if not isinstance(entry, dict) or not isinstance(entry.get("lengths"), list):
        return False
    file, size = entry.get("file"), entry.get("bytes")
    named = isinstance(file, str) and Path(file).name == file and isinstance(entry.get("sha256"), str)
    return named and isinstance(size, int) and all(isinstance(length, int) for length in entry["lengths"])


_SETTINGS = {
    "target": "target.path (weights)",
    "tokenizer": "target.path (tokenizer)",
    "data": "samples (data.*)",
    "source": "data.features",
    "taps": "drafter.target_layer_ids",
    "hidden_size": "hidden_size",
    "dtype": "data.feature_dtype",
    "target_dtype": "target.dtype",
}
"""What a field of an `Identity` follows from."""


def check_identity(directory: Path, identity: Identity) -> None:
    """Refuses a cache of something else, whole or begun. It took hours perhaps, so nothing here removes it.

    Raises:
      InputError: there is one; names what differs.
    """
    manifest = read_manifest(directory)
    if not manifest:
        return
    found, needed = manifest["identity"], _plain(identity)
    names = [name for name in needed if found.get(name) != needed[name]]
    if names:
        differing = [f"{_SETTINGS.get(name, name)} {found.get(name)}, needed is {needed[name]}" for name in names]
        raise InputError(
            f"{directory}: made with {'; '.join(differing)}; go back to the old settings, remove this folder, "
            "or use another --workdir"
        )


def is_complete(directory: Path, identity: Identity) -> bool:
    """Whether the whole cache of this identity is there: its shards, by their sizes, and the frozen matrices."""
    manifest = read_manifest(directory)
    if not manifest.get("complete") or manifest["identity"] != _plain(identity):
        return False
    return (frozen_file(directory)).exists() and all(_is_whole(directory, shard) for shard in manifest["shards"])


def _is_whole(directory: Path, shard: dict[str, Any]) -> bool:
    """Whether a shard is there and of its size."""
    path = directory / shard["file"]
    return path.exists() and path.stat().st_size == shard["bytes"]


def _open_partial(directory: Path) -> list[dict[str, Any]]:
    """The shards that are whole; other shards in the directory, which a kill has left, are removed."""
    shards = read_manifest(directory).get("shards", [])
    directory.mkdir(parents=True, exist_ok=True)
    for count, shard in enumerate(shards):
        if not _is_whole(directory, shard):
            shards = shards[:count]
            break
    kept = {shard["file"] for shard in shards}
    for path in directory.glob("shard-*"):
        if path.name not in kept:
            path.unlink()
    return shards


def _write_manifest(
    directory: Path, identity: Identity, shards: list[dict[str, Any]], frozen: str | None, *, complete: bool
) -> None:
    """Replaces the manifest in one step."""
    content = {"format": FORMAT, "identity": _plain(identity), "complete": complete, "frozen": frozen, "shards": shards}
    temporary = directory / "manifest.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / "manifest.json")


def _plain(identity: Identity) -> dict[str, Any]:
    """As JSON holds it."""
    return {"format": FORMAT} | json.loads(json.dumps(dataclasses.asdict(identity)))
