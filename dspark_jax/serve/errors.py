"""Errors as OpenAI's clients know them: a status, and a JSON object that says what, where and what to do."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from dspark_jax.engine.serving import EngineClosed, EngineFailed, QueueFull
from dspark_jax.errors import InputError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a request is refused with.

    Attributes:
      status: of HTTP.
      message: one line: what, where, the value, the remedy.
      param: the field that is wrong; None where it is none.
      code: a word for programs, e.g. `model_not_found`.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The response; in ASCII, since what was wrong may be no Unicode."""
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")


def api_error(error: Exception, param: str | None = None) -> ApiError:
    """What an error of the engine or of bad input is to a client; `param` names the field where it does not."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        message = str(error).split(";")[0] + "; send it again later"
        return ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, EngineClosed):
        return ApiError(
            503,
            "the server is shutting down and takes no more requests; send it to another one, or again later",
            code="shutting_down",
            headers={"Retry-After": "5", "Connection": "close"},
        )
    if isinstance(error, EngineFailed):
        return ApiError(503, f"{error}; the server has to be started again", code="engine_failed")
    if isinstance(error, InputError):
        return ApiError(400, str(error), param=param, code="invalid_value")
    raise error


HANDLED = (ApiError, QueueFull, EngineClosed, EngineFailed, InputError)
"""What `api_error` knows."""
