"""A small server with OpenAI's API for tests: completions, chat, what vLLM and llama.cpp add, and faults on demand."""

import collections
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dspark_jax.data import chat

Answer = Callable[[Sequence[int], dict[str, Any]], Sequence[int]]
"""(prompt ids, the request) -> answer ids, a stop token included."""


@dataclasses.dataclass
class Behaviour:
    """How a server behaves; may be changed while it runs.

    Attributes:
      answer: see there.
      kind: vllm, llamacpp or plain; the last one gives text only, and does not say what it read.
      model: its name.
      room: what it says of its context; 0 says nothing.
      key: must come with every request, if there is one.
      fault: number of a request for an answer, counted from 0 -> what goes wrong with it, or "".
      template: of the server; that of the tokenizer if it is empty.
      finish: number of a request, the request -> its finish reason if it is neither stop nor length.
      more: further fields of a message of the assistant.
      refusal_seconds: that pass before a status that is not 200 is sent.
    """

    answer: Answer
    kind: str = "vllm"
    model: str = "tiny"
    room: int = 0
    key: str = ""
    fault: Callable[[int], str] = lambda number: ""
    template: str = ""
    finish: Callable[[int, dict[str, Any]], str] = lambda number, body: ""
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    refusal_seconds: float = 0.0


class OpenAIServer:
    """The server, in a thread.

    Attributes:
      url: ends in /v1.
      requests: what it was asked for answers, in order.
      answered: (prompt, seed) of what it has answered -> how often.
      now: requests that are being answered.
      most: most of them at a time.
      together: of each request, how many there were when it came.
    """

    def __init__(self, tokenizer: Any, behaviour: Behaviour):
        self.tokenizer, self.behaviour = tokenizer, behaviour
        self.requests: list[dict[str, Any]] = []
        self.answered: collections.Counter[tuple[str, int]] = collections.Counter()
        self.most = self.now = 0
        self.together: list[int] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.serve(self)

            def do_POST(self) -> None:
                outer.serve(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """Says nothing: the client has gone."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        """Ends it, hanging requests too."""
        self._over.set()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Answers one request."""
        length = int(handler.headers.get("Content-Length") or 0)
        body = json.loads(handler.rfile.read(length)) if length else {}
        behaviour, path = self.behaviour, handler.path.removeprefix("/v1")
        if behaviour.key and handler.headers.get("Authorization") != f"Bearer {behaviour.key}":
            return _send(handler, 401, {"error": {"message": "wrong key"}})
        if path == "/models":
            about = {"id": behaviour.model, "owned_by": behaviour.kind}
            if behaviour.room:
                about |= {"meta": {"n_ctx": behaviour.room}, "max_model_len": behaviour.room}
            return _send(handler, 200, {"object": "list", "data": [about]})
        if path == "/apply-template":
            return _send(handler, 200, {"prompt": self._render(body)})
        if path not in ("/completions", "/chat/completions", "/completion"):
            return _send(handler, 404, {"error": {"message": "no such page"}})
        with self._lock:
            number = len(self.requests)
            self.requests.append(body | {"path": path})
            self.now += 1
            self.most = max(self.most, self.now)
            self.together.append(self.now)
        try:
            if not self._fail(handler, behaviour.fault(number)):
                self._complete(handler, path, body, behaviour.finish(number, body))
        finally:
            with self._lock:
                self.now -= 1

    def _fail(self, handler: BaseHTTPRequestHandler, fault: str) -> bool:
        if fault == "hang":
            self._over.wait(30)
            handler.close_connection = True
        elif fault == "drop":
            handler.close_connection = True
        elif fault == "truncated":
            _send(handler, 200, {"choices": [{"text": "the answer"}]}, claimed=1000)
            handler.close_connection = True
        elif fault == "html":
            _send(handler, 200, "<html>busy</html>")
        elif fault == "empty":
            _send(handler, 200, {"choices": []})
        elif fault:
            status, _, after = fault.partition(":")
            self._over.wait(self.behaviour.refusal_seconds)
            _send(handler, int(status), {"error": {"message": "on demand"}}, retry_after=after)
        return bool(fault)

    def _render(self, body: dict[str, Any]) -> str:
        given = body.get("chat_template_kwargs", {})
        return self.tokenizer.apply_chat_template(
            body["messages"],
            tokenize=False,
            add_generation_prompt=True,
            chat_template=self.behaviour.template or None,
            tools=body.get("tools"),
            **given,
        )

    def _complete(self, handler: BaseHTTPRequestHandler, path: str, body: dict[str, Any], finish: str) -> None:
        chatting, behaviour = path == "/chat/completions", self.behaviour
        prompt = chat.encode(self.tokenizer, self._render(body))["input_ids"] if chatting else body["prompt"]
        room = body.get("n_predict", body["max_tokens"])
        ids = list(behaviour.answer(prompt, body))[:room]
        stopped = bool(ids) and ids[-1] in body["stop_token_ids"]
        shown = ids[:-1] if stopped else ids
        text = self.tokenizer.decode(shown, skip_special_tokens=not body["skip_special_tokens"])
        with self._lock:
            self.answered[json.dumps(prompt), body["seed"]] += 1
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        if path == "/completion":
            ending = "eos" if stopped else "limit"
            known = {"content": text, "tokens": ids, "stop_type": ending, "tokens_evaluated": len(prompt)}
            return _send(handler, 200, known)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish or ("stop" if stopped else "length")}
        choice |= {"message": {"role": "assistant", "content": text} | behaviour.more} if chatting else {"text": text}
        if behaviour.kind == "vllm":
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        return _send(handler, 200, {"choices": [choice]} | ({"usage": usage} if behaviour.kind != "plain" else {}))


def _send(
    handler: BaseHTTPRequestHandler, status: int, content: Any, *, claimed: int = 0, retry_after: str = ""
) -> None:
    data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "text/html" if isinstance(content, str) else "application/json")
    handler.send_header("Content-Length", str(claimed or len(data)))
    if retry_after:
        handler.send_header("Retry-After", retry_after)
    handler.end_headers()
    handler.wfile.write(data)


def by_seed(stop: int, seconds: float = 0.0) -> Answer:
    """Answers that a seed decides: digits, whose text has one tokenisation, and the id `stop` at their end."""

    def answer(prompt: Sequence[int], body: dict[str, Any]) -> list[int]:
        time.sleep(seconds)
        length = 4 + (len(prompt) + body["seed"]) % 23
        return [*(15 + (body["seed"] + i * i) % 10 for i in range(length)), stop]

    return answer
