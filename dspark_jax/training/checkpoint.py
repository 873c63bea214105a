"""Checkpoints: everything a run needs to go on, or a drafter needs to be used, in one atomic directory per step.

    checkpoints/500/params      the drafter's parameters
    checkpoints/500/optimizer   the optimizer's state and the step
    checkpoints/500/data        the data iterator's state, the same for every process
    checkpoints/500/about       the resolved config, fingerprints of target, tokenizer and data, and of all the above;
                                accepted length on held-out prompts, where it was measured

Saving copies the state off the device and returns; the files are written in the background and the directory appears
under its name only when it is complete. The random numbers of a step are functions of seed, step and sample id, so the
step and the config are all the state that randomness has.

Checkpoint 0 is an imported drafter: of it, only the parameters count, whatever optimizer and data a run goes on with.

Where the newest checkpoint is damaged, the newest one that is whole is taken, and a line says so. The best one by
accepted length is kept beside the newest ones; who reads a drafter may name it, or a step.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dspark_jax.buckets import places
from dspark_jax.config import Config, InputError, TargetConfig, from_json
from dspark_jax.drafter.interface import DrafterModule
from dspark_jax.progress import log
from dspark_jax.run import Run, checkpoint_directory
from dspark_jax.training.about import about_of, check_about, check_target, read_about, read_measured
from dspark_jax.training.best import NEWEST, HeldOut, KeepBest, best_step, check_name, named_step
from dspark_jax.training.full_disk import check_space, reported_in_one_line
from dspark_jax.training.integrity import Damaged, array_sums, check_sums, digest, naming_damage
from dspark_jax.training.orbax_reports import quiet
from dspark_jax.training.state import Params, TrainState, abstract_drafter, param_shardings, to_module, to_params

Found = TypeVar("Found")


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save."""

    def __init__(self, run: Run):
        """Opens (or creates) the directory; what a killed run left half-written in it is removed."""
        self.directory = run.checkpoint_folder.absolute()
        self.config = run.config
        self.about = about_of(run) | {"data": run.prepared_fingerprint}
        self.measured: dict[int, HeldOut] = {}
        newest = ocp.checkpoint_managers.LatestN(run.config.train.keep_checkpoints)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy([newest, KeepBest(self.measured)]),
            cleanup_tmp_directories=True,
        )
        if self.directory.exists() and not self.directory.is_dir():
            raise InputError(f"{self.directory}: a file, where a directory is needed; remove it")
        with quiet(), _naming_metadata(self.directory), reported_in_one_line(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            self.manager = ocp.CheckpointManager(self.directory, options=options)
            self.measured |= read_measured(self.manager, self.directory)

    def best(self) -> int | None:
        """Step of the best complete checkpoint; None if none was measured."""
        return best_step(self.measured)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def path(self, step: int) -> Path:
        """Directory of a step's checkpoint."""
        return self.directory / str(step)

    def save(self, step: int, state: TrainState, data: dict[str, Any], heldout: HeldOut | None = None) -> None:
        """Starts saving; `state` may be donated as soon as this returns.

        Args:
          step: optimizer steps done, the checkpoint's name.
          state: the training state.
          data: the data iterator's state, as JSON can hold it.
          heldout: what `state` was measured at, if it was.

        Raises:
          InputError: the disk is full, now or during the save before this one, or the directory cannot be written in.
        """
        arrays = {"params": state.params, "optimizer": {"step": state.step, "state": state.optimizer}}
        about = self.about | {"sums": array_sums(arrays), "position": digest(data)}
        if heldout is not None:
            about |= {"heldout": dataclasses.asdict(heldout)}
        items = {name: ocp.args.StandardSave(value) for name, value in arrays.items()}
        items |= {"data": ocp.args.JsonSave(data), "about": ocp.args.JsonSave(about | {"digest": digest(about)})}
        self.wait()
        check_space(self.directory, state)
        if heldout is not None:
            self.measured[step] = heldout
        with reported_in_one_line(self.directory):
            self.manager.save(step, args=ocp.args.Composite(**items))
        places.publish(self.path(step), wait=False)

    def restore(self, layout: TrainState) -> tuple[int, TrainState, dict[str, Any]]:
        """The newest checkpoint that is whole; damaged ones that are newer are renamed, so that they can be made again.

        Args:
          layout: shapes and shardings to restore onto; any mesh will do.

        Returns:
          Its step, the state, and the data iterator's state. Of checkpoint 0 the optimizer is empty.

        Raises:
          InputError: the checkpoint belongs to another target or drafter, the data order would change, or all of them
            are damaged.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        found = _newest_whole(self.directory, steps, lambda step: self._restore(step, layout))
        for step in (step for step in steps if step > found[0]):
            self.measured.pop(step, None)
            aside = self.directory / f"{step}.damaged"
            if aside.exists():
                shutil.rmtree(aside)
            self.path(step).rename(aside)
            places.publish(aside)
            places.withdraw(self.path(step))
            log(f"the damaged checkpoint is now {aside}; remove it when you do not need it")
        self.manager.reload()
        return found

    def _restore(self, step: int, layout: TrainState) -> tuple[int, TrainState, dict[str, Any]]:
        """The checkpoint of one step."""
        where = self.path(step)
        about = read_about(self.manager, where)
        check_about(where, about, self.about, self.config.target.path)
        if step == 0:
            params = _restore_params(self.manager, where, about, layout.params)
            return step, TrainState(jnp.zeros((), jnp.int32), params, ()), {}
        arrays = {"params": layout.params, "optimizer": {"step": layout.step, "state": layout.optimizer}}
        items = {name: ocp.args.StandardRestore(value) for name, value in arrays.items()}
        args = ocp.args.Composite(**items, data=ocp.args.JsonRestore())
        places.fetch(where)
        with naming_damage(where, ("params", "optimizer", "data")):
            found = self.manager.restore(step, args=args)
        check_sums(where, {name: found[name] for name in arrays}, about.get("sums", {}))
        if about.get("position", digest(found["data"])) != digest(found["data"]):
            raise Damaged(f"{where / 'data'}: damaged (it is not what was saved)")
        state = TrainState(found["optimizer"]["step"], found["params"], found["optimizer"]["state"])
        return step, state, found["data"]

    def wait(self) -> None:
        """Returns when everything is on disk, or in the bucket. Raises InputError if the disk is full."""
        with reported_in_one_line(self.directory):
            self.manager.wait_until_finished()
        places.settle(self.directory)

    def __enter__(self) -> "Checkpoints":
        """Itself."""
        self._quiet = quiet()
        self._quiet.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        """Waits for the last save and closes; raises InputError if the disk is full."""
        with reported_in_one_line(self.directory):
            self.manager.close()
        if error is None:
            places.settle(self.directory)
            self._quiet.__exit__(None, None, None)


def saved_config(workdir: Path, checkpoint: str = NEWEST) -> Config | None:
    """The config in a checkpoint of a working directory, see `load_drafter`; None if it has no checkpoint."""
    found = _read_one_about(workdir, checkpoint)
    return None if found is None else from_json(json.dumps(found[1]["config"]))


def trained_for(workdir: Path) -> str | None:
    """The fingerprint of the target's weights that the newest checkpoint was trained for; None without a checkpoint."""
    found = _read_one_about(workdir, NEWEST)
    return None if found is None else found[1]["target"]


def check_continuation(run: Run) -> bool:
    """Refuses what `Checkpoints.restore` would, before data is prepared again for it.

    Returns:
      Whether there is a checkpoint to go on from.

    Raises:
      InputError: see `Checkpoints.restore`.
    """
    found = _read_one_about(run.workdir)
    if found is not None:
        where, about = found
        now = run.data_fingerprint if about.get("data") else None
        check_about(where, about, about_of(run) | {"data": now}, run.config.target.path)
    return found is not None


def load_drafter(
    workdir: Path,
    mesh: Mesh,
    target: TargetConfig | None = None,
    *,
    any_target: bool = False,
    checkpoint: str = NEWEST,
) -> tuple[Config, DrafterModule]:
    """The drafter of a checkpoint, parameters only.

    Args:
      workdir: of the training run.
      mesh: to put the parameters on.
      target: the target it is going to draft for; the one in the checkpoint's config if None.
      any_target: do not ask whether the checkpoint was made for this target, nor for its files.
      checkpoint: `newest`, of those that are whole; `best` by accepted length on held-out prompts; or a step.

    Returns:
      The config it was trained with (with `target` in it) and the drafter.

    Raises:
      InputError: there is no such checkpoint, or it was made for another target.
    """

    def check(where: Path, about: dict[str, Any], config: Config) -> None:
        if not any_target:
            check_target(where, about, Run(config, workdir).fingerprints, config.target.path)

    return _load_step(workdir, mesh, target, checkpoint, check)[1:]


def load_step(run: Run, checkpoint: str = NEWEST) -> tuple[int, Config, DrafterModule]:
    """A checkpoint's step, the config it was trained with (with the run's target in it) and the drafter.

    Args:
      run: its target is the one that the drafter is going to draft for.
      checkpoint: as `load_drafter`.

    Raises:
      InputError: as `load_drafter`.
    """
    target = run.config.target

    def check(where: Path, about: dict[str, Any], _: Config) -> None:
        check_target(where, about, run.fingerprints, target.path)

    return _load_step(run.workdir, run.mesh, target, checkpoint, check)


def _load_step(
    workdir: Path,
    mesh: Mesh,
    target: TargetConfig | None,
    checkpoint: str,
    check: Callable[[Path, dict[str, Any], Config], None],
) -> tuple[int, Config, DrafterModule]:
    """The same; `check` gets a checkpoint's directory, what it says of itself and its config, and refuses it."""
    check_name(checkpoint)
    directory = checkpoint_directory(workdir).absolute()
    missing = InputError(f"{directory}: no checkpoint here; train first, or point --workdir at a trained run")
    if not directory.is_dir():
        raise missing
    with _opened(directory) as manager:
        steps = sorted(manager.all_steps(), reverse=True)
        if not steps:
            raise missing

        def read(step: int) -> tuple[int, Config, DrafterModule]:
            where = directory / str(step)
            about = read_about(manager, where)
            config = from_json(json.dumps(about["config"]))
            if target is not None:
                config = dataclasses.replace(config, target=target)
            check(where, about, config)
            abstract = abstract_drafter(config)
            shapes, shardings = to_params(abstract), param_shardings(abstract, mesh)
            layout = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[name])
                for name, leaf in shapes.items()
            }
            return step, config, to_module(abstract, _restore_params(manager, where, about, layout))

        return _named_or_newest(manager, directory, steps, checkpoint, read)


@contextlib.contextmanager
def _opened(directory: Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints in a directory, for reading."""
    options = ocp.CheckpointManagerOptions(read_only=True)
    with quiet(), contextlib.ExitStack() as stack:
        with _naming_metadata(directory):
            manager = stack.enter_context(ocp.CheckpointManager(directory, options=options))
        yield manager


@contextlib.contextmanager
def _naming_metadata(directory: Path) -> Iterator[None]:
    """Turns what Orbax raises when the file in which it notes how it wrote a checkpoint is damaged into one line.

    It does without the file, and without one that is no JSON.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        files = [file for file in sorted(directory.glob("*/_CHECKPOINT_METADATA")) if not _is_metadata(file)]
        where = files[0] if files else directory / "*" / "_CHECKPOINT_METADATA"
        raise InputError(f"{where}: damaged ({error}); remove it, the checkpoint is read without it") from error


def _is_metadata(file: Path) -> bool:
    """Whether a file is JSON of the shape of Orbax's notes, or none at all."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return True
    parts = ("item_handlers", "metrics", "performance_metrics", "custom_metadata")
    return isinstance(content, dict) and all(isinstance(content.get(name) or {}, dict) for name in parts)


def _named_or_newest(
    manager: ocp.CheckpointManager,
    directory: Path,
    steps: Sequence[int],
    name: str,
    read: Callable[[int], Found],
    say: Callable[[str], None] = log,
) -> Found:
    """What `read` gives of the checkpoint that is meant; only for the newest one, an older one may be taken.

    Raises:
      InputError: there is none of this name, or it is damaged.
    """
    if name == NEWEST:
        return _newest_whole(directory, steps, read, say)
    step = named_step(name, directory, steps, read_measured(manager, directory))
    try:
        return read(step)
    except Damaged as error:
        raise InputError(f"{error}; put it back from a copy, or use another --checkpoint") from error


def _newest_whole(
    directory: Path, steps: Sequence[int], read: Callable[[int], Found], say: Callable[[str], None] = log
) -> Found:
    """What `read` gives of the first of `steps` that is not damaged; says which ones are.

    Raises:
      InputError: all are, or several hosts read: each would have to take the same.
    """
    for number, step in enumerate(steps):
        try:
            found = read(step)
        except Damaged as error:
            older = [f"{directory / str(one)}" for one in steps[number + 1 :]]
            if not older:
                raise InputError(
                    f"{error}; no older checkpoint is whole: put it back from a copy, or remove {directory} and train"
                ) from error
            if jax.process_count() > 1:
                raise InputError(f"{error}; move this checkpoint away to go on from {older[0]}") from error
            say(f"{error}; looking at the checkpoint before it")
        else:
            if number:
                say(f"using {directory / str(step)}, the newest checkpoint that is whole")
            return found
    raise AssertionError("there is a last step")


def _restore_params(manager: ocp.CheckpointManager, where: Path, about: dict[str, Any], layout: Params) -> Params:
    """The parameters of a checkpoint alone."""
    args = ocp.args.Composite(params=ocp.args.StandardRestore(layout))
    places.fetch(where / "params")
    with naming_damage(where, ("params",)):
        params = manager.restore(int(where.name), args=args)["params"]
    check_sums(where, {"params": params}, about.get("sums", {}))
    return params


def _read_one_about(workdir: Path, checkpoint: str = NEWEST) -> tuple[Path, dict[str, Any]] | None:
    """Directory and `about` of a checkpoint, where there are any."""
    check_name(checkpoint)
    directory = checkpoint_directory(workdir).absolute()
    there = directory.is_dir()
    if jax.process_count() > 1:  # hosts open it together or not at all, and the first one to go on makes it
        multihost_utils.sync_global_devices("looked for checkpoints")
    if not there:
        return None
    with _opened(directory) as manager:
        steps = sorted(manager.all_steps(), reverse=True)

        def read(step: int) -> tuple[Path, dict[str, Any]]:
            where = directory / str(step)
            return where, read_about(manager, where)

        # Silently: whoever reads the rest of the checkpoint will say it.
        return _named_or_newest(manager, directory, steps, checkpoint, read, lambda line: None) if steps else None
