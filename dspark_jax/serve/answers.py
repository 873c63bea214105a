"""Requests of the engine on behalf of a client: submitted together, followed as they go on, cancelled when it goes."""

import asyncio
import contextlib
import dataclasses
import functools
import json
import secrets
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dspark_jax.engine.arguments import MOST
from dspark_jax.engine.request import Request, RequestResult
from dspark_jax.serve.errors import HANDLED, ApiError, api_error
from dspark_jax.serve.schema import Asked
from dspark_jax.serve.service import Service


@dataclasses.dataclass(frozen=True)
class News:
    """What has happened to one answer.

    Attributes:
      index: of the answer.
      text: that is new.
      result: when it has ended.
    """

    index: int
    text: str
    result: RequestResult | None


class Group:
    """The answers to one HTTP request."""

    def __init__(self, service: Service, asked: Asked, requests: Sequence[Request]):
        self.service, self.asked, self.requests = service, asked, requests
        self.prompt_tokens = sum(len(one.prompt) for one in requests[:: asked.n])
        self.results: list[RequestResult] = []
        self._event = asyncio.Event()
        for one in requests:
            one.on_change(functools.partial(self._changed, one))

    def _changed(self, request: Request) -> None:
        """In the engine's thread: wakes those who follow, who want pieces only for a stream."""
        if self.asked.stream or request.done:
            self.service.waker.set(self._event)

    async def follow(self, receive: Receive) -> AsyncGenerator[News]:
        """What happens, until all answers have ended. Cancels them if the client goes away, or nobody follows on.

        Raises:
          ClientGone: the client went away.
          ApiError: the engine has stopped, or the server.
        """
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(lambda _: self._event.set())
        seen, running = [0] * len(self.requests), list(range(len(self.requests)))
        try:
            while running:
                await self._event.wait()
                self._event.clear()
                if gone.done():
                    raise ClientGone
                for index in list(running):
                    request = self.requests[index]
                    done = request.done  # before its pieces are looked at: none comes after it
                    fresh = request.pieces[seen[index] :]  # the engine's thread adds to them at any time
                    seen[index] += len(fresh)
                    text = "".join(piece.text for piece in fresh)
                    result = self._result(request) if done else None
                    if done:
                        running.remove(index)
                    if text or done:
                        yield News(index, text, result)
        finally:
            gone.cancel()
            self.cancel()

    def _result(self, request: Request) -> RequestResult:
        result = request.result(0)
        if result.finish_reason == "error":
            raise ApiError(500, result.error or "the engine has stopped", code="engine_failed")
        if result.finish_reason == "cancelled":
            message = "the server has closed before the answer was complete; send the request again"
            raise ApiError(503, message, code="shutting_down", headers={"Retry-After": "5"})
        self.results.append(result)
        self.service.metrics.observe(self.asked.model, result.metrics, len(result.tokens))
        return result

    def cancel(self) -> None:
        """Ends what has not ended."""
        for one in self.requests:
            one.cancel()

    def usage(self) -> dict[str, Any]:
        """Counts of tokens; drafts are predictions in OpenAI's words."""
        written = sum(len(one.tokens) for one in self.results)
        accepted = sum(one.metrics.accepted for one in self.results)
        admitted = sum(one.metrics.admitted for one in self.results)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": written,
            "total_tokens": self.prompt_tokens + written,
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": admitted - accepted,
            },
        }


class ClientGone(Exception):
    """Nobody reads the response."""


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def submit(
    service: Service, asked: Asked, prompts: Callable[[], Sequence[Sequence[int]]], field: str, default: int | None
) -> Group:
    """Queues all answers of a request, or none.

    Args:
      service: of the server.
      asked: the request.
      prompts: gives the ids of its prompts; is called in a thread.
      field: of the body, in which the prompts are.
      default: most tokens of an answer that names no limit; None is what is left.

    Raises:
      ApiError: a prompt or a limit does not fit, the queue is full, or the server closes.
    """

    def queue() -> list[Request]:
        engine = service.pool.engine(asked.model)
        settings = dict(asked.settings)
        if settings["seed"] is None:
            settings["seed"] = secrets.randbelow(MOST)
        requests: list[Request] = []
        with contextlib.ExitStack() as undo:
            for ids in prompts():
                budget = _budget(service, asked, len(ids), field, default)
                for stream in range(asked.n):
                    one = engine.submit(ids, max_new_tokens=budget, random_stream=stream, **settings)
                    undo.callback(one.cancel)
                    requests.append(one)
            undo.pop_all()
        return requests

    try:
        return Group(service, asked, await run_in_threadpool(queue))
    except HANDLED as error:
        raise api_error(error, field) from error


def _budget(service: Service, asked: Asked, prompt: int, field: str, default: int | None) -> int:
    """Most tokens of an answer to a prompt of some tokens; see `submit`."""
    limits, capacity = service.limits, service.pool.sizes.capacity
    longest = limits.prompt or capacity - 1
    if prompt > longest:
        message = f"{field} has {prompt} tokens; at most {longest} are possible, shorten it"
        raise ApiError(400, message, param=field, code="context_length_exceeded")
    left = min(capacity - prompt, limits.tokens or capacity)
    if asked.max_tokens is None:
        return left if default is None else min(default, left)
    if asked.max_tokens > left:
        message = (
            f"{asked.budget_field}={asked.max_tokens}: after a prompt of {prompt} tokens at most {left} are possible; "
            "lower it"
        )
        raise ApiError(400, message, param=asked.budget_field, code="context_length_exceeded")
    return asked.max_tokens


async def whole(group: Group, request: HttpRequest) -> tuple[list[str], list[str]] | None:
    """Texts and finish reasons of all answers; None if the client went away."""
    texts, reasons = [""] * len(group.requests), [""] * len(group.requests)
    try:
        async for news in group.follow(request.receive):
            texts[news.index] += news.text
            if news.result is not None:
                reasons[news.index] = news.result.finish_reason
    except ClientGone:
        return None
    return texts, reasons


class Nothing(Response):
    """For a client that went away."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends what a closed connection drops."""
        await send({"type": "http.response.start", "status": 499, "headers": []})
        await send({"type": "http.response.body", "body": b""})


class EventStream(Response):
    """Answers as server-sent events, as they come.

    `events(news)` gives the JSON of what one piece of news is, `opening` what comes first, and `closing()` what comes
    last, before `[DONE]`.
    """

    def __init__(
        self,
        group: Group,
        events: Callable[[News], Iterator[dict[str, Any]]],
        opening: Sequence[dict[str, Any]] = (),
        closing: Callable[[], Sequence[dict[str, Any]]] = tuple,
    ):
        self.group, self.events, self.opening, self.closing = group, events, opening, closing
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # or a proxy collects them
        del scope

        async def give(body: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body.encode(), "more_body": more})

        async with contextlib.aclosing(self.group.follow(receive)) as news:
            try:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                if self.opening:
                    await give("".join(map(event, self.opening)))
                async for one in news:
                    await give("".join(map(event, self.events(one))))
                await give("".join(map(event, self.closing())) + "data: [DONE]\n\n", False)
            except ApiError as error:
                await give(event(error.body), False)
            except ClientGone:
                return
            finally:
                self.group.cancel()


def event(content: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
