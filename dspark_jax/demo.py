"""Records real decoding rounds, and writes a page on which they are played, as one file that needs no server.

    python -m dspark_jax.demo --config quickstart --out demo.html

The page is that of `python -m dspark_jax.serve`; open the file in a browser, from disk or from anywhere. Its rounds are
those of the newest checkpoint of the working directory, or of several drafters of one target with a
`--drafter NAME=DIR` each, and of plain decoding: for the first held-out prompts of every domain, for every scheduler,
temperature and number of background users that the flags name. A scheduler that reads confidences is left out for a
drafter that gives none.
"""

import dataclasses
import datetime
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from dspark_jax import command
from dspark_jax.config import Config, InputError
from dspark_jax.engine.schedulers import SCHEDULERS
from dspark_jax.engine.serving import Engine
from dspark_jax.json_file import written_whole
from dspark_jax.progress import Progress, log
from dspark_jax.registry import find
from dspark_jax.run import Run
from dspark_jax.serve.background import Background
from dspark_jax.serve.document import document
from dspark_jax.serve.pool import Pool, Sizes, named_drafters
from dspark_jax.serve.rounds import Event
from dspark_jax.serve.watch import MOST_TOKENS, MOST_USERS, PROMPTS, Ask, Watch
from dspark_jax.training.best import NEWEST

_ANSWER = 128
"""Tokens that background users may ask for beyond a prompt."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is recorded: every combination.

    Attributes:
      schedulers: names.
      users: numbers of background users.
      temperatures: of sampling.
      prompts: of each domain.
      tokens: longest answer.
    """

    schedulers: tuple[str, ...]
    users: tuple[int, ...]
    temperatures: tuple[float, ...]
    prompts: int
    tokens: int


def demo(
    config: Config,
    workdir: Path,
    *,
    out: str | None = None,
    drafter: Sequence[str] = (),
    checkpoint: str = NEWEST,
    schedulers: Sequence[str] = ("fixed", "threshold"),
    users: Sequence[str | int] = (0, 7),
    temperatures: Sequence[str | float] = (0.0, 1.0),
    prompts: int = 1,
    tokens: int = 96,
) -> dict[str, Any]:
    """Records and writes.

    Args:
      config: resolved; `target`, `eval.prompts` and the chat settings of `data` are used.
      workdir: of the training run, unless there are drafters.
      out: the file to write; None: demo.html, here.
      drafter: NAME=DIR of each.
      checkpoint: of every drafter: `newest`, `best` or a step.
      schedulers: that are recorded.
      users: numbers of background users that are recorded.
      temperatures: that are recorded.
      prompts: of each domain.
      tokens: longest answer.

    Returns:
      What was recorded, as it is in the file.

    Raises:
      InputError: a flag is out of range, there is no checkpoint or no prompt, or the file cannot be written.
    """
    wanted = _wanted(schedulers, users, temperatures, prompts, tokens)
    out = out or "demo.html"
    target = Path(out)
    if target.is_dir() or not target.parent.is_dir():
        raise InputError(f"--out={out}: no file can be there; name one in a directory that exists")
    capacity = config.data.max_prompt_length + max(tokens, _ANSWER)
    positions = config.target.architecture.max_position_embeddings or capacity
    sizes = Sizes(slots=max(wanted.users) + 1, capacity=min(capacity, positions))
    named = named_drafters(drafter) or None
    with Pool.open(Run(config, workdir), sizes, drafters=named, checkpoint=checkpoint) as pool:
        recording = record(pool, wanted)
    content = document(recording).encode()
    try:
        with written_whole(target) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise InputError(f"--out={out}: cannot be written ({error.strerror}); name another file") from None
    log(f"demo: wrote {out}, {len(recording['runs'])} runs, {len(content) / 1e6:.1f} MB; open it in a browser")
    return recording


def record(pool: Pool, wanted: Wanted) -> dict[str, Any]:
    """Decodes everything; returns what the page plays: `about`, `state` (as /live/state) and `runs`.

    Raises:
      InputError: there is no held-out prompt.
    """
    watch = Watch(pool)
    if not watch.questions:
        raise InputError(
            "no prompt of eval.prompts can be asked; name files of prompts, --config.eval.prompts=('FILE',)"
        )
    background = Background(pool, lambda: [one.ids for domain in watch.questions.values() for one in domain])
    asks = list(_asks(watch, wanted))
    runs = []
    with Progress("demo", len(asks), unit="run") as progress:
        for ask, users in asks:
            engine = watch.engine(ask)
            background.set(users, engine)
            _wait_for(engine, users)
            request = watch.submit(ask)
            named = {name: getattr(ask, name) for name in ("model", "scheduler", "domain", "index", "temperature")}
            runs.append(named | {"users": users, "events": [_short(event) for event in watch.events(request)]})
            progress.advance(1)
    background.stop()
    state = watch.state()
    state["domains"] = {name: texts[: wanted.prompts] for name, texts in state["domains"].items()}
    recorded = {run["scheduler"] for run in runs}
    state |= {
        "schedulers": [name for name in state["schedulers"] if name in recorded],
        "users": wanted.users,
        "temperatures": wanted.temperatures,
    }
    state["limits"] |= {"users": max(wanted.users), "max_tokens": wanted.tokens}
    today = datetime.datetime.now(datetime.UTC).strftime("%d %B %Y").lstrip("0")
    about = f"A recording of {len(runs)} runs of {today} on {pool.device}, with {pool.sizes.slots} slots"
    return {"about": f"{about}: nothing is computed here, and other choices were not recorded.", "state": state} | {
        "runs": runs
    }


def _asks(watch: Watch, wanted: Wanted) -> Iterator[tuple[Ask, int]]:
    """(request, background users), so that an engine's come one after the other."""
    for model in watch.state()["models"]:
        usable = [name for name in wanted.schedulers if name in model["schedulers"]]
        for scheduler in usable or ["fixed"]:
            for users in wanted.users:
                for temperature in wanted.temperatures:
                    for domain, questions in watch.questions.items():
                        for index in range(min(wanted.prompts, len(questions))):
                            about = {"temperature": temperature, "max_tokens": wanted.tokens}
                            yield Ask(model["name"], scheduler, None, domain, index, **about), users


def _wait_for(engine: Engine, users: int, seconds: float = 60.0) -> None:
    """Until so many background users are being answered, or some seconds have passed."""
    end = time.monotonic() + seconds
    while engine.running < users and time.monotonic() < end:
        time.sleep(0.01)


def _short(event: Event) -> Event:
    """An event with as many digits as anybody looks at."""
    short = {name: round(value, 6) if isinstance(value, float) else value for name, value in event.items()}
    if event.get("drafted"):
        short["drafted"] = [
            one | {"confidence": None if one["confidence"] is None else round(one["confidence"], 4)}
            for one in event["drafted"]
        ]
    return short


def _wanted(
    schedulers: Sequence[str],
    users: Sequence[str | int],
    temperatures: Sequence[str | float],
    prompts: int,
    tokens: int,
) -> Wanted:
    """The flags, checked."""
    for name in schedulers:
        find(SCHEDULERS, name, "--schedulers")
    loads = _numbers("users", users, int, MOST_USERS)
    heats = _numbers("temperatures", temperatures, float, 2.0)
    for name, value, most in (("prompts", prompts, PROMPTS), ("tokens", tokens, MOST_TOKENS)):
        if not 1 <= value <= most:
            raise InputError(f"--{name}={value} is out of range; use 1 to {most}")
    if not schedulers:
        raise InputError("--schedulers is empty; name one or more, e.g. --schedulers=fixed")
    return Wanted(tuple(dict.fromkeys(schedulers)), loads, heats, prompts, tokens)


def _numbers(name: str, given: Sequence[Any], kind: type, most: float) -> tuple[Any, ...]:
    """Each once, rising."""
    found = set()
    for one in given:
        try:
            value = kind(one)
        except ValueError:
            value = -1
        if not 0 <= value <= most:
            raise InputError(f"--{name} has {one!r}; give numbers from 0 to {most:g}, e.g. --{name}=0,1")
        found.add(value)
    if not found:
        raise InputError(f"--{name} is empty; give numbers from 0 to {most:g}, e.g. --{name}=0,1")
    return tuple(sorted(found))


def _define(values: flags.FlagValues) -> None:
    command.define_path(values, "out", "The file to write. Default: demo.html.")
    flags.DEFINE_multi_string(
        "drafter",
        [],
        "NAME=DIR of a drafter to record, instead of the working directory's: DIR is a run for the same target. May be "
        "repeated.",
        flag_values=values,
    )
    command.define_checkpoint(values)
    flags.DEFINE_list("schedulers", ["fixed", "threshold"], "Schedulers that are recorded.", flag_values=values)
    flags.DEFINE_list("users", ["0", "7"], "Numbers of background users that are recorded.", flag_values=values)
    flags.DEFINE_list("temperatures", ["0", "1"], "Sampling temperatures that are recorded.", flag_values=values)
    flags.DEFINE_integer("prompts", 1, "Prompts of each domain.", flag_values=values)
    flags.DEFINE_integer("tokens", 96, "Longest answer.", flag_values=values)


if __name__ == "__main__":
    command.run(demo, define=_define, distributed=False, writes=False)
