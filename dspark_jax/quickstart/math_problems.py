"""Generated math: word problems and arithmetic with short worked steps, unlimited and exact by construction.

Every template takes a `random.Random` and returns (question, steps, answer). Numbers are kept small enough that a model
of six million parameters can learn to compute with them.
"""

import random
from collections.abc import Callable
from fractions import Fraction

Problem = tuple[str, list[str], str]

NAMES = (
    "Ada Ben Carla Dan Elena Farid Grace Hugo Ines Jonas Kim Lena Marco Nadia Oscar Petra Quinn Rosa Sam Tara "
    "Umar Vera Will Yuki Zoe Alice Bob Chen Dora Emil"
).split()
THINGS = (
    "apple pencil book ticket marble cookie stamp coin sticker card orange shell button candle notebook muffin "
    "balloon flower egg cup pear plate ribbon postcard"
).split()
PLACES = "shop market fair bakery garden library school farm museum kiosk".split()


def _plural(thing: str, count: int) -> str:
    return thing if count == 1 else thing + "s"


def _two(rng: random.Random, pool: list[str]) -> list[str]:
    return rng.sample(pool, 2)


def addition(rng: random.Random) -> Problem:
    """Column addition, right to left, with the carries."""
    digits = rng.choice([2, 2, 3, 3, 4])
    a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
    question = rng.choice(["What is {a} + {b}?", "Compute {a} + {b}.", "Add {a} and {b}.", "Find the sum of {a} and {b}."])
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
    question = rng.choice(["What is {a} - {b}?", "Compute {a} - {b}.", "Subtract {b} from {a}.", "Take {b} away from {a}."])
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
    question = rng.choice(["What is the next number in the sequence {s}?", "Continue the sequence: {s}, ...", "{s}, ... What comes next?"])
    return question.format(s=shown), [f"Each step {word}.", f"{terms[3]} {op} = {terms[4]}."], str(terms[4])


def fraction_sum(rng: random.Random) -> Problem:
    """The sum of two fractions, reduced."""
    q1, q2 = rng.randrange(2, 9), rng.randrange(2, 9)
    p1, p2 = rng.randrange(1, q1), rng.randrange(1, q2)
    total, common = Fraction(p1, q1) + Fraction(p2, q2), q1 * q2
    question = rng.choice(["What is {a} + {b}?", "Add the fractions {a} and {b}.", "Compute {a} + {b} as a fraction."])
    top = p1 * q2 + p2 * q1
    steps = [f"The common denominator is {q1} * {q2} = {common}.", f"{p1 * q2}/{common} + {p2 * q1}/{common} = {top}/{common}."]
    if total.denominator != common:
        steps.append(f"Reduced: {top}/{common} = {total}.")
    return question.format(a=f"{p1}/{q1}", b=f"{p2}/{q2}"), steps, str(total)


def fraction_of(rng: random.Random) -> Problem:
    """A fraction of a number of things."""
    q, part, name, thing = rng.randrange(2, 9), rng.randrange(2, 16), rng.choice(NAMES), rng.choice(THINGS)
    p = rng.randrange(1, q)
    n = q * part
    verb = rng.choice(["gives away", "sells", "loses", "uses"])
    question = f"{name} has {n} {thing}s and {verb} {p}/{q} of them. How many {thing}s are left?"
    steps = [f"1/{q} of {n} is {n} / {q} = {part}.", f"{name} {verb} {p} * {part} = {p * part} {_plural(thing, p * part)}.",
             f"{n} - {p * part} = {n - p * part} {_plural(thing, n - p * part)} are left."]
    return question, steps, str(n - p * part)


def percent(rng: random.Random) -> Problem:
    """A percentage, as a part, a discount or an increase."""
    rate, base = rng.choice([5, 10, 20, 25, 30, 40, 50, 60, 75]), 20 * rng.randrange(1, 26)
    part = rate * base // 100
    steps = [f"{rate}% of {base} is {rate} * {base} / 100 = {part}."]
    form, thing, name = rng.randrange(3), rng.choice(["coat", "bike", "lamp", "desk", "phone", "chair"]), rng.choice(NAMES)
    if form == 0:
        return rng.choice(["What is {r}% of {b}?", "Find {r} percent of {b}."]).format(r=rate, b=base), steps, str(part)
    if form == 1:
        steps.append(f"The new price is {base} - {part} = {base - part} dollars.")
        return f"A {thing} costs {base} dollars. What does it cost after a discount of {rate}%?", steps, str(base - part)
    steps.append(f"The new amount is {base} + {part} = {base + part} dollars.")
    return f"{name} earns {base} dollars and gets a raise of {rate}%. How much does {name} earn now?", steps, str(base + part)


def shopping(rng: random.Random) -> Problem:
    """Two kinds of things at two prices, sometimes with change."""
    (name,), (one, two) = rng.sample(NAMES, 1), _two(rng, THINGS)
    a, b, p, q = rng.randrange(2, 10), rng.randrange(2, 10), rng.randrange(1, 10), rng.randrange(1, 10)
    total = a * p + b * q
    place = rng.choice(PLACES)
    lead = rng.choice([f"At the {place}, {name} buys", f"{name} goes to the {place} and buys", f"{name} buys"])
    money = lambda n: f"{n} " + ("dollar" if n == 1 else "dollars")  # noqa: E731
    question = f"{lead} {a} {one}s at {money(p)} each and {b} {two}s at {money(q)} each."
    steps = [f"The {one}s cost {a} * {p} = {a * p} dollars.", f"The {two}s cost {b} * {q} = {b * q} dollars.",
             f"Together that is {a * p} + {b * q} = {total} dollars."]
    if rng.random() < 0.5:
        paid = (total // 50 + 1) * 50
        steps.append(f"The change is {paid} - {total} = {paid - total} dollars.")
        return f"{question} {name} pays with {paid} dollars. How much change is there?", steps, str(paid - total)
    return f"{question} " + rng.choice(["What is the total?", "How much does it cost?", f"How much does {name} pay?"]), steps, str(total)


def speed(rng: random.Random) -> Problem:
    """Distance, speed and time: any one from the other two."""
    thing, rate, hours = rng.choice(["train", "car", "bus", "boat", "truck", "cyclist"]), 5 * rng.randrange(2, 25), rng.randrange(2, 10)
    far, form = rate * hours, rng.randrange(3)
    if form == 0:
        return (f"A {thing} travels at {rate} km per hour for {hours} hours. How far does it go?",
                ["Distance is speed times time.", f"{rate} * {hours} = {far} km."], str(far))
    if form == 1:
        return (f"A {thing} covers {far} km in {hours} hours. What is its speed in km per hour?",
                ["Speed is distance divided by time.", f"{far} / {hours} = {rate} km per hour."], str(rate))
    return (f"How many hours does a {thing} need for {far} km at {rate} km per hour?",
            ["Time is distance divided by speed.", f"{far} / {rate} = {hours} hours."], str(hours))


def ages(rng: random.Random) -> Problem:
    """How old somebody is, was or will be."""
    (a, b), age, factor, years = _two(rng, NAMES), rng.randrange(3, 15), rng.randrange(2, 5), rng.randrange(2, 13)
    older = age * factor
    if rng.random() < 0.5:
        steps = [f"{b} is {factor} * {age} = {older} years old.", f"In {years} years, {b} will be {older} + {years} = {older + years}."]
        return f"{a} is {age} years old. {b} is {factor} times as old. How old will {b} be in {years} years?", steps, str(older + years)
    steps = [f"{b} is {age} + {years} = {age + years} years old.", f"Together they are {age} + {age + years} = {2 * age + years}."]
    return f"{a} is {age} years old and {b} is {years} years older. What is the sum of their ages?", steps, str(2 * age + years)


def sharing(rng: random.Random) -> Problem:
    """Equal shares, with what is left over."""
    name, thing, n, each = rng.choice(NAMES), rng.choice(THINGS), rng.randrange(2, 13), rng.randrange(2, 16)
    rest = rng.randrange(n) if rng.random() < 0.5 else 0
    total = n * each + rest
    lead = f"{name} shares {total} {thing}s equally among {n} {rng.choice(['friends', 'children', 'bags', 'boxes'])}."
    if rest:
        return (f"{lead} How many {thing}s are left over?",
                [f"{total} / {n} is {each} with a remainder.", f"{n} * {each} = {n * each}.", f"{total} - {n * each} = {rest}."], str(rest))
    return f"{lead} How many does each get?", [f"{total} / {n} = {each}."], str(each)


def inventory(rng: random.Random) -> Problem:
    """Things come and go in two steps."""
    name, thing, start, out, back = rng.choice(NAMES), rng.choice(THINGS), rng.randrange(20, 100), rng.randrange(2, 20), rng.randrange(2, 60)
    lose, gain = rng.choice([("gives away", "finds"), ("sells", "buys"), ("loses", "gets"), ("eats", "receives")] if thing in
                            ("apple", "cookie", "orange", "muffin", "egg", "pear") else
                            [("gives away", "finds"), ("sells", "buys"), ("loses", "gets")])
    left = start - out
    steps = [f"After the first step there are {start} - {out} = {left} {_plural(thing, left)}.", f"Then there are {left} + {back} = {left + back} {thing}s."]
    question = f"{name} has {start} {thing}s, {lose} {out} and then {gain} {back} more. How many {thing}s does {name} have now?"
    return question, steps, str(left + back)


def rectangle(rng: random.Random) -> Problem:
    """Area or perimeter of a rectangle, or a side from the area."""
    w, h, thing = rng.randrange(2, 20), rng.randrange(2, 20), rng.choice(["garden", "room", "field", "rectangle", "table", "wall"])
    form = rng.randrange(3)
    if form == 0:
        return f"A {thing} is {w} m long and {h} m wide. What is its area?", ["The area is length times width.", f"{w} * {h} = {w * h}."], str(w * h)
    if form == 1:
        return (f"A {thing} is {w} m long and {h} m wide. What is its perimeter?",
                [f"The sum of the two sides is {w} + {h} = {w + h}.", f"The perimeter is 2 * {w + h} = {2 * (w + h)}."], str(2 * (w + h)))
    return (f"The area of a {thing} is {w * h} square meters and its length is {w} m. What is its width?",
            ["The width is the area divided by the length.", f"{w * h} / {w} = {h}."], str(h))


def average(rng: random.Random) -> Problem:
    """The mean of three or four numbers; always an integer."""
    n, mean = rng.choice([3, 4]), rng.randrange(5, 40)
    numbers = [mean + rng.randrange(-4, 5) for _ in range(n - 1)]
    numbers.append(n * mean - sum(numbers))
    shown = ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}"
    question = rng.choice(["What is the average of {s}?", "Find the mean of {s}.", "Compute the average of the numbers {s}."])
    steps = [f"The sum is {' + '.join(map(str, numbers))} = {n * mean}.", f"There are {n} numbers: {n * mean} / {n} = {mean}."]
    return question.format(s=shown), steps, str(mean)


def wages(rng: random.Random) -> Problem:
    """Pay per hour, then what is left after an expense, or how long to save."""
    name, rate, hours = rng.choice(NAMES), rng.randrange(8, 26), rng.randrange(3, 11)
    earned = rate * hours
    spent = rng.randrange(5, min(earned, 60))
    job = rng.choice(["at the library", "in a bakery", "as a painter", "in the garden", "at a shop", "as a driver"])
    steps = [f"{name} earns {hours} * {rate} = {earned} dollars.", f"{earned} - {spent} = {earned - spent} dollars are left."]
    return (f"{name} works {hours} hours {job} for {rate} dollars per hour and spends {spent} dollars on food. How much is left?",
            steps, str(earned - spent))


def unit_conversion(rng: random.Random) -> Problem:
    """Between two units whose ratio is an integer."""
    big, small, k = rng.choice([("hours", "minutes", 60), ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7),
                                ("feet", "inches", 12), ("dozens", "eggs", 12), ("meters", "centimeters", 100), ("years", "months", 12)])
    n, rest = rng.randrange(2, 13), rng.randrange(1, min(k, 30))
    if rng.random() < 0.5:
        return f"How many {small} are {n} {big}?", [f"There are {k} {small} in one unit of {big}.", f"{n} * {k} = {n * k}."], str(n * k)
    steps = [f"{n} * {k} = {n * k} {small}.", f"{n * k} + {rest} = {n * k + rest} {small}."]
    return f"How many {small} are {n} {big} and {rest} {small}?", steps, str(n * k + rest)


def comparison(rng: random.Random) -> Problem:
    """How many more, or the total of a chain of comparisons."""
    (a, b), thing, n, more, factor = _two(rng, NAMES), rng.choice(THINGS), rng.randrange(4, 40), rng.randrange(2, 20), rng.randrange(2, 5)
    if rng.random() < 0.5:
        steps = [f"{b} has {n} + {more} = {n + more} {thing}s.", f"Together they have {n} + {n + more} = {2 * n + more} {thing}s."]
        return f"{a} has {n} {thing}s. {b} has {more} more than {a}. How many {thing}s do they have together?", steps, str(2 * n + more)
    steps = [f"{b} has {factor} * {n} = {factor * n} {thing}s.", f"The difference is {factor * n} - {n} = {factor * n - n}."]
    return f"{a} has {n} {thing}s. {b} has {factor} times as many. How many more does {b} have than {a}?", steps, str(factor * n - n)


def power(rng: random.Random) -> Problem:
    """A small power by repeated multiplication."""
    base, exponent = rng.choice([(b, 2) for b in range(2, 21)] + [(b, 3) for b in range(2, 10)] + [(2, e) for e in range(4, 10)])
    steps, value = [], base
    for _ in range(exponent - 1):
        steps.append(f"{value} * {base} = {value * base}.")
        value *= base
    extra = rng.randrange(1, 60)
    steps.append(f"{value} + {extra} = {value + extra}.")
    return rng.choice(["What is {b}^{e} + {x}?", "Compute {b}^{e} + {x}."]).format(b=base, e=exponent, x=extra), steps, str(value + extra)


def rate_of_work(rng: random.Random) -> Problem:
    """Something made per unit of time by several makers."""
    n, rate, hours = rng.randrange(2, 9), rng.randrange(2, 13), rng.randrange(2, 9)
    maker, made = rng.choice([("machine", "bolts"), ("baker", "loaves"), ("printer", "pages"), ("worker", "boxes"), ("robot", "toys")])
    steps = [f"In one hour, {n} {maker}s make {n} * {rate} = {n * rate} {made}.", f"In {hours} hours they make {hours} * {n * rate} = {hours * n * rate} {made}."]
    return f"One {maker} makes {rate} {made} per hour. How many {made} do {n} {maker}s make in {hours} hours?", steps, str(hours * n * rate)


def even_or_factor(rng: random.Random) -> Problem:
    """A yes or no question about divisibility, or a greatest common divisor."""
    if rng.random() < 0.5:
        d, q = rng.randrange(3, 13), rng.randrange(3, 25)
        rest = rng.choice([0, rng.randrange(d)])
        n = d * q + rest
        steps = [f"{d} * {q} = {d * q}.", f"{n} - {d * q} = {rest}, so " + (f"{d} divides {n}." if not rest else f"{d} does not divide {n}.")]
        return f"Is {n} divisible by {d}?", steps, "no" if rest else "yes"
    g, a, b = rng.randrange(2, 13), *rng.choice([(2, 3), (3, 4), (2, 5), (3, 5), (4, 5), (1, 4), (5, 6), (3, 7), (1, 6)])
    steps = [f"{g * a} = {g} * {a}.", f"{g * b} = {g} * {b}.", f"{a} and {b} have no common factor."]
    return f"What is the greatest common divisor of {g * a} and {g * b}?", steps, str(g)


TEMPLATES: tuple[Callable[[random.Random], Problem], ...] = (
    addition, subtraction, multiplication, division, order_of_operations, linear_equation, sequence, fraction_sum,
    fraction_of, percent, shopping, speed, ages, sharing, inventory, rectangle, average, wages, unit_conversion,
    comparison, power, rate_of_work, even_or_factor,
)  # fmt: skip
REQUESTS = ("Show your work.", "Think step by step.", "Explain the steps.", "Please reason step by step.", "Give the steps.")
OPENINGS = ("Let us work it out.", "Step by step:", "Here is the solution.", "We compute it in steps.")


def problem(rng: random.Random) -> tuple[str, str]:
    """One problem as (question, worked answer); the answer's last line is `The answer is N.`."""
    question, steps, answer = rng.choice(TEMPLATES)(rng)
    if rng.random() < 0.4:
        question += " " + rng.choice(REQUESTS)
    opening = [rng.choice(OPENINGS)] if rng.random() < 0.4 else []
    joint = "\n" if rng.random() < 0.7 else " "
    return question, joint.join(opening + steps) + f"\nThe answer is {answer}."
