"""Paths that are given to us: local ones and, where it says so, addresses in a bucket, gs://BUCKET/... or s3://BUCKET/...

Anything else with a scheme would become a folder called `hf:`, without a word.
"""

import re
from os import PathLike

from dspark_jax.errors import InputError

BUCKETS = {"gs": "gcs", "s3": "s3"}
"""Schemes of buckets, and the extra of this package that brings what is needed for each."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+\-]+):/")
_BUCKET = re.compile(rf"({'|'.join(BUCKETS)}):/{{1,2}}([^/].*?)/*", re.DOTALL)


def bucket_url(path: str | PathLike[str]) -> str | None:
    """The address without slashes at its end; None for what is in no bucket. `Path` shortens it to gs:/bucket/run."""
    match = _BUCKET.fullmatch(str(path))
    return f"{match[1]}://{match[2]}" if match else None


def check_path(name: str, path: str | PathLike[str]) -> None:
    """Refuses what is neither a local path nor an address in a bucket; see `check_local`."""
    if bucket_url(path) is None:
        _refuse_scheme(name, path, "only local paths and buckets (gs://, s3://) are")


def check_local(name: str, path: str | PathLike[str]) -> None:
    """Refuses what has a scheme, such as gs://bucket/run or file:///run.

    Args:
      name: of the option or the field that has the path.
      path: as it was given, or as `Path` has shortened it (gs:/bucket/run).

    Raises:
      InputError: it has one.
    """
    _refuse_scheme(name, path, "only local paths are")


def _refuse_scheme(name: str, path: str | PathLike[str], what: str) -> None:
    if match := _SCHEME.match(str(path)):
        raise InputError(
            f"{name}={path}: {match[1]}:// is not supported here, {what}; mount the storage (a bucket with gcsfuse, "
            "say) or download the files, and give the path here; a model on the hub is OWNER/NAME"
        )
