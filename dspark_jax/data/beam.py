"""Conversations to samples on disk through Apache Beam: on this machine, or wherever Dataflow, Spark or Flink run.

Two pipelines: the first one makes the samples of chunks of conversations, the second one is TFDS's, which sorts them by
id, serialises them and writes the shards. In between the ids and counts of all chunks are added up here. Workers need
this package and apache-beam, and must see the working directory, where chunks and shards lie. A killed first pipeline
goes on with the chunks that it has made.
"""

import dataclasses
import logging
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam as beam  # pyright: ignore[reportMissingImports]  (optional)
import tensorflow_datasets as tfds
from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions  # pyright: ignore[reportMissingImports]
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator  # pyright: ignore[reportMissingImports]
from apache_beam.runners import create_runner  # pyright: ignore[reportMissingImports]

from dspark_jax.config import DataConfig, InputError
from dspark_jax.data.chunks import make_chunk, merge_chunks, read_chunk, read_settings, write_chunks
from dspark_jax.data.prompts import Prompt
from dspark_jax.data.regenerate import Answered
from dspark_jax.data.samples import Tally
from dspark_jax.data.sources import SPLIT, DsparkSamples, build
from dspark_jax.tokenizer import ChatTokenizer

_WITH_SERVERS = ("PortableRunner", "FlinkRunner", "SparkRunner")
"""Runners with options that only their job server knows."""


def pipeline_options(text: str) -> PipelineOptions:
    """Beam's options, checked as far as that is possible before anything runs.

    Args:
      text: as on a command line, e.g. `--runner=FlinkRunner --flink_master=host:8081`; without a runner the direct one
        of this machine.

    Raises:
      InputError: they are not known, or the runner misses some, or a package.
    """
    try:
        given = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--beam={text}: {error}; write options as on a command line") from None
    logging.getLogger("apache_beam.options.pipeline_options").setLevel(logging.ERROR)  # it is said here
    options = PipelineOptions([*given, *([] if _names_runner(given) else ["--runner=DirectRunner"])])
    runner = options.view_as(StandardOptions).runner
    try:
        errors = PipelineOptionsValidator(options, create_runner(runner)).validate()
    except (ValueError, ImportError, AttributeError) as error:
        raise InputError(f"--beam: {error}") from None
    known = set(options.get_all_options())
    unknown = sorted(set(options.get_all_options(retain_unknown_options=True)) - known)
    if unknown and runner.rpartition(".")[2] not in _WITH_SERVERS:
        errors.append(f"{runner} has no option --{unknown[0]}")
    if errors:
        raise InputError(f"--beam={text}: {'; '.join(errors)}; correct the options")
    return options


def _names_runner(given: Sequence[str]) -> bool:
    return any(one.partition("=")[0] == "--runner" for one in given)


def write_with_beam(
    directory: Path,
    chunks: Path,
    tokenizer: ChatTokenizer,
    config: DataConfig,
    items: Sequence[Answered] | Sequence[Prompt],
    tally: Tally,
    options: PipelineOptions,
) -> None:
    """Makes samples of conversations and writes them: the same records in the same order as `sources.write_samples`.

    Args:
      directory: of the dataset, which is replaced.
      chunks: a folder for what lies between the pipelines.
      tokenizer: of the target.
      config: says how samples are made.
      items: conversations that the target has answered, or ones that are answered in their files.
      tally: counts; nothing is written if there is no sample.
      options: of Beam.

    Raises:
      InputError: nothing can be made of any conversation.
    """
    names = write_chunks(chunks, tokenizer, config, items)
    place = str(chunks.absolute())
    with beam.Pipeline(options=options) as pipeline:
        _ = pipeline | beam.Create(names) | beam.Reshuffle() | beam.ParDo(_MakeChunk(place))
    moves = merge_chunks(chunks, names, tally)
    if not any(tally.prompt_sets.values()):
        return
    shutil.rmtree(directory / DsparkSamples.name, ignore_errors=True)
    builder = _BeamSamples(place, list(zip(names, moves, strict=True)), data_dir=str(directory))
    build(builder, directory, tfds.download.DownloadConfig(beam_options=options))


class _MakeChunk(beam.DoFn):
    """A chunk's name -> its samples, in files."""

    def __init__(self, folder: str):
        self.folder = folder

    def setup(self) -> None:
        """Once per worker thread, which then has a tokenizer of its own."""
        self.settings = read_settings(Path(self.folder))

    def process(self, element: str) -> None:
        """Makes it; nothing goes on to the next stage."""
        make_chunk(Path(self.folder), element, self.settings)


def _examples(chunk: tuple[str, int], folder: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The samples of a chunk (its name, the move of its ids) as TFDS takes them, with keys by which it sorts."""
    for sample in read_chunk(Path(folder), *chunk):
        yield sample.sample_id, dataclasses.asdict(sample)


class _BeamSamples(DsparkSamples, skip_registration=True):
    """The same builder, with a pipeline in the place of a generator: TFDS then writes with Beam."""

    name = DsparkSamples.name

    def __init__(self, folder: str, chunks: list[tuple[str, int]], **kwargs: Any):
        """`chunks` are names with the moves of their ids."""
        self._folder, self._chunks = folder, chunks
        super().__init__(**kwargs)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded
        return {SPLIT: beam.Create(self._chunks) | beam.Reshuffle() | beam.FlatMap(_examples, self._folder)}
