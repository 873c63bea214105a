"""Which schedulers can work: everything wrong with one is found here, before anything is compiled."""

import numpy as np

from dspark_jax.config import InputError
from dspark_jax.engine import arguments
from dspark_jax.engine.estimator import EstimateSettings
from dspark_jax.engine.models import Models
from dspark_jax.engine.schedule import NAMES, Scheduler

_NEEDED = {
    "fixed": (),
    "threshold": ("confidence",),
    "early_stop": ("steps_per_second",),
    "lagged": ("steps_per_second", "prior"),
    "adaptive": ("steps_per_second", "plain_steps_per_second", "online"),
}
"""What a rule cannot do without; the constructors named after the rules give it."""


def check_scheduler(scheduler: Scheduler, models: Models, requests: int) -> None:
    """Refuses a scheduler that cannot work for `requests` requests with this drafter.

    Raises:
      InputError: it is no scheduler, there is no confidence head, a table or prior has the wrong shape or impossible
        values, or settings per request are not as many as the requests.
    """
    if not isinstance(scheduler, Scheduler):
        raise InputError(
            f"scheduler={scheduler!r} is {type(scheduler).__name__}; make one, e.g. with Scheduler.fixed()"
        )
    name = scheduler.name
    if name not in NAMES:
        raise InputError(f"scheduler {name!r} is unknown; use one of {', '.join(NAMES)}")
    missing = [field for field in _NEEDED[name] if getattr(scheduler, field) is None]
    if missing:
        raise InputError(f"scheduler {name!r} has no {missing[0]}; make it with Scheduler.{name}")
    size = models.block_size
    _check_source(scheduler, models)
    _check_rates(scheduler)
    _check_prior(scheduler, size)
    _check_bounds(scheduler, size, requests)
    _check_head(scheduler, size, requests)


def _check_source(scheduler: Scheduler, models: Models) -> None:
    """The estimate or the confidence head that the rule reads."""
    name, online = scheduler.name, scheduler.online
    if online is None:
        if name != "fixed" and not models.confident:
            raise InputError(f"scheduler {name!r} needs a drafter with a confidence head; use fixed or adaptive")
        return
    if not isinstance(online, EstimateSettings):
        raise InputError(f"online of scheduler {name!r} is {type(online).__name__}; give EstimateSettings(...)")
    if not models.drafts:
        raise InputError(f"scheduler {name!r} estimates how drafts are accepted; give a drafter, or use fixed")
    online.check()
    if online.confident and not models.confident:
        raise InputError(f"scheduler {name!r} is to learn from a confidence head; this drafter has none")


def _check_rates(scheduler: Scheduler) -> None:
    """Cost tables, and the batch sizes that they are asked for."""
    name, rungs = scheduler.name, scheduler.capacities
    for field in ("steps_per_second", "plain_steps_per_second"):
        rates = _values(scheduler, field)
        if rates is None:
            continue
        if rates.ndim != 1 or not rates.size or not (np.isfinite(rates) & (rates >= 0)).all():
            raise InputError(
                f"{field} of scheduler {name!r} has shape {rates.shape} or an impossible value; give one finite rate "
                "of 0 or more for each number of tokens from 0"
            )
    if rungs is not None and (not rungs or [*rungs] != sorted({*rungs}) or rungs[0] < 1):
        raise InputError(f"capacities={rungs} of scheduler {name!r} are not rising sizes from 1; sort them")


def _check_prior(scheduler: Scheduler, size: int) -> None:
    """What is assumed of the first rounds."""
    prior = _values(scheduler, "prior")
    if prior is not None and (prior.shape != (size,) or not ((prior >= 0) & (prior <= 1)).all()):
        raise InputError(
            f"prior of scheduler {scheduler.name!r} has shape {prior.shape} or a value outside 0..1; "
            f"give {size} survival probabilities"
        )


def _check_bounds(scheduler: Scheduler, size: int, requests: int) -> None:
    """Numbers of drafts and of rounds."""
    name = scheduler.name
    for field, shapes in (("minimum", ((), (requests,))), ("maximum", ((), (requests,))), ("probe", ((),))):
        values = _values(scheduler, field)
        if values is None and field == "maximum":
            continue
        if values is None or values.shape not in shapes:
            found = "is None" if values is None else f"has shape {values.shape}"
            remedy = "give one number" + (", or one each" if len(shapes) > 1 else "")
            raise InputError(f"{field} of scheduler {name!r} {found} for {requests} requests; {remedy}")
        most = size if field == "minimum" else arguments.MOST
        if not ((values >= 0) & (values <= most)).all():
            worst = values.min() if values.min() < 0 else values.max()
            raise InputError(f"{field} of scheduler {name!r} has {worst}, which is out of range; use 0 to {most}")


def _check_head(scheduler: Scheduler, size: int, requests: int) -> None:
    """What is compared with the confidence head, and what corrects it."""
    name = scheduler.name
    least, bias, heat = (_values(scheduler, field) for field in ("confidence", "bias", "temperatures"))
    if least is not None and (least.ndim or not 0 <= least <= 1):
        raise InputError(f"confidence={least} of scheduler {name!r} is no probability; use one number from 0 to 1")
    if bias is not None and (bias.shape not in ((), (requests,)) or not np.isfinite(bias).all()):
        raise InputError(
            f"bias of scheduler {name!r} has shape {bias.shape} for {requests} requests, or a value that is not "
            "finite; give one number, or one each"
        )
    good = heat is None or heat.shape in ((size,), (requests, size)) and (np.isfinite(heat) & (heat > 0)).all()
    if heat is not None and not good:
        raise InputError(
            f"temperatures of scheduler {name!r} have shape {heat.shape} or a value that is not positive and finite; "
            f"give {size} of them"
        )


def _values(scheduler: Scheduler, field: str) -> np.ndarray | None:
    """Numbers of a scheduler, on the host."""
    values = getattr(scheduler, field)
    return None if values is None else np.asarray(arguments.numeric(f"{field} of the scheduler", values))
