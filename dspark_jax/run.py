"""One run as a command sees it: config, working directory, and what follows from the two."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dspark_jax.config import Config
from dspark_jax.data.inputs import digest, read_inputs
from dspark_jax.json_file import read_ours
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import fingerprint, tokenizer_fingerprint


def checkpoint_directory(workdir: Path) -> Path:
    """Where the checkpoints of a working directory lie."""
    return workdir / "checkpoints"


@dataclasses.dataclass(frozen=True)
class Run:
    """A resolved config and its working directory. A command makes one when it starts, and hands it on.

    What takes time is computed when it is first asked for, and kept: the files of the target and the prompts are looked
    at once. What changes while a command runs, such as the prepared data, is read again every time.

    Attributes:
      config: resolved.
      workdir: where everything is written and found again.
      given_mesh: of the models; the one that `config.mesh` describes, over all devices, if None.
    """

    config: Config
    workdir: Path
    given_mesh: Mesh | None = None

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Of the models. Raises InputError if the config's does not fit the devices."""
        return make_mesh(self.config.mesh) if self.given_mesh is None else self.given_mesh

    @functools.cached_property
    def target_fingerprint(self) -> str:
        """Of the target's weights; raises as `target.loading.fingerprint`."""
        return fingerprint(self.config.target.path)

    @functools.cached_property
    def tokenizer_fingerprint(self) -> str:
        """Of the target's tokenizer."""
        return tokenizer_fingerprint(self.config.target.path)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the weights and the tokenizer of the target, as a checkpoint notes them."""
        return {"target": self.target_fingerprint, "tokenizer": self.tokenizer_fingerprint}

    @functools.cached_property
    def data_inputs(self) -> dict[str, Any]:
        """Everything that decides what the samples are; raises as `data.inputs.read_inputs`."""
        weights = self.target_fingerprint if self.config.data.regenerate else None
        return read_inputs(self.config, weights, self.tokenizer_fingerprint)

    @property
    def data_fingerprint(self) -> str:
        """What `fingerprint` in `data/report.json` will be, without preparing anything."""
        return digest(self.data_inputs)

    @property
    def prepared_fingerprint(self) -> str | None:
        """Of what the samples that are there now were made of; None where they were not made by `prepare`."""
        return read_ours(self.data_folder / "report.json").get("fingerprint")

    @property
    def data_folder(self) -> Path:
        """Where the prepared samples lie."""
        return self.workdir / "data"

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints lie."""
        return checkpoint_directory(self.workdir)

    @property
    def feature_folder(self) -> Path:
        """Where the feature cache lies."""
        return self.workdir / "features"

    @property
    def eval_folder(self) -> Path:
        """Where the commands that measure write."""
        return self.workdir / "eval"
