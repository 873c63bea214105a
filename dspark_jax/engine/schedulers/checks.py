"""What is wrong with a scheduler's parameters, found before anything is compiled."""

from typing import Any

import numpy as np

from dspark_jax.config import InputError
from dspark_jax.engine import arguments
from dspark_jax.engine.estimator import EstimateSettings
from dspark_jax.engine.models import Models


def check_source(scheduler: Any, models: Models) -> None:
    """The estimate or the confidence head that the rule reads."""
    name, online = scheduler.name, scheduler.online
    if online is None:
        if scheduler.reads_confidence and not models.confident:
            raise InputError(f"scheduler {name!r} needs a drafter with a confidence head; use fixed or adaptive")
        return
    if not isinstance(online, EstimateSettings):
        raise InputError(f"online of scheduler {name!r} is {type(online).__name__}; give EstimateSettings(...)")
    if not models.drafts:
        raise InputError(f"scheduler {name!r} estimates how drafts are accepted; give a drafter, or use fixed")
    online.check()
    if online.confident and not models.confident:
        raise InputError(f"scheduler {name!r} is to learn from a confidence head; this drafter has none")


def check_rates(scheduler: Any, field: str) -> None:
    """A cost table."""
    rates = _values(scheduler, field)
    if rates is None or rates.ndim != 1 or not rates.size or not (np.isfinite(rates) & (rates >= 0)).all():
        shape = None if rates is None else rates.shape
        raise InputError(
            f"{field} of scheduler {scheduler.name!r} has shape {shape} or an impossible value; give one finite rate "
            "of 0 or more for each number of tokens from 0"
        )


def check_capacities(scheduler: Any) -> None:
    """The batch sizes that are filled."""
    sizes = scheduler.capacities
    if sizes is not None and (not sizes or [*sizes] != sorted({*sizes}) or sizes[0] < 1):
        raise InputError(f"capacities={sizes} of scheduler {scheduler.name!r} are not rising sizes from 1; sort them")


def check_prior(scheduler: Any, size: int) -> None:
    """What is assumed of the first rounds."""
    prior = _values(scheduler, "prior")
    if prior is not None and (prior.shape != (size,) or not ((prior >= 0) & (prior <= 1)).all()):
        raise InputError(
            f"prior of scheduler {scheduler.name!r} has shape {prior.shape} or a value outside 0..1; "
            f"give {size} survival probabilities"
        )


def check_bounds(scheduler: Any, size: int, requests: int) -> None:
    """Numbers of drafts."""
    check_counts(scheduler, "minimum", ((), (requests,)), most=size)
    if scheduler.maximum is not None:
        check_counts(scheduler, "maximum", ((), (requests,)))


def check_counts(scheduler: Any, field: str, shapes: tuple[tuple[int, ...], ...], most: int = arguments.MOST) -> None:
    """Numbers of drafts or rounds from 0 to `most`, in one of these shapes."""
    values, name = _values(scheduler, field), scheduler.name
    if values is None or values.shape not in shapes:
        found = "is None" if values is None else f"has shape {values.shape}"
        requests = f" for {shapes[-1][0]} requests" if shapes[-1] else ""
        remedy = "give one number" + (", or one each" if requests else "")
        raise InputError(f"{field} of scheduler {name!r} {found}{requests}; {remedy}")
    if not ((values >= 0) & (values <= most)).all():
        worst = values.min() if values.min() < 0 else values.max()
        raise InputError(f"{field} of scheduler {name!r} has {worst}, which is out of range; use 0 to {most}")


def check_probability(scheduler: Any, field: str) -> None:
    """What is compared with the confidence head."""
    value = _values(scheduler, field)
    if value is not None and (value.ndim or not 0 <= value <= 1):
        raise InputError(
            f"{field}={value} of scheduler {scheduler.name!r} is no probability; use one number from 0 to 1"
        )


def check_share(scheduler: Any, field: str) -> None:
    """A share of the time, which may be unlimited."""
    value = _values(scheduler, field)
    if value is None or value.ndim or not value >= 0:
        raise InputError(
            f"{field}={value} of scheduler {scheduler.name!r} is no share; use one number from 0, or inf for no limit"
        )


def check_head(scheduler: Any, size: int, requests: int) -> None:
    """What corrects the confidence head."""
    name = scheduler.name
    bias, heat = (_values(scheduler, field) for field in ("bias", "temperatures"))
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


def _values(scheduler: Any, field: str) -> np.ndarray | None:
    """Numbers of a scheduler, on the host."""
    values = getattr(scheduler, field)
    return None if values is None else np.asarray(arguments.numeric(f"{field} of the scheduler", values))
