"""Bodies of requests, checked: a field is used, or refused by its name; none is ignored."""

import asyncio
import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from dspark_jax.data.messages import Message, check_order, read_message, read_tools
from dspark_jax.engine import arguments
from dspark_jax.engine.sampling import request_sampling
from dspark_jax.errors import InputError
from dspark_jax.serve.errors import ApiError
from dspark_jax.serve.pool import OWN_STOPS, Pool
from dspark_jax.serve.service import Limits
from dspark_jax.unicode import check_unicode

LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
"""Fields that say who asks, and change no answer."""

_PENALTY = "it would change the distribution of the text, and the target's own is what is served; leave it out"
_LOGPROBS = "the engine keeps no log probabilities of the tokens that it commits; leave it out"
_FORMAT = "answers are not constrained to a format; leave it out"
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "frequency_penalty": ((0,), _PENALTY),
    "presence_penalty": ((0,), _PENALTY),
    "repetition_penalty": ((1,), _PENALTY),
    "logit_bias": (({},), _PENALTY),
    "response_format": (({"type": "text"},), _FORMAT),
    "store": ((False,), "nothing is stored; leave it out"),
    "service_tier": (("auto", "default"), "there is one tier; leave it out"),
}
"""Fields that are known and not supported: values that ask for nothing, and why no others are taken."""

NEUTRAL_COMPLETION = NEUTRAL | {
    "logprobs": ((), _LOGPROBS),
    "best_of": ((1,), "answers are not ranked; use n"),
    "echo": ((False,), "the prompt is not repeated; leave it out"),
    "suffix": (("",), "the target writes what follows a prompt, nothing in between; leave it out"),
}
NEUTRAL_CHAT = NEUTRAL | {
    "logprobs": ((False,), _LOGPROBS),
    "top_logprobs": ((), _LOGPROBS),
    "functions": (([],), "they are called tools now; use tools"),
    "function_call": (("none", "auto"), "it is called tool_choice now; use that"),
    "parallel_tool_calls": ((True,), "how many tools are called is not constrained; leave it out"),
    "modalities": ((["text"],), "answers are text; leave it out"),
    "audio": ((), "answers are text; leave it out"),
    "prediction": ((), "the drafter predicts; leave it out"),
    "web_search_options": ((), "there is no web search; leave it out"),
    "reasoning_effort": ((), 'use chat_template_kwargs={"enable_thinking": true}'),
    "verbosity": ((), "it is not known to the target; leave it out"),
}

_SHARED = ("model", "n", "stream", "stream_options", "stop", "stop_token_ids", "seed", "temperature", "top_k", "top_p")
_SHARED += ("min_p", "max_tokens", *LABELS)
COMPLETION = (*_SHARED, "prompt")
CHAT = (*_SHARED, "max_completion_tokens", "messages", "tools", "tool_choice", "chat_template_kwargs")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What both endpoints have in common.

    Attributes:
      model: a name of the pool.
      n: answers to each prompt.
      stream: whether they are sent as they come.
      usage: whether a stream ends with the counts of tokens.
      max_tokens: of an answer; None is the endpoint's default.
      budget_field: what that is called.
      settings: the arguments of `Engine.submit` that follow.
    """

    model: str
    n: int
    stream: bool
    usage: bool
    max_tokens: int | None
    budget_field: str
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """The messages of a chat, as `Pool.prompt` takes them."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...]
    thinking: bool | None


async def read_body(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object that a request has as its body.

    Raises:
      ApiError: it is too large, too slow, no JSON, or something else than an object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind or 'missing'}; send JSON, as application/json")
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size <= limits.body:
                    parts.append(part)
                elif size > 32 * limits.body:  # a client that is sending reads no answer, so the rest is waited for
                    break
    except TimeoutError:
        what = f"the body was not here after {limits.body_seconds:g} seconds; send it faster"
        raise ApiError(408, what, headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ApiError(400, "the client went away while it sent the body") from None
    if size > limits.body:
        message = f"the body has more than {limits.body} bytes; send less, or raise the server's --max_body"
        raise ApiError(413, message, code="body_too_large", headers={"Connection": "close"})
    body = parsed(b"".join(parts))
    if not isinstance(body, dict):
        raise ApiError(400, f"the body is a JSON {type(body).__name__}; send an object", code="invalid_json")
    return body


def parsed(body: bytes) -> Any:
    """JSON; raises ApiError if it is none."""
    try:
        return json.loads(body.decode(), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except UnicodeDecodeError as error:
        where = f"it has the byte 0x{body[error.start]:02x} at {error.start}"
        raise ApiError(400, f"the body is not UTF-8: {where}; convert it", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply; send less", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}; correct it", code="invalid_json") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice")
    return found


class Fields:
    """Reads fields of a body, after unknown ones were refused."""

    def __init__(self, body: Mapping[str, Any], known: tuple[str, ...], neutral: Mapping[str, tuple[Any, str]]):
        self.body = body
        for name, value in body.items():
            if name in neutral:
                allowed, why = neutral[name]
                if value is not None and not any(_same(value, one) for one in allowed):
                    raise ApiError(400, f"{name} is not supported: {why}", param=name, code="unsupported_parameter")
            elif name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                remedy = f"did you mean {near[0]}?" if near else "leave it out"
                message = f"{_shown(name)}: no such parameter; {remedy}"
                raise ApiError(400, message, param=name, code="unknown_parameter")
        for name in LABELS:
            if not isinstance(body.get(name), str | dict | None):
                raise ApiError(400, f"{name} is no text", param=name, code="invalid_type")

    def read(self, name: str, read: Callable[[str, Any], Any], default: Any = None) -> Any:
        """A field as `read(name, value)` gives it; null is as good as none. Its ValueErrors become answers."""
        value = self.body.get(name)
        if value is None:
            return default
        try:
            return read(name, value)
        except ValueError as error:
            raise ApiError(400, str(error), param=name, code="invalid_value") from None

    def needed(self, name: str, read: Callable[[str, Any], Any]) -> Any:
        """The same for a field that must be there."""
        if self.body.get(name) is None:
            raise ApiError(400, f"{name} is missing; give it", param=name, code="missing_parameter")
        return self.read(name, read)


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _shown(value: Any) -> str:
    words = ascii(value)
    return words if len(words) <= 60 else words[:57] + "..."


def check_model(pool: Pool, name: Any) -> str:
    """The name of a model that there is; ApiError 404 for another."""
    if not isinstance(name, str):
        raise ApiError(400, f"model is a JSON {type(name).__name__}; give a name", param="model", code="invalid_type")
    if name not in pool.names:
        known = ", ".join(pool.names)
        message = f"there is no model {_shown(name)}; use one of {known}"
        raise ApiError(404, message, param="model", code="model_not_found")
    return name


def completion(body: Mapping[str, Any], pool: Pool, limits: Limits) -> tuple[Asked, list[Any]]:
    """What a body for /v1/completions asks for, and its prompts: texts or lists of ids."""
    fields = Fields(body, COMPLETION, NEUTRAL_COMPLETION)
    prompts = fields.needed("prompt", _prompts)
    asked = _asked(fields, pool, limits)
    _check_choices(asked.n * len(prompts), "prompt" if len(prompts) > 1 else "n", pool, limits)
    return asked, prompts


def chat(body: Mapping[str, Any], pool: Pool, limits: Limits) -> tuple[Asked, Conversation]:
    """What a body for /v1/chat/completions asks for, and its conversation."""
    fields = Fields(body, CHAT, NEUTRAL_CHAT)
    messages = fields.needed("messages", _messages)
    tools = fields.read("tools", _tools, ())
    if fields.read("tool_choice", _tool_choice, "auto") == "none":
        tools = ()
    thinking = fields.read("chat_template_kwargs", _thinking)
    asked = _asked(fields, pool, limits)
    _check_choices(asked.n, "n", pool, limits)
    return asked, Conversation(messages, tools, thinking)


def _asked(fields: Fields, pool: Pool, limits: Limits) -> Asked:
    model = check_model(pool, fields.body.get("model") or pool.default)
    stream = fields.read("stream", _boolean, False)
    options = fields.read("stream_options", _stream_options, {})
    if options and not stream:
        raise ApiError(400, "stream_options is for streams; set stream=true", param="stream_options")
    settings = {
        "temperature": fields.read("temperature", arguments.real, 1.0),
        "top_k": fields.read("top_k", lambda name, value: arguments.integer(name, value, 0), 0),
        "top_p": fields.read("top_p", arguments.real, 1.0),
        "min_p": fields.read("min_p", arguments.real, 0.0),
    }
    for name, value in settings.items():
        fields.read(name, lambda name, _, value=value: request_sampling(1, **{name: value}))
    settings["seed"] = fields.read("seed", lambda name, value: arguments.integer(name, value, 0))
    settings["stop_strings"] = fields.read("stop", lambda _, value: _stops(value, limits), ())
    settings["stop_tokens"] = fields.read("stop_token_ids", lambda name, value: _ids(name, value, pool), ())
    budget, field = _budget(fields)
    n = fields.read("n", lambda name, value: arguments.integer(name, value, 1), 1)
    return Asked(model, n, stream, options.get("include_usage", False), budget, field, settings)


def _check_choices(count: int, field: str, pool: Pool, limits: Limits) -> None:
    most = min(limits.choices, pool.sizes.max_queue)
    if count > most:
        message = f"{field} asks for {count} answers at a time; at most {most} are possible"
        raise ApiError(400, message, param=field, code="too_many_choices")


def _budget(fields: Fields) -> tuple[int | None, str]:
    def one(name: str, value: Any) -> int:
        return arguments.integer(name, value, 1)

    old, new = fields.read("max_tokens", one), fields.read("max_completion_tokens", one)
    if old is not None and new is not None and old != new:
        message = f"max_tokens={old} and max_completion_tokens={new} are two names of one limit; give one of them"
        raise ApiError(400, message, param="max_tokens", code="invalid_value")
    return (new, "max_completion_tokens") if new is not None else (old, "max_tokens")


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InputError(f"{name}={_shown(value)} is neither true nor false")
    return value


def _stream_options(name: str, value: Any) -> dict[str, bool]:
    if not isinstance(value, dict):
        raise InputError(f'{name}={_shown(value)} is no object; use {{"include_usage": true}}')
    for key, one in value.items():
        if key != "include_usage" and not (key == "include_obfuscation" and one is False):
            raise InputError(f"{name}.{_shown(key)} is not supported; use include_usage")
        _boolean(f"{name}.{key}", one)
    return value


def _stops(value: Any, limits: Limits) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise InputError(f"stop={_shown(value)} is neither a text nor a list of texts, none of them empty")
    if len(found) > limits.stops or any(len(one) > limits.stop_length for one in found):
        raise InputError(f"stop may have {limits.stops} texts of {limits.stop_length} characters at most")
    return tuple(check_unicode("one of stop", one) for one in found)


def _ids(name: str, value: Any, pool: Pool) -> tuple[int, ...]:
    ids = arguments.token_ids(name, value, pool.models(pool.default).arch.vocab_size)
    if len(ids) > OWN_STOPS:
        raise InputError(f"{name} has {len(ids)} ids; at most {OWN_STOPS} are possible")
    return tuple(ids.tolist())


def _prompts(name: str, value: Any) -> list[Any]:
    """A text, a list of texts, ids, or a list of lists of ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise InputError(f"{name}={_shown(value)} is neither a text nor a list of some texts or token ids")
    if all(isinstance(one, str) for one in value) or all(isinstance(one, list) for one in value):
        return value
    if all(isinstance(one, int) and not isinstance(one, bool) for one in value):
        return [value]
    raise InputError(f"{name} mixes kinds of entries, or has some that are neither text nor token ids; use one kind")


def _messages(name: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{name}={_shown(value)} is no list of messages with one entry or more")
    messages = []
    for number, entry in enumerate(value):
        try:
            message, unused = read_message(entry, ("role", "content"), reasoning=True)
        except ValueError as error:
            raise InputError(f"{name}[{number}]: {error}") from None
        if unused:
            raise InputError(f"{name}[{number}].{_shown(unused[0])[1:-1]} is not supported; leave it out")
        messages.append(message)
    check_order(messages)
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{name} ends with an assistant's message, which is not continued; end with a user's")
    return tuple(messages)


def _tools(name: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list):
        raise InputError(f"{name}={_shown(value)} is no list of tools")
    tools, unused = read_tools(name, value)
    if unused:
        raise InputError(f"{unused[0]} is not supported; leave it out")
    return tools


def _tool_choice(name: str, value: Any) -> str:
    if value not in ("auto", "none"):
        raise InputError(f"{name}={_shown(value)} is not supported: calls are not constrained; use auto or none")
    return value


def _thinking(name: str, value: Any) -> bool:
    if not isinstance(value, dict) or not value or set(value) - {"enable_thinking", "thinking"}:
        raise InputError(f'{name}={_shown(value)} is not supported; use {{"enable_thinking": true}} or false')
    found = {_boolean(f"{name}.{key}", one) for key, one in value.items()}
    if len(found) > 1:
        raise InputError(f"{name} says both; give one of enable_thinking and thinking")
    return found.pop()
