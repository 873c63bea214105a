"""Generated word problems with worked steps: shopping, speed, ages, shares and the like.

Every template takes a `random.Random` and returns (question, steps, answer).
"""

import random

from tests.quickstart.builder.arithmetic import Problem

NAMES = [
    "Ada",
    "Ben",
    "Carla",
    "Dan",
    "Elena",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jonas",
    "Kim",
    "Lena",
    "Marco",
    "Nadia",
    "Oscar",
    "Petra",
    "Quinn",
    "Rosa",
    "Sam",
    "Tara",
    "Umar",
    "Vera",
    "Will",
    "Yuki",
    "Zoe",
    "Alice",
    "Bob",
    "Chen",
    "Dora",
    "Emil",
]
THINGS = [
    "apple",
    "pencil",
    "book",
    "ticket",
    "marble",
    "cookie",
    "stamp",
    "coin",
    "sticker",
    "card",
    "orange",
    "shell",
    "button",
    "candle",
    "notebook",
    "muffin",
    "balloon",
    "flower",
    "egg",
    "cup",
    "pear",
    "plate",
    "ribbon",
    "postcard",
]
PLACES = ["shop", "market", "fair", "bakery", "garden", "library", "school", "farm", "museum", "kiosk"]


def _plural(thing: str, count: int) -> str:
    return thing if count == 1 else thing + "s"


def _two(rng: random.Random, pool: list[str]) -> list[str]:
    return rng.sample(pool, 2)


def fraction_of(rng: random.Random) -> Problem:
    """A fraction of a number of things."""
    q, part, name, thing = rng.randrange(2, 9), rng.randrange(2, 16), rng.choice(NAMES), rng.choice(THINGS)
    p = rng.randrange(1, q)
    n = q * part
    verb = rng.choice(["gives away", "sells", "loses", "uses"])
    question = f"{name} has {n} {thing}s and {verb} {p}/{q} of them. How many {thing}s are left?"
    steps = [
        f"1/{q} of {n} is {n} / {q} = {part}.",
        f"{name} {verb} {p} * {part} = {p * part} {_plural(thing, p * part)}.",
        f"{n} - {p * part} = {n - p * part} {_plural(thing, n - p * part)} are left.",
    ]
    return question, steps, str(n - p * part)


def percent(rng: random.Random) -> Problem:
    """A percentage, as a part, a discount or an increase."""
    rate, base = rng.choice([5, 10, 20, 25, 30, 40, 50, 60, 75]), 20 * rng.randrange(1, 26)
    part = rate * base // 100
    steps = [f"{rate}% of {base} is {rate} * {base} / 100 = {part}."]
    form, thing, name = (
        rng.randrange(3),
        rng.choice(["coat", "bike", "lamp", "desk", "phone", "chair"]),
        rng.choice(NAMES),
    )
    if form == 0:
        return rng.choice(["What is {r}% of {b}?", "Find {r} percent of {b}."]).format(r=rate, b=base), steps, str(part)
    if form == 1:
        steps.append(f"The new price is {base} - {part} = {base - part} dollars.")
        return (
            f"A {thing} costs {base} dollars. What does it cost after a discount of {rate}%?",
            steps,
            str(base - part),
        )
    steps.append(f"The new amount is {base} + {part} = {base + part} dollars.")
    return (
        f"{name} earns {base} dollars and gets a raise of {rate}%. How much does {name} earn now?",
        steps,
        str(base + part),
    )


def shopping(rng: random.Random) -> Problem:
    """Two kinds of things at two prices, sometimes with change."""
    (name,), (one, two) = rng.sample(NAMES, 1), _two(rng, THINGS)
    a, b, p, q = rng.randrange(2, 10), rng.randrange(2, 10), rng.randrange(1, 10), rng.randrange(1, 10)
    total = a * p + b * q
    place = rng.choice(PLACES)
    lead = rng.choice([f"At the {place}, {name} buys", f"{name} goes to the {place} and buys", f"{name} buys"])
    question = (
        f"{lead} {a} {one}s at {p} {_plural('dollar', p)} each and {b} {two}s at {q} {_plural('dollar', q)} each."
    )
    steps = [
        f"The {one}s cost {a} * {p} = {a * p} dollars.",
        f"The {two}s cost {b} * {q} = {b * q} dollars.",
        f"Together that is {a * p} + {b * q} = {total} dollars.",
    ]
    if rng.random() < 0.5:
        paid = (total // 50 + 1) * 50
        steps.append(f"The change is {paid} - {total} = {paid - total} dollars.")
        return f"{question} {name} pays with {paid} dollars. How much change is there?", steps, str(paid - total)
    return (
        f"{question} " + rng.choice(["What is the total?", "How much does it cost?", f"How much does {name} pay?"]),
        steps,
        str(total),
    )


def speed(rng: random.Random) -> Problem:
    """Distance, speed and time: any one from the other two."""
    thing, rate, hours = (
        rng.choice(["train", "car", "bus", "boat", "truck", "cyclist"]),
        5 * rng.randrange(2, 25),
        rng.randrange(2, 10),
    )
    far, form = rate * hours, rng.randrange(3)
    if form == 0:
        return (
            f"A {thing} travels at {rate} km per hour for {hours} hours. How far does it go?",
            ["Distance is speed times time.", f"{rate} * {hours} = {far} km."],
            str(far),
        )
    if form == 1:
        return (
            f"A {thing} covers {far} km in {hours} hours. What is its speed in km per hour?",
            ["Speed is distance divided by time.", f"{far} / {hours} = {rate} km per hour."],
            str(rate),
        )
    return (
        f"How many hours does a {thing} need for {far} km at {rate} km per hour?",
        ["Time is distance divided by speed.", f"{far} / {rate} = {hours} hours."],
        str(hours),
    )


def ages(rng: random.Random) -> Problem:
    """How old somebody is, was or will be."""
    (a, b), age, factor, years = _two(rng, NAMES), rng.randrange(3, 15), rng.randrange(2, 5), rng.randrange(2, 13)
    older = age * factor
    if rng.random() < 0.5:
        steps = [
            f"{b} is {factor} * {age} = {older} years old.",
            f"In {years} years, {b} will be {older} + {years} = {older + years}.",
        ]
        return (
            f"{a} is {age} years old. {b} is {factor} times as old. How old will {b} be in {years} years?",
            steps,
            str(older + years),
        )
    steps = [
        f"{b} is {age} + {years} = {age + years} years old.",
        f"Together they are {age} + {age + years} = {2 * age + years}.",
    ]
    return (
        f"{a} is {age} years old and {b} is {years} years older. What is the sum of their ages?",
        steps,
        str(2 * age + years),
    )


def sharing(rng: random.Random) -> Problem:
    """Equal shares, with what is left over."""
    name, thing, n, each = rng.choice(NAMES), rng.choice(THINGS), rng.randrange(2, 13), rng.randrange(2, 16)
    rest = rng.randrange(n) if rng.random() < 0.5 else 0
    total = n * each + rest
    lead = f"{name} shares {total} {thing}s equally among {n} {rng.choice(['friends', 'children', 'bags', 'boxes'])}."
    if rest:
        return (
            f"{lead} How many {thing}s are left over?",
            [
                f"{total} / {n} is {each} with a remainder.",
                f"{n} * {each} = {n * each}.",
                f"{total} - {n * each} = {rest}.",
            ],
            str(rest),
        )
    return f"{lead} How many does each get?", [f"{total} / {n} = {each}."], str(each)


def inventory(rng: random.Random) -> Problem:
    """Things come and go in two steps."""
    name, thing, start, out, back = (
        rng.choice(NAMES),
        rng.choice(THINGS),
        rng.randrange(20, 100),
        rng.randrange(2, 20),
        rng.randrange(2, 60),
    )
    lose, gain = rng.choice(
        [("gives away", "finds"), ("sells", "buys"), ("loses", "gets"), ("eats", "receives")]
        if thing in ("apple", "cookie", "orange", "muffin", "egg", "pear")
        else [("gives away", "finds"), ("sells", "buys"), ("loses", "gets")]
    )
    left = start - out
    steps = [
        f"After the first step there are {start} - {out} = {left} {_plural(thing, left)}.",
        f"Then there are {left} + {back} = {left + back} {thing}s.",
    ]
    question = f"{name} has {start} {thing}s, {lose} {out} and then {gain} {back} more."
    question += f" How many {thing}s does {name} have now?"
    return question, steps, str(left + back)


def rectangle(rng: random.Random) -> Problem:
    """Area or perimeter of a rectangle, or a side from the area."""
    w, h, thing = (
        rng.randrange(2, 20),
        rng.randrange(2, 20),
        rng.choice(["garden", "room", "field", "rectangle", "table", "wall"]),
    )
    form = rng.randrange(3)
    if form == 0:
        return (
            f"A {thing} is {w} m long and {h} m wide. What is its area?",
            ["The area is length times width.", f"{w} * {h} = {w * h}."],
            str(w * h),
        )
    if form == 1:
        return (
            f"A {thing} is {w} m long and {h} m wide. What is its perimeter?",
            [f"The sum of the two sides is {w} + {h} = {w + h}.", f"The perimeter is 2 * {w + h} = {2 * (w + h)}."],
            str(2 * (w + h)),
        )
    return (
        f"The area of a {thing} is {w * h} square meters and its length is {w} m. What is its width?",
        ["The width is the area divided by the length.", f"{w * h} / {w} = {h}."],
        str(h),
    )


def wages(rng: random.Random) -> Problem:
    """Pay per hour, then what is left after an expense, or how long to save."""
    name, rate, hours = rng.choice(NAMES), rng.randrange(8, 26), rng.randrange(3, 11)
    earned = rate * hours
    spent = rng.randrange(5, min(earned, 60))
    job = rng.choice(["at the library", "in a bakery", "as a painter", "in the garden", "at a shop", "as a driver"])
    steps = [
        f"{name} earns {hours} * {rate} = {earned} dollars.",
        f"{earned} - {spent} = {earned - spent} dollars are left.",
    ]
    question = f"{name} works {hours} hours {job} for {rate} dollars per hour and spends {spent} dollars on food."
    return question + " How much is left?", steps, str(earned - spent)


def comparison(rng: random.Random) -> Problem:
    """How many more, or the total of a chain of comparisons."""
    (a, b), thing, n, more, factor = (
        _two(rng, NAMES),
        rng.choice(THINGS),
        rng.randrange(4, 40),
        rng.randrange(2, 20),
        rng.randrange(2, 5),
    )
    if rng.random() < 0.5:
        steps = [
            f"{b} has {n} + {more} = {n + more} {thing}s.",
            f"Together they have {n} + {n + more} = {2 * n + more} {thing}s.",
        ]
        return (
            f"{a} has {n} {thing}s. {b} has {more} more than {a}. How many {thing}s do they have together?",
            steps,
            str(2 * n + more),
        )
    steps = [
        f"{b} has {factor} * {n} = {factor * n} {thing}s.",
        f"The difference is {factor * n} - {n} = {factor * n - n}.",
    ]
    return (
        f"{a} has {n} {thing}s. {b} has {factor} times as many. How many more does {b} have than {a}?",
        steps,
        str(factor * n - n),
    )


def rate_of_work(rng: random.Random) -> Problem:
    """Something made per unit of time by several makers."""
    n, rate, hours = rng.randrange(2, 9), rng.randrange(2, 13), rng.randrange(2, 9)
    maker, made = rng.choice(
        [("machine", "bolts"), ("baker", "loaves"), ("printer", "pages"), ("worker", "boxes"), ("robot", "toys")]
    )
    steps = [
        f"In one hour, {n} {maker}s make {n} * {rate} = {n * rate} {made}.",
        f"In {hours} hours they make {hours} * {n * rate} = {hours * n * rate} {made}.",
    ]
    return (
        f"One {maker} makes {rate} {made} per hour. How many {made} do {n} {maker}s make in {hours} hours?",
        steps,
        str(hours * n * rate),
    )
