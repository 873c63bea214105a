"""The names that `import dspark_jax` gives."""

import subprocess
import sys

import pytest

import dspark_jax


def test_every_name_is_there_and_nothing_is_loaded_before():
    for name in dspark_jax.__all__:
        assert getattr(dspark_jax, name) is not None and name in dir(dspark_jax)
    code = "import dspark_jax, sys; print('jax' in sys.modules, dspark_jax.Config.__name__, 'jax' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "Config", "False"]


def test_an_unknown_name_is_one_line():
    with pytest.raises(AttributeError, match="no 'Engin'; it has .*Engine"):
        dspark_jax.Engin  # noqa: B018
