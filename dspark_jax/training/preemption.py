"""Notice that this process is about to be stopped: SIGTERM, as a preempted machine, GKE and SLURM send it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils


class Preemption:
    """While it is entered, SIGTERM is noted instead of ending the process; a second one ends it.

    Where several processes train together, the notice that any of them got reaches all, and they agree on the step: JAX
    does that, and had listened for the signal since `jax.distributed.initialize`.
    """

    def __init__(self):
        """Nothing was noted yet."""
        self._noted = False
        self._before: Any = None

    def reached(self, step: int) -> bool:
        """Whether to save after step `step` and stop; to be asked after every step, by all processes alike."""
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted

    @property
    def noted(self) -> bool:
        """Whether this process got the notice; where several train, they agree on a step by `reached`."""
        return self._noted

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        signal.signal(number, self._before)

    def __enter__(self) -> "Preemption":
        """Itself."""
        ours = threading.current_thread() is threading.main_thread()  # others may not listen for signals
        if ours and not jax.distributed.is_initialized():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Signals do again what they did before."""
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
