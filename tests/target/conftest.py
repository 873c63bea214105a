"""Shared by the tests of targets."""

import pytest


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """case of `random_models` -> (directory, model of transformers, ours), made once."""
    from tests.target.random_models import alone, load, write_model

    known = {}

    def of(case):
        if case not in known:
            directory = tmp_path_factory.mktemp(case)
            model = write_model(case, directory)
            known[case] = directory, model, load(directory, alone())
        return known[case]

    return of
