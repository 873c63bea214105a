"""The web application: routes, who may use them, limits, and errors in OpenAI's shape."""

import hmac
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dspark_jax.engine.serving import EngineClosed
from dspark_jax.serve import chat, completions, live, schema
from dspark_jax.serve.errors import HANDLED, ApiError, api_error
from dspark_jax.serve.pool import Pool
from dspark_jax.serve.service import Limits, Service

OPEN = ("/", "/health")
"""Paths that need no key: nothing about prompts or models is there."""


def make_app(pool: Pool, *, limits: Limits | None = None, api_key: str = "") -> Starlette:
    """The application that serves a pool; its service is `app.state.service`.

    Args:
      pool: of models; is neither opened nor closed here.
      limits: of requests; the usual ones if None.
      api_key: that every request but those for `OPEN` must carry; "" is none.
    """
    service = Service(pool, limits or Limits())
    routes: list[BaseRoute] = [
        Route("/health", health),
        Route("/metrics", metrics),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", completions.answer, methods=["POST"]),
        Route("/v1/chat/completions", chat.answer, methods=["POST"]),
        *live.routes(pool),
    ]
    handlers: dict[Any, Any] = {kind: _refuse for kind in (*HANDLED, HTTPException)}
    handlers[Exception] = _crashed
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=service.lifespan)
    app.state.service = service
    app.add_middleware(Gate, service=service, api_key=api_key)
    return app


async def health(request: Request) -> Response:
    """Whether requests are taken."""
    service: Service = request.app.state.service
    if service.draining:
        raise ApiError(503, "the server is shutting down", code="shutting_down")
    failed = [name for (name, _), engine in service.pool.engines.items() if engine.failed]
    if failed:
        raise ApiError(503, f"the engine of {failed[0]} has stopped; start the server again", code="engine_failed")
    return JSONResponse({"status": "ok", "device": service.pool.device, "models": list(service.pool.names)})


async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    service: Service = request.app.state.service
    text = service.metrics.text(draining=service.draining, in_flight=service.in_flight)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def models(request: Request) -> Response:
    """Every model."""
    service: Service = request.app.state.service
    return JSONResponse({"object": "list", "data": [_described(service, name) for name in service.pool.names]})


async def model(request: Request) -> Response:
    """One of them."""
    service: Service = request.app.state.service
    name = request.path_params["name"]
    schema.check_model(service.pool, name)
    return JSONResponse(_described(service, name))


def _described(service: Service, name: str) -> dict[str, Any]:
    member = service.pool.member(name)
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "dspark_jax",
        "max_model_len": service.pool.sizes.capacity,
        "kind": member.kind,
        "block_size": member.models.block_size,
        "step": member.step,
    }


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        known = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
        message = known.get(error.status_code, error.detail)
        return ApiError(error.status_code, message, headers=error.headers).response()
    return api_error(error).response()


async def _crashed(request: Request, error: Exception) -> Response:
    del request, error  # the server logs it
    return ApiError(500, "the server has made a mistake, which is in its log", code="internal_error").response()


class Gate:
    """Goes before the application: keys, limits of bodies, and the end of the server."""

    def __init__(self, app: ASGIApp, service: Service, api_key: str):
        self.app, self.service, self.key = app, service, api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        works = scope["method"] not in ("GET", "HEAD", "OPTIONS")

        async def counting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.service.metrics.responses[_known(scope["path"]), message["status"]] += 1
            await send(message)

        self.service.in_flight += works
        try:
            await self._pass(scope, receive, counting, works=works)
        finally:
            self.service.in_flight -= works

    async def _pass(self, scope: Scope, receive: Receive, send: Send, *, works: bool) -> None:
        try:
            self._check_key(scope)
            if works and self.service.draining:
                raise EngineClosed
        except HANDLED as error:
            await api_error(error).response()(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_key(self, scope: Scope) -> None:
        if not self.key or scope["path"] in OPEN:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        kind, _, key = given.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.key):
            what = "the API key is wrong" if given else "an API key is needed"
            message = f"{what}; send the server's --api_key as Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _known(path: str) -> str:
    """A path as a label: those that anybody may make up are one."""
    first = path.split("/")[1] if path.startswith("/") else ""
    if path in ("/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"):
        return path
    return "/v1/models/" if path.startswith("/v1/models/") else "/live/" if first == "live" else "other"
