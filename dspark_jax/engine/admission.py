"""What a request may ask for: everything wrong with one is found here, before it is queued."""

import difflib
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.engine.request import Settings
from dspark_jax.engine.sampling import request_sampling

_SEEDS = 2**31


def check_engine(
    target: Any,
    sizes: Mapping[str, int],
    capacity: int,
    stop_tokens: Sequence[int],
) -> None:
    """Refuses sizes with which an engine cannot work; see `Engine`, whose arguments these are.

    Args:
      target: the language model.
      sizes: by name, what must be at least 1; `max_stop_tokens` is among them.
      capacity: most tokens of a request.
      stop_tokens: of the engine itself.

    Raises:
      InputError: names the size and a remedy.
    """
    for name, value in sizes.items():
        if _integer(name, value) < 1:
            raise InputError(f"{name}={value} leaves no room for a request; use 1 or more")
    if _integer("capacity", capacity) < 2:
        raise InputError(f"capacity={capacity} has no room for a prompt and an answer; use 2 or more")
    most = target.arch.max_position_embeddings
    if most and capacity > most:
        raise InputError(
            f"capacity={capacity} exceeds the target's max_position_embeddings={most}; use at most that many"
        )
    _stops(stop_tokens, target.arch, sizes["max_stop_tokens"])


def request_settings(
    given: Mapping[str, Any],
    unknown: Mapping[str, Any],
    arch: TargetArchitecture,
    stop_tokens: Sequence[int],
    max_stop_tokens: int,
) -> Settings:
    """Checked settings of a request.

    Args:
      given: the fields of `Settings`.
      unknown: parameters that do not exist.
      arch: of the target; its vocabulary bounds the stop tokens.
      stop_tokens: the engine's own, which are added.
      max_stop_tokens: most of them together.

    Raises:
      InputError: an unknown parameter, a value of the wrong type or out of range.
    """
    for name in unknown:
        near = difflib.get_close_matches(name, list(given), n=1, cutoff=0.3)
        raise InputError(f"{name}: no such parameter; " + (f"did you mean {near[0]}?" if near else "leave it out"))
    values: dict[str, Any] = {name: _integer(name, given[name]) for name in ("max_new_tokens", "top_k", "seed")}
    values |= {name: _real(name, given[name]) for name in ("temperature", "top_p", "min_p")}
    if values["max_new_tokens"] < 1:
        raise InputError(f"max_new_tokens={values['max_new_tokens']} leaves nothing to generate; use 1 or more")
    if not 0 <= values["seed"] < _SEEDS:
        raise InputError(f"seed={values['seed']} is out of range; use 0 to {_SEEDS - 1}")
    # Its checks and messages are the ones of `generate`.
    request_sampling(1, **{name: values[name] for name in ("temperature", "top_k", "top_p", "min_p")})
    own = _stops(given["stop_tokens"], arch, max_stop_tokens)
    values["stop_tokens"] = tuple(dict.fromkeys((*stop_tokens, *own)))
    if len(values["stop_tokens"]) > max_stop_tokens:
        raise InputError(
            f"stop_tokens has {len(own)} ids, with the engine's own {len(values['stop_tokens'])}; at most "
            f"max_stop_tokens={max_stop_tokens} are possible"
        )
    strings = given["stop_strings"]
    if isinstance(strings, str) or not isinstance(strings, Sequence):
        raise InputError(f"stop_strings={strings!r} is no list of texts; use e.g. stop_strings=['\\n\\n']")
    for one in strings:
        if not isinstance(one, str) or not one:
            raise InputError(f"stop_strings has {one!r}; every one must be a text that is not empty")
    if not isinstance(given["trace"], bool):
        raise InputError(f"trace={given['trace']!r} is neither True nor False")
    return Settings(**values, stop_strings=tuple(strings), trace=given["trace"])


def prompt_ids(prompt: Any, tokenizer: Any, arch: TargetArchitecture) -> np.ndarray:
    """Token ids [P] int32 of a prompt given as ids or as text.

    Raises:
      InputError: it is empty, neither ids nor text, text without a tokenizer, or has a token outside the vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("the prompt is text and the engine has no tokenizer; give token ids")
        prompt = tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
    if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes):
        raise InputError(f"the prompt is {type(prompt).__name__}; give a list of token ids, or text")
    if not len(prompt):
        raise InputError("the prompt is empty; give at least one token")
    ids = _token_ids("the prompt", prompt, arch)
    return np.asarray(ids, np.int32)


def _stops(stop_tokens: Any, arch: TargetArchitecture, most: int) -> list[int]:
    if isinstance(stop_tokens, str | bytes) or not isinstance(stop_tokens, Sequence | np.ndarray):
        raise InputError(f"stop_tokens={stop_tokens!r} is no list of token ids; use e.g. stop_tokens=[2]")
    ids = _token_ids("stop_tokens", stop_tokens, arch)
    if len(ids) > most:
        raise InputError(f"stop_tokens has {len(ids)} ids; at most max_stop_tokens={most} are possible")
    return ids


def _token_ids(name: str, ids: Any, arch: TargetArchitecture) -> list[int]:
    found = []
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, numbers.Integral):
            raise InputError(f"{name} has {one!r}, which is no token id; give integers")
        if not 0 <= int(one) < arch.vocab_size:
            raise InputError(
                f"{name} has token {one} outside the vocabulary 0..{arch.vocab_size - 1}; tokenise with the target's "
                "own tokenizer"
            )
        found.append(int(one))
    return found


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name}={value!r} is {type(value).__name__}; an integer is needed")
    return int(value)


def _real(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{name}={value!r} is {type(value).__name__}; a number is needed")
    return float(value)
