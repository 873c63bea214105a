"""Training samples on disk: a TFDS dataset in ArrayRecord files, written and read without TensorFlow.

TFDS gives the layout (`features.json`, `dataset_info.json`, shards with their record counts), so that the data can also
be opened with `tfds.data_source`, TFDS's own tools or any ArrayRecord reader.
"""

import contextlib
import dataclasses
import io
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]  (no type stubs)
from google.protobuf.json_format import ParseError
from tensorflow_datasets.core import shuffle, writer
from tensorflow_datasets.proto import tf_example_pb2

from dspark_jax.buckets.places import fetch
from dspark_jax.config import InputError
from dspark_jax.errors import as_os_error
from dspark_jax.json_file import read_object

SPLIT = "train"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation as the drafter is trained on it.

    Attributes:
      tokens: [length] int32.
      loss_mask: [length] uint8, 1 on what an assistant wrote.
      prompt_set: name of the prompt set it comes from.
      sample_id: unique within its dataset; randomness per sample is folded from it.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    prompt_set: str
    sample_id: int


class Samples(Protocol):
    """Random access to samples: what `pipeline` needs of a source. A list will do."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def __getitem__(self, index: int, /) -> Sample:
        """The sample at `index` in 0..len-1; the same one every time."""
        ...


class _Writer(writer.ExampleWriter):
    """Writes records of which the same fields are always the same bytes.

    TFDS leaves their order to the library for protocol buffers, which has another one in every process.
    """

    def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> Any:
        """Writes (key, record) pairs as a shard."""
        return super().write(path, ((key, _in_order(record)) for key, record in examples))


def _in_order(record: bytes) -> bytes:
    example = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]  (generated)
    return example.SerializeToString(deterministic=True)


class DsparkSamples(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder of a samples dataset; the records keep the order in which they are given."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "tokens, loss_mask, prompt_set, sample_id"}
    # TFDS would look for download checksums beside this file, through a package that it does not install.
    code_path = None

    def __init__(self, *, samples: Iterable[Sample] = (), **kwargs: Any):
        """`samples` is gone through once, while the dataset is written."""
        self._samples = samples
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "loss_mask": tfds.features.Tensor(shape=(None,), dtype=np.uint8),
            "prompt_set": tfds.features.Text(),
            "sample_id": tfds.features.Scalar(dtype=np.int64),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations with answers by the target, tokenised.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {SPLIT: self._generate_examples()}

    def _example_writer(self) -> writer.ExampleWriter:
        return _Writer(file_format=tfds.core.FileFormat.ARRAY_RECORD)

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for sample in self._samples:
            yield sample.sample_id, dataclasses.asdict(sample)


def write_samples(directory: str | os.PathLike[str], samples: Iterable[Sample]) -> int:
    """Writes a dataset as `directory/dspark_samples/1.0.0/`, replacing what is there; returns its number of samples.

    Args:
      directory: is created if need be.
      samples: with ascending ids; gone through once, one in memory at a time.

    Raises:
      InputError: there are no samples.
      OSError: the disk is full or not writable.
    """
    iterator = iter(samples)
    first = next(iterator, None)
    if first is None:
        raise InputError(f"{directory}: there is no sample to write; give prompts that leave some")
    shutil.rmtree(Path(directory) / DsparkSamples.name, ignore_errors=True)
    return build(DsparkSamples(samples=itertools.chain([first], iterator), data_dir=str(directory)), directory)


def build(builder: DsparkSamples, directory: str | os.PathLike[str], config: Any = None) -> int:
    """Lets a builder write its dataset in `directory`, with TFDS's `DownloadConfig`; returns its number of samples."""
    tfds.display_progress_bar(False)
    # Beyond 1 GB TFDS sorts records on disk, with TensorFlow. Ours have their order already, and 4 bytes per token.
    shuffle.MAX_MEM_BUFFER_SIZE = sys.maxsize
    # TFDS announces a download on stdout, and leaves a folder for it.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        try:
            builder.download_and_prepare(download_dir=scratch, download_config=config)
        except RuntimeError as error:  # ArrayRecord knows no error numbers
            if (found := as_os_error(error, directory)) is None:
                raise
            raise found from error
    return builder.info.splits[SPLIT].num_examples


class SampleReader:
    """Random access to the samples that `write_samples` has written below `directory`.

    Raises:
      InputError: there is no complete dataset, or it is damaged; ArrayRecord keeps a hash of every record.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self._path = Path(directory) / DsparkSamples.name / str(DsparkSamples.VERSION)
        self._directory = directory
        fetch(Path(directory))
        if not (self._path / "dataset_info.json").exists():
            raise InputError(f"{directory}: no prepared samples; run python -m dspark_jax.prepare first")
        for name in ("dataset_info.json", "features.json"):
            read_object(self._path / name, self._remedy, self._remedy)
        try:
            builder = tfds.builder_from_directory(str(self._path))
            split = builder.info.splits[SPLIT]
            counts = zip(map(str, split.filepaths), split.shard_lengths, strict=True)
            self._records = builder.as_data_source(split=SPLIT)  # pyright: ignore[reportCallIssue]  (its decorator hides the signature)
        except _UNREADABLE as error:
            raise InputError(f"{self._path}: damaged ({_first_line(error)}); {self._remedy}") from None
        for file, count in counts:
            self._check_shard(file, count)

    @property
    def _remedy(self) -> str:
        return f"remove {self._directory} and run python -m dspark_jax.prepare again"

    def _check_shard(self, file: str, count: int) -> None:
        """Refuses a shard without the list of its `count` records, which is at its end."""
        try:
            reader = array_record_module.ArrayRecordReader(file)
            found = reader.num_records()
            reader.close()
        except RuntimeError as error:
            why = _first_line(error) or "a part is missing"
        else:
            if found == count:
                return
            why = f"{found} of {count} records are left"
        raise InputError(f"{file}: damaged ({why}); {self._remedy}")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index` in 0..len-1."""
        try:
            record = self._records[index]
        except RuntimeError as error:
            where = f"{self._path}: sample {index} is damaged"
            raise InputError(f"{where} ({_first_line(error)}); {self._remedy}") from None
        return Sample(record["tokens"], record["loss_mask"], record["prompt_set"].decode(), int(record["sample_id"]))

    def __repr__(self) -> str:
        """Names the data, and only that: grain prints it in its error messages."""
        return f"SampleReader({str(self._path)!r})"


_UNREADABLE = (ParseError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ImportError)
"""What TFDS raises of descriptions that are JSON, but not those of a dataset."""


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[0].split())[:200]
