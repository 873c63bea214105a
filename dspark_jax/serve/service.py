"""What all handlers share: the pool, the limits, figures, and the bridge from engines' threads to the event loop."""

import asyncio
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

from dspark_jax.serve.metrics import Metrics
from dspark_jax.serve.pool import Pool


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may take.

    Attributes:
      body: bytes.
      prompt: tokens; 0 is what the engine's capacity leaves.
      tokens: of an answer; 0 is what the engine's capacity leaves.
      choices: answers of one request, those to several prompts together.
      stops: stop strings.
      stop_length: characters of a stop string.
      header_seconds: until the head of a request is here.
      body_seconds: until its body is.
      send_seconds: until a client has taken what it was sent.
    """

    body: int = 1 << 20
    prompt: int = 0
    tokens: int = 0
    choices: int = 64
    stops: int = 16
    stop_length: int = 256
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 60.0


class Waker:
    """Sets events of a loop from other threads, with one wake-up of the loop for all that have come meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._lock = loop, threading.Lock()
        self._due: set[asyncio.Event] = set()

    def set(self, event: asyncio.Event) -> None:
        """Sets an event soon; from any thread. Nothing happens if the loop is closed: nobody waits in it."""
        with self._lock:
            first = not self._due
            self._due.add(event)
        if first:
            try:
                self._loop.call_soon_threadsafe(self._run)
            except RuntimeError:
                if not self._loop.is_closed():
                    raise

    def _run(self) -> None:
        with self._lock:
            due, self._due = self._due, set()
        for event in due:
            event.set()


class Service:
    """The state of a server.

    Attributes:
      pool: of models.
      limits: of requests.
      metrics: what was served, and how fast.
      in_flight: requests that make the models work and whose response is not complete.
      started: seconds since the epoch.
    """

    def __init__(self, pool: Pool, limits: Limits):
        self.pool, self.limits, self.metrics = pool, limits, Metrics(pool)
        self.in_flight = 0
        self.started = int(time.time())
        self._waker: Waker | None = None

    @property
    def waker(self) -> Waker:
        """Of the loop in which the application runs."""
        assert self._waker is not None, "the application has not started"
        return self._waker

    @property
    def draining(self) -> bool:
        """Whether no more requests are taken."""
        return self.pool.draining

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Any) -> AsyncIterator[None]:
        """Runs beside the application."""
        del app
        self._waker = Waker(asyncio.get_running_loop())
        sampling = asyncio.create_task(self.metrics.sample())
        try:
            yield
        finally:
            sampling.cancel()

    async def drain(self, seconds: float) -> bool:
        """Takes no more requests and waits until all responses have been sent; False if some were not."""
        self.pool.draining = True
        end = time.monotonic() + seconds
        while self.in_flight and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self.in_flight
