"""Training data that grows while it is trained on, by the parts of the prompts that have been answered."""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.config import InputError
from dspark_jax.data.parts import part_folder
from dspark_jax.data.sources import Sample, SampleReader, Samples
from dspark_jax.json_file import read_ours


class JoinedSamples:
    """Random access to the samples of several sources, one source after the other."""

    def __init__(self, sources: Sequence[Samples]):
        """`sources` with at least one sample together."""
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, self._sources)))

    def __len__(self) -> int:
        """Number of samples."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """The sample at `index` in 0..len-1."""
        source = bisect.bisect_right(self._ends, index)
        return self._sources[source][index - (self._ends[source - 1] if source else 0)]

    def __repr__(self) -> str:
        """Names the data, and only that: grain prints it in its error messages."""
        return f"JoinedSamples({self._sources!r})"


class GrowingBatches:
    """Batches over the samples of all parts that are there. Iterates as `pipeline.batches` does.

    When a part is added, the order begins anew over all samples, shuffled by a seed that follows from the number of
    parts. The state names the parts by their digests, so that a run goes on with the very samples that it had.
    """

    def __init__(self, workdir: Path, batches: Callable[[Samples, int], Any], seed: int):
        """Begins with the first part.

        Args:
          workdir: of the run, prepared.
          batches: makes the iterator of `pipeline.batches` over samples, ordered by a seed.
          seed: of the order of the first part alone.
        """
        self._workdir, self._batches, self._seed = workdir, batches, seed
        self._sources: list[Samples] = [SampleReader(workdir / "data")]
        self._digests: list[str] = []
        self._iterator = self._begin()

    @property
    def parts(self) -> int:
        """Number of parts that are trained on."""
        return 1 + len(self._digests)

    @property
    def samples(self) -> int:
        """Number of samples in them."""
        return sum(map(len, self._sources))

    @property
    def next_id(self) -> int:
        """A sample id above all that there are."""
        last = [source[len(source) - 1].sample_id for source in self._sources if len(source)]
        return 1 + max(last)

    def add(self) -> None:
        """Adds the next part, which is in its folder.

        Raises:
          InputError: it is not, or it is damaged.
        """
        folder = part_folder(self._workdir, self.parts)
        digest = read_ours(folder / "report.json").get("digest")
        if not digest:
            raise InputError(f"{folder}: no samples of this run; put the folder back, or use another --workdir")
        self._open(folder, digest)
        self._iterator.close()
        self._iterator = self._begin()

    def _open(self, folder: Path, digest: str) -> None:
        report = read_ours(folder / "report.json")
        if report.get("digest") != digest:
            raise InputError(
                f"{folder}: not the samples that the checkpoint was trained on; put the folder back, or use another "
                "--workdir"
            )
        if report["samples"]:
            reader = SampleReader(folder)
            if len(reader) != report["samples"]:
                raise InputError(
                    f"{folder}: {len(reader)} of {report['samples']} samples are left; put the folder back, or use "
                    "another --workdir"
                )
            self._sources.append(reader)
        self._digests.append(digest)

    def _begin(self) -> Any:
        added = len(self._digests)
        seed = self._seed
        if added:
            seed = int(np.random.SeedSequence([self._seed, added]).generate_state(1)[0]) % 2**31
        return self._batches(JoinedSamples(self._sources), seed)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Itself."""
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch."""
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Digests of the parts that were added, and the state of the order over all of them; as JSON can hold it."""
        return {"parts": list(self._digests), "batches": self._iterator.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called, with the parts that were there then.

        Raises:
          InputError: a part of them is missing, damaged or another one.
        """
        del self._sources[1:], self._digests[:]
        for part, digest in enumerate(state["parts"], start=1):
            self._open(part_folder(self._workdir, part), digest)
        self._iterator.close()
        self._iterator = self._begin()
        self._iterator.set_state(state["batches"])
