"""Second step of a round: how many drafts are verified; and, before a round, whether it drafts at all.

One rule per file. `SCHEDULERS` has those that commands know by name; a rule that is passed to `generate` or `Engine`
need not be in it.
"""

from dspark_jax.engine.schedulers.adaptive import Adaptive, adaptive
from dspark_jax.engine.schedulers.base import History, Measured, Scheduler, check_scheduler
from dspark_jax.engine.schedulers.early_stop import EarlyStop, early_stop
from dspark_jax.engine.schedulers.fixed import Fixed, fixed
from dspark_jax.engine.schedulers.lagged import Lagged, lagged
from dspark_jax.engine.schedulers.threshold import Threshold, threshold

SCHEDULERS: dict[str, type[Scheduler]] = {
    rule.name: rule for rule in (Fixed, Threshold, EarlyStop, Lagged, Adaptive)
}  # fmt: skip

__all__ = [
    "SCHEDULERS",
    "History",
    "Measured",
    "Scheduler",
    "adaptive",
    "check_scheduler",
    "early_stop",
    "fixed",
    "lagged",
    "threshold",
]
