"""Checkpoints: what is saved comes back, on any mesh; wrong targets, changed drafters and full disks are refused."""

import dataclasses
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dspark_jax import train
from dspark_jax.config import InputError, MeshConfig, TargetConfig
from dspark_jax.training.checkpoint import Checkpoints, check_continuation, load_drafter
from dspark_jax.training.state import TrainState, abstract_drafter, state_layout, to_params

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)


@pytest.fixture
def saved(config, meshes):
    """A state in which every number of every array is another one."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        return jax.device_put(rng.uniform(1, 100, leaf.shape).astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, layout(config, meshes["one"]))


def layout(config, mesh):
    return state_layout(abstract_drafter(config), OPTIMIZER, mesh)


def assert_states_equal(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["one", "cube", "wide"])
def test_a_state_comes_back_on_any_mesh(config, meshes, saved, tmp_path, name):
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(40, saved, {"next_index": 40})
        checkpoints.save(50, saved, {"next_index": 50})
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.latest() == 50
        wanted = layout(config, meshes[name])
        state, data = checkpoints.restore(wanted)
    assert data == {"next_index": 50}
    assert_states_equal(state, saved)
    for found, stated in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert found.sharding.is_equivalent_to(stated.sharding, found.ndim)
    assert jax.tree.structure(state) == jax.tree.structure(saved)


def test_the_state_may_be_overwritten_while_it_is_written(config, meshes, saved, tmp_path):
    state = jax.tree.map(lambda x: x + 0, saved)
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(overwrite(state))
    with Checkpoints(tmp_path, config) as checkpoints:
        assert_states_equal(checkpoints.restore(layout(config, meshes["one"]))[0], saved)


def test_only_the_newest_are_kept(config, saved, tmp_path):
    config.train.keep_checkpoints = 2
    with Checkpoints(tmp_path, config) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, saved, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_drafter_is_loaded_for_use(config, meshes, saved, tmp_path):
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, saved, {})
    found, drafter = load_drafter(tmp_path, meshes["cube"])
    assert found == config
    params = to_params(drafter)
    assert set(params) == set(saved.params)
    for name, value in saved.params.items():
        np.testing.assert_array_equal(params[name], value)
    assert params["backbone.fc"].sharding.mesh == meshes["cube"]


def test_no_checkpoint_to_load(config, meshes, tmp_path):
    with pytest.raises(InputError, match="no checkpoint here; train first"):
        load_drafter(tmp_path, meshes["one"])
    with Checkpoints(tmp_path, config):
        pass
    with pytest.raises(InputError, match="no checkpoint here; train first"):
        load_drafter(tmp_path, meshes["one"])


def test_a_checkpoint_of_another_target_is_refused(config, meshes, saved, tmp_path, new_target):
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, saved, {})
    other = str(new_target(tmp_path / "other", seed=1))
    elsewhere = dataclasses.replace(config, target=dataclasses.replace(config.target, path=other))
    message = r"checkpoints/3: made for another target, weights \w+ but \S+/other has \w+; use its own target.path"
    with Checkpoints(tmp_path, elsewhere) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.restore(layout(config, meshes["one"]))
    with pytest.raises(InputError, match=message):
        load_drafter(tmp_path, meshes["one"], TargetConfig(path=other))


def test_another_tokenizer_is_another_target(config, meshes, saved, tmp_path, new_target):
    mine = new_target(tmp_path / "mine")
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, path=str(mine)))
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, saved, {})
    (mine / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="made for another target, tokenizer"):
        load_drafter(tmp_path, meshes["one"])


@pytest.mark.parametrize(
    "group, name, value",
    [
        ("drafter", "markov_rank", 4),
        ("train", "seed", 9),
        ("optim", "kind", "muon"),
        ("data", "pack", True),
        ("data", "max_length", 20),
        ("train", "init_from", "runs/other"),
    ],
)
def test_what_cannot_be_continued_is_refused(config, meshes, saved, tmp_path, group, name, value):
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, saved, {})
    before = getattr(getattr(config, group), name)
    setattr(getattr(config, group), name, value)
    message = rf"checkpoints/3: {group}.{name} was {before!r}, now {value!r}; resume with the old value"
    with Checkpoints(tmp_path, config) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.restore(layout(config, meshes["one"]))
    with pytest.raises(InputError, match=message):
        check_continuation(config, tmp_path, lambda: pytest.fail("there is no fingerprint to compare with"))


@pytest.mark.parametrize("kind", ["eagle3", "mtp", "dflash"])
def test_the_mask_token_counts_only_where_there_is_one(config, tmp_path, kind):
    """Runs of EAGLE-3 and MTP from before their presets had 0 there still resume."""
    config.drafter.kind = kind
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, TrainState(jnp.int32(3), {"x": jnp.zeros(2)}, {}), {})
    config.drafter.mask_token_id = 0
    if kind != "dflash":
        assert check_continuation(config, tmp_path, lambda: "")
        return
    with pytest.raises(InputError, match=r"checkpoints/3: drafter.mask_token_id was 66, now 0; resume with the old"):
        check_continuation(config, tmp_path, lambda: "")


def test_other_data_is_refused(config, meshes, saved, tmp_path, monkeypatch):
    """Where both, the checkpoint and the data, say what they were made of; a warm start's source need not be named."""
    report = tmp_path / "data" / "report.json"
    report.parent.mkdir()
    message = r"checkpoints/4: trained on data with the fingerprint b, the config's has c; resume with the old data"
    config.train.init_from = "runs/other"
    for step, before, now in ((1, None, "b"), (2, "b", None), (3, "b", "b"), (4, "b", "c")):
        report.write_text(json.dumps({"fingerprint": before}) if before else "{}")
        with Checkpoints(tmp_path, config) as checkpoints:
            checkpoints.save(step, saved, {})
        report.write_text(json.dumps({"fingerprint": now}) if now else "{}")
        present = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=""))
        with Checkpoints(tmp_path, present) as checkpoints:
            if step < 4:
                checkpoints.restore(layout(config, meshes["one"]))
                continue
            with pytest.raises(InputError, match=message):
                checkpoints.restore(layout(config, meshes["one"]))
    assert check_continuation(present, tmp_path, lambda: "b")
    monkeypatch.setattr(train, "data_fingerprint", lambda config: "c")
    monkeypatch.setattr(train, "prepare", lambda *_: pytest.fail("the old data was replaced"))
    with pytest.raises(InputError, match=message):
        train.train(dataclasses.replace(present, mesh=MeshConfig()), tmp_path)


def test_a_full_disk_leaves_one_line_and_the_earlier_checkpoint(config, meshes, saved, tmp_path):
    """Files may not grow beyond 8 kB during the second save: the operating system refuses as it does on a full disk."""
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, saved, {"next_index": 3})
    message = "disk is full.*the checkpoint of step 3 is intact; free space"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(InputError, match=message) as error, Checkpoints(tmp_path, config) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
            checkpoints.save(6, saved, {"next_index": 6})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    with Checkpoints(tmp_path, config) as checkpoints:
        state, data = checkpoints.restore(layout(config, meshes["one"]))
    assert data == {"next_index": 3}
    assert_states_equal(state, saved)


def test_a_save_without_room_is_not_started(config, saved, tmp_path, monkeypatch):
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(3, saved, {})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = r"the disk is full, a checkpoint takes 0\.\d MB and 0.0 MB are free; the checkpoint of step 3 is intact"
    with pytest.raises(InputError, match=message), Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(6, saved, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
