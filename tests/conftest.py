"""Shared by all tests: eight host devices on CPU, and the golden vectors where they are present."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The numeric test vectors of the PyTorch reference, kept beside the checkout and not part of the project."""
    path = SHARED / "golden"
    if not path.exists():
        pytest.skip("golden vectors are not beside this checkout (../shared/golden)")
    return path
