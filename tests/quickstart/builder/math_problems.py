"""Generated math: one problem of any kind, unlimited and exact by construction.

Numbers are kept small enough that a model of six million parameters can learn to compute with them.
"""

import random
from collections.abc import Callable

from tests.quickstart.builder import arithmetic, word_problems
from tests.quickstart.builder.arithmetic import Problem

TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    arithmetic.addition,
    arithmetic.subtraction,
    arithmetic.multiplication,
    arithmetic.division,
    arithmetic.order_of_operations,
    arithmetic.linear_equation,
    arithmetic.sequence,
    arithmetic.fraction_sum,
    word_problems.fraction_of,
    word_problems.percent,
    word_problems.shopping,
    word_problems.speed,
    word_problems.ages,
    word_problems.sharing,
    word_problems.inventory,
    word_problems.rectangle,
    arithmetic.average,
    word_problems.wages,
    arithmetic.unit_conversion,
    word_problems.comparison,
    arithmetic.power,
    word_problems.rate_of_work,
    arithmetic.even_or_factor,
)
REQUESTS = (
    "Show your work.",
    "Think step by step.",
    "Explain the steps.",
    "Please reason step by step.",
    "Give the steps.",
)
OPENINGS = ("Let us work it out.", "Step by step:", "Here is the solution.", "We compute it in steps.")


def problem(rng: random.Random) -> tuple[str, str]:
    """One problem as (question, worked answer); the answer's last line is `The answer is N.`."""
    question, steps, answer = rng.choice(TEMPLATES)(rng)
    if rng.random() < 0.4:
        question += " " + rng.choice(REQUESTS)
    opening = [rng.choice(OPENINGS)] if rng.random() < 0.4 else []
    joint = "\n" if rng.random() < 0.7 else " "
    return question, joint.join(opening + steps) + f"\nThe answer is {answer}."
