"""Answers a prompt with a trained drafter and its target, and streams the answer to the terminal.

    python -m dspark_jax.generate --config configs/quickstart.py --prompt "What is 3 + 4?"
    echo "Write a function that adds two numbers." | python -m dspark_jax.generate --config configs/quickstart.py

The newest checkpoint of the working directory drafts, or that of `--checkpoint`; `--plain` decodes with the target
alone. The prompt is one user message in the target's chat template, from `--prompt` or from standard input. The answer
goes to standard output; tokens, rounds, tau (tokens per round) and tokens per second go to standard error. Whatever
drafts and whatever the scheduler admits, the answer is the target's.

`--explain` shows every round instead, and the answer after them. Each drafted token is shown with the confidence of the
drafter that it is accepted if all before it are:

    +"token" .93   accepted
    -"token" .41   verified and rejected, or after a rejection
    ."token" .20   not admitted by the scheduler
    ="token"       the target's own: the correction or the bonus token

In a terminal these are green, red, grey and bold; NO_COLOR turns the colours off.

The schedulers `early_stop` and `lagged` read `cost_table.json` of the working directory, as `profile` writes it, or
without one assume an accelerator that is far from saturated; `adaptive`, which drafts only in rounds that promise to
gain by it, assumes that a round with drafts takes twice as long as one without. Every scheduler but `fixed` reads
`calibration.json` if there is one.
"""

import json
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from dspark_jax import command
from dspark_jax.config import Config, InputError
from dspark_jax.data.chat import Options, load_tokenizer, prompt_tokens, stop_tokens, with_system
from dspark_jax.drafter.none import NO_DRAFTER
from dspark_jax.engine.generate import generate as decode
from dspark_jax.engine.models import Models, when_loaded
from dspark_jax.engine.request import Piece, Request, TracedRound
from dspark_jax.engine.schedulers import SCHEDULERS
from dspark_jax.engine.serving import Engine
from dspark_jax.evaluation.run_scheduler import run_scheduler
from dspark_jax.evaluation.setup import open_drafter
from dspark_jax.ops.sampling import GREEDY_BELOW
from dspark_jax.progress import log
from dspark_jax.registry import find
from dspark_jax.run import Run
from dspark_jax.target.loading import load_target
from dspark_jax.tokenizer import ChatTokenizer
from dspark_jax.training.best import NEWEST
from dspark_jax.unicode import check_unicode

_COLOURS = {"+": "32", "-": "31", ".": "90", "=": "1"}  # green, red, grey, bold
_CHUNK = 64  # prompt tokens read at a time; capacities are multiples of it, so that few executables are compiled


def generate(
    config: Config,
    workdir: Path,
    *,
    mesh: Mesh | None = None,
    prompt: str | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    max_new_tokens: int | None = None,
    seed: int = 0,
    scheduler: str | None = None,
    threshold: float | None = None,
    plain: bool = False,
    explain: bool = False,
    checkpoint: str = NEWEST,
) -> Request:
    """Answers one prompt on standard output.

    Args:
      config: resolved; `target`, `mesh`, and of `data` the system prompt are used, and `drafter` is compared with the
        checkpoint's.
      workdir: of the training run.
      mesh: of the models; that of the config if None.
      prompt: the user's message; standard input if None.
      temperature: 0 is greedy.
      top_k: 0 is off.
      top_p: 1 is off.
      min_p: 0 is off.
      max_new_tokens: longest answer; `config.eval.max_new_tokens` if None.
      seed: of what is sampled.
      scheduler: how many drafts are verified, one of `SCHEDULERS`; `fixed` if None, `threshold` if there is one.
      threshold: least confidence of `threshold`; 0.5 if None.
      plain: decode without a drafter.
      explain: show the rounds.
      checkpoint: `newest`, `best` or a step, see `training.checkpoint.load_drafter`.

    Returns:
      The request, which has ended.

    Raises:
      InputError: no prompt, a setting out of range, no checkpoint or one of another drafter, or options that exclude
        each other.
    """
    name = _check_options(scheduler, threshold, plain, explain)
    text = _read_prompt() if prompt is None else check_unicode("--prompt", prompt)
    if not text.strip():
        raise InputError("the prompt is empty; give --prompt TEXT, or text on standard input")
    run = Run(config, Path(workdir), mesh)
    drafter = NO_DRAFTER if plain else open_drafter(run, checkpoint)[1]
    rule = run_scheduler(name, drafter, run.workdir, confidence=threshold)
    tokenizer = load_tokenizer(config.target.path)
    messages = with_system([{"role": "user", "content": text}], config.data.system_prompt)
    ids = prompt_tokens(tokenizer, messages, Options(config.data.thinking == "on"))
    budget = config.eval.max_new_tokens if max_new_tokens is None else max_new_tokens
    models = Models(when_loaded(load_target(config.target, run.mesh)), when_loaded(drafter))
    with jax.set_mesh(run.mesh):
        engine = Engine(
            models,
            slots=1,
            capacity=_capacity(len(ids), budget, models.arch.max_position_embeddings),
            scheduler=rule,
            tokenizer=tokenizer,
            stop_tokens=stop_tokens(config.target.path, tokenizer),
            prefill_chunk=_CHUNK,
        )
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
        # Refused before anything is compiled; the request that is measured comes after.
        engine.submit(ids, max_new_tokens=budget, **settings).cancel()
        filtered = top_k > 0 or top_p < 1 or min_p > 0
        greedy = temperature < GREEDY_BELOW
        engine.warm_up(greedy=greedy, sampled=not greedy and not filtered, filtered=not greedy and filtered)
        request = engine.submit(ids, max_new_tokens=budget, trace=explain, **settings)
        _show(request, tokenizer if explain else None)
        engine.close()
    return request


def _check_options(scheduler: str | None, threshold: float | None, plain: bool, explain: bool) -> str:
    """The scheduler's name, after options that make no sense together were refused."""
    name = scheduler or ("fixed" if threshold is None else "threshold")
    find(SCHEDULERS, name, "--scheduler")
    if plain and (name != "fixed" or explain):
        other = "--explain" if explain else f"--scheduler={name}"
        raise InputError(f"--plain decodes without drafts, {other} needs them; leave one of them out")
    if threshold is not None and name != "threshold":
        raise InputError(f"--threshold={threshold:g} is of no use to --scheduler={name}; use --scheduler=threshold")
    if threshold is not None and not 0 <= threshold <= 1:
        raise InputError(f"--threshold={threshold:g} is no probability; use a value from 0 to 1")
    return name


def _read_prompt() -> str:
    """The whole of standard input.

    Raises:
      InputError: there is none, or it is not UTF-8.
    """
    if sys.stdin is None:  # closed
        raise InputError("there is no standard input; give --prompt TEXT")
    if sys.stdin.isatty():
        log("prompt (end it with Ctrl-D on a line of its own):")
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        where = f"it has the byte 0x{error.object[error.start]:02x} at {error.start}"
        raise InputError(f"standard input is not {error.encoding.upper()}: {where}; convert it") from None
    except OSError as error:  # a terminal that is gone
        raise InputError(f"standard input cannot be read ({error.strerror}); give --prompt TEXT") from None
    return check_unicode("standard input", text)


def _capacity(prompt: int, budget: int, most: int) -> int:
    """Positions for a request, in steps, so that requests of similar lengths share executables."""
    wanted = -(-(prompt + max(budget, 1)) // _CHUNK) * _CHUNK
    return min(wanted, most) if most else wanted


def _show(request: Request, tokenizer: ChatTokenizer | None) -> None:
    """Prints a request as it is decoded; with a tokenizer, its rounds."""
    primary = jax.process_index() == 0
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    number = 0
    for piece in request:
        if primary and tokenizer is not None:
            if piece.round is not None:
                number += 1
            print(_explained(piece, number, lambda one: tokenizer.decode([one]), colours=colours), flush=True)
        elif primary:
            print(piece.text, end="", flush=True)
    if not primary:
        return
    result = request.result()
    print(f"\n{result.text}" if tokenizer is not None else "", flush=True)
    metrics = result.metrics
    assert metrics.total_seconds is not None
    rounds, speed = metrics.rounds, len(result.tokens) / metrics.total_seconds
    tau = f"tau {metrics.emitted / rounds:.2f}, " if rounds else ""
    log(
        f"{len(result.tokens)} tokens, {rounds} rounds, {tau}{speed:.1f} tokens/s, "
        f"first token after {metrics.first_token_seconds or 0.0:.3f} s, ended by {result.finish_reason}"
    )


def _explained(piece: Piece, number: int, decode: Callable[[int], str], *, colours: bool) -> str:
    """One line about a round, or about the first token."""
    if piece.round is None:
        marked = [_mark("=", decode(token), None, colours) for token in piece.tokens]
        return "prompt   " + " ".join([*marked, *([] if marked else [piece.text])])
    return f"round {number:<3}" + " ".join(_marks(piece.round, decode, colours))


def _marks(entry: TracedRound, decode: Callable[[int], str], colours: bool) -> Sequence[str]:
    """The tokens of a round with what became of them."""
    found = []
    for k, token in enumerate(entry.drafted):
        sign = "+" if k < entry.accepted else "-" if k < entry.admitted else "."
        found.append(_mark(sign, decode(token), entry.confidence[k] if entry.confidence else None, colours))
    if entry.next_token is not None:
        found.append(_mark("=", decode(entry.next_token), None, colours))
    return found


def _mark(sign: str, text: str, confidence: float | None, colours: bool) -> str:
    quoted = f"{sign}{json.dumps(text, ensure_ascii=False)}"
    if confidence is not None:
        quoted += f" {1 / (1 + np.exp(-np.clip(confidence, -30, 30))):.2f}".replace(" 0.", " .")
    return f"\x1b[{_COLOURS[sign]}m{quoted}\x1b[0m" if colours else quoted


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("prompt", None, "The user's message. Default: standard input.", flag_values=values)
    flags.DEFINE_float("temperature", 0.0, "Sampling temperature; 0 is greedy.", flag_values=values)
    flags.DEFINE_integer("top_k", 0, "Draw from so many of the likeliest tokens only; 0: from all.", flag_values=values)
    flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens of this total probability.", flag_values=values)
    flags.DEFINE_float(
        "min_p", 0.0, "Draw from tokens of at least this share of the likeliest one's probability.", flag_values=values
    )
    flags.DEFINE_integer(
        "max_new_tokens", None, "Longest answer in tokens. Default: eval.max_new_tokens.", flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "Of what is sampled: the same seed gives the same answer.", flag_values=values)
    flags.DEFINE_string(
        "scheduler",
        None,
        "How many drafts are verified in a round: all (fixed), those before the first one of low confidence "
        "(threshold), as many as pay by a cost table (early_stop, lagged, and adaptive, which drafts in some "
        "rounds only), or a rule of a module that `imports` names. Default: fixed, or threshold if --threshold is "
        "given.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "threshold", None, "Least confidence of --scheduler=threshold; 0.5 if not given.", flag_values=values
    )
    command.define_checkpoint(values)
    flags.DEFINE_boolean("plain", False, "Decode with the target alone.", flag_values=values)
    flags.DEFINE_boolean("explain", False, "Show what every round drafted, admitted and accepted.", flag_values=values)


class _Callable(types.ModuleType):
    """This module, which shares its name with the function that `dspark_jax` gives: it can be called as that."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """`engine.generate.generate`."""
        return decode(*arguments, **options)


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    command.run(generate, define=_define, writes=False)
