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


def test_generate_is_the_function_and_the_command():
    """Whichever is loaded first: the command is a module of the same name, which replaces a function in the package."""
    for first in ("from dspark_jax import generate", "import dspark_jax.generate", "pass"):
        code = f"{first}; import dspark_jax; dspark_jax.generate(None, [[1]], max_new_tokens=1)"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "InputError: the models are NoneType; give Models(target, drafter)" in ran.stderr, ran.stderr
    assert dspark_jax.generate.generate.__module__ == "dspark_jax.generate"  # pyright: ignore
