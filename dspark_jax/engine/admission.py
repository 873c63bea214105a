"""What a request may ask for: everything wrong with one is found here, before it is queued."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.engine import arguments
from dspark_jax.engine.request import Settings
from dspark_jax.engine.sampling import request_sampling
from dspark_jax.tokenizer import Tokenizer
from dspark_jax.unicode import check_unicode


def check_engine(
    arch: TargetArchitecture,
    sizes: Mapping[str, int],
    capacity: int,
    stop_tokens: Sequence[int],
    tokenizer: Tokenizer | None,
) -> None:
    """Refuses values with which an engine cannot work; see `Engine`, whose arguments these are.

    Args:
      arch: of the target.
      sizes: by name, what must be at least 1; `max_stop_tokens` is among them.
      capacity: most tokens of a request.
      stop_tokens: of the engine itself.
      tokenizer: of the target, or None.

    Raises:
      InputError: names the value and a remedy.
    """
    for name, value in sizes.items():
        arguments.integer(name, value, least=1)
    arguments.integer("capacity", capacity, least=2)  # a prompt and an answer
    most = arch.max_position_embeddings
    if most and capacity > most:
        raise InputError(
            f"capacity={capacity} exceeds the target's max_position_embeddings={most}; use at most that many"
        )
    _stops(stop_tokens, arch, sizes["max_stop_tokens"])
    if tokenizer is not None and not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise InputError(f"the tokenizer is {type(tokenizer).__name__}; load one with load_tokenizer, or give None")


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
        arguments.check_known("submit", name, list(given))
    least = {"max_new_tokens": 1, "top_k": 0, "seed": 0, "random_stream": 0}
    values: dict[str, Any] = {name: arguments.integer(name, given[name], start) for name, start in least.items()}
    values |= {name: arguments.real(name, given[name]) for name in ("temperature", "top_p", "min_p")}
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
    if isinstance(strings, str | bytes) or not isinstance(strings, Sequence):
        raise InputError(f"stop_strings={strings!r} is no list of texts; use e.g. stop_strings=['\\n\\n']")
    for one in strings:
        if not isinstance(one, str) or not one:
            raise InputError(f"stop_strings has {one!r}; every one must be a text that is not empty")
        check_unicode("one of stop_strings", one)
    trace = arguments.boolean("trace", given["trace"])
    return Settings(**values, stop_strings=tuple(strings), trace=trace)


def prompt_ids(prompt: Any, tokenizer: Tokenizer | None, arch: TargetArchitecture) -> np.ndarray:
    """Token ids [P] int32 of a prompt given as ids or as text.

    Raises:
      InputError: it is empty, neither ids nor text, text without a tokenizer or with half a surrogate pair, or has a
        token outside the vocabulary.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("the prompt is text and the engine has no tokenizer; give token ids")
        prompt = tokenizer(check_unicode("the prompt", prompt), add_special_tokens=False, verbose=False)["input_ids"]
    ids = arguments.token_ids("prompt", prompt, arch.vocab_size)
    if not len(ids):
        raise InputError("the prompt is empty; give at least one token")
    return ids


def check_fits(prompt: int, settings: Settings, capacity: int, tokenizer: Tokenizer | None) -> None:
    """Refuses a request for which an engine has no room, or no tokenizer.

    Args:
      prompt: its length in tokens.
      settings: of the request.
      capacity: of the engine, in tokens of a request.
      tokenizer: of the engine, or None.

    Raises:
      InputError: names the size and a remedy.
    """
    if settings.stop_strings and tokenizer is None:
        raise InputError("stop_strings need the tokenizer; make the Engine with tokenizer=...")
    if prompt + settings.max_new_tokens > capacity:
        raise InputError(
            f"prompt of {prompt} tokens and max_new_tokens={settings.max_new_tokens} exceed the engine's "
            f"capacity={capacity}; shorten one of them"
        )


def prompt_rows(prompts: Any, max_new_tokens: Any, arch: TargetArchitecture) -> list[np.ndarray]:
    """Prompts as rows of token ids [P] int32, each with room for an answer.

    Args:
      prompts: lists of token ids.
      max_new_tokens: of every answer.
      arch: of the target.

    Raises:
      InputError: something else than lists of tokens, an empty one, or one that is too long for the target.
    """
    arguments.integer("max_new_tokens", max_new_tokens, least=1)
    rows = []
    for number, prompt in enumerate(arguments.as_list("prompts", prompts, "of lists of token ids")):
        row = arguments.token_ids(f"prompt {number}", prompt, arch.vocab_size)
        if not len(row):
            raise InputError(f"prompt {number} is empty; give at least one token")
        if arch.max_position_embeddings and len(row) + max_new_tokens > arch.max_position_embeddings:
            raise InputError(
                f"prompt {number} of {len(row)} tokens and max_new_tokens={max_new_tokens} exceed the target's "
                f"max_position_embeddings={arch.max_position_embeddings}; shorten one of them"
            )
        rows.append(row)
    return rows


def _stops(stop_tokens: Any, arch: TargetArchitecture, most: int) -> list[int]:
    ids = arguments.token_ids("stop_tokens", stop_tokens, arch.vocab_size).tolist()
    if len(ids) > most:
        raise InputError(f"stop_tokens has {len(ids)} ids; at most max_stop_tokens={most} are possible")
    return ids
