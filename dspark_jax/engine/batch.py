"""The host side of the slots: who is in which, what is launched next, and what launches have committed.

One thread at a time. It is always one launch behind the device: what a step launches is read by the next one.
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dspark_jax.engine.models import Models
from dspark_jax.engine.request import EngineMetrics, FinishReason, Request, Settings, TracedRound
from dspark_jax.engine.schedulers import Scheduler
from dspark_jax.engine.sizes import verified_sizes
from dspark_jax.engine.slots import Chunk, Committed, Mode, open_slots, parts, prefill_chunk, serve_round
from dspark_jax.ops.sampling import GREEDY_BELOW
from dspark_jax.sharding import evenly


@dataclasses.dataclass(frozen=True)
class _Launch:
    """Something launched whose outcome has not been read: it belongs to the requests that were there at the time."""

    owners: list[tuple[int, Request]]  # (row of the outcome, request)
    outcome: Committed


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is allocated and compiled for.

    Attributes:
      slots: B.
      capacity: most tokens of a request.
      width: tokens of a prompt chunk.
      chunks: most chunks between two rounds.
      stops: stop tokens per request.
      verify_sizes: see `serving.Engine`.
    """

    slots: int
    capacity: int
    width: int
    chunks: int
    stops: int
    verify_sizes: Sequence[int] | None = None


class Batch:
    """Requests in slots."""

    def __init__(self, models: Models, scheduler: Scheduler, metrics: EngineMetrics, sizes: Sizes):
        """Empty slots.

        Args:
          models: target and drafter.
          scheduler: decides how many drafts are verified.
          metrics: what is launched and committed is counted there.
          sizes: of what is allocated.
        """
        slots, width = sizes.slots, sizes.width
        count = evenly(slots)  # on the devices; what is more than the slots stays empty
        scheduler = scheduler if count == slots else scheduler.take(np.minimum(np.arange(count), slots - 1))
        self.scheduler, self.metrics, self.stops = scheduler, metrics, sizes.stops
        self.width, self.chunks = width, sizes.chunks
        self.pending: collections.deque[_Launch] = collections.deque()
        # Room for the last round, which begins below the limit, and for the padding of the last chunk.
        rows = max(sizes.capacity + models.block_size, -(-sizes.capacity // width) * width)
        self.sizes = verified_sizes(sizes.verify_sizes, scheduler, count, models.rows, slots_may_be_empty=True)
        self._models = models.for_decoding(batch_size=count)
        self._device = open_slots(self._models, scheduler, count=count, rows=rows, stops=sizes.stops)
        self._parts = parts(count)
        self._part = count // self._parts  # slots of a part
        self._requests: list[Request | None] = [None] * slots
        self._read = [0] * slots  # prompt tokens of each slot's request that have been launched
        self._filling: collections.deque[int] = collections.deque()  # slots with unread prompts, first come first
        self._released = np.zeros(count, bool)

    @property
    def free(self) -> int:
        """Slots without a request."""
        return self._requests.count(None)

    @property
    def busy(self) -> bool:
        """Whether there is a request, or a launch that has not been read."""
        return self.free < len(self._requests) or bool(self.pending)

    def release(self) -> None:
        """Frees the slots of requests that have ended."""
        for slot, request in enumerate(self._requests):
            if request is not None and request.done:
                self._requests[slot], self._released[slot] = None, True
                if slot in self._filling:
                    self._filling.remove(slot)

    def place(self, request: Request) -> None:
        """Gives a free slot to a request, in the part of the slots that has the fewest."""
        free = [slot for slot, other in enumerate(self._requests) if other is None]
        taken = collections.Counter(slot // self._part for slot, other in enumerate(self._requests) if other)
        slot = min(free, key=lambda slot: taken[slot // self._part])
        self._requests[slot], self._read[slot] = request, 0
        self._filling.append(slot)
        request.admitted()

    def advance(self) -> None:
        """Launches chunks and at most one round, then reads what was launched before them."""
        earlier = len(self.pending)
        for _ in range(self.chunks):
            self._launch_chunk()
        self._launch_round()
        for _ in range(earlier):
            self._collect(self.pending.popleft())

    def _launch_chunk(self) -> None:
        """Launches the next chunk of the prompt that has waited longest, of each part of the slots."""
        if not self._filling:
            return
        chosen: dict[int, int] = {}  # part -> slot
        for slot in self._filling:
            chosen.setdefault(slot // self._part, slot)
        owners: list[tuple[int, Request]] = []
        chunks = [_chunk(None, -1, 0, self.width, self.stops)] * self._parts
        for part, slot in chosen.items():
            request = self._requests[slot]
            assert request is not None
            start = self._read[slot]
            self._read[slot] = min(start + self.width, len(request.prompt))
            if self._read[slot] == len(request.prompt):
                owners.append((part, request))
                self._filling.remove(slot)
            self._released[slot] = False  # the chunk sets the slot's state whole
            chunks[part] = _chunk(request, slot % self._part, start, self.width, self.stops)
        outcome = self._prefill(_together(chunks))
        self.metrics.chunks += len(chosen)
        self.pending.append(_Launch(owners, _fetching(outcome)))

    def _launch_round(self) -> None:
        """Launches a round if a slot is decoding, as far as the host knows."""
        owners = [
            (slot, request)
            for slot, request in enumerate(self._requests)
            if request is not None and slot not in self._filling
        ]
        if not owners:
            return
        outcome = self._round(_mode([request.settings for _, request in owners]))
        self.metrics.rounds += 1
        self.pending.append(_Launch(owners, _fetching(outcome)))

    def _prefill(self, chunk: Chunk) -> Committed:
        self._device, outcome = prefill_chunk(self._models, self._device, chunk, self.scheduler)
        return outcome

    def _round(self, mode: Mode) -> Committed:
        released, self._released = self._released, np.zeros_like(self._released)
        self._device, outcome = serve_round(
            self._models, self._device, released, self.scheduler, mode=mode, sizes=self.sizes
        )
        return outcome

    def _collect(self, launch: _Launch) -> None:
        """Reads what a launch has committed and hands it out; those who have ended since get nothing."""
        outcome: Committed = jax.device_get(launch.outcome)
        together = (0, 0, 0)
        if outcome.round is not None:
            together = _together_in(outcome)
            self.metrics.rows += int(outcome.round.rows)
        for row, request in launch.owners:
            if request.done:
                continue
            count = int(outcome.counts[row])
            ended: FinishReason | None = None
            if outcome.finished[row]:
                ended = "stop" if outcome.stopped[row] else "length"
            entry = outcome.round
            traced = None if entry is None else _traced(entry, row, together)
            emitted = 0 if entry is None else int(entry.emitted[row])
            self.metrics.tokens += request.receive(outcome.tokens[row, :count].tolist(), ended, traced, emitted)
            if traced is not None:
                self.metrics.shares += 1
                self.metrics.accepted += traced.accepted
                self.metrics.admitted += traced.admitted
                self.metrics.emitted += emitted

    def warm_up(self, modes: Sequence[Mode]) -> None:
        """Compiles the chunk and a round of every mode, by running them on empty slots."""
        # A chunk of a prompt that goes on leaves its slot finished; the next request sets it whole.
        outcome = self._prefill(_together([_chunk(None, 0, 0, self.width, self.stops)] * self._parts))
        for mode in modes:
            outcome = self._round(mode)
        jax.block_until_ready(outcome)


def _chunk(request: Request | None, slot: int, start: int, width: int, stops: int) -> Chunk:
    """The next tokens of a request's prompt for a slot of a part; without a request, zeros that ask for more."""
    prompt = np.zeros(width + 1, np.int32) if request is None else request.prompt
    settings = request.settings if request is not None else Settings(1, 0.0, 0, 1.0, 0.0, 0, 0, (), (), trace=False)
    tokens, stop_tokens = np.zeros(width, np.int32), np.full(stops, -1, np.int32)
    part = prompt[start : start + width]
    tokens[: len(part)] = part
    stop_tokens[: len(settings.stop_tokens)] = settings.stop_tokens
    return Chunk(
        tokens,
        np.int32(len(part)),
        np.int32(start),
        np.int32(slot),
        np.int32(len(prompt)),
        np.int32(len(prompt) + settings.max_new_tokens),
        np.int32(settings.seed),
        np.int32(settings.random_stream),
        np.float32(settings.temperature),
        np.int32(min(settings.top_k, np.iinfo(np.int32).max)),
        np.float32(settings.top_p),
        np.float32(settings.min_p),
        stop_tokens,
    )


def _together(chunks: Sequence[Chunk]) -> Chunk:
    """The chunks of all parts."""
    return jax.tree.map(lambda *values: np.stack(values), *chunks)


def _mode(settings: Sequence[Settings]) -> Mode:
    """What the requests of a round have in common."""
    sampled = [one for one in settings if one.temperature >= GREEDY_BELOW]
    return Mode(not sampled, any(one.top_k > 0 or one.top_p < 1 or one.min_p > 0 for one in sampled))


def _fetching(outcome: Committed) -> Committed:
    """`outcome`, on its way to the host."""
    for leaf in jax.tree.leaves(outcome):
        leaf.copy_to_host_async()
    return outcome


def _together_in(outcome: Committed) -> tuple[int, int, int]:
    """Of all requests of a fetched round: how many they were, their verified tokens, and the rows computed for them."""
    assert outcome.round is not None
    active = np.asarray(outcome.counts) > 0  # a round gives every request that is decoding a token
    running = int(active.sum())
    return running, running + int(np.asarray(outcome.round.proposed)[active].sum()), int(outcome.round.rows)


def _traced(entry: Any, row: int, together: tuple[int, int, int]) -> TracedRound:
    """What a fetched round did to one request; `together` is `_together_in`."""
    drafted = tuple(entry.drafted[row].tolist())
    if drafted and drafted[0] < 0:  # a round without drafts
        drafted = ()
    confidence = None if entry.confidence is None else tuple(entry.confidence[row].tolist())[: len(drafted)]
    accepted = int(entry.accepted[row])
    follows = int(entry.next_token[row]) if entry.emitted[row] > accepted else None
    return TracedRound(drafted, confidence, int(entry.proposed[row]), accepted, follows, *together)
