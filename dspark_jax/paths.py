"""Paths that are given to us are local ones: a bucket's address would become a folder called `gs:`, without a word."""

import re
from os import PathLike

from dspark_jax.errors import InputError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+\-]+):/")


def check_local(name: str, path: str | PathLike[str]) -> None:
    """Refuses what has a scheme, such as gs://bucket/run or file:///run.

    Args:
      name: of the option or the field that has the path.
      path: as it was given, or as `Path` has shortened it (gs:/bucket/run).

    Raises:
      InputError: it has one.
    """
    if match := _SCHEME.match(str(path)):
        raise InputError(
            f"{name}={path}: {match[1]}:// is not supported, only local paths are; mount the storage (a bucket with "
            "gcsfuse, say) or download the files, and give the path here; a model on the hub is OWNER/NAME"
        )
