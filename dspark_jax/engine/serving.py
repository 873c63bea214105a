"""Serving: requests come and go while the others decode (continuous batching).

An `Engine` has a fixed number of slots and a queue. Between two decoding rounds of all slots, a few chunks of waiting
prompts are read: not more, so that long prompts do not stall the others. The host is always one launch behind the
device: it launches a step and then reads what the step before has committed. A request that turns out to have ended
does nothing in the round that was launched meanwhile, so the tokens are those of `generate`.

    with Engine(Models(target, drafter), slots=8, capacity=1024, tokenizer=tokenizer) as engine:
        for piece in engine.submit("Once upon a time", max_new_tokens=100):
            print(piece.text, end="", flush=True)
"""

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
from jax.sharding import Mesh

from dspark_jax.config import InputError
from dspark_jax.engine import schedulers
from dspark_jax.engine.admission import check_engine, check_fits, prompt_ids, request_settings
from dspark_jax.engine.arguments import boolean, check_models, seconds
from dspark_jax.engine.batch import Batch, Sizes
from dspark_jax.engine.models import Models
from dspark_jax.engine.request import EngineMetrics, Request, TextStream
from dspark_jax.engine.schedulers import Scheduler, check_scheduler
from dspark_jax.engine.slots import Mode
from dspark_jax.sharding import mesh_of
from dspark_jax.tokenizer import Tokenizer


class QueueFull(RuntimeError):
    """The queue has no room; try again later, or submit with `block=True`."""


class EngineClosed(RuntimeError):
    """The engine takes no more requests."""


class EngineFailed(RuntimeError):
    """The engine stopped on an unexpected error, which is this one's cause."""


class Engine:
    """Decodes requests as they come, in a fixed number of slots.

    Either `start()` it (or use it in a `with` statement): a thread of its own then drives it. Or drive it with
    `step()`; waiting for a request does so as well. A step is not broken off, so that a time to wait is then looked at
    between steps, the first of which also compile. All methods may be called from any thread.

    On a mesh over several hosts, each has an engine and drives it with `step()`, and all are given the same requests
    and cancellations between the same steps: hosts launch the same programs, or wait for each other for ever.
    """

    def __init__(
        self,
        models: Models,
        *,
        slots: int = 8,
        capacity: int = 1024,
        scheduler: Scheduler | None = None,
        tokenizer: Tokenizer | None = None,
        stop_tokens: Sequence[int] = (),
        max_queue: int = 64,
        prefill_chunk: int = 64,
        prefill_chunks: int | None = None,
        max_stop_tokens: int = 8,
        verify_sizes: Sequence[int] | None = None,
    ):
        """Allocates the slots; compiles nothing (see `warm_up`).

        Args:
          models: the target and what drafts for it; they decode on the mesh on which they lie.
          slots: requests decoded together; on a mesh, the batch axis.
          capacity: most tokens of a request, prompt and answer together.
          scheduler: decides how many drafts are verified; None verifies all.
          tokenizer: for text prompts, text output and stop strings; None serves token ids only.
          stop_tokens: ids that end every request, besides its own.
          max_queue: requests that may wait for a slot.
          prefill_chunk: tokens of a prompt that are read at once.
          prefill_chunks: how many such chunks are read between two rounds at most (by each copy of the weights, where a
            mesh has several). More fill free slots sooner, fewer keep the rounds regular. None: one for every eight
            slots.
          max_stop_tokens: most stop tokens of one request, these included.
          verify_sizes: sizes of the batch in which a round verifies the scheduled tokens of all requests: the smallest
            one that holds them, or G + 1 tokens of every slot where none does. None chooses them (`engine.sizes`).

        Raises:
          InputError: a value of the wrong type or out of range, or a scheduler that this drafter cannot feed.
        """
        check_models(models)
        self.scheduler = schedulers.fixed() if scheduler is None else scheduler
        sizes = {
            "slots": slots,
            "max_queue": max_queue,
            "prefill_chunk": prefill_chunk,
            "prefill_chunks": 1 if prefill_chunks is None else prefill_chunks,
            "max_stop_tokens": max_stop_tokens,
        }
        check_engine(models.arch, sizes, capacity, stop_tokens, tokenizer)
        check_scheduler(self.scheduler, models, slots)
        self.slots, self.capacity, self.max_queue = slots, capacity, max_queue
        self.tokenizer, self.stop_tokens, self.max_stop_tokens = tokenizer, tuple(stop_tokens), max_stop_tokens
        self.arch = models.arch
        self.metrics = EngineMetrics()
        self._mesh = mesh_of(models) or _current_mesh()
        chunks = max(slots // 8, 1) if prefill_chunks is None else prefill_chunks
        allocated = Sizes(slots, capacity, prefill_chunk, chunks, max_stop_tokens, verify_sizes)
        with _use(self._mesh):
            self._batch = Batch(models, self.scheduler, self.metrics, allocated)

        self._lock = threading.Lock()  # guards what several threads change: queue, metrics, closing, failure
        self._changed = threading.Condition(self._lock)
        self._driving = threading.Lock()  # held by whoever advances the engine; guards the batch
        self._queue: collections.deque[Request] = collections.deque()
        self._live: set[Request] = set()
        self._failure: BaseException | None = None
        self._closed = False
        self._thread: threading.Thread | None = None
        self._next = 0

    # Requests.

    def submit(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        random_stream: int = 0,
        stop_tokens: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        trace: bool = False,
        block: bool = False,
        timeout: float | None = None,
        **unknown: Any,
    ) -> Request:
        """Queues a request.

        Args:
          prompt: token ids, or text that the tokenizer encodes as it is (no chat template).
          max_new_tokens: its budget.
          temperature: below 1e-5 is greedy.
          top_k: only so many of the likeliest tokens; 0 is off.
          top_p: only the smallest set of likeliest tokens with at least this probability; 1 is off.
          min_p: only tokens of at least this share of the likeliest one's probability; 0 is off.
          seed: the request has the random numbers of `generate([prompt], seed=seed)`; 0 to 2**31 - 1. Its tokens are
            those, too, under a scheduler that looks at one request alone.
          random_stream: it has those which that call has for its prompt of this number; 0 to 2**31 - 1.
          stop_tokens: ids that end it, besides the engine's; the stop token is the last of its tokens.
          stop_strings: texts that end it, wherever tokens end; the text stops before them.
          trace: keep what every round drafted, admitted and accepted in its pieces.
          block: wait for room when the queue is full; without a thread, drive the engine until there is some.
          timeout: seconds to wait at most; None waits as long as it takes.
          **unknown: refused, with the nearest known name.

        Raises:
          InputError: something about the request is wrong; nothing else is affected.
          QueueFull: no room in the queue (after `timeout`).
          EngineClosed: it is draining or closed.
          EngineFailed: it has stopped on an unexpected error.
        """
        given = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "seed": seed,
            "random_stream": random_stream,
            "stop_tokens": stop_tokens,
            "stop_strings": stop_strings,
            "trace": trace,
        }
        try:
            block, timeout = boolean("block", block), seconds("timeout", timeout)
            settings = request_settings(given, unknown, self.arch, self.stop_tokens, self.max_stop_tokens)
            ids = prompt_ids(prompt, self.tokenizer, self.arch)
            check_fits(len(ids), settings, self.capacity, self.tokenizer)
        except InputError:
            with self._lock:
                self.metrics.rejected += 1
            raise
        stream = None if self.tokenizer is None else TextStream(self.tokenizer, settings.stop_strings)
        with self._changed:
            self._wait_for_room(block, timeout)
            request = Request(self._next, ids, settings, stream, self._drive, self._ended)
            self._next += 1
            self._queue.append(request)
            self._live.add(request)
            self.metrics.submitted += 1
            self._changed.notify_all()
        return request

    def _wait_for_room(self, block: bool, timeout: float | None) -> None:
        """Returns when the queue has room; under `_changed`."""

        def open_or_over() -> bool:
            return len(self._queue) < self.max_queue or self._closed or self._failure is not None

        if block:
            self._wait_until(open_or_over, timeout)
        self._raise_if_over()
        if len(self._queue) >= self.max_queue:
            self.metrics.refused += 1
            raise QueueFull(
                f"the queue is full ({self.max_queue} requests wait for {self.slots} slots); submit again later, or "
                "with block=True"
            )

    def _raise_if_failed(self) -> None:
        if self._failure is not None:
            raise EngineFailed(f"the engine has stopped: {_describe(self._failure)}") from self._failure

    def _raise_if_over(self) -> None:
        self._raise_if_failed()
        if self._closed:
            raise EngineClosed("the engine is closed and takes no more requests; make another one")

    def _ended(self, request: Request) -> None:
        """Called once by every request that ends, in whichever thread ended it."""
        assert request.finish_reason is not None
        with self._changed:
            self._live.discard(request)
            if request in self._queue:
                self._queue.remove(request)
            self.metrics.finished[request.finish_reason] += 1
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests in slots."""
        return max(len(self._live) - len(self._queue), 0)

    @property
    def failed(self) -> bool:
        """Whether it has stopped on an unexpected error."""
        return self._failure is not None

    # Driving.

    def start(self) -> Self:
        """Starts the thread that drives the engine; waits for nothing.

        Raises:
          InputError: the mesh is one of several hosts.
        """
        if self._mesh is not None and self._mesh.is_multi_process:
            raise InputError("Engine.start: several hosts would not launch the same rounds; drive it with step()")
        with self._lock:
            self._raise_if_over()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
        return self

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._busy() or self._closed)
                if self._closed and not self._busy():
                    return
            self.step()

    def _drive(self, timeout: float | None) -> bool:
        """Advances the engine for somebody who waits, unless its thread does, or others do for all of `timeout`."""
        if self._thread is not None and self._thread is not threading.current_thread():
            return False
        if self._driving.acquire(timeout=-1 if timeout is None else timeout):
            try:
                self._advance()
            finally:
                self._driving.release()
        return True

    def _wait_until(self, ready: Callable[[], bool], timeout: float | None) -> bool:
        """Waits until `ready()`, driving the engine if need be; False after `timeout` seconds. Under `_changed`."""
        end = None if timeout is None else time.monotonic() + timeout
        while not ready():
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return False
            if self._thread is not None:
                self._changed.wait_for(ready, left)
                continue
            self._changed.release()
            try:
                self._drive(left)
            finally:
                self._changed.acquire()
        return True

    def step(self) -> bool:
        """Launches some prompt chunks and at most one round, and reads what the step before has committed.

        Returns:
          Whether there is anything left to do.

        Raises:
          EngineFailed: an earlier step has failed.
        """
        with self._driving:
            self._advance()
        with self._lock:
            return self._busy()

    def _advance(self) -> None:
        """One step, under `_driving`."""
        with self._lock:
            self._raise_if_failed()
        completed = False
        try:
            with _use(self._mesh):
                self._batch.release()
                self._admit()
                self._batch.advance()
            completed = True
        finally:
            # Whatever it is, it goes on to the caller (or ends the thread); nobody is left waiting for a result.
            if not completed:
                self._fail(sys.exception())

    def _busy(self) -> bool:
        return bool(self._live or self._batch.pending)

    def _admit(self) -> None:
        """Gives free slots to those that wait longest."""
        with self._changed:
            while self._queue and self._batch.free:
                self._batch.place(self._queue.popleft())
            self._changed.notify_all()

    def _fail(self, error: BaseException | None) -> None:
        with self._changed:
            self._failure = error
            left = list(self._live)
            self._changed.notify_all()
        for request in left:
            request.finish("error", f"the engine has stopped: {_describe(error)}")

    def warm_up(self, *, greedy: bool = True, sampled: bool = True, filtered: bool = False) -> None:
        """Compiles what requests are going to need, before the first one comes.

        Args:
          greedy: rounds in which all requests are greedy.
          sampled: rounds with temperatures above 0.
          filtered: rounds with top-k, top-p or min-p.

        Raises:
          RuntimeError: requests are being decoded.
          InputError: an argument is neither True nor False.
        """
        for name, value in (("greedy", greedy), ("sampled", sampled), ("filtered", filtered)):
            boolean(name, value)
        wanted = {Mode(): greedy, Mode(greedy=False): sampled, Mode(greedy=False, filtered=True): filtered}
        with self._driving, _use(self._mesh):
            if self._batch.busy:
                raise RuntimeError("warm_up while requests are being decoded; call it first")
            self._batch.warm_up([mode for mode, use in wanted.items() if use])

    # The end.

    def drain(self, timeout: float | None = None) -> None:
        """Takes no more requests and waits until all there are have ended.

        Raises:
          TimeoutError: they have not after `timeout` seconds.
          EngineFailed: an unexpected error ended them.
          InputError: `timeout` is no number of seconds.
        """
        left = seconds("timeout", timeout)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            # Without a thread, nobody else reads what the last step has launched.
            ended = self._wait_until(lambda: not (self._live if self._thread else self._busy()), left)
            self._raise_if_failed()
            if not ended:
                raise TimeoutError(f"{len(self._live)} requests have not ended after {timeout} seconds")

    def close(self) -> None:
        """Cancels what has not ended, and stops the thread. May be called again."""
        with self._changed:
            self._closed = True
            left = list(self._live)
            self._changed.notify_all()
        for request in left:
            request.cancel()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> Self:
        """Starts the thread."""
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        """Drains, or cancels everything if the block was left by an error."""
        try:
            if kind is None:
                self.drain()
        finally:
            self.close()


def _current_mesh() -> Mesh | None:
    """The mesh set by `jax.set_mesh`, which other threads do not see; None without one."""
    mesh = jax.sharding.get_mesh()
    return mesh if isinstance(mesh, Mesh) and not mesh.empty else None


def _use(mesh: Mesh | None) -> Any:
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def _describe(error: BaseException | None) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
