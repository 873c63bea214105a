"""Checkpoints: what is saved comes back, on any mesh; wrong targets, changed drafters and full disks are refused."""

import dataclasses
import errno
import gc
import json
import logging
import os
import re
import resource
import shutil
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dspark_jax import train
from dspark_jax.config import InputError, MeshConfig, TargetConfig
from dspark_jax.run import Run
from dspark_jax.training import orbax_reports
from dspark_jax.training.checkpoint import Checkpoints, check_continuation, load_drafter, load_step
from dspark_jax.training.orbax_reports import quiet
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
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(40, saved, {"next_index": 40})
        checkpoints.save(50, saved, {"next_index": 50})
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        assert checkpoints.latest() == 50
        wanted = layout(config, meshes[name])
        step, state, data = checkpoints.restore(wanted)
    assert (step, data) == (50, {"next_index": 50})
    assert_states_equal(state, saved)
    for found, stated in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert found.sharding.is_equivalent_to(stated.sharding, found.ndim)
    assert jax.tree.structure(state) == jax.tree.structure(saved)


def test_the_state_may_be_overwritten_while_it_is_written(config, meshes, saved, tmp_path):
    state = jax.tree.map(lambda x: x + 0, saved)
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        checkpoints.save(1, state, {})
        jax.block_until_ready(overwrite(state))
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        assert_states_equal(checkpoints.restore(layout(config, meshes["one"]))[1], saved)


def test_only_the_newest_are_kept(config, saved, tmp_path):
    config.train.keep_checkpoints = 2
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, saved, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


def test_a_drafter_is_loaded_for_use(config, meshes, saved, tmp_path):
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
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
    with Checkpoints(Run(config, tmp_path)):
        pass
    with pytest.raises(InputError, match="no checkpoint here; train first"):
        load_drafter(tmp_path, meshes["one"])


def test_a_checkpoint_of_another_target_is_refused(config, meshes, saved, tmp_path, new_target):
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        checkpoints.save(3, saved, {})
    other = str(new_target(tmp_path / "other", seed=1))
    elsewhere = dataclasses.replace(config, target=dataclasses.replace(config.target, path=other))
    message = r"checkpoints/3: made for another target, weights \w+ but \S+/other has \w+; use its own target.path"
    with Checkpoints(Run(elsewhere, tmp_path)) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.restore(layout(config, meshes["one"]))
    with pytest.raises(InputError, match=message):
        load_drafter(tmp_path, meshes["one"], TargetConfig(path=other))


def test_another_tokenizer_is_another_target(config, meshes, saved, tmp_path, new_target):
    mine = new_target(tmp_path / "mine")
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, path=str(mine)))
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
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
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        checkpoints.save(3, saved, {})
    before = getattr(getattr(config, group), name)
    setattr(getattr(config, group), name, value)
    message = rf"checkpoints/3: {group}.{name} was {before!r}, now {value!r}; resume with the old value"
    with Checkpoints(Run(config, tmp_path)) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.restore(layout(config, meshes["one"]))
    with pytest.raises(InputError, match=message):
        check_continuation(Run(config, tmp_path))


@pytest.mark.parametrize("kind", ["eagle3", "mtp", "dflash"])
def test_the_mask_token_counts_only_where_there_is_one(config, tmp_path, kind):
    """Runs of EAGLE-3 and MTP from before their presets had 0 there still resume."""
    config.drafter.kind = kind
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        checkpoints.save(3, TrainState(jnp.int32(3), {"x": jnp.zeros(2)}, {}), {})
    config.drafter.mask_token_id = 0
    if kind != "dflash":
        assert check_continuation(Run(config, tmp_path))
        return
    with pytest.raises(InputError, match=r"checkpoints/3: drafter.mask_token_id was 66, now 0; resume with the old"):
        check_continuation(Run(config, tmp_path))


def test_other_data_is_refused(config, meshes, saved, tmp_path, monkeypatch):
    """Where both, the checkpoint and the data, say what they were made of; a warm start's source need not be named."""
    report = tmp_path / "data" / "report.json"
    report.parent.mkdir()
    message = r"checkpoints/4: trained on data with the fingerprint b, the config's has c; resume with the old data"
    config.train.init_from = "runs/other"
    for step, before, now in ((1, None, "b"), (2, "b", None), (3, "b", "b"), (4, "b", "c")):
        report.write_text(json.dumps({"fingerprint": before}) if before else "{}")
        with Checkpoints(Run(config, tmp_path)) as checkpoints:
            checkpoints.save(step, saved, {})
        report.write_text(json.dumps({"fingerprint": now}) if now else "{}")
        present = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=""))
        with Checkpoints(Run(present, tmp_path)) as checkpoints:
            if step < 4:
                checkpoints.restore(layout(config, meshes["one"]))
                continue
            with pytest.raises(InputError, match=message):
                checkpoints.restore(layout(config, meshes["one"]))
    monkeypatch.setattr(Run, "data_fingerprint", "b")
    assert check_continuation(Run(present, tmp_path))
    monkeypatch.setattr(Run, "data_fingerprint", "c")
    monkeypatch.setattr(train, "prepare_run", lambda *_: pytest.fail("the old data was replaced"))
    with pytest.raises(InputError, match=message):
        train.train(dataclasses.replace(present, mesh=MeshConfig()), tmp_path)


def test_a_full_disk_leaves_one_line_and_the_earlier_checkpoint(config, meshes, saved, tmp_path):
    """Files may not grow beyond 8 kB during the second save: the operating system refuses as it does on a full disk."""
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        checkpoints.save(3, saved, {"next_index": 3})
    message = "disk is full.*the checkpoint of step 3 is intact; free space"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(InputError, match=message) as error, Checkpoints(Run(config, tmp_path)) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
            checkpoints.save(6, saved, {"next_index": 6})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        step, state, data = checkpoints.restore(layout(config, meshes["one"]))
    assert (step, data) == (3, {"next_index": 3})
    assert_states_equal(state, saved)


def test_a_save_without_room_is_not_started(config, saved, tmp_path, monkeypatch):
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        checkpoints.save(3, saved, {})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    message = r"the disk is full, a checkpoint takes 0\.\d MB and 0.0 MB are free; the checkpoint of step 3 is intact"
    with pytest.raises(InputError, match=message), Checkpoints(Run(config, tmp_path)) as checkpoints:
        checkpoints.save(6, saved, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_where_no_directory_can_be_made_nothing_is_left_waiting(config, saved, tmp_path, monkeypatch):
    """One line at once: threads of Orbax that wait for such a directory would hold the process for five minutes."""
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        checkpoints.save(3, saved, {})
    before = set(threading.enumerate())
    make = os.mkdir

    def refuse(path, *arguments, **options):
        if Path(path).parent.name == "checkpoints":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        make(path, *arguments, **options)

    message = "checkpoints: cannot be written in .Read-only file system.; the checkpoint of step 3 is intact; change"
    with Checkpoints(Run(config, tmp_path)) as checkpoints, pytest.raises(InputError, match=message):
        monkeypatch.setattr(os, "mkdir", refuse)
        checkpoints.save(6, saved, {})
    assert not [one for one in set(threading.enumerate()) - before if "commit" in one.name]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    """Changes one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rename(path):
    """Still JSON, and the run has another name."""
    assert b'"tiny"' in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(b'"tiny"', b'"tinx"'))


DAMAGES = {  # what happens to checkpoint 6, what is said, and whether the parameters are still whole
    "no about": (lambda at: shutil.rmtree(at / "about"), r"6/about: damaged \(the directory is missing", False),
    "about cut": (lambda at: cut(at / "about/metadata"), r"6/about/metadata: damaged \(not valid JSON", False),
    "about changed": (lambda at: rename(at / "about/metadata"), r"6/about: damaged \(it is not what was", False),
    "params empty": (lambda at: (shutil.rmtree(at / "params"), (at / "params").mkdir()), r"6/params.*: damaged", False),
    "params cut": (lambda at: cut(largest(at / "params")), r"6/params: damaged \(.*while reading \w+", False),
    "params lost": (lambda at: largest(at / "params").unlink(), r"6/params: damaged \(.*while reading \w+", False),
    "params changed": (
        lambda at: flip(largest(at / "params")),
        r"6: damaged \(the values of params\.\S+ are not",
        False,
    ),
    "layout cut": (lambda at: cut(at / "params/_METADATA"), r"6/params/_METADATA: damaged \(not valid JSON", False),
    "moments lost": (lambda at: shutil.rmtree(at / "optimizer"), r"6/optimizer: damaged \(the directory is", True),
    "moments changed": (lambda at: flip(largest(at / "optimizer/ocdbt.process_0")), r"6.*: damaged \(", True),
    "position lost": (lambda at: (at / "data/metadata").unlink(), r"6/data/metadata: damaged \(no such file", True),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory, target_directory, make_tiny_config, meshes):
    """A working directory with checkpoints 3 and 6, whose parameters differ."""
    config, workdir, rng = make_tiny_config(target_directory), tmp_path_factory.mktemp("two"), np.random.default_rng(1)

    def fill(leaf):
        return jax.device_put(rng.uniform(1, 100, leaf.shape).astype(leaf.dtype), leaf.sharding)

    states = {step: jax.tree.map(fill, layout(config, meshes["one"])) for step in (3, 6)}
    with Checkpoints(Run(config, workdir)) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"next_index": step})
    return config, workdir, states


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(two, meshes, tmp_path, capfd, name):
    config, source, states = two
    damage, line, still_drafts = DAMAGES[name]
    shutil.copytree(source / "checkpoints", tmp_path / "checkpoints")
    damage(tmp_path / "checkpoints" / "6")
    drafter = load_drafter(tmp_path, meshes["one"])[1]
    assert_states_equal(to_params(drafter), states[6 if still_drafts else 3].params)
    said = capfd.readouterr().err
    assert said == "" if still_drafts else re.search(line, said) and len(said.splitlines()) == 2, said
    assert check_continuation(Run(config, tmp_path))

    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        step, state, data = checkpoints.restore(layout(config, meshes["one"]))
        assert (step, data) == (3, {"next_index": 3})
        assert_states_equal(state, states[3])
        checkpoints.save(6, states[6], {})  # as a run does that goes on
    said = capfd.readouterr().err
    assert re.search(line, said) and "using" in said and "6.damaged; remove it" in said and len(said.splitlines()) == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "6", "6.damaged"]
    assert load_step(Run(config, tmp_path, meshes["one"]))[0] == 6


@pytest.mark.parametrize("name", ["no about", "params cut", "params changed"])
def test_where_no_checkpoint_is_whole_nothing_is_touched(two, meshes, tmp_path, name):
    config, source, _ = two
    damage, line, _ = DAMAGES[name]
    shutil.copytree(source / "checkpoints" / "6", tmp_path / "checkpoints" / "6")
    damage(tmp_path / "checkpoints" / "6")
    message = f"{line}.*; no older checkpoint is whole: put it back from a copy, or remove"
    with pytest.raises(InputError, match=message):
        load_drafter(tmp_path, meshes["one"])
    with Checkpoints(Run(config, tmp_path)) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.restore(layout(config, meshes["one"]))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["6"]


def test_checkpoints_from_before_there_were_sums_are_read(two, meshes, tmp_path):
    config, source, states = two
    shutil.copytree(source / "checkpoints" / "6", tmp_path / "checkpoints" / "6")
    file = tmp_path / "checkpoints/6/about/metadata"
    about = json.loads(file.read_text())
    file.write_text(json.dumps({name: about[name] for name in ("config", "target", "tokenizer", "data")}))
    with Checkpoints(Run(config, tmp_path)) as checkpoints:
        assert_states_equal(checkpoints.restore(layout(config, meshes["one"]))[1], states[6])


@pytest.mark.parametrize("content", ["[1]", '{"metrics": "x"}'])
def test_damaged_notes_of_orbax_are_named(two, meshes, tmp_path, content):
    config, source, _ = two
    shutil.copytree(source / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/6/_CHECKPOINT_METADATA").write_text(content)
    message = r"checkpoints/6/_CHECKPOINT_METADATA: damaged .*; remove it, the checkpoint is read without it"
    with pytest.raises(InputError, match=message):
        load_drafter(tmp_path, meshes["one"])
    with pytest.raises(InputError, match=message):
        Checkpoints(Run(config, tmp_path))
    (tmp_path / "checkpoints/6/_CHECKPOINT_METADATA").unlink()
    assert load_step(Run(config, tmp_path, meshes["one"]))[0] == 6


def test_what_comes_late_of_a_failed_reading_is_not_shown(caplog):
    """A future of TensorStore that nobody waited for has no traceback that would tell where it is from."""
    cause = "Future exception was never retrieved\nfuture: <Future finished exception=ValueError('OUT_OF_RANGE: Error "
    with pytest.raises(ValueError), quiet():
        raise ValueError
    logging.getLogger("asyncio").error(cause + 'reading "backbone.fc/0.0" in OCDBT database at local file "params/")')
    assert not caplog.records
    logging.getLogger("asyncio").error("another")
    assert len(caplog.records) == 1


def test_coroutines_that_a_failed_reading_leaves_are_collected_in_silence(monkeypatch):
    """Inside a block that ends well because an older checkpoint was read."""
    seen = []
    orbax_reports._Dropping.stop()
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: seen.append(unraisable.object.__name__))
    with quiet(), pytest.raises(ValueError), quiet():
        raise ValueError
    for file in ("orbax/reading.py", "ours/reading.py"):
        scope = {}
        source = "async def {}():\n  try:\n    await wait()\n  except BaseException:\n    raise OSError\n"
        exec(compile(source.format(Path(file).parent), file, "exec"), {"wait": _never}, scope)
        started = scope[str(Path(file).parent)]()
        started.send(None)
        del started, scope
        gc.collect()
    orbax_reports._Dropping.stop()
    assert seen == ["ours"]


class _never:
    """Something to wait for that does not come."""

    def __await__(self):
        yield
