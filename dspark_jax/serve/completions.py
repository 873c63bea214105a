"""`POST /v1/completions`: the target goes on with a text or token ids, without a chat template."""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from dspark_jax.engine.admission import prompt_ids
from dspark_jax.serve import schema
from dspark_jax.serve.answers import EventStream, News, Nothing, submit, whole
from dspark_jax.serve.service import Service

DEFAULT = 16
"""Tokens of an answer that names no limit, as at OpenAI."""


async def answer(request: Request) -> Response:
    """Answers one request."""
    service: Service = request.app.state.service
    pool = service.pool
    asked, prompts = schema.completion(await schema.read_body(request, service.limits), pool, service.limits)

    def ids() -> Sequence[Sequence[int]]:
        arch = pool.models(asked.model).arch
        return [prompt_ids(one, pool.tokenizer, arch).tolist() for one in prompts]

    group = await submit(service, asked, ids, "prompt", DEFAULT)
    about = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": asked.model,
    }

    def choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}

    if asked.stream:
        unknown = {"usage": None} if asked.usage else {}

        def events(news: News) -> Iterator[dict[str, Any]]:
            reason = None if news.result is None else news.result.finish_reason
            yield {**about, "choices": [choice(news.index, news.text, reason)], **unknown}

        def closing() -> Sequence[dict[str, Any]]:
            return [{**about, "choices": [], "usage": group.usage()}] if asked.usage else []

        return EventStream(group, events, closing=closing)
    found = await whole(group, request)
    if found is None:
        return Nothing()
    choices = [choice(index, text, reason) for index, (text, reason) in enumerate(zip(*found, strict=True))]
    return JSONResponse({**about, "choices": choices, "usage": group.usage()})
