"""Serves a run over HTTP as OpenAI does: /v1/completions and /v1/chat/completions, with streams.

    python -m dspark_jax.serve --config quickstart
    curl localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "What is 12 + 30?"}]}'

The newest checkpoint of the working directory drafts, or that of `--checkpoint`. Several drafters of one target are
served with a `--drafter NAME=DIR` each, where DIR is the working directory of a run; the target is loaded once. The
`model` of a request chooses between them, and `plain` decodes without a drafter: the answers are the target's under
each of them. `/v1/models` lists them, `/health` says whether requests are taken, `/metrics` is for Prometheus.

Only this machine is served unless `--host` says otherwise. With `--api_key`, or DSPARK_JAX_API_KEY in the environment,
requests must carry it as OpenAI's clients do (`Authorization: Bearer KEY`). SIGTERM or Ctrl-C drains: what is running
is finished, other requests get status 503; a second one closes. Needs the extra `serve`:
pip install 'dspark-jax[serve]'.
"""

import importlib.util
import os
import signal
from pathlib import Path

from absl import flags

from dspark_jax import command
from dspark_jax.config import Config, InputError
from dspark_jax.progress import log
from dspark_jax.run import Run
from dspark_jax.serve.pool import Pool, Sizes, named_drafters
from dspark_jax.training.best import NEWEST

KEY = "DSPARK_JAX_API_KEY"
"""Variable of the environment that holds the key, where other users of the machine cannot read it."""


def serve(
    config: Config,
    workdir: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    drafter: list[str] | None = None,
    plain: bool = False,
    checkpoint: str = NEWEST,
    scheduler: str = "fixed",
    slots: int = 8,
    capacity: int = 1024,
    max_queue: int = 64,
    api_key: str | None = None,
    max_body: int = 1 << 20,
    max_prompt: int = 0,
    max_tokens: int = 0,
    drain_seconds: float = 60.0,
    warm_up: bool = True,
) -> None:
    """Serves until a signal comes.

    Args:
      config: resolved; `target`, `mesh.decode` and of `data` the system prompt and thinking are used, and `drafter` is
        compared with the checkpoint's.
      workdir: of the training run, unless there are drafters.
      host: address to listen at.
      port: 0 is any that is free.
      drafter: NAME=DIR of each.
      plain: serve the target alone; no run is needed.
      checkpoint: of every drafter: `newest`, `best` or a step.
      scheduler: how many drafts are verified, one of `SCHEDULERS`.
      slots: requests that are decoded together, with each drafter.
      capacity: most tokens of a request, prompt and answer together; never more than the target has positions.
      max_queue: requests that may wait for a slot.
      api_key: that requests must carry; None: that of the environment, if any.
      max_body: bytes of a request.
      max_prompt: tokens; 0: what `capacity` leaves.
      max_tokens: of an answer; 0: what `capacity` leaves.
      drain_seconds: for what is running when the first signal comes.
      warm_up: compile before the first request comes.

    Raises:
      InputError: no checkpoint, a package that is missing, an address that cannot be used, or options that exclude
        each other.
      KeyboardInterrupt: the signal was Ctrl-C.
    """
    _check_packages()
    from dspark_jax.serve import server  # needs them
    from dspark_jax.serve.app import make_app
    from dspark_jax.serve.service import Limits

    named = named_drafters(drafter or [])
    if plain and named:
        raise InputError("--plain serves the target alone, --drafter a drafter too; leave one of them out")
    for name, value, least in (("max_body", max_body, 1), ("max_prompt", max_prompt, 0), ("max_tokens", max_tokens, 0)):
        if value < least:
            raise InputError(f"--{name}={value} is out of range; use {least} or more")
    if not drain_seconds >= 0:
        raise InputError(f"--drain_seconds={drain_seconds:g} is out of range; use 0 or more")
    key = os.environ.get(KEY, "") if api_key is None else api_key
    if not key.isascii() or key != key.strip():
        raise InputError("the API key has characters that no header carries; use ASCII without spaces around it")
    place = server.bind(host, port)
    positions = config.target.architecture.max_position_embeddings
    sizes = Sizes(slots, min(capacity, positions or capacity), max_queue, scheduler)
    with Pool.open(Run(config, workdir), sizes, drafters={} if plain else named or None, checkpoint=checkpoint) as pool:
        if warm_up:
            log(f"serve: compiling for {', '.join(pool.names)}")
            pool.warm_up()
        app = make_app(pool, limits=Limits(body=max_body, prompt=max_prompt, tokens=max_tokens), api_key=key)
        one = server.Server(app.state.service, app, drain_seconds)
        log(f"serve: {', '.join(pool.names)} at {server.address(place)} (at most {slots} requests at a time)")
        if not server.is_loopback(host) and not key:
            log(f"serve: everybody who reaches {host} can use it; --api_key, or {KEY}, asks for a key")
        one.run(sockets=[place])
    if one.signals and one.signals[0] == signal.SIGINT:
        raise KeyboardInterrupt


def _check_packages() -> None:
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve needs {' and '.join(missing)}; pip install 'dspark-jax[serve]'")


def _define(values: flags.FlagValues) -> None:
    def integer(name: str, default: int, text: str) -> None:
        flags.DEFINE_integer(name, default, text, flag_values=values)

    flags.DEFINE_string(
        "host", "127.0.0.1", "Address to listen at; 0.0.0.0 serves other machines too.", flag_values=values
    )
    integer("port", 8000, "Port to listen at; 0 is any that is free.")
    flags.DEFINE_multi_string(
        "drafter",
        [],
        "NAME=DIR of a drafter to serve, instead of the working directory's: DIR is a run for the same target. May be "
        "repeated.",
        flag_values=values,
    )
    flags.DEFINE_boolean("plain", False, "Serve the target alone; no run is needed.", flag_values=values)
    command.define_checkpoint(values)
    flags.DEFINE_string(
        "scheduler", "fixed", "How many drafts are verified in a round; see generate --help.", flag_values=values
    )
    integer("slots", 8, "Requests that are decoded together, with each drafter.")
    integer("capacity", 1024, "Most tokens of a request, prompt and answer together.")
    integer("max_queue", 64, "Requests that may wait for a slot; more are refused with status 429.")
    flags.DEFINE_string(
        "api_key", None, f"Key that requests must carry. Default: {KEY} of the environment, if any.", flag_values=values
    )
    integer("max_body", 1 << 20, "Most bytes of a request.")
    integer("max_prompt", 0, "Most tokens of a prompt; 0: what the capacity leaves.")
    integer("max_tokens", 0, "Most tokens of an answer; 0: what the capacity leaves.")
    flags.DEFINE_float("drain_seconds", 60.0, "For what is running when the server is ended.", flag_values=values)
    flags.DEFINE_boolean("warm_up", True, "Compile before the first request comes.", flag_values=values)


if __name__ == "__main__":
    command.run(serve, define=_define, distributed=False, writes=False)
