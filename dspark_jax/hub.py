"""Models by path: a local directory, or an id on the Hugging Face hub, downloaded once into the hub's own cache.

`HF_HUB_OFFLINE=1` keeps to what is in the cache; an interrupted download goes on where it stopped.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dspark_jax.config import Config, InputError, TargetArchitecture

FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
"""What is needed of a model: configs, weights, tokenizer and chat template."""

_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


def is_hub_id(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a model on the hub: `owner/name`, and nothing of that name is here."""
    return bool(_ID.fullmatch(str(path))) and not Path(path).exists()


def local_directory(path: str | os.PathLike[str], files: tuple[str, ...] = FILES) -> Path:
    """The directory that holds a model; one of the hub is downloaded first, as far as it is not in the cache.

    Args:
      path: a directory, or the id of a model.
      files: patterns of the files that are needed.

    Raises:
      InputError: the hub cannot be reached and the cache does not hold it, there is no such model, or no access to it.
    """
    if not is_hub_id(path):
        return Path(path)
    from huggingface_hub import snapshot_download

    with _in_one_line(str(path), "model", "local directory"):
        return Path(snapshot_download(str(path), allow_patterns=list(files)))


def data_file(data_set: str, name: str) -> Path:
    """A file of a data set of the hub, downloaded if it is not in the cache.

    Args:
      data_set: its id.
      name: of the file, with its folders.

    Raises:
      InputError: as `local_directory`, or the data set has no such file.
    """
    from huggingface_hub import hf_hub_download

    with _in_one_line(f"{data_set}/{name}", "data set", "local file"):
        return Path(hf_hub_download(data_set, name, repo_type="dataset"))


def data_set_commit(data_set: str) -> str:
    """The newest commit of a data set of the hub, which has to be reached for it.

    Raises:
      InputError: as `local_directory`.
    """
    from huggingface_hub import HfApi

    with _in_one_line(data_set, "data set", "local file"):
        return HfApi().dataset_info(data_set).sha or ""


@contextlib.contextmanager
def _in_one_line(path: str, what: str, instead: str) -> Iterator[None]:
    """Turns what the hub answers into one line.

    Args:
      path: what is asked for.
      what: kind of thing that it is a part of, or is.
      instead: what may be given instead of it.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        remedy = "accept its licence on its page and log in with `hf auth login`"
        raise InputError(f"{path}: access to this {what} must be asked for; {remedy}") from None
    except (RepositoryNotFoundError, HFValidationError):  # the latter for what no id can be: a path, misspelt
        here = instead.removeprefix("local ")
        raise InputError(f"{path}: neither a {here} here nor a {what} on the hub; check the name") from None
    except RemoteEntryNotFoundError:
        raise InputError(f"{path}: this {what} has no such file; check the name") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if getattr(error, "errno", None) is not None:  # a full disk, say: `command` has a line for that
            raise
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        remedy = f"download it where there is a network, or give a {instead}"
        raise InputError(f"{path}: not in the hub's cache, and {reason}; {remedy}") from None


def with_architecture(config: Config) -> Config:
    """The config with the shape of a target that is on the hub, unless it states one itself."""
    target = config.target
    if target.architecture.vocab_size or not is_hub_id(target.path):
        return config
    read = TargetArchitecture.of_any_model if config.data.features == "torch" else TargetArchitecture.from_hf
    found = read(local_directory(target.path, ("config.json",)))
    return dataclasses.replace(config, target=dataclasses.replace(target, architecture=found))
