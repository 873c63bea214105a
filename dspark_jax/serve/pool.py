"""Every drafter of one target that is loaded, plain decoding among them, and their engines.

Nothing here knows HTTP. Engines have threads of their own; making one allocates its slots and may take seconds, so it
does not belong into an event loop.
"""

import dataclasses
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax

from dspark_jax.buckets.places import reading
from dspark_jax.config import Config, InputError
from dspark_jax.data.chat import Options, load_tokenizer, prompt_tokens, render, stop_tokens, with_system
from dspark_jax.data.messages import Message, has_tools
from dspark_jax.data.turns import renderable
from dspark_jax.drafter.none import NO_DRAFTER
from dspark_jax.engine.admission import check_engine
from dspark_jax.engine.models import Models, when_loaded
from dspark_jax.engine.placement import decoding_mesh, serving_load
from dspark_jax.engine.schedulers import SCHEDULERS
from dspark_jax.engine.serving import Engine, EngineClosed
from dspark_jax.evaluation.run_scheduler import run_scheduler
from dspark_jax.evaluation.setup import open_drafter
from dspark_jax.registry import find
from dspark_jax.run import Run
from dspark_jax.sharding import evenly
from dspark_jax.target.loading import load_target
from dspark_jax.tokenizer import ChatTokenizer
from dspark_jax.training.best import NEWEST
from dspark_jax.training.checkpoint import saved_config

PLAIN = "plain"
"""The model that decodes without a drafter."""

OWN_STOPS = 8
"""Most stop tokens of one request, besides those that end every answer."""


@dataclasses.dataclass(frozen=True)
class Member:
    """A drafter of the pool.

    Attributes:
      name: of the model that requests choose.
      models: with the target that all members share.
      kind: of the drafter, as in `drafter.kind`; `plain` without one.
      workdir: of its run, with what `calibrate` and `profile` have written.
      step: of its checkpoint; None without one.
    """

    name: str
    models: Models
    kind: str
    workdir: Path
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of every engine of a pool; see `Engine`, and `--help` of the command."""

    slots: int = 8
    capacity: int = 1024
    max_queue: int = 64
    scheduler: str = "fixed"


class Pool:
    """Drafters of one target by name, and an engine for each that somebody has asked for.

    All methods may be called from any thread.

    Attributes:
      names: of the models; the last one is `plain`.
      default: the one for requests that name none.
      config: of the run; its target, prompts and chat settings are those of all members.
      sizes: of the engines.
      tokenizer: of the target.
      stop_tokens: ids that end every answer.
      draining: the server takes no more requests; whoever submits on its own stops.
    """

    def __init__(self, members: Sequence[Member], config: Config, tokenizer: ChatTokenizer, sizes: Sizes):
        """Checks that every member can be served; allocates and compiles nothing.

        Args:
          members: without plain decoding, which is added; models of one target. At least `plain` itself.
          config: resolved.
          tokenizer: of the target.
          sizes: of the engines.

        Raises:
          InputError: two members of one name, or a scheduler that a drafter cannot feed.
        """
        drafters = [one for one in members if one.models.drafts]
        plain = Member(PLAIN, members[0].models.plain(), PLAIN, members[0].workdir)
        self._members = {one.name: one for one in (*drafters, plain)}
        if len(self._members) <= len(drafters):
            names = ", ".join(one.name for one in (*drafters, plain))
            raise InputError(f"the models {names}: two have one name; give each --drafter NAME=DIR its own")
        self.names = tuple(self._members)
        self.default = self.names[0]
        self.config, self.sizes, self.tokenizer = config, sizes, tokenizer
        self.stop_tokens = stop_tokens(config.target.path, tokenizer)
        self._engines: dict[tuple[str, str], Engine] = {}
        self._making = threading.Lock()
        self.draining = self._closed = False
        for name in self.names:
            self._rule(name, self._scheduler(name, None))

    @classmethod
    def open(
        cls, run: Run, sizes: Sizes, *, drafters: Mapping[str, Path] | None = None, checkpoint: str = NEWEST
    ) -> Self:
        """Loads the target of a run once, and drafters for it.

        Args:
          run: its target is served, and its drafter, by the name of its config, if no others are given.
          sizes: of the engines.
          drafters: working directory of each by name; an empty mapping serves the target alone.
          checkpoint: of every drafter: `newest`, `best` or a step.

        Raises:
          InputError: a run has no checkpoint, or one for another target; something does not fit or cannot be loaded.
        """
        config = run.config
        tokenizer = load_tokenizer(config.target.path)
        _check_sizes(config, sizes, tokenizer)
        names = [PLAIN] if drafters == {} else list(drafters or {config.name: run.workdir})
        if PLAIN in (drafters or ()):
            raise InputError(f"--drafter {PLAIN}=...: {PLAIN} is decoding without a drafter; choose another name")
        runs = [run] if not drafters else [_run_of(name, path, config) for name, path in drafters.items()]
        load = serving_load(runs[0].config, slots=sizes.slots, capacity=sizes.capacity, plain=names == [PLAIN])
        mesh = run.given_mesh or decoding_mesh(config.mesh.decode, load)
        loaded: list[tuple[str, Run, int | None, Any]] = []
        for name, one in zip(names, runs, strict=True):
            step, drafter = (None, NO_DRAFTER) if name == PLAIN else open_drafter(one.on(mesh), checkpoint)
            loaded.append((name, one, step, when_loaded(drafter)))
        target = when_loaded(load_target(config.target, mesh))
        with jax.set_mesh(mesh):
            batch = evenly(sizes.slots)
        members = []
        for name, one, step, drafter in loaded:
            models = Models(target, drafter).for_decoding(batch_size=batch)
            target = models.target  # in the form in which all engines share it
            kind = PLAIN if name == PLAIN else one.config.drafter.kind
            members.append(Member(name, models, kind, one.workdir, step))
        # Those that come first have to have the same arrays.
        members = [dataclasses.replace(one, models=Models(target, one.models.drafter)) for one in members]
        return cls(members, config, tokenizer, sizes)

    def member(self, name: str) -> Member:
        """A member by its name.

        Raises:
          InputError: there is none.
        """
        return find(self._members, name, "model")

    def models(self, name: str) -> Models:
        """Its target and drafter; raises as `member`."""
        return self.member(name).models

    @property
    def device(self) -> str:
        """What everything runs on, e.g. `2 x NVIDIA H100`."""
        devices = jax.devices()
        kind = devices[0].device_kind
        return kind if len(devices) == 1 else f"{len(devices)} x {kind}"

    # Engines.

    def engine(self, name: str, scheduler: str | None = None) -> Engine:
        """The running engine of a model, which is made when it is first asked for.

        Args:
          name: of the model.
          scheduler: one of `SCHEDULERS`; None: that of the pool. Without a drafter there is nothing to schedule.

        Raises:
          InputError: there is no such model or scheduler, or the drafter cannot feed it.
          EngineClosed: the pool is draining.
        """
        key = (name, self._scheduler(name, scheduler))
        if key in self._engines and not self._closed:
            return self._engines[key]
        with self._making:
            if self._closed:
                raise EngineClosed("the server is shutting down and takes no more requests")
            if key not in self._engines:
                self._engines[key] = self._made(*key)
            return self._engines[key]

    def _scheduler(self, name: str, asked: str | None) -> str:
        wanted = self.sizes.scheduler if asked is None else asked
        find(SCHEDULERS, wanted, "scheduler")
        return wanted if self.models(name).drafts else "fixed"

    def _rule(self, name: str, scheduler: str) -> Any:
        one = self.member(name)
        return run_scheduler(scheduler, one.models.drafter, one.workdir, slots=self.sizes.slots)

    def _made(self, name: str, scheduler: str) -> Engine:
        return Engine(
            self.models(name),
            slots=self.sizes.slots,
            capacity=self.sizes.capacity,
            scheduler=self._rule(name, scheduler),
            tokenizer=self.tokenizer,
            stop_tokens=self.stop_tokens,
            max_queue=self.sizes.max_queue,
            max_stop_tokens=len(self.stop_tokens) + OWN_STOPS,
        ).start()

    @property
    def engines(self) -> dict[tuple[str, str], Engine]:
        """Those that there are, by model and scheduler."""
        return dict(self._engines)

    def warm_up(self) -> None:
        """Makes the engines of all models and compiles what requests will need."""
        for name in self.names:
            self.engine(name).warm_up(filtered=True)

    # Prompts.

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = (), thinking: bool | None = None) -> list[int]:
        """Ids of a conversation after which the target answers, as `prepare` and `evaluate` ask it.

        Args:
          messages: as `data.messages.read_message` gives them.
          tools: definitions of functions, as `data.messages.read_tools` gives them.
          thinking: whether the target thinks first; None: what the config says.

        Raises:
          InputError: the chat template cannot render it.
        """
        return prompt_tokens(self.tokenizer, *self._conversation(messages, tools, thinking))

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = (), thinking: bool | None = None) -> str:
        """The text of `prompt`."""
        messages, options = self._conversation(messages, tools, thinking)
        return render(self.tokenizer, messages, generation_prompt=True, options=options)

    def _conversation(
        self, messages: Sequence[Message], tools: Sequence[Any], thinking: bool | None
    ) -> tuple[Sequence[Message], Options]:
        asks = self.config.data.thinking == "on" if thinking is None else thinking
        options = Options(asks, tuple(tools))
        messages = with_system(messages, self.config.data.system_prompt)
        if options.tools or has_tools(messages):
            messages = renderable(self.tokenizer, messages, options)
        return messages, options

    # The end.

    def drain(self, timeout: float | None = None) -> None:
        """Takes no more requests and waits until all there are have ended.

        Raises:
          TimeoutError: they have not after `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        with self._making:
            self.draining = self._closed = True
        for engine in self.engines.values():
            engine.drain(None if end is None else max(end - time.monotonic(), 0.0))

    def close(self) -> None:
        """Cancels what has not ended, and stops the engines. May be called again."""
        with self._making:
            self.draining = self._closed = True
        for engine in self.engines.values():
            engine.close()

    def __enter__(self) -> Self:
        """Nothing is needed."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Closes."""
        self.close()


def _check_sizes(config: Config, sizes: Sizes, tokenizer: ChatTokenizer) -> None:
    """Refuses sizes with which no engine can be made, before anything large is loaded."""
    find(SCHEDULERS, sizes.scheduler, "scheduler")
    stops = stop_tokens(config.target.path, tokenizer)
    counts = {"slots": sizes.slots, "max_queue": sizes.max_queue, "max_stop_tokens": len(stops) + OWN_STOPS}
    check_engine(config.target.architecture, counts, sizes.capacity, stops, tokenizer)


def named_drafters(given: Sequence[str]) -> dict[str, Path]:
    """Working directories by name, as the flag --drafter NAME=DIR of a command gives them.

    Raises:
      InputError: an entry is something else, or a name is there twice.
    """
    found: dict[str, Path] = {}
    for one in given:
        name, separator, path = one.partition("=")
        if not separator or not name or not path:
            raise InputError(f"--drafter {one}: a name and a working directory are needed, e.g. --drafter small=runs/x")
        if name in found:
            raise InputError(f"--drafter {one}: there is a {name} already; give each its own name")
        found[name] = Path(path)
    return found


def _run_of(name: str, workdir: Path, config: Config) -> Run:
    """The run of a drafter for the target of `config`.

    Raises:
      InputError: there is no checkpoint.
    """
    folder = reading(workdir)
    saved = saved_config(folder)
    if saved is None:
        raise InputError(f"--drafter {name}={workdir}: no checkpoint there; name the directory of a trained run")
    return Run(dataclasses.replace(saved, target=config.target), folder)
