"""`POST /v1/chat/completions`: the target answers a conversation, rendered by its chat template as `prepare` does it.

An answer is given as the target writes it: thoughts and calls of tools are in its text.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dspark_jax.serve import schema
from dspark_jax.serve.answers import EventStream, News, Nothing, submit, whole
from dspark_jax.serve.service import Service


async def answer(request: Request) -> Response:
    """Answers one request."""
    service: Service = request.app.state.service
    asked, chat = schema.chat(await schema.read_body(request, service.limits), service.pool, service.limits)

    def ids() -> Sequence[Sequence[int]]:
        return [service.pool.prompt(chat.messages, chat.tools, chat.thinking)]

    group = await submit(service, asked, ids, "messages", None)
    name = f"chatcmpl-{uuid.uuid4().hex}"
    about = {"id": name, "object": "chat.completion", "created": int(time.time()), "model": asked.model}
    if asked.stream:
        about["object"] = "chat.completion.chunk"
        unknown = {"usage": None} if asked.usage else {}

        def chunk(index: int, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            return {**about, "choices": [choice], **unknown}

        def events(news: News) -> Iterator[dict[str, Any]]:
            if news.text:
                yield chunk(news.index, {"content": news.text})
            if news.result is not None:
                yield chunk(news.index, {}, news.result.finish_reason)

        def closing() -> Sequence[dict[str, Any]]:
            return [{**about, "choices": [], "usage": group.usage()}] if asked.usage else []

        opening = [chunk(index, {"role": "assistant", "content": ""}) for index in range(asked.n)]
        return EventStream(group, events, opening, closing)
    found = await whole(group, request)
    if found is None:
        return Nothing()
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        for index, (text, reason) in enumerate(zip(*found, strict=True))
    ]
    return JSONResponse({**about, "choices": choices, "usage": group.usage()})
