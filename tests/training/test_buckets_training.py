"""Checkpoints of a run in a bucket: whole when they are said to be there, restored on another machine, damaged ones."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dspark_jax.buckets.mirror import Mirror
from dspark_jax.buckets.places import reading, working_directory
from dspark_jax.config import Config, InputError
from dspark_jax.run import Run
from dspark_jax.start import check_start
from dspark_jax.training.checkpoint import Checkpoints, load_step
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import TrainState, abstract_drafter, init_state, state_layout, to_params
from tests import fake_bucket

RUN = Path("s3://bucket/run")


@pytest.fixture
def state(config: Config, meshes: dict[str, Any]) -> TrainState:
    return init_state(config, make_optimizer(config.optim, 8), meshes["one"])


def layout(config: Config, mesh: Any) -> TrainState:
    return state_layout(abstract_drafter(config), make_optimizer(config.optim, 8), mesh)


def there() -> set[str]:
    """Steps that are whole in the bucket."""
    names = (name.removeprefix("bucket/run/manifests/checkpoints/") for name in fake_bucket.objects())
    return {name.removesuffix(".json") for name in names if "/" not in name}


def test_a_checkpoint_is_in_the_bucket_when_it_is_said_to_be_there(
    config: Config, meshes: dict[str, Any], state: TrainState, bucket: Callable[[], None]
) -> None:
    config.train.keep_checkpoints = 2
    with working_directory(RUN, "train") as folder, Checkpoints(Run(config, folder)) as checkpoints:
        checkpoints.save(1, state, {"next_index": 1})
        checkpoints.wait()
        assert there() == {"1"}
        for step in (2, 3):
            checkpoints.save(step, state, {"next_index": step})
        checkpoints.wait()
        assert there() >= {"2", "3"}
    assert there() == {"2", "3"}
    assert not [name for name in fake_bucket.objects() if "/checkpoints/1/" in name or "lock" in name]
    bucket()
    with working_directory(RUN, "train") as folder, Checkpoints(Run(config, folder)) as checkpoints:
        assert checkpoints.latest() == 3 and not (folder / "checkpoints" / "3" / "params").exists()
        step, found, data = checkpoints.restore(layout(config, meshes["cube"]))
        assert (step, data) == (3, {"next_index": 3})
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert not (folder / "checkpoints" / "2" / "params").exists()


def test_a_drafter_is_loaded_without_the_optimizer(
    config: Config, meshes: dict[str, Any], state: TrainState, bucket: Callable[[], None]
) -> None:
    with working_directory(RUN, "train") as folder, Checkpoints(Run(config, folder)) as checkpoints:
        checkpoints.save(5, state, {})
    bucket()
    folder = reading(RUN)
    step, _, drafter = load_step(Run(config, folder, meshes["one"]))
    assert step == 5 and to_params(drafter).keys() == state.params.keys()
    assert sorted(path.name for path in (folder / "checkpoints" / "5").iterdir() if path.is_dir()) == [
        "about", "data", "params",
    ]  # fmt: skip
    config.train.init_from = str(RUN)
    check_start(config)
    config.train.init_from = "s3://bucket/none"
    with pytest.raises(InputError, match="train.init_from=s3://bucket/none: no checkpoint and no config.json"):
        check_start(config)


def test_a_damaged_checkpoint_in_the_bucket_is_set_aside_there(
    config: Config, meshes: dict[str, Any], state: TrainState, bucket: Callable[[], None], capsys: Any
) -> None:
    with working_directory(RUN, "train") as folder, Checkpoints(Run(config, folder)) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {"next_index": step})
    for name in fake_bucket.objects():
        if "checkpoints/2/params" in name and name.endswith("_METADATA"):
            fake_bucket.put(name, b"{")
    bucket()
    with working_directory(RUN, "train") as folder, Checkpoints(Run(config, folder)) as checkpoints:
        assert checkpoints.restore(layout(config, meshes["one"]))[0] == 1
        assert there() == {"1", "2.damaged"}
        checkpoints.save(2, dataclasses.replace(state), {"next_index": 2})
    assert there() == {"1", "2", "2.damaged"}


def test_a_save_that_does_not_reach_the_bucket_is_an_error(
    config: Config, state: TrainState, bucket: Callable[[], None], monkeypatch: Any
) -> None:
    def fail(self: Mirror, path: Path) -> None:
        raise InputError("s3://bucket/run: cannot be written")

    monkeypatch.setattr(Mirror, "publish", fail)
    with working_directory(RUN, "train") as folder, Checkpoints(Run(config, folder)) as checkpoints:
        checkpoints.save(1, state, {})
        with pytest.raises(InputError, match="cannot be written"):
            checkpoints.wait()
