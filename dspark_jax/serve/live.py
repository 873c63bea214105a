"""Routes of the live page: the page itself, requests that are watched round by round, background users, and figures."""

import asyncio
import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from dspark_jax.engine import arguments
from dspark_jax.engine.request import EngineMetrics, Request
from dspark_jax.engine.sampling import request_sampling
from dspark_jax.engine.schedulers import SCHEDULERS
from dspark_jax.errors import InputError
from dspark_jax.registry import find
from dspark_jax.serve import document
from dspark_jax.serve.answers import event
from dspark_jax.serve.background import Background
from dspark_jax.serve.errors import HANDLED, ApiError, api_error
from dspark_jax.serve.pool import Pool
from dspark_jax.serve.schema import Fields, check_model, read_body
from dspark_jax.serve.service import Service
from dspark_jax.serve.watch import MOST_TOKENS, MOST_USERS, Ask, Watch

_EVERY = 0.5  # seconds between figures
_OVER = 5  # figures are rates over so many of them

ASK = tuple(field.name for field in dataclasses.fields(Ask))


def routes(pool: Pool) -> list[BaseRoute]:
    """The routes, for an application whose `state.service` serves the same pool."""
    live = Live(pool)
    return [
        Route("/", live.page),
        Route("/live/state", live.state),
        Route("/live/runs", live.run, methods=["POST"]),
        Route("/live/load", live.load, methods=["PUT", "DELETE"]),
        Route("/live/metrics", live.metrics),
    ]


class Live:
    """The handlers."""

    def __init__(self, pool: Pool):
        self.pool, self.watch = pool, Watch(pool)
        self.background = Background(pool, self._prompts)

    def _prompts(self) -> list[list[int]]:
        found = [one.ids for questions in self.watch.questions.values() for one in questions]
        return found or [self.pool.prompt([{"role": "user", "content": "Hello."}])]

    async def page(self, request: HttpRequest) -> Response:
        """The page."""
        del request
        headers = {
            "Content-Security-Policy": f"{document.policy()}; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",
        }
        return HTMLResponse(await run_in_threadpool(document.document), headers=headers)

    async def state(self, request: HttpRequest) -> Response:
        """What there is to choose from."""
        del request
        return JSONResponse(await run_in_threadpool(self.watch.state))

    async def run(self, request: HttpRequest) -> Response:
        """The events of `serve.rounds` of one request, as they come; it is cancelled when the client goes away."""
        service: Service = request.app.state.service
        ask = asked(await read_body(request, service.limits), self.pool)
        if self.watch.ready(ask):  # what is refused then has a status of its own
            return Stream(self._follow(await self._submit(ask)), service)
        await run_in_threadpool(self.watch.ids, ask)
        return Stream(self._prepare(ask), service)

    async def _submit(self, ask: Ask) -> Request:
        return await run_in_threadpool(self.watch.submit, ask)

    async def _prepare(self, ask: Ask) -> AsyncGenerator[dict[str, Any], None]:
        """Events of a request that has to wait until its engine is compiled."""
        how = "" if ask.greedy else ", with sampling"
        yield {"preparing": f"Compiling {ask.model} with the scheduler {ask.scheduler}{how}; this happens once"}
        async with contextlib.aclosing(self._follow(await self._submit(ask))) as events:
            async for one in events:
                yield one

    async def _follow(self, request: Request) -> AsyncGenerator[dict[str, Any], None]:
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[dict[str, Any]]()

        def read() -> None:
            for one in self.watch.events(request):
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads
                    loop.call_soon_threadsafe(queue.put_nowait, one)

        threading.Thread(target=read, name="watched request", daemon=True).start()
        try:
            while True:
                one = await queue.get()
                yield one
                if "done" in one:
                    return
        finally:
            request.cancel()

    async def load(self, request: HttpRequest) -> Response:
        """PUT {users, model, scheduler}: so many background users, for half a minute; DELETE: none."""
        if request.method == "DELETE":
            await run_in_threadpool(self.background.stop)
            return JSONResponse({"users": 0})
        service: Service = request.app.state.service
        fields = Fields(await read_body(request, service.limits), ("users", "model", "scheduler"), {})
        users = fields.needed("users", _users)
        ask = Ask(*_engine(fields, self.pool))

        def use() -> None:
            self.background.set(users, self.watch.engine(ask) if users else None)

        await run_in_threadpool(use)
        return JSONResponse({"users": users})

    async def metrics(self, request: HttpRequest) -> Response:
        """Figures of all engines, twice a second."""
        service: Service = request.app.state.service
        return Stream(self._figures(service), service)

    async def _figures(self, service: Service) -> AsyncGenerator[dict[str, Any], None]:
        samples: collections.deque[tuple[float, dict[Any, _Totals]]] = collections.deque(maxlen=_OVER)
        while not service.draining:
            now = {key: _Totals.of(engine.metrics) for key, engine in self.pool.engines.items()}
            samples.append((time.monotonic(), now))
            yield self._figure(samples)
            await asyncio.sleep(_EVERY)

    def _figure(self, samples: "collections.deque[tuple[float, dict[Any, _Totals]]]") -> dict[str, Any]:
        (then, before), (now, totals) = samples[0], samples[-1]
        engines, changes = [], []
        for key, engine in self.pool.engines.items():
            if key in totals:
                change = totals[key] - before.get(key, totals[key])
                changes.append(change)
                there = {"running": engine.running, "slots": engine.slots, "queue": engine.waiting}
                engines.append({"model": key[0], "scheduler": key[1]} | there | change.rates(now - then))
        together = sum(changes, _Totals()).rates(now - then)
        busy = [one for one in engines if one["running"] or one["queue"]]
        return {
            "users": self.background.count,
            "running": sum(one["running"] for one in engines),
            "slots": sum(one["slots"] for one in busy) or self.pool.sizes.slots,
            "queue": sum(one["queue"] for one in engines),
            "engines": engines,
        } | together


@dataclasses.dataclass(frozen=True)
class _Totals:
    """Counters of an engine, or what they have grown by; `shares` counts a round once for every request in it."""

    tokens: int = 0
    shares: int = 0
    emitted: int = 0
    admitted: int = 0

    @classmethod
    def of(cls, metrics: EngineMetrics) -> "_Totals":
        return cls(metrics.tokens, metrics.shares, metrics.emitted, metrics.admitted)

    def __sub__(self, other: "_Totals") -> "_Totals":
        return _Totals(*(a - b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __add__(self, other: "_Totals") -> "_Totals":
        return _Totals(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def rates(self, seconds: float) -> dict[str, float | None]:
        """What the page shows; None where no round was decoded. The budget counts the anchor, too."""
        return {
            "tokens_per_second": self.tokens / seconds if seconds > 0 else 0.0,
            "accepted_length": self.emitted / self.shares if self.shares else None,
            "budget": 1 + self.admitted / self.shares if self.shares else None,
        }


def asked(body: dict[str, Any], pool: Pool) -> Ask:
    """What a body for /live/runs asks for.

    Raises:
      ApiError: a field is unknown, missing, of the wrong type or out of range.
    """
    fields = Fields(body, ASK, {})
    prompt, domain = fields.read("prompt", _text), fields.read("domain", _text, "")
    if (prompt is None) == (not domain):
        message = "give prompt, a text, or domain and index of a held-out prompt, and not both"
        raise ApiError(400, message, param="prompt", code="invalid_value")
    model, scheduler = _engine(fields, pool)
    ask = Ask(
        model,
        scheduler,
        prompt,
        domain,
        fields.read("index", lambda name, value: arguments.integer(name, value, 0), 0),
        fields.read("temperature", arguments.real, 0.0),
        fields.read("seed", lambda name, value: arguments.integer(name, value, 0), 0),
        fields.read("max_tokens", _tokens, 96),
    )
    fields.read("temperature", lambda name, value: request_sampling(1, temperature=ask.temperature))
    return ask


def _engine(fields: Fields, pool: Pool) -> tuple[str, str]:
    model = check_model(pool, fields.body.get("model") or pool.default)
    if not pool.models(model).drafts:
        return model, "fixed"
    return model, fields.read("scheduler", _scheduler, pool.sizes.scheduler)


def _scheduler(name: str, value: Any) -> str:
    find(SCHEDULERS, _text(name, value), name)
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is a JSON {type(value).__name__}; give a text")
    return value


def _users(name: str, value: Any) -> int:
    users = arguments.integer(name, value, 0)
    if users > MOST_USERS:
        raise InputError(f"{name}={users}: at most {MOST_USERS} background users are possible")
    return users


def _tokens(name: str, value: Any) -> int:
    tokens = arguments.integer(name, value, 1)
    if tokens > MOST_TOKENS:
        raise InputError(f"{name}={tokens}: at most {MOST_TOKENS} tokens can be watched")
    return tokens


class Stream(Response):
    """Server-sent events until there are no more or the client goes away; then the iterator is closed."""

    def __init__(self, events: AsyncGenerator[dict[str, Any], None], service: Service):
        self.events, self.seconds = events, service.limits.send_seconds
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends them."""
        del scope
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        headers.append((b"x-accel-buffering", b"no"))  # or a proxy collects them
        sending = asyncio.ensure_future(self._send(send, headers))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in (sending, gone):
                one.cancel()
            with contextlib.suppress(asyncio.CancelledError, TimeoutError):  # a client that takes nothing
                await sending

    async def _send(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        async def give(body: str, more: bool = True) -> None:
            async with asyncio.timeout(self.seconds):
                await send({"type": "http.response.body", "body": body.encode(), "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with contextlib.aclosing(self.events) as events:
            try:
                async for one in events:
                    await give(event(one))
            except HANDLED as error:  # too late for a status
                await give(event({"error": api_error(error).message}))
        await give("", False)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
