"""A pool with held-out prompts, and a client of the live routes, for several tests."""

import contextlib
import dataclasses
import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dspark_jax.config import EvalConfig
from dspark_jax.serve.pool import Pool

PROMPTS = {"math": ["one and one", "the sum of two"], "code": ["write a sum"]}


def with_prompts(pool: Pool, folder: Path) -> Pool:
    """The pool with `PROMPTS` as its held-out prompts, in files of this folder."""
    files = []
    for domain, texts in PROMPTS.items():
        files.append(folder / f"{domain}.heldout.jsonl")
        files[-1].write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    pool.config = dataclasses.replace(pool.config, eval=EvalConfig(prompts=tuple(map(str, files))))
    return pool


@dataclasses.dataclass(frozen=True)
class Client:
    """Asks a server."""

    url: str
    headers: dict[str, str] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def asking(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        """A response, and the connection as long as the block lasts."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=60)
        headers = self.headers | ({} if body is None else {"Content-Type": "application/json"})
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        try:
            yield connection.getresponse()
        finally:
            connection.close()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, JSON)."""
        with self.asking(method, path, body) as response:
            return response.status, json.loads(response.read())

    def run(self, body: Any) -> list[dict[str, Any]]:
        """All events of a run."""
        with self.asking("POST", "/live/runs", body) as response:
            assert response.status == 200, response.read()
            assert response.getheader("content-type", "").startswith("text/event-stream")
            return [*events(response)]


def events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream, as they come."""
    for line in response:
        if line.strip():
            yield json.loads(line.decode().removeprefix("data: "))


Make = Callable[..., Pool]
