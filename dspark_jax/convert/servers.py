"""What each server makes of a drafter directory: its loading rules, replayed on config.json and the tensors' shapes.

The rules are data, with the version, date and source file in which each was read: `servers.toml`, which says how it is
to be understood. A server either refuses, or reads the file in some way (`Verdict.reading`), which need not be the way
in which the drafter was trained: that is for `convert.dialect` to find out. What was not verified is called unknown.
"""

import dataclasses
import datetime
import functools
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.convert.drafter_files import Files, Verdict
from dspark_jax.convert.layouts import Layout, default_taps, read_layout
from dspark_jax.convert.server_facts import facts, kind, lookup
from dspark_jax.target import families

VERDICTS = ("refuses", "wrong", "unknown", "note")
"""What a rule may say."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds of a file if all conditions do; see `servers.toml`."""

    verdict: str
    say: str
    source: str
    kinds: Sequence[str] = ()
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    last: bool = False


@dataclasses.dataclass(frozen=True)
class Reading:
    """Where a server looks for the settings of a file; see `servers.toml`. None: as the file's own tool means it."""

    kinds: Sequence[str] = ()
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    taps: Sequence[Any] | None = None
    mask_token_id: Sequence[Any] | None = None
    block_size: Sequence[Any] | None = None
    anchor_first: Sequence[Any] | None = None
    markov_rank: Sequence[Any] | None = None
    markov_head_type: Sequence[Any] | None = None


@dataclasses.dataclass(frozen=True)
class Server:
    """A server and its rules; see `servers.toml`."""

    name: str
    version: str
    date: datetime.date
    repository: str
    reading: Sequence[Reading]
    rule: Sequence[Rule]
    serves: bool = True
    greedy: Sequence[str] = ()
    ran: Mapping[str, str] = dataclasses.field(default_factory=dict)
    norms: Sequence[str] | None = None


@functools.cache
def servers() -> tuple[Server, ...]:
    """All servers that are known."""
    text = (resources.files("dspark_jax.convert") / "servers.toml").read_text("utf-8")
    found = []
    for raw in tomllib.loads(text)["server"]:
        readings = [Reading(**one) for one in raw.pop("reading")]
        found.append(Server(reading=readings, rule=[Rule(**one) for one in raw.pop("rule")], **raw))
    return tuple(found)


def serving() -> list[str]:
    """Names of those that serve what they read."""
    return [server.name for server in servers() if server.serves]


def replay(
    path: str,
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    target: TargetArchitecture,
    split: str = "",
) -> list[Verdict]:
    """The verdict of every server on a directory; for the arguments see `Files`.

    Raises:
      InputError: config.json describes no drafter that is known here.
    """
    files = Files(path, config, shapes, target, read_layout(path, config), split)
    if not shapes:
        raise InputError(f"{path}: there are no tensors; download it again")
    return [judge(server, files) for server in servers()]


def judge(server: Server, files: Files) -> Verdict:
    """What one server does with a directory."""
    which = next(one for one in server.reading if _holds(one, files, {"speculators": files.speculators}))
    read = read_settings(which, files)
    known = facts(files, read)
    said: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for rule in _applying(server, files, known):
        said[rule.verdict].append(rule.say.format_map(known))
    unread = [name for name in files.stated.eagle3_norms if name not in (server.norms or ())]
    if unread and server.norms is not None:
        said["wrong"].append(f"it does not read {', '.join(unread)} and computes without it")
    elif unread and server.serves:
        said["unknown"].append(f"whether it reads {', '.join(unread)} was not verified")
    reading = None if said["refuses"] or said["unknown"] else _layout(files.stated, read)
    notes = [*said["note"], *([_experience(server, files)] if server.serves and reading else [])]
    return Verdict(
        server.name,
        tuple(dict.fromkeys(said["refuses"])),
        tuple(said["wrong"]),
        tuple(notes),
        reading,
        greedy=kind(files) in server.greedy,
        unknown=tuple(said["unknown"]),
    )


def read_settings(reading: Reading, files: Files) -> dict[str, Any]:
    """By name what a server finds in config.json: the first entry that is there, None where none is."""
    stated = files.stated
    found: dict[str, Any] = {
        "taps": stated.taps,
        "mask_token_id": stated.mask_token_id,
        "block_size": stated.block_size,
        "anchor_first": stated.anchor_first,
        "markov_rank": stated.markov_rank,
        "markov_head_type": stated.markov_head_type,
    }
    for name in found:
        places = getattr(reading, name)
        if places is not None:
            values = (_value(files, place) for place in places)
            found[name] = next((value for value in values if value is not None), None)
    if reading.anchor_first is not None:  # the class of z-lab's drafters has no other order of rows
        found["anchor_first"] = bool(found["anchor_first"]) and kind(files) not in ("dflash", "dflash2")
    return found


def _value(files: Files, place: Any) -> Any:
    """What is at a place: a literal, a path in config.json, or the layers that the file's tool means or are usual."""
    if not isinstance(place, str):
        return place
    if place == "usual":
        return default_taps(files.target.num_hidden_layers)
    if place == "stated":
        return files.stated.taps or None
    path, _, less = place.partition(" - ")
    value = lookup(files, path)
    if isinstance(value, list):
        return tuple(i - int(less or 0) for i in value) or None
    return value


def _applying(server: Server, files: Files, known: Mapping[str, Any]) -> Iterator[Rule]:
    for rule in server.rule:
        if _holds(rule, files, known):
            yield rule
            if rule.last:
                return


def _holds(one: Rule | Reading, files: Files, known: Mapping[str, Any]) -> bool:
    """Whether a rule or a reading is for these files."""
    if one.kinds and kind(files) not in one.kinds:
        return False
    return all(_is(_fact(files, known, name), wanted) for name, wanted in one.when.items())


def _fact(files: Files, known: Mapping[str, Any], name: str) -> Any:
    where, _, rest = name.partition(".")
    if where == "config":
        return lookup(files, rest)
    if where == "tensor":
        stem = rest.removesuffix("*")
        return (
            any(one.removeprefix("model.").startswith(stem) for one in files.shapes)
            if stem != rest
            else (rest in files.shapes)
        )
    return known[name]


def _is(value: Any, wanted: Any) -> bool:
    """Whether a fact is as a condition wants it."""
    if isinstance(wanted, Mapping):
        return not _is(value, wanted["not"])
    value = "" if value is None else value
    return value in wanted if isinstance(wanted, list) else value == wanted


def _layout(stated: Layout, read: Mapping[str, Any]) -> Layout:
    """How the server understands the file."""
    mask = read["mask_token_id"]
    return dataclasses.replace(
        stated,
        taps=tuple(read["taps"] or ()),
        mask_token_id=-1 if mask is None else mask,
        block_size=read["block_size"] or stated.block_size,
        anchor_first=read["anchor_first"],
    )


def _experience(server: Server, files: Files) -> str:
    """Whether the server has been run with such drafters, or its rules are only known from its code."""
    version, family = server.ran.get(files.stated.family), families.of_shape(files.target)
    if not family.drafter_class:
        return f"not run with a {family.title} as the target, whose hidden states it has to hand to these layers"
    if version and files.stated.anchor_first and not (files.gemma or files.llama):
        return f"served DSpark exports for the embedded target: {version}"
    return f"not run with such drafters: its rules are known from its code ({server.version}; {server.date})"
