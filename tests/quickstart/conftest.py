"""Shared by the quickstart tests: the shipped folders, and the corpus read once."""

from pathlib import Path

import pytest

import dspark_jax.quickstart
from tests.quickstart.builder.corpus import libraries

_HERE = Path(dspark_jax.quickstart.__file__).parent


@pytest.fixture(scope="session")
def target_folder() -> Path:
    return _HERE / "target"


@pytest.fixture(scope="session")
def prompt_folder() -> Path:
    return _HERE / "prompts"


@pytest.fixture(scope="session")
def split():
    return libraries()
