"""Which drafters a comparison trains: studies, their points, and the runs that the points share."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dspark_jax.config import CompareConfig, Config, InputError, resolve
from dspark_jax.kinds import KINDS, as_kind

STUDIES = ("main", "depth", "length")


@dataclasses.dataclass(frozen=True)
class Point:
    """A drafter in a study.

    Attributes:
      study: one of `STUDIES`.
      kind: of drafter.
      value: its depth or draft length, 0 in the main table.
      runs: names of its runs, one per seed; runs of equal settings are shared.
    """

    study: str
    kind: str
    value: int
    runs: tuple[str, ...]

    @property
    def run(self) -> str:
        """Name of the first one, which has the config's own seed."""
        return self.runs[0]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be trained: resolved configs by run, and where each run appears."""

    runs: Mapping[str, Config]
    points: Sequence[Point]

    def of(self, study: str) -> list[Point]:
        """The points of a study."""
        return [point for point in self.points if point.study == study]

    def timed(self, failed: Collection[str]) -> dict[str, str]:
        """By `Point.run` the run whose rounds are timed: a round takes the same time whatever the seed was."""
        able = {name for name in self.runs if name not in failed}
        found = {point.run: next((name for name in point.runs if name in able), None) for point in self.points}
        return {run: name for run, name in found.items() if name is not None}


def make_plan(config: Config, studies: str, seeds: int = 1) -> Plan:
    """The runs of some studies, in the order in which they are trained: all with one seed, then with the next.

    A run is called after its kind and the fields that differ from the config's, so that a study finds the runs of
    another one, whether it was asked for at the same time or earlier. The first seed is the config's `train.seed`,
    the others are those after it: of the initial weights and of the order of the data.

    Raises:
      InputError: an unknown study or drafter, one that the config cannot be turned into, or less than one seed.
    """
    if seeds < 1:
        raise InputError(f"--seeds={seeds}: at least one training of every drafter is needed, e.g. --seeds=3")
    first = config.train.seed
    plans = [_plan_of_seed(config, studies, seed) for seed in range(first, first + seeds)]
    runs = {name: sub for plan in plans for name, sub in plan.runs.items()}
    points = [
        dataclasses.replace(same[0], runs=tuple(point.run for point in same))
        for same in zip(*(plan.points for plan in plans), strict=True)
    ]
    return Plan(runs, points)


def _plan_of_seed(config: Config, studies: str, seed: int) -> Plan:
    """The same for one value of `train.seed`."""
    chosen = [name.strip() for name in studies.split(",") if name.strip()]
    for name in chosen:
        if name not in STUDIES:
            raise InputError(f"--studies={studies}: {name!r} is unknown; use some of: {','.join(STUDIES)}")
    if not chosen:
        raise InputError(f"--studies is empty; use some of: {','.join(STUDIES)}")
    if config.drafter.kind != "dspark":
        raise InputError(
            f"drafter.kind={config.drafter.kind!r}: state a dspark drafter, the others are derived from it"
        )
    if config.train.refresh_every:
        raise InputError(
            f"train.refresh_every={config.train.refresh_every}: drafters that answer prompts themselves are trained on "
            "different answers; set train.refresh_every=0 to compare them"
        )
    wanted = config.compare
    _refuse_empty_or_twice(wanted, chosen)
    runs: dict[str, Config] = {}
    points: list[Point] = []

    def add(study: str, kind: str, value: int, **fields: int) -> None:
        sub = as_kind(dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, **fields)), kind)
        own = {field: number for field, number in fields.items() if number != getattr(config.drafter, field)}
        own |= {"seed": seed} if seed != config.train.seed else {}
        name = kind + "".join(f"-{field}{number}" for field, number in own.items())
        train = dataclasses.replace(sub.train, evaluate=False, seed=seed)
        # Who else is compared changes nothing about a run: it stays finished when that does.
        sub = resolve(dataclasses.replace(sub, train=train, compare=CompareConfig()))
        same = [other for other, planned in runs.items() if _essence(planned) == _essence(sub)]
        if not same:
            runs[name] = dataclasses.replace(sub, name=f"{config.name}_{name}")
        points.append(Point(study, kind, value, (same[0] if same else name,)))

    for study in sorted(set(chosen), key=STUDIES.index):
        if study == "main":
            for kind in wanted.drafters:
                add(study, kind, 0)
        elif study == "depth":
            _refuse(wanted.depth_drafters, "num_layers", "compare.depth_drafters")
            for depth in wanted.depths:
                for kind in wanted.depth_drafters:
                    add(study, kind, depth, num_layers=depth)
        else:
            _refuse(wanted.length_drafters, "block_size", "compare.length_drafters")
            for length in wanted.lengths:
                for kind in wanted.length_drafters:
                    add(study, kind, length, block_size=length)
    return Plan(runs, points)


def with_measured(plan: Plan, config: Config, seeds: int, measured: Callable[[str, Config], bool]) -> Plan:
    """The plan, and with it the points of the other studies whose runs have been measured already.

    A study of which there is no more than the plan's own runs was never asked for, and is left out.

    Args:
      plan: of the studies that were asked for.
      config: that it was made from.
      seeds: likewise.
      measured: whether a run of this name and config has been.
    """
    runs, points = dict(plan.runs), list(plan.points)
    for study in STUDIES:
        if plan.of(study):
            continue
        try:
            other = make_plan(config, study, seeds)
        except InputError:  # nobody has asked for it
            continue
        there = {name: sub for name, sub in other.runs.items() if measured(name, sub)}
        if set(there) <= set(plan.runs):
            continue
        runs |= {name: sub for name, sub in there.items() if name not in runs}
        points += [point for point in other.points if there.keys() & set(point.runs)]
    return Plan(runs, points)


_FIELDS = {"main": ("drafters",), "depth": ("depth_drafters", "depths"), "length": ("length_drafters", "lengths")}
"""Fields of `CompareConfig` that a study reads."""


def _refuse_empty_or_twice(wanted: CompareConfig, studies: Collection[str]) -> None:
    """Refuses studies of nothing, and names or numbers that are there twice."""
    for study in studies:
        for field in _FIELDS[study]:
            values = getattr(wanted, field)
            if not values:
                raise InputError(f"compare.{field} is empty; name at least one, or leave {study!r} out of --studies")
            if len(set(values)) < len(values):
                raise InputError(f"compare.{field}={values} has one of them twice; name each once")


def _refuse(names: Sequence[str], varied: str, field: str) -> None:
    """Refuses kinds for which the field of the drafter that a study varies has one value."""
    for name in names:
        if name in KINDS and varied in KINDS[name].fixed:
            why = KINDS[name].fixed[varied][1]
            raise InputError(
                f"{field} has {name!r}, which always {why}: it would be one drafter many times; leave it out"
            )


def _essence(config: Config) -> Any:
    return dataclasses.asdict(dataclasses.replace(config, name=""))
