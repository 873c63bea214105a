"""Conversations: deterministic, exact in their arithmetic, and split by item."""

import random
import re
from fractions import Fraction
from itertools import islice

import pytest
from tokenizers import Tokenizer

from tests.quickstart.builder.corpus import DOMAINS, conversations, explain, split_of, trim
from tests.quickstart.builder.math_problems import TEMPLATES, problem
from tests.quickstart.builder.prompt_sets import prompt_set
from tests.quickstart.builder.stdlib_items import Function, prose

_EQUATION = re.compile(r"(?<![\w^])((?:\d+ [-+*/] )+\d+) = (-?\d+)\b(?!/)")


@pytest.mark.parametrize("domain", DOMAINS)
def test_same_seed_same_conversations(split, domain):
    first, again, other = (list(islice(conversations(domain, split["train"], seed), 200)) for seed in (3, 3, 4))
    assert first == again != other
    for conversation in first:
        assert len(conversation.messages) in (2, 4)
        assert all(message.strip() for message in conversation.messages)


@pytest.mark.parametrize("domain", DOMAINS)
def test_prompt_sets_are_deterministic(split, target_folder, domain):
    """Here, where the corpus has been read."""
    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    one, two = (prompt_set(tokenizer, split["heldout"], domain, 20, seed=9) for _ in range(2))
    assert one == two and len(set(one)) == 20


def test_unknown_domain_is_refused(split):
    with pytest.raises(ValueError, match="'poetry': one of math, code, chat"):
        next(conversations("poetry", split["train"], 0))


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.__name__)
def test_every_step_of_a_problem_is_true(template):
    rng = random.Random(0)
    for _ in range(200):
        question, steps, answer = template(rng)
        assert "{" not in question and answer
        for step in steps:
            for left, right in _EQUATION.findall(step):
                assert eval(left) == Fraction(right), step  # digits and operators only, by the pattern


def test_answers_end_in_the_result():
    rng = random.Random(1)
    for _ in range(200):
        assert re.search(r"\nThe answer is \S+\.$", problem(rng)[1])


def test_items_of_the_splits_are_disjoint(split):
    train, held = split["train"], split["heldout"]
    assert not {e.subject for e in train.explanations} & {e.subject for e in held.explanations}
    assert not {e.paragraphs[0] for e in train.explanations} & {e.paragraphs[0] for e in held.explanations}
    assert not {f.head for f in train.functions} & {f.head for f in held.functions}
    assert not {f.code for f in train.functions} & {f.code for f in held.functions}
    assert not set(train.summaries) & set(held.summaries)
    assert len(held.functions) > 128 and len(held.explanations) > 128


def test_split_does_not_depend_on_the_process():
    assert [split_of(f"item {i}") for i in range(40)].count("heldout") == 3
    assert split_of("What is 7 + 8?") == "train"


def test_functions_are_whole(split):
    rng = random.Random(2)
    for function in rng.sample(split["train"].functions, 300):
        compile(function.code, function.name, "exec")
        assert function.code.startswith(("def ", "async def "))


def test_docstring_is_quoted_as_source():
    function = Function("m", "f", "def f(x):", "One.\nTwo.", "    return x")
    assert function.code == 'def f(x):\n    """One.\n    Two.\n    """\n    return x'


def test_prose_keeps_sentences_and_drops_the_rest():
    text = """Return the thing that
    was asked for, if there is one.

    >>> f(1)
    2

       indented code here, left out.

    A last paragraph, which is kept.
    """
    assert prose(text) == ("Return the thing that was asked for, if there is one.", "A last paragraph, which is kept.")


def test_trim_ends_on_a_sentence():
    text = "One is here. Two (e.g. this) follows. Three is long."
    assert trim(text, 40) == "One is here. Two (e.g. this) follows."
    assert trim(text, 5) == ""
    assert trim(text, 500) == text


def test_explanations_fit_an_answer(split):
    rng = random.Random(5)
    for item in rng.sample(split["train"].explanations, 300):
        conversation = explain(rng, item)
        if conversation is not None:
            assert 20 < len(conversation.messages[1]) < 700
