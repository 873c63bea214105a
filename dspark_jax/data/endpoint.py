"""One server with OpenAI's API: what is asked, what it says, and what its refusals mean.

vLLM and SGLang give the token ids of an answer if they are asked for; llama.cpp gives them at its own `/completion`. Of
other servers the text is taken. All sampling settings are sent, also those that are off: a server's own defaults (of
`generation_config.json`, or llama.cpp's) are not the distribution that was asked for.
"""

import asyncio
import dataclasses
import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dspark_jax.config import DataConfig, InputError
from dspark_jax.data.regenerate import Question

LLAMA_CPP = "llamacpp"
"""How llama.cpp names itself in its list of models."""

_RESTS = ("ConnectError", "ConnectTimeout")
"""Errors of httpx with which a server cannot be reached at all."""


class Trouble(Exception):
    """No answer this time; the message says why.

    Attributes:
      rests: the server should be left alone for a while, by all.
      wait: seconds that it asks to be left alone.
      limited: it has too many requests.
      answers: what is wrong is this answer, not the server: after the last retry it is set aside.
    """

    def __init__(
        self, why: str, *, rests: bool = False, wait: float = 0.0, limited: bool = False, answers: bool = False
    ):
        super().__init__(why)
        self.rests, self.wait, self.limited, self.answers = rests, wait, limited, answers


class Refused(Exception):
    """The server does not answer this question, however often it is asked."""


@dataclasses.dataclass(frozen=True)
class Said:
    """What a server has answered.

    Attributes:
      text: of the answer.
      ids: of the answer, or None.
      stopped: the answer has ended by itself.
      prompt_length: tokens of the prompt, as the server counts them, or None.
      prompt_ids: of the prompt, or None.
      prompt_text: of the prompt, as the server renders it, or None.
      hidden: what the server has taken out of the text: thoughts or calls of tools.
    """

    text: str
    ids: list[int] | None
    stopped: bool
    prompt_length: int | None = None
    prompt_ids: list[int] | None = None
    prompt_text: str | None = None
    hidden: str = ""


class Endpoint:
    """A server."""

    def __init__(self, url: str, config: DataConfig, stop_tokens: Sequence[int]):
        """Sends nothing yet.

        Raises:
          InputError: the package openai is missing.
        """
        try:
            self._openai: Any = importlib.import_module("openai")
        except ModuleNotFoundError:
            raise InputError(
                "data.answers.endpoints needs the package openai; pip install 'dspark-jax[answers]'"
            ) from None
        self.url, self.config, self.settings = url.rstrip("/"), config, config.answers
        self.stop_tokens = list(stop_tokens)
        key = os.environ.get(self.settings.key_variable) or "none"
        self._client = self._openai.AsyncOpenAI(
            base_url=self.url, api_key=key, max_retries=0, timeout=self.settings.timeout
        )
        self.model = self.settings.model
        self.kind = ""
        self._connecting: asyncio.Task[None] | None = None
        self._connected = False

    async def close(self) -> None:
        """Ends its connections."""
        await self._client.close()

    async def connect(self) -> None:
        """Finds the model and what the server has room for, once for all who ask.

        Raises:
          InputError: it does not serve the model, or has less room than samples may take.
          Trouble: it gives no answer.
        """
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
        attempt = self._connecting
        try:
            await asyncio.shield(attempt)
        except Trouble:
            if self._connecting is attempt:
                self._connecting = None
            raise

    async def _connect(self) -> None:
        try:
            found = await self._call("get", "/models")
        except Refused:  # a server without a list of models
            found = {"data": []}
        models = {str(one.get("id")): one for one in _objects(found.get("data"))}
        names = ", ".join(map(repr, models))
        if not self.model and len(models) != 1:
            lists = f"lists the models {names}" if models else "lists no models (most URLs end in /v1)"
            raise InputError(f"{self.url} {lists}; name the target with data.answers.model")
        if self.model and models and self.model not in models:
            raise InputError(f"{self.url} has no model {self.model!r}; data.answers.model must be one of {names}")
        self.model = self.model or next(iter(models))
        about = models.get(self.model, {})
        self.kind = LLAMA_CPP if about.get("owned_by") == LLAMA_CPP else ""
        self._check_room(about)
        self._connected = True

    def _check_room(self, about: Mapping[str, Any]) -> None:
        data, meta = self.config, about.get("meta")
        room = about.get("max_model_len") or (meta.get("n_ctx") if isinstance(meta, dict) else None)
        needed = data.max_length
        if self.settings.max_new_tokens:
            needed = min(needed, data.max_prompt_length + self.settings.max_new_tokens)
        if type(room) is int and room < needed:
            raise InputError(
                f"{self.url} takes {room} tokens, prompt and answer together, and data.max_length={data.max_length} "
                "is more; serve it with a longer context, or lower data.max_length"
            )

    async def ask(self, question: Question, seed: int, *, compare: bool) -> Said:
        """The answer to a question.

        Args:
          question: its ids or its messages are sent.
          seed: of its random draws.
          compare: find out how the server renders the prompt, if that needs a request of its own.

        Raises:
          InputError: no question can be answered (the key, the model).
          Refused: this one cannot.
          Trouble: it may be answered another time.
        """
        await self.connect()
        if self.settings.mode == "chat":
            return await self._chat(question, seed, compare)
        if self.kind == LLAMA_CPP:
            return await self._complete_llama_cpp(question, seed)
        body = await self._call("post", "/completions", self._body(question, seed) | {"prompt": question.ids})
        choice = _choice(body)
        return _said(body, choice, _text(choice.get("text")), "")

    async def _chat(self, question: Question, seed: int, compare: bool) -> Said:
        named = question.conversation.options.arguments()
        tools = named.pop("tools", None)
        content: dict[str, Any] = {
            "messages": [dict(message) for message in question.messages],
            "chat_template_kwargs": named,
            **({"tools": tools} if tools else {}),
        }
        rendered = None
        if compare and self.kind == LLAMA_CPP:
            rendered = (await self._call("post", self._beside("/apply-template"), content)).get("prompt")
        more = {"return_prompt_token_ids": True, "reasoning_format": "none"}
        body = await self._call("post", "/chat/completions", self._body(question, seed) | content | more)
        choice = _choice(body)
        message = choice.get("message")
        if not isinstance(message, dict):
            raise Trouble("its answer has no message")
        hidden = next((name for name in ("reasoning_content", "reasoning", "tool_calls") if message.get(name)), "")
        said = _said(body, choice, _text(message.get("content") or ""), hidden)
        return dataclasses.replace(said, prompt_text=rendered if isinstance(rendered, str) else None)

    async def _complete_llama_cpp(self, question: Question, seed: int) -> Said:
        """llama.cpp's own way of completing, which gives token ids."""
        asked = self._body(question, seed)
        asked |= {"prompt": question.ids, "n_predict": question.room, "return_tokens": True, "repeat_penalty": 1.0}
        body = await self._call("post", self._beside("/completion"), asked)
        ids, length = _ids(body.get("tokens")), body.get("tokens_evaluated")
        stopped = body.get("stop_type") in ("eos", "word")
        return Said(_text(body.get("content")), ids, stopped, length if type(length) is int else None)

    def _beside(self, path: str) -> str:
        """A page of the server that is not among OpenAI's."""
        return self.url.removesuffix("/v1") + path

    def _body(self, question: Question, seed: int) -> dict[str, Any]:
        """What every request says: settings of vLLM and SGLang too, which other servers pass over."""
        answers = self.settings
        return {
            "model": self.model,
            "max_tokens": question.room,
            "temperature": self.config.temperature,
            "top_p": answers.top_p,
            "seed": seed,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "top_k": answers.top_k or -1,
            "min_p": answers.min_p,
            "repetition_penalty": 1.0,
            "stop_token_ids": self.stop_tokens,
            "skip_special_tokens": False,
            "return_token_ids": True,
        }

    async def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the server says to one request."""
        openai = self._openai
        try:
            if method == "get":
                found = await self._client.get(
                    path, cast_to=object, options={"timeout": min(self.settings.timeout, 60)}
                )
            else:
                found = await self._client.post(path, cast_to=object, body=body)
        except openai.APITimeoutError:
            why = f"no answer within {self.settings.timeout:g} seconds (data.answers.timeout)"
            raise Trouble(why, rests=True, limited=True) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__
            why = str(cause) or type(cause).__name__
            raise Trouble(f"no connection ({why})", rests=type(cause).__name__ in _RESTS) from None
        except openai.APIStatusError as error:
            raise self._meaning(error) from None
        except (openai.APIResponseValidationError, ValueError):
            raise Trouble("its answer is not JSON") from None
        if not isinstance(found, dict):
            raise Trouble("its answer is no JSON object")
        return found

    def _meaning(self, error: Any) -> Exception:
        """What a status other than 200 says."""
        status = error.status_code
        said = " ".join(str(error.message).removeprefix(f"Error code: {status} - ").split())[:300]
        if status in (401, 403):
            return InputError(
                f"{self.url} refuses the key ({status}: {said}); set the environment variable "
                f"{self.settings.key_variable}, or name another one in data.answers.key_variable"
            )
        if status == 404 and self._connected:
            return InputError(
                f"{self.url} has no such page or model ({said}); check the URL, most end in /v1, and data.answers.model"
            )
        if status == 429:
            return Trouble(f"{status}: {said}", rests=True, wait=_retry_after(error.response), limited=True)
        if status == 503:
            return Trouble(f"{status}: {said}", rests=True, wait=_retry_after(error.response))
        if status in (408, 409, 425) or status >= 500:
            return Trouble(f"{status}: {said}")
        return Refused(f"{status}: {said}")


def question_seed(seed: int, question: Question) -> int:
    """The seed of a question, 0 to 2**31 - 1: another one for every conversation and turn."""
    numbers = (seed, question.conversation.sample_id, question.turn)
    return int(np.random.SeedSequence(numbers).generate_state(1)[0]) >> 1


def _retry_after(response: Any) -> float:
    """Seconds of the header Retry-After, if it says seconds; an hour at most."""
    value = response.headers.get("retry-after", "")
    return min(float(value), 3600.0) if value.replace(".", "", 1).isdigit() else 0.0


def _objects(values: Any) -> list[dict[str, Any]]:
    return [one for one in values if isinstance(one, dict)] if isinstance(values, list) else []


def _choice(body: Mapping[str, Any]) -> dict[str, Any]:
    choices = _objects(body.get("choices"))
    if not choices:
        raise Trouble("its answer has no choices")
    return choices[0]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Trouble("its answer has no text")
    return value


def _said(body: Mapping[str, Any], choice: Mapping[str, Any], text: str, hidden: str) -> Said:
    """An answer in OpenAI's form, with what vLLM and SGLang add."""
    reason, usage = choice.get("finish_reason"), body.get("usage")
    if reason == "content_filter":
        raise Refused("finish reason content_filter")
    if reason not in ("stop", "length", "tool_calls", "function_call"):
        raise Trouble(f"finish reason {reason}", answers=True)
    ids = next((ids for name in ("token_ids", "response_token_ids") if (ids := _ids(choice.get(name)))), None)
    prompt_ids = _ids(choice.get("prompt_token_ids")) or _ids(body.get("prompt_token_ids"))
    length = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return Said(
        text, ids, reason != "length", length if type(length) is int else None, prompt_ids, None, "" if ids else hidden
    )


def _ids(value: Any) -> list[int] | None:
    """A list of token ids, or None if it is none or empty."""
    whole = isinstance(value, list) and all(type(one) is int for one in value)
    return (value or None) if whole else None
