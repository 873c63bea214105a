"""The process side of serving: sockets, slow clients, signals, and the end."""

import asyncio
import contextlib
import functools
import json
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from dspark_jax.errors import InputError
from dspark_jax.progress import log
from dspark_jax.serve.app import make_app
from dspark_jax.serve.errors import ApiError
from dspark_jax.serve.pool import Pool
from dspark_jax.serve.service import Limits, Service

_LEAVING = 2
"""Seconds for responses that tell clients that the server closes."""


class Protocol(H11Protocol):
    """HTTP with times within which the head of a request must be here, and a client take what it is sent.

    Errors are JSON. A client that takes nothing is cut off; its requests then end like those of one that went away.
    """

    def __init__(self, *arguments: Any, header_seconds: float, send_seconds: float, **options: Any):
        super().__init__(*arguments, **options)
        self._seconds, self._send_seconds = header_seconds, send_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Time runs from the connection on."""
        super().connection_made(transport)
        self._timer = self.loop.call_later(self._seconds, self._late)

    def data_received(self, data: bytes) -> None:
        """And from the first byte of every further request."""
        super().data_received(data)
        waiting = self.conn.their_state is h11.IDLE
        if self._timer is not None and not waiting:
            self._timer.cancel()
            self._timer = None
        elif self._timer is None and waiting and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._seconds, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._unstick()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client has to take something now, or is cut off."""
        super().pause_writing()
        self._stuck = self.loop.call_later(self._send_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It has."""
        self._unstick()
        super().resume_writing()

    def _unstick(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _late(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self._end(ApiError(408, f"the request was not here after {self._seconds:g} seconds; send it faster"))

    def send_400_response(self, msg: str) -> None:
        """For what is no HTTP."""
        self._end(ApiError(400, msg))

    def _end(self, error: ApiError) -> None:
        body = json.dumps(error.body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        reason = {400: b"Bad Request", 408: b"Request Timeout"}[error.status]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class Server(uvicorn.Server):
    """A server that drains at the first signal and closes at the second one, or when the time is over.

    Attributes:
      signals: that have come, in their order.
    """

    def __init__(self, service: Service, app: Any, drain_seconds: float):
        limits = service.limits
        times = {"header_seconds": limits.header_seconds, "send_seconds": limits.send_seconds}
        config = uvicorn.Config(
            app,
            http=functools.partial(Protocol, **times),  # pyright: ignore[reportArgumentType]  (called, as a class is)
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_LEAVING,
        )
        super().__init__(config)
        self.service, self.drain_seconds = service, drain_seconds
        self.signals: list[int] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._again: asyncio.Event | None = None
        self._leaving: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Within it, SIGTERM and Ctrl-C end the server; in another than the main thread nobody sends any."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, wanted = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in wanted}
        for number in wanted:
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)

    def leave_soon(self, *, at_once: bool = False) -> None:
        """`leave` from any thread, while the server runs."""
        assert self._loop is not None, "the server has not started"
        self._loop.call_soon_threadsafe(functools.partial(self.leave, at_once=at_once))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Also notes the loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def _stop(self, number: int) -> None:
        self.signals.append(number)
        self.leave(at_once=len(self.signals) > 1)

    def leave(self, *, at_once: bool = False) -> None:
        """Begins to drain; the second time, or `at_once`, closes. In the loop's thread."""
        if self._again is None:
            self._again = asyncio.Event()
            self._leaving = asyncio.ensure_future(self._leave(self._again))
        if at_once:
            self._again.set()

    async def _leave(self, again: asyncio.Event) -> None:
        service = self.service
        log(
            f"serve: draining: {service.in_flight} requests are finished within {self.drain_seconds:g} seconds, no "
            "more are taken; a second signal closes"
        )
        draining = asyncio.ensure_future(service.drain(self.drain_seconds))
        second = asyncio.ensure_future(again.wait())
        await asyncio.wait({draining, second}, return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if service.in_flight:
            log(f"serve: closing: {service.in_flight} requests are cut off")
        draining.cancel()
        await asyncio.to_thread(service.pool.close)
        await service.drain(_LEAVING)
        self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address; port 0 is any that is free.

    Raises:
      InputError: the address cannot be used.
    """
    if not 0 <= port < 1 << 16:
        raise InputError(f"--port {port} is no port; use 1 to 65535, or 0 for any that is free")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        why = error.strerror or str(error)
        raise InputError(f"--host {host} --port {port}: {why}; use another address") from None
    return found


def address(found: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = found.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in ("localhost", "::1") or host.startswith("127.")


@contextlib.contextmanager
def running(
    pool: Pool, *, port: int = 0, limits: Limits | None = None, api_key: str = "", drain_seconds: float = 30.0
) -> Iterator[tuple[str, Server]]:
    """Serves a pool on the loopback address in a thread of this process, as long as the block lasts; then drains.

    Args:
      pool: of models; it is closed at the end.
      port: 0 is any that is free.
      limits: of requests; the usual ones if None.
      api_key: as in `make_app`.
      drain_seconds: for what is running at the end.

    Returns:
      Its URL, and the server.
    """
    place = bind("127.0.0.1", port)
    app = make_app(pool, limits=limits, api_key=api_key)
    server = Server(app.state.service, app, drain_seconds)
    thread = threading.Thread(target=lambda: server.run(sockets=[place]), name="server", daemon=True)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            thread.join(0.01)
        yield address(place), server
    finally:
        if thread.is_alive():
            server.leave_soon()
        thread.join()
        pool.close()
