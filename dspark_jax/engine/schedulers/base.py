"""What every scheduler is: a rule for how many of the drafted tokens a round verifies, and its parameters.

A scheduler may use the confidences c_1..c_k to decide about draft k, never the drafted token k itself; anything else
biases the output (paper appendix A, trap 29). Since c_{k+1} depends on x_k, that also forbids weighing draft k by what
would come after it. Rules read survivals: of this round's drafts, from the drafter's confidence head, or from the
running estimate of `engine.estimator`, which works for every drafter and is known before anything is drafted. What a
rule remembers from round to round is a `History`.
"""

import dataclasses
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import InputError
from dspark_jax.drafter.interface import Proposal
from dspark_jax.engine import arguments, estimator
from dspark_jax.engine.estimator import AcceptanceEstimate, EstimateSettings
from dspark_jax.engine.models import Models
from dspark_jax.engine.schedulers import checks
from dspark_jax.engine.schedulers.survival import scaled, survival


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """What a scheduler remembers of earlier rounds; each part is there only where the rule needs it.

    Attributes:
      survival: [2, B, G] float32 survivals of the last round and of the one before.
      estimate: running acceptance of every request and of all of them.
      idle: [] int32, rounds since the last one with drafts.
      credit: [] float32, plain rounds whose time trials may still cost; below 0, what rounds with drafts have lost.
    """

    survival: jax.Array | None = None
    estimate: AcceptanceEstimate | None = None
    idle: jax.Array | None = None
    credit: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a training run's directory knows that a scheduler may use.

    Attributes:
      block_size: G of the drafter.
      confident: the drafter has a confidence head.
      calibration: `bias` and `temperatures` by name, as far as there are any.
      steps_per_second: [N + 1] cost table of rounds with drafts, measured or assumed.
      plain_steps_per_second: [N + 1] of rounds without, or None.
      cost_file: where the table is from; None where it is assumed.
      confidence: least confidence asked for, of `threshold`.
    """

    block_size: int
    confident: bool
    calibration: dict[str, Any]
    steps_per_second: np.ndarray
    plain_steps_per_second: np.ndarray | None
    cost_file: str | None
    confidence: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduler:
    """A rule and its parameters. Make one with the functions of `engine.schedulers` that are named after the rules.

    A rule of your own is a subclass, a registered dataclass, with a `name` and an `admit`.

    Attributes:
      minimum: [] or [B] drafts that are always verified.
      maximum: [] or [B] drafts that are verified at most; None is G.
      temperatures: [G] or [B, G] of sequential temperature scaling; None is 1.
      bias: [] or [B] added to confidence logits before that; None is 0.
      online: settings of the running estimate, which then stands in for the confidence head; static.
    """

    name: ClassVar[str] = ""
    needed: ClassVar[tuple[str, ...]] = ()
    """Attributes that the rule cannot do without; the function named after it gives them."""
    reads_confidence: ClassVar[bool] = True
    """Whether it needs a confidence head, or `online`."""
    alternates: ClassVar[bool] = False
    """Whether rounds without drafts are possible."""

    minimum: jax.Array | int = 0
    maximum: jax.Array | int | None = None
    temperatures: jax.Array | None = None
    bias: jax.Array | None = None
    online: EstimateSettings | None = dataclasses.field(default=None, metadata={"static": True})

    def admit(self, proposal: Proposal, active: jax.Array, history: Any) -> tuple[jax.Array, Any]:
        """The rule itself; see `schedule`, which checks that there is what it reads."""
        raise NotImplementedError

    @classmethod
    def from_run(cls, measured: Measured) -> "Scheduler":
        """The scheduler with what a training run's directory knows about costs and calibration.

        Raises:
          InputError: something that the rule needs is missing there, or it is not for commands.
        """
        raise InputError(
            f"scheduler={cls.name!r} cannot be made by a command; give {cls.__name__} a `from_run` (docs/adding.md)"
        )

    @property
    def selects(self) -> bool:
        """Whether it may admit less than everything; static."""
        return True

    @property
    def remembers(self) -> bool:
        """Whether there is a history; static."""
        return self.online is not None

    def filling(self, sizes: tuple[int, ...]) -> Self:
        """The rule for rounds that verify one of these numbers of tokens (rising), whether all are used or not."""
        del sizes
        return self

    def start(self, batch: int, block_size: int) -> Any:
        """History of requests that are about to start; None where the rule remembers nothing."""
        return None if self.online is None else History(estimate=self.online.start(batch, block_size))

    def schedule(self, proposal: Proposal, active: jax.Array, history: Any = None) -> tuple[jax.Array, Any]:
        """Lengths of this round.

        Args:
          proposal: this round's drafts; only their number and their confidences are looked at.
          active: [B] bool; other requests get 0.
          history: of the rounds before; `start` is the first one, and the rows of a slot are set to it when a new
            request takes it.

        Returns:
          Lengths [B] int32, and the history with this round's survivals (None where there was none); `observe` adds
          what came of them.

        Raises:
          ValueError: the rule needs confidences or a history that are not there.
        """
        if self.reads_confidence and self.online is None and proposal.confidence is None:
            raise ValueError(f"scheduler {self.name!r} needs a drafter with a confidence head, or `online`")
        if self.remembers and history is None:
            raise ValueError(f"scheduler {self.name!r} needs a history; begin with its `start`")
        return self.admit(proposal, active, history)

    def drafts_now(self, history: Any, active: jax.Array) -> jax.Array:
        """Whether the round that is about to begin drafts: [] bool, a function of earlier rounds alone."""
        del history, active
        return jnp.bool_(True)

    def expected(self, proposal: Proposal) -> jax.Array | None:
        """Survivals [B, G] that the confidence head gives this round's drafts, if `observe` is to learn from them."""
        if self.online is None or not self.online.confident:
            return None
        assert proposal.confidence is not None
        return survival(proposal.confidence, self.temperatures, self.bias)

    def observe(
        self,
        history: Any,
        proposed: jax.Array,
        accepted: jax.Array,
        active: jax.Array,
        *,
        drafted: bool,
        expected: jax.Array | None = None,
    ) -> Any:
        """The history after a round.

        Args:
          history: after `schedule`, or None.
          proposed: [B] drafts that were verified; 0 in a round without drafts.
          accepted: [B] drafts that were accepted.
          active: [B] bool, requests that took part.
          drafted: whether the round drafted.
          expected: of the round's drafts, from the method of that name.
        """
        if history is None:
            return None
        estimate, idle = history.estimate, history.idle
        if estimate is not None:
            estimate = estimator.update(estimate, proposed, accepted, active, expected)
        if idle is not None:
            idle = jnp.int32(0) if drafted else idle + 1
        return dataclasses.replace(history, estimate=estimate, idle=idle)

    def logits(self, proposal: Proposal, history: Any) -> jax.Array:
        """Confidence logits [B, G] that the rule reads: calibrated ones of the head, or those of the estimate."""
        if self.online is None:
            assert proposal.confidence is not None
            return scaled(proposal.confidence, self.temperatures, self.bias)
        return jax.scipy.special.logit(estimator.conditional(history.estimate))

    def within(self, lengths: jax.Array, active: jax.Array, block_size: int) -> jax.Array:
        """Lengths [B] of a prefix rule between the bounds, 0 for inactive requests; neither bound knows any draft."""
        maximum = block_size if self.maximum is None else self.maximum
        return jnp.where(active, jnp.minimum(jnp.maximum(lengths, self.minimum), maximum), 0).astype(jnp.int32)

    def take(self, rows: Any) -> Self:
        """For some of the requests: what is given per request follows the indices `rows`."""

        def pick(values: Any, axes: int) -> Any:
            return values[jnp.asarray(rows)] if values is not None and jnp.ndim(values) == axes else values

        return dataclasses.replace(
            self,
            minimum=pick(self.minimum, 1),
            maximum=pick(self.maximum, 1),
            bias=pick(self.bias, 1),
            temperatures=pick(self.temperatures, 2),
        )

    def check(self, models: Models, requests: int) -> None:
        """Refuses a scheduler that cannot work for `requests` requests with this drafter.

        Raises:
          InputError: there is no confidence head, a parameter has the wrong shape or impossible values, or settings per
            request are not as many as the requests.
        """
        missing = [field for field in self.needed if getattr(self, field) is None]
        if missing:
            raise InputError(f"scheduler {self.name!r} has no {missing[0]}; make it with schedulers.{self.name}")
        checks.check_source(self, models)
        checks.check_bounds(self, models.block_size, requests)
        checks.check_head(self, models.block_size, requests)


def check_scheduler(scheduler: Any, models: Models, requests: int) -> None:
    """`Scheduler.check`, of what may be no scheduler at all."""
    if not isinstance(scheduler, Scheduler):
        raise InputError(
            f"scheduler={scheduler!r} is {type(scheduler).__name__}; make one, e.g. with schedulers.fixed()"
        )
    scheduler.check(models, requests)


BOUNDS = {"minimum": jnp.int32, "maximum": jnp.int32, "temperatures": jnp.float32, "bias": jnp.float32}


def bounds_of(rule: str, given: dict[str, Any], *, capacities: bool = False) -> dict[str, Any]:
    """Further attributes of a rule, as arrays, so that numbers do not become constants of an executable.

    Args:
      rule: its name.
      given: by name.
      capacities: the rule has such.

    Raises:
      InputError: one that the rule does not have, or of the wrong type.
    """
    known = [*BOUNDS, "online", *(["capacities"] if capacities else [])]
    found = {}
    for name, value in given.items():
        arguments.check_known(f"schedulers.{rule}", name, known)
        if name in BOUNDS and value is not None:
            value = arguments.array(name, value, BOUNDS[name])
        elif name == "capacities" and value is not None:
            value = arguments.sizes(name, value)
        found[name] = value
    return found


def floats(name: str, values: Any) -> jax.Array:
    """A parameter as float32."""
    return arguments.array(name, values, jnp.float32)
