"""Memory that is kept by the C library is given back."""

import resource
import sys
from pathlib import Path

import pytest

from dspark_jax.training.host_memory import return_freed_memory


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_memory_is_returned():
    """64 MB in small pieces, freed but for the last one, which keeps the C library from shrinking its heap."""
    pieces = [bytes(4096) for _ in range(16384)]
    pinned = pieces[-1]
    del pieces
    before = resident()
    return_freed_memory()
    assert pinned is not None and resident() < before - 32e6
