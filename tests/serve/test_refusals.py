"""What cannot be served is refused in OpenAI's shape: a 4xx with a message that says what, where, and what to do."""

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

from dspark_jax.engine.serving import Engine
from dspark_jax.serve.app import make_app
from dspark_jax.serve.pool import Pool
from tests.serve.conftest import LIMITS, Served

HELLO: list[Any] = [{"role": "user", "content": "hello"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TOOL = {"type": "function", "function": {"name": "add"}}

WRONG: list[tuple[str, dict[str, Any], str | None, str]] = [
    (TEXT, {"prompt": None}, "prompt", "prompt is missing"),
    (TEXT, {"prompt": ""}, "prompt", "the prompt is empty"),
    (TEXT, {"prompt": []}, "prompt", "neither a text nor a list"),
    (TEXT, {"prompt": 5}, "prompt", "neither a text nor a list"),
    (TEXT, {"prompt": [1, "a"]}, "prompt", "mixes kinds"),
    (TEXT, {"prompt": [True]}, "prompt", "mixes kinds"),
    (TEXT, {"prompt": [1, 320]}, "prompt", "outside the vocabulary 0..319"),
    (TEXT, {"prompt": [1] * 192}, "prompt", "prompt has 192 tokens; at most 191"),
    (TEXT, {"prompt": "\ud800"}, "prompt", "lone surrogate"),
    (TEXT, {"prompt": ["a"] * 6}, "prompt", "asks for 6 answers at a time; at most 5"),
    (TEXT, {"max_tokens": 0}, "max_tokens", "use 1 or more"),
    (TEXT, {"max_tokens": 2.5}, "max_tokens", "an integer is needed"),
    (TEXT, {"max_tokens": 151}, "max_tokens", "at most 150 are possible"),
    (TEXT, {"max_completion_tokens": 5}, "max_completion_tokens", "did you mean max_tokens?"),
    (TEXT, {"logprobs": 0}, "logprobs", "no log probabilities"),
    (TEXT, {"best_of": 2}, "best_of", "use n"),
    (TEXT, {"echo": True}, "echo", "not repeated"),
    (TEXT, {"suffix": "b"}, "suffix", "in between"),
    (TEXT, {"temperature": "hot"}, "temperature", "a number is needed"),
    (TEXT, {"temperature": -1}, "temperature", "out of range"),
    (TEXT, {"top_p": 7.0}, "top_p", "out of range"),
    (TEXT, {"top_k": -1}, "top_k", "out of range"),
    (TEXT, {"min_p": 2}, "min_p", "out of range"),
    (TEXT, {"seed": -1}, "seed", "out of range"),
    (TEXT, {"seed": 1 << 31}, "seed", "out of range"),
    (TEXT, {"n": 0}, "n", "use 1 or more"),
    (TEXT, {"n": 6}, "n", "at most 5"),
    (TEXT, {"stop": ""}, "stop", "none of them empty"),
    (TEXT, {"stop": ["a"] * 17}, "stop", "16 texts of 256 characters"),
    (TEXT, {"stop": ["\udc00"]}, "stop", "lone surrogate"),
    (TEXT, {"stop_token_ids": [320]}, "stop_token_ids", "outside the vocabulary"),
    (TEXT, {"stop_token_ids": [1] * 9}, "stop_token_ids", "at most 8"),
    (TEXT, {"stream": 1}, "stream", "neither true nor false"),
    (TEXT, {"stream_options": {"include_usage": True}}, "stream_options", "set stream=true"),
    (TEXT, {"stream": True, "stream_options": {"usage": True}}, "stream_options", "use include_usage"),
    (TEXT, {"frequency_penalty": 0.5}, "frequency_penalty", "change the distribution"),
    (TEXT, {"presence_penalty": False}, "presence_penalty", "change the distribution"),
    (TEXT, {"logit_bias": {"5": 1}}, "logit_bias", "change the distribution"),
    (TEXT, {"user": 5}, "user", "is no text"),
    (TEXT, {"model": 5}, "model", "give a name"),
    (TEXT, {"temprature": 1}, "temprature", "did you mean temperature?"),
    (TEXT, {"messages": HELLO}, "messages", "no such parameter"),
    (CHAT, {"messages": []}, "messages", "no list of messages"),
    (CHAT, {"messages": "hi"}, "messages", "no list of messages"),
    (CHAT, {"messages": ["hi"]}, "messages", "messages[0]: a message must be an object"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages", "role 'robot' is unknown"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages", "not a string"),
    (CHAT, {"messages": [{"role": "user", "content": " "}]}, "messages", "is empty"),
    (CHAT, {"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages", "messages[0].colour"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "only text"),
    (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": "a"}]}, "messages", "not continued"),
    (CHAT, {"messages": [{"role": "system", "content": "a"}]}, "messages", "no user message"),
    (CHAT, {"messages": [{"role": "user", "content": "a" * 2000}]}, "messages", "tokens; at most 191"),
    (CHAT, {"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "two names of one limit"),
    (CHAT, {"max_completion_tokens": 151}, "max_completion_tokens", "at most 150 are possible"),
    (CHAT, {"logprobs": True}, "logprobs", "no log probabilities"),
    (CHAT, {"top_logprobs": 2}, "top_logprobs", "no log probabilities"),
    (CHAT, {"response_format": {"type": "json_object"}}, "response_format", "not constrained"),
    (CHAT, {"tools": [TOOL]}, "messages", "the chat template"),
    (CHAT, {"tools": {"name": "add"}}, "tools", "no list of tools"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools", "must be a list of"),
    (CHAT, {"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "use auto or none"),
    (CHAT, {"functions": [{"name": "add"}]}, "functions", "use tools"),
    (CHAT, {"reasoning_effort": "high"}, "reasoning_effort", "chat_template_kwargs"),
    (CHAT, {"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs", "enable_thinking"),
    (CHAT, {"chat_template_kwargs": {"enable_thinking": 1}}, "chat_template_kwargs", "neither true nor false"),
    (CHAT, {"prompt": "a"}, "prompt", "no such parameter"),
]


def check(found: tuple[int, dict[str, str], Any], status: int, param: str | None, message: str) -> None:
    error = found[2]["error"]
    assert (found[0], error["param"]) == (status, param), error
    assert message in error["message"] and "\n" not in error["message"], error
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_wrong_fields(served: Served) -> None:
    usual = {TEXT: {"prompt": "a"}, CHAT: {"messages": HELLO}}
    for path, change, param, message in WRONG:
        check(served.post(path, usual[path] | change), 400, param, message)
    assert served.pool.engine("tiny").metrics.submitted == 0


def test_fields_that_ask_for_nothing_are_taken(served: Served) -> None:
    nothing = {"frequency_penalty": 0, "logit_bias": {}, "logprobs": None, "user": "me", "metadata": {"a": "b"}}
    both = {"max_tokens": 1, "temperature": 0, "seed": None, "stop": None, "service_tier": "auto"} | nothing
    only = {"best_of": 1, "echo": False, "suffix": None}
    assert served.post(TEXT, {"prompt": "a"} | both | only)[0] == 200
    only = {"logprobs": False, "response_format": {"type": "text"}, "tools": [TOOL], "tool_choice": "none"}
    only |= {"chat_template_kwargs": {"enable_thinking": False}, "parallel_tool_calls": True, "n": 1}
    assert served.post(CHAT, {"messages": HELLO} | both | only)[0] == 200


def test_the_classes_of_the_openai_package(served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as found:
        served.client.chat.completions.create(model="nobody", messages=HELLO)
    assert (found.value.code, found.value.param) == ("model_not_found", "model")
    assert "use one of tiny, other, plain" in found.value.message
    with pytest.raises(openai.NotFoundError, match="there is no model 'x/y'"):
        served.client.models.retrieve("x/y")
    with pytest.raises(openai.BadRequestError, match="use 1 or more"):
        served.client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=0, stream=True)
    with pytest.raises(openai.NotFoundError, match="there is no /v1/embeddings"):
        served.client.embeddings.create(model="tiny", input="a")


MALFORMED: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b'{"prompt": "a"} x', "not valid JSON"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN is no JSON number"),
    (b'{"prompt": "a", "prompt": "b"}', "the field 'prompt' is there twice"),
    (b'{"prompt": "a", "n": ' + b"9" * 3900 + b"}", "out of range"),
    (b'{"prompt": "\xff"}', "not UTF-8: it has the byte 0xff at 12"),
    ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
    (b"[" * 3999, "nested too deeply"),
    (b'["prompt"]', "is a JSON list; send an object"),
    (b"null", "is a JSON NoneType; send an object"),
    (b'{"\\ud800": 1}', "no such parameter"),
]


def test_malformed_bodies(served: Served) -> None:
    for body, message in MALFORMED:
        found = served.post(TEXT, body)
        param = found[2]["error"]["param"]
        check(found, 400, param if message in ("out of range", "no such parameter") else None, message)
    check(served.post(TEXT, b"a" * 4001), 413, None, "more than 4000 bytes")
    check(served.post(TEXT, b"prompt=a", {"Content-Type": "text/plain"}), 415, None, "send JSON, as application/json")
    status, text = served.get(TEXT)
    assert status == 405 and "does not take GET" in json.loads(text)["error"]["message"]
    status, text = served.get("/nowhere")
    assert status == 404 and "there is no /nowhere" in json.loads(text)["error"]["message"]


def spoken(served: Served, *parts: bytes, pause: float = 0.0) -> bytes:
    """What a connection answers to bytes that are sent one by one."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as raw:
        try:
            for part in parts:
                raw.sendall(part)
                time.sleep(pause)
        except OSError:  # the server has had enough
            part = b""
        found = b""
        while part := raw.recv(65536):
            found += part
    return found


def test_slow_and_broken_clients(served: Served) -> None:
    """Head or body that do not come, chunks without end, and what is no HTTP."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    for parts in ((b"",), (b"POST /v1",), (head,), (head[:20], head[20:])):
        answer = spoken(served, *parts)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"the request was not here after 0.6 seconds" in answer
    answer = spoken(served, head + b"Content-Length: 50\r\n\r\n", b'{"prompt"')
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the body was not here after 0.6 seconds" in answer
    assert b"connection: close" in answer.lower()
    chunk = b"3e8\r\n" + b"a" * 1000 + b"\r\n"
    answer = spoken(served, head + b"Transfer-Encoding: chunked\r\n\r\n", chunk * 5 + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    answer = spoken(served, b"\x16\x03\x01 hello\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ") and b'"error"' in answer
    assert served.get("/health")[0] == 200


def test_a_client_that_reads_nothing_is_cut_off(served: Served) -> None:
    host, port = served.url.removeprefix("http://").split(":")
    connections = served.server.server_state.connections
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n" * 1500)
        end = time.monotonic() + 20
        while not any(one.flow.write_paused for one in connections):
            assert time.monotonic() < end
            time.sleep(0.01)
        while any(one.flow.write_paused for one in connections):
            assert time.monotonic() < end
            time.sleep(0.01)
        found = 0
        with contextlib.suppress(ConnectionResetError):
            while part := raw.recv(65536):
                found += part.count(b"HTTP/1.1 200")
        assert found < 1500


def called(app: Any, path: str, *headers: tuple[bytes, bytes], method: str = "GET") -> tuple[int, Any]:
    """(status, JSON) of an application without a server."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": list(headers), "http_version": "1.1", "scheme": "http", "server": ("a", 1), "root_path": ""}
    asyncio.run(app(scope, receive, send))
    body = b"".join(one.get("body", b"") for one in sent)
    return sent[0]["status"], json.loads(body) if body.startswith(b"{") else body.decode()


def test_a_key_is_asked_for(make_pool: Callable[..., Pool]) -> None:
    app = make_app(make_pool(), limits=LIMITS, api_key="secret")
    for headers in ([], [(b"authorization", b"Bearer other")], [(b"authorization", b"Basic secret")]):
        for path in ("/v1/models", "/metrics", "/v1/chat/completions", "/nowhere"):
            status, body = called(app, path, *headers)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            assert body["error"]["type"] == "authentication_error"
    assert called(app, "/v1/models", (b"authorization", b"Bearer secret"))[0] == 200
    assert called(app, "/health")[0] == 200


def test_a_failed_engine_and_a_mistake_are_told(make_pool: Callable[..., Pool], monkeypatch: Any) -> None:
    pool = make_pool()
    app = make_app(pool)
    with pytest.raises(ZeroDivisionError):  # it is raised again, for the log
        monkeypatch.setattr(Pool, "device", property(lambda _: 1 / 0))
        called(app, "/health")
    monkeypatch.undo()
    pool.engine("plain")._failure = ValueError("broken")
    status, body = called(app, "/health")
    assert (status, body["error"]["code"]) == (503, "engine_failed")
    pool.close()


def test_a_request_ends_with_the_engine(make_pool: Callable[..., Pool], monkeypatch: Any) -> None:
    """An unexpected error of the engine is a 500 to those who wait, and a 503 to those who come."""
    from dspark_jax.serve.server import running
    from tests.serve.conftest import client_of

    def fail(self: Engine) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Engine, "_admit", fail)
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with make_pool() as pool, running(pool) as (url, _):
        client = client_of(url)
        with pytest.raises(openai.InternalServerError, match="the device is gone") as first:
            client.completions.create(model="tiny", prompt="a")
        with pytest.raises(openai.InternalServerError, match="the device is gone") as second:
            client.completions.create(model="tiny", prompt="a")
        assert (first.value.status_code, second.value.status_code) == (500, 503)
        assert first.value.code == second.value.code == "engine_failed"
