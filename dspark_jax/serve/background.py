"""Users that the server makes itself, to show what a load does: each asks, waits for its answer, and asks again."""

import random
import threading
import time
from collections.abc import Callable, Sequence

from dspark_jax.engine.request import Request
from dspark_jax.engine.serving import Engine, EngineClosed, EngineFailed, QueueFull
from dspark_jax.serve.pool import Pool

LEASE = 30.0
"""Seconds after which the users leave unless they are asked for again: whoever wanted them may be gone."""

SHORTEST, LONGEST = 32, 128
"""Tokens of an answer."""

_PAUSE = 0.2  # seconds, when the queue is full


class Background:
    """Some users of one engine."""

    def __init__(self, pool: Pool, prompts: Callable[[], Sequence[Sequence[int]]]):
        """`pool` is that of the engines; `prompts` gives ids of what they ask, of which each takes one at random."""
        self.pool, self._prompts = pool, prompts
        self._lock = threading.Lock()
        self._users: list[_User] = []
        self._engine: Engine | None = None
        self._until = 0.0

    @property
    def count(self) -> int:
        """Users that there are."""
        return sum(user.is_alive() for user in self._users)

    @property
    def over(self) -> bool:
        """Whether all are to leave: nobody has asked for them for a while, or the server shuts down."""
        return self.pool.draining or time.monotonic() > self._until

    def set(self, users: int, engine: Engine | None) -> None:
        """Has so many users of an engine for `LEASE` seconds; those of another engine leave."""
        prompts = self._prompts() if users else ()
        with self._lock:
            self._until = time.monotonic() + LEASE
            there = [user for user in self._users if user.is_alive()]
            keep = users if engine is self._engine else 0
            self._users, leaving = there[:keep], there[keep:]
            self._engine = engine
            for user in leaving:
                user.leave()
            for number in range(len(self._users), users):
                assert engine is not None
                user = _User(self, engine, prompts, number)
                self._users.append(user)
                user.start()

    def stop(self) -> None:
        """Sends all away."""
        self.set(0, None)


class _User(threading.Thread):
    def __init__(self, owner: Background, engine: Engine, prompts: Sequence[Sequence[int]], number: int):
        super().__init__(name=f"background user {number}", daemon=True)
        self.owner, self.engine, self.prompts = owner, engine, prompts
        self.random = random.Random(number)
        self.left = threading.Event()
        self.request: Request | None = None

    def run(self) -> None:
        """Asks until told to leave, or the engine has ended."""
        while not self.left.is_set() and not self.owner.over:
            try:
                self.request = self._ask()
            except QueueFull:
                self.left.wait(_PAUSE)
                continue
            except (EngineClosed, EngineFailed):
                return
            if self.left.is_set():
                self.request.cancel()
            self.request.result()

    def _ask(self) -> Request:
        ids = self.random.choice(self.prompts)
        longest = min(LONGEST, self.engine.capacity - len(ids))
        tokens = self.random.randint(min(SHORTEST, longest), longest)
        return self.engine.submit(ids, max_new_tokens=tokens, seed=self.random.randrange(2**31))

    def leave(self) -> None:
        """Ends what it waits for, and itself."""
        self.left.set()
        request = self.request
        if request is not None:
            request.cancel()
