"""Generated arithmetic: sums, products, fractions, equations and sequences, with worked steps.

Every template takes a `random.Random` and returns (question, steps, answer).
"""

import random
from fractions import Fraction

Problem = tuple[str, list[str], str]


def addition(rng: random.Random) -> Problem:
    """Column addition, right to left, with the carries."""
    digits = rng.choice([2, 2, 3, 3, 4])
    a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    question = rng.choice(
        ["What is {a} + {b}?", "Compute {a} + {b}.", "Add {a} and {b}.", "Find the sum of {a} and {b}."]
    )
    steps, carry = [], 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        terms = f"{x} + {y}" + (" + 1" if carry else "")
        carry = total // 10
        steps.append(f"{terms} = {total}, write {total % 10}" + (", carry 1." if carry else "."))
    return question.format(a=a, b=b), steps, str(a + b)


def subtraction(rng: random.Random) -> Problem:
    """Subtraction by splitting the subtrahend into tens and ones."""
    a = rng.randrange(40, 1000)
    b = rng.randrange(11, min(a, 100))
    tens, ones = b - b % 10, b % 10
    question = rng.choice(
        ["What is {a} - {b}?", "Compute {a} - {b}.", "Subtract {b} from {a}.", "Take {b} away from {a}."]
    )
    steps = [f"{a} - {tens} = {a - tens}."] + ([f"{a - tens} - {ones} = {a - b}."] if ones else [])
    return question.format(a=a, b=b), steps, str(a - b)


def multiplication(rng: random.Random) -> Problem:
    """A product by partial products."""
    a, b = rng.randrange(11, 100), rng.choice([rng.randrange(3, 10), rng.randrange(11, 30)])
    question = rng.choice(["What is {a} * {b}?", "Multiply {a} by {b}.", "Compute {a} times {b}.", "Find {a} * {b}."])
    big, small = (b, a) if b > 10 else (a, b)
    tens, ones = big - big % 10, big % 10
    steps = [f"{small} * {tens} = {small * tens}."]
    if ones:
        steps += [f"{small} * {ones} = {small * ones}.", f"{small * tens} + {small * ones} = {a * b}."]
    return question.format(a=a, b=b), steps, str(a * b)


def division(rng: random.Random) -> Problem:
    """A quotient with remainder."""
    divisor, quotient = rng.randrange(3, 13), rng.randrange(4, 30)
    rest = rng.randrange(divisor)
    n = divisor * quotient + rest
    question = rng.choice(["Divide {n} by {d}. What is the remainder?", "What is the remainder of {n} divided by {d}?"])
    steps = [f"{divisor} * {quotient} = {divisor * quotient}.", f"{n} - {divisor * quotient} = {rest}."]
    return question.format(n=n, d=divisor), steps, str(rest)


def order_of_operations(rng: random.Random) -> Problem:
    """An expression with brackets and mixed operators."""
    a, b, c, d = (rng.randrange(2, 13) for _ in range(4))
    lead = rng.choice(["Evaluate", "Compute", "What is the value of", "Simplify"])
    end = "?" if lead.startswith("What") else "."
    form = rng.randrange(4)
    if form == 0:
        text, steps, value = f"{a} + {b} * {c}", [f"{b} * {c} = {b * c}.", f"{a} + {b * c} = {a + b * c}."], a + b * c
    elif form == 1:
        value = (a + b) * c
        text, steps = f"({a} + {b}) * {c}", [f"{a} + {b} = {a + b}.", f"{a + b} * {c} = {value}."]
    elif form == 2:
        value = a * b + c * d
        text = f"{a} * {b} + {c} * {d}"
        steps = [f"{a} * {b} = {a * b}.", f"{c} * {d} = {c * d}.", f"{a * b} + {c * d} = {value}."]
    else:
        value = a * (b + c) - d
        text = f"{a} * ({b} + {c}) - {d}"
        steps = [f"{b} + {c} = {b + c}.", f"{a} * {b + c} = {a * (b + c)}.", f"{a * (b + c)} - {d} = {value}."]
    return f"{lead} {text}{end}", steps, str(value)


def linear_equation(rng: random.Random) -> Problem:
    """a x + b = c with an integer solution."""
    letter, a, x, b = rng.choice("xyznk"), rng.randrange(2, 13), rng.randrange(2, 21), rng.randrange(1, 31)
    sign = rng.choice([1, -1])
    c = a * x + sign * b
    op, undo = ("+", "Subtract {b} from both sides") if sign > 0 else ("-", "Add {b} to both sides")
    question = rng.choice(["Solve {e} for {v}.", "Find {v} if {e}.", "What is {v} when {e}?"])
    steps = [f"{undo.format(b=b)}: {a}{letter} = {a * x}.", f"Divide by {a}: {letter} = {a * x} / {a} = {x}."]
    return question.format(e=f"{a}{letter} {op} {b} = {c}", v=letter), steps, str(x)


def sequence(rng: random.Random) -> Problem:
    """The next term of an arithmetic or geometric sequence."""
    if rng.random() < 0.6:
        start, step = rng.randrange(1, 40), rng.choice([-3, -2, *range(2, 13)])
        start += 15 if step < 0 else 0
        terms = [start + step * i for i in range(5)]
        word = f"adds {step}" if step > 0 else f"subtracts {-step}"
        op = f"+ {step}" if step > 0 else f"- {-step}"
    else:
        start, step = rng.randrange(1, 7), rng.choice([2, 3])
        terms = [start * step**i for i in range(5)]
        word, op = f"multiplies by {step}", f"* {step}"
    shown = ", ".join(map(str, terms[:4]))
    question = rng.choice(
        ["What is the next number in the sequence {s}?", "Continue the sequence: {s}, ...", "{s}, ... What comes next?"]
    )
    return question.format(s=shown), [f"Each step {word}.", f"{terms[3]} {op} = {terms[4]}."], str(terms[4])


def fraction_sum(rng: random.Random) -> Problem:
    """The sum of two fractions, reduced."""
    q1, q2 = rng.randrange(2, 9), rng.randrange(2, 9)
    p1, p2 = rng.randrange(1, q1), rng.randrange(1, q2)
    total, common = Fraction(p1, q1) + Fraction(p2, q2), q1 * q2
    question = rng.choice(["What is {a} + {b}?", "Add the fractions {a} and {b}.", "Compute {a} + {b} as a fraction."])
    top = p1 * q2 + p2 * q1
    steps = [
        f"The common denominator is {q1} * {q2} = {common}.",
        f"{p1 * q2}/{common} + {p2 * q1}/{common} = {top}/{common}.",
    ]
    if total.denominator != common:
        steps.append(f"Reduced: {top}/{common} = {total}.")
    return question.format(a=f"{p1}/{q1}", b=f"{p2}/{q2}"), steps, str(total)


def average(rng: random.Random) -> Problem:
    """The mean of three or four numbers; always an integer."""
    n, mean = rng.choice([3, 4]), rng.randrange(5, 40)
    numbers = [mean + rng.randrange(-4, 5) for _ in range(n - 1)]
    numbers.append(n * mean - sum(numbers))
    shown = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    question = rng.choice(
        ["What is the average of {s}?", "Find the mean of {s}.", "Compute the average of the numbers {s}."]
    )
    steps = [
        f"The sum is {' + '.join(map(str, numbers))} = {n * mean}.",
        f"There are {n} numbers: {n * mean} / {n} = {mean}.",
    ]
    return question.format(s=shown), steps, str(mean)


def power(rng: random.Random) -> Problem:
    """A small power by repeated multiplication."""
    base, exponent = rng.choice(
        [(b, 2) for b in range(2, 21)] + [(b, 3) for b in range(2, 10)] + [(2, e) for e in range(4, 10)]
    )
    steps, value = [], base
    for _ in range(exponent - 1):
        steps.append(f"{value} * {base} = {value * base}.")
        value *= base
    extra = rng.randrange(1, 60)
    steps.append(f"{value} + {extra} = {value + extra}.")
    return (
        rng.choice(["What is {b}^{e} + {x}?", "Compute {b}^{e} + {x}."]).format(b=base, e=exponent, x=extra),
        steps,
        str(value + extra),
    )


def even_or_factor(rng: random.Random) -> Problem:
    """A yes or no question about divisibility, or a greatest common divisor."""
    if rng.random() < 0.5:
        d, q = rng.randrange(3, 13), rng.randrange(3, 25)
        rest = rng.choice([0, rng.randrange(d)])
        n = d * q + rest
        steps = [
            f"{d} * {q} = {d * q}.",
            f"{n} - {d * q} = {rest}, so " + (f"{d} divides {n}." if not rest else f"{d} does not divide {n}."),
        ]
        return f"Is {n} divisible by {d}?", steps, "no" if rest else "yes"
    g, a, b = (
        rng.randrange(2, 13),
        *rng.choice([(2, 3), (3, 4), (2, 5), (3, 5), (4, 5), (1, 4), (5, 6), (3, 7), (1, 6)]),
    )
    steps = [f"{g * a} = {g} * {a}.", f"{g * b} = {g} * {b}.", f"{a} and {b} have no common factor."]
    return f"What is the greatest common divisor of {g * a} and {g * b}?", steps, str(g)


def unit_conversion(rng: random.Random) -> Problem:
    """Between two units whose ratio is an integer."""
    big, small, k = rng.choice(
        [
            ("hours", "minutes", 60),
            ("minutes", "seconds", 60),
            ("days", "hours", 24),
            ("weeks", "days", 7),
            ("feet", "inches", 12),
            ("dozens", "eggs", 12),
            ("meters", "centimeters", 100),
            ("years", "months", 12),
        ]
    )
    n, rest = rng.randrange(2, 13), rng.randrange(1, min(k, 30))
    if rng.random() < 0.5:
        return (
            f"How many {small} are {n} {big}?",
            [f"There are {k} {small} in one unit of {big}.", f"{n} * {k} = {n * k}."],
            str(n * k),
        )
    steps = [f"{n} * {k} = {n * k} {small}.", f"{n * k} + {rest} = {n * k + rest} {small}."]
    return f"How many {small} are {n} {big} and {rest} {small}?", steps, str(n * k + rest)
