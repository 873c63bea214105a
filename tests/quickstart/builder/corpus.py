"""The conversations the embedded model is trained on: math, code and chat, split into train and held-out by item.

Pure and deterministic for a given seed and CPython version. An item (a function, an explanation, a problem's text) is
held out by a hash of its text, so every copy of it in the standard library falls on the same side.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.quickstart.builder.math_problems import problem
from tests.quickstart.builder.stdlib_items import MAX_PROSE, Explanation, Function, library_items

DOMAINS = ("math", "code", "chat")
SPLITS = ("train", "heldout")
HELD_OUT_PERCENT = 7


@dataclass(frozen=True)
class Conversation:
    """Alternating user and assistant messages, the user first; `domain` is one of `DOMAINS`."""

    domain: str
    messages: tuple[str, ...]

    @property
    def turns(self) -> tuple[str, ...]:
        """The user's messages."""
        return self.messages[::2]


def split_of(text: str) -> str:
    """`train` or `heldout`, by a hash that does not depend on the process or platform."""
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT else "train"


def _key(text: str) -> str:
    """Letters and digits of the beginning: equal for a docstring however it is wrapped."""
    return re.sub(r"[^a-z0-9]", "", text.lower())[:80]


@dataclass(frozen=True)
class Library:
    """The standard library's items of one split."""

    split: str
    functions: tuple[Function, ...]
    explanations: tuple[Explanation, ...]
    summaries: dict[str, tuple[tuple[str, str], ...]] = field(repr=False)  # module -> ((name, one line), ...)


def libraries() -> dict[str, Library]:
    """Both splits, disjoint in docstrings, code and the names that questions use."""
    by_split: dict[str, tuple[list[Function], list[Explanation]]] = {split: ([], []) for split in SPLITS}
    functions, explanations = library_items()
    for function in functions:
        by_split[split_of(_key(function.doc)) if function.doc else "train"][0].append(function)
    for item in explanations:
        by_split[split_of(_key(item.paragraphs[0]))][1].append(item)
    held_functions, held_explanations = by_split["heldout"]
    held_code = {_key_code(f) for f in held_functions}
    held_names = {(f.module, f.name) for f in held_functions}
    held_subjects = {item.subject for item in held_explanations}
    train_functions = [
        f for f in by_split["train"][0] if _key_code(f) not in held_code and (f.module, f.name) not in held_names
    ]
    train_explanations = [item for item in by_split["train"][1] if item.subject not in held_subjects]
    summaries = _summaries(train_functions)
    return {
        "train": Library("train", tuple(train_functions), tuple(train_explanations), _modules(summaries, "train")),
        "heldout": Library("heldout", tuple(held_functions), tuple(held_explanations), _modules(summaries, "heldout")),
    }


def _key_code(function: Function) -> str:
    return "".join((function.signature + function.body).split())


def _summaries(items: list[Function]) -> dict[str, tuple[tuple[str, str], ...]]:
    """One-line docstrings by module, for modules with enough of them to choose from."""
    found: dict[str, dict[str, str]] = {}
    for function in items:
        line = " ".join(function.doc.split())
        if 15 < len(line) < 110 and line.endswith(".") and not function.name.split(".")[-1].startswith("_"):
            found.setdefault(function.module, {})[function.name] = line
    return {module: tuple(names.items()) for module, names in found.items() if len(names) >= 4}


def _modules(summaries: dict[str, tuple[tuple[str, str], ...]], split: str) -> dict[str, tuple[tuple[str, str], ...]]:
    return {module: entries for module, entries in summaries.items() if split_of("module " + module) == split}


# ---------------------------------------------------------------- math


def math_conversation(rng: random.Random, split: str) -> Conversation:
    """One problem, two problems at once, or two turns; every question belongs to `split`."""

    def ask() -> tuple[str, str]:
        while True:
            question, answer = problem(rng)
            if split_of(question) == split:
                return question, answer

    form = rng.random()
    if form < 0.65:
        return Conversation("math", ask())
    (q1, a1), (q2, a2) = ask(), ask()
    if form < 0.82:
        follow = rng.choice(["And now: {q}", "Next question: {q}", "Thanks. {q}", "{q}", "Good. Now this one: {q}"])
        return Conversation("math", (q1, a1, follow.format(q=q2), a2))
    lead = rng.choice(["Answer both questions.", "Two problems:", "Solve these."])
    return Conversation("math", (f"{lead}\n1. {q1}\n2. {q2}", f"1. {a1}\n2. {a2}"))


# ---------------------------------------------------------------- code

COMPLETE = (
    "Complete this {what} of `{where}`.",
    "Complete the following {what}, from `{where}`:",
    "Here is the beginning of a {what} from `{where}`. Write it in full.",
    "Finish this {what} (`{where}`).",
    "Write the whole {what} from its signature and docstring. It belongs to `{where}`.",
)
IMPLEMENT = (
    "Implement this {what} of `{where}`, without its docstring.",
    "Give only the code, no docstring, of this {what} from `{where}`:",
    "Write the code of this {what} (`{where}`) and leave out the docstring.",
)
UNDOCUMENTED = (
    "Write the {what} `{name}` of `{where}`.",
    "How is `{name}` of `{where}` written?",
    "Show me the code of the {what} `{name}` in `{where}`.",
)


def _fence(code: str) -> str:
    return f"```python\n{code}\n```"


def code_conversation(rng: random.Random, function: Function) -> Conversation:
    """Signature and docstring (or only the name) in, the whole function out."""
    owner, _, short = function.name.rpartition(".")
    what = "method" if owner else "function"
    where = f"{function.module}.{owner}" if owner else function.module
    if not function.doc or rng.random() < 0.06:
        ask = rng.choice(UNDOCUMENTED).format(what=what, where=where, name=short)
        if rng.random() < 0.5:
            ask += "\n" + _fence(function.signature)
        return Conversation("code", (ask, _fence(function.code)))
    if rng.random() < 0.1:
        doc = " ".join(function.doc.split())
        first = rng.choice(["What does the {what} `{name}` of `{where}` do?", "What is `{name}` in `{where}` for?"])
        second = rng.choice(["Show me the code.", "How is it implemented?", "Write it for me."])
        return Conversation(
            "code", (first.format(what=what, name=short, where=where), doc, second, _fence(function.code))
        )
    if rng.random() < 0.65:
        lead, answer = rng.choice(COMPLETE), function.code
    else:
        lead, answer = rng.choice(IMPLEMENT), function.signature + "\n" + function.body
    return Conversation("code", (f"{lead.format(what=what, where=where)}\n{_fence(function.head)}", _fence(answer)))


# ---------------------------------------------------------------- chat

QUESTIONS = {
    "function": ("What does {s} do?", "Explain the function {s}.", "How does {s} work?", "What is {s} good for?",
                 "When would I use {s}?", "Tell me about the function {s} in Python.", "Describe {s}."),
    "method": ("What does {s} do?", "Explain the method {s} in `{c}`.", "How does {s} of `{c}` work?",
               "What is {s} in `{c}` for?", "Describe the method {s}."),
    "class": ("What is {s}?", "Explain the class {s}.", "What is the class {s} for?", "Describe {s} to me.",
              "When would I use {s} in Python?", "Tell me about {s}."),
    "module": ("What is the module {s} for?", "Tell me about the Python module {s}.", "What does {s} provide?",
               "Explain what the {s} module does.", "Give me an overview of {s}."),
    "section": ('Explain "{s}" in Python.', 'What should I know about "{s}" in Python?', 'Tell me about "{s}".',
                'How does Python define "{s}"?', 'I am learning Python. What is "{s}" about?'),
}  # fmt: skip
OPENERS = {
    "function": ("", "", "", "", "{s} is a function. ", "This function does the following. ", "In short: "),
    "method": ("", "", "", "", "This is a method of `{c}`. ", "In short: ", "The method {s} does this: "),
    "class": ("", "", "", "", "{s} is a class. ", "It is a class in `{c}`. ", "In short: "),
    "module": ("", "", "", "", "{s} is a module of the standard library. ", "In short: "),
    "section": ("", "", "", "", "In Python, this works as follows. ", "In short: "),
}
OVERVIEWS = (
    "What can I do with `{m}`?",
    "Name a few things that `{m}` offers.",
    "Which functions of `{m}` should I know?",
    "Give me some examples of what `{m}` can do.",
    "List a few functions or methods of `{m}`.",
)
MORE = ("Tell me more.", "And what else?", "Go on, please.", "Can you say more about it?", "Is there more to know?")


def trim(text: str, limit: int) -> str:
    """The longest run of whole sentences within `limit` characters, at least one sentence."""
    if len(text) <= limit:
        return text
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s+[A-Z`*'\"(]|\s*\n|$)", text)]
    fitting = [end for end in ends if end <= limit]
    return text[: fitting[-1]] if fitting else ""


def _hint(item: Explanation, rng: random.Random) -> str:
    """What sets this piece of a long section apart: a term in backticks that it uses."""
    terms = sorted({t for t in re.findall(r"`([^`]+)`", " ".join(item.paragraphs)) if t not in item.subject})
    return f" I mean the part about `{rng.choice(terms)}`." if terms and rng.random() < 0.7 else ""


def explain(rng: random.Random, item: Explanation) -> Conversation | None:
    """A question about one subject and its explanation; the rest of a long one as a second turn."""
    text = "\n\n".join(item.paragraphs)
    answer = trim(text, MAX_PROSE if rng.random() < 0.7 else rng.randrange(150, MAX_PROSE))
    if not answer:
        return None
    context = item.context or "Python"
    ask = rng.choice(QUESTIONS[item.kind]).format(s=item.subject, c=context)
    if item.kind == "section":
        if item.context and item.context != item.subject and rng.random() < 0.5:
            ask += f' It belongs to "{item.context}".'
        ask += _hint(item, rng)
    opener = rng.choice(OPENERS[item.kind]).format(s=item.subject, c=context)
    messages = (ask, opener + answer)
    rest = trim(text[len(answer) :].strip(), 400)
    if len(rest) > 60 and rng.random() < 0.7:
        messages += (rng.choice(MORE), rest)
    return Conversation("chat", messages)


def overview(rng: random.Random, library: Library) -> Conversation:
    """What a module offers: a few of its functions, freely chosen, with one line each."""
    module = rng.choice(sorted(library.summaries))
    entries = library.summaries[module]
    chosen = rng.sample(entries, min(len(entries), rng.randrange(3, 6)))
    ask = rng.choice(OVERVIEWS)
    lead = rng.choice(["Here are some of them:", "For example:", f"`{module}` has, among others:", "Some examples:"])
    return Conversation(
        "chat", (ask.format(m=module), "\n".join([lead, *(f"- `{name}`: {line}" for name, line in chosen)]))
    )


def compare(rng: random.Random, library: Library) -> Conversation | None:
    """Two subjects of one kind side by side."""
    kind = rng.choice(["function", "method", "class", "module"])
    pool = [item for item in library.explanations if item.kind == kind]
    one, two = rng.sample(pool, 2)
    a, b = (trim(" ".join(item.paragraphs), 260) for item in (one, two))
    if not a or not b or one.subject == two.subject:
        return None
    ask = rng.choice(["What are {a} and {b}?", "Compare {a} and {b}.", "What is the difference between {a} and {b}?",
                      "Explain {a} and then {b}."]).format(a=one.subject, b=two.subject)  # fmt: skip
    joint = rng.choice(["\n\n", "\n\nThe other one is different. ", f"\n\nAs for {two.subject}: "])
    return Conversation("chat", (ask, f"{one.subject}: {a}{joint}{b}"))


# ---------------------------------------------------------------- streams


def conversations(domain: str, library: Library, seed: int) -> Iterator[Conversation]:
    """An endless stream of one domain: fresh problems for math; for code and chat, epochs over the items, each item
    phrased in another way every time.
    """
    rng = random.Random(f"{seed} {domain} {library.split}")
    while domain == "math":
        yield math_conversation(rng, library.split)
    while domain == "code":
        for function in rng.sample(library.functions, len(library.functions)):
            if function.doc or rng.random() < 0.6:  # undocumented functions are many and tell little
                yield code_conversation(rng, function)
    while domain == "chat":
        for item in rng.sample(library.explanations, len(library.explanations)):
            form = rng.random()
            found = explain(rng, item)
            if form < 0.25:
                if library.summaries:
                    yield overview(rng, library)
            elif form < 0.4:
                found = compare(rng, library) or found
            if found is not None:
                yield found
    raise ValueError(f"unknown domain {domain!r}: one of {', '.join(DOMAINS)}")


def documented(library: Library) -> Library:
    """Only the functions with a docstring, and no private modules: what the prompt sets ask for."""
    kept = tuple(f for f in library.functions if f.doc and f.module[0] != "_")
    return Library(library.split, kept, library.explanations, library.summaries)
