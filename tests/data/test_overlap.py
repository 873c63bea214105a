from dspark_jax.data.overlap import compare, describe
from dspark_jax.data.prompts import Prompt

FORM = "\nPlease reason step by step, and put your final answer within \\boxed{}."
QUESTION = "Tom has 12 apples and gives 5 of them to his sister, who eats 2. How many apples are left in the end?"


def prompts(*texts: str, name: str = "heldout") -> list[Prompt]:
    return [
        Prompt(({"role": "user", "content": text},), name, f"{name}.jsonl", number)
        for number, text in enumerate(texts, start=1)
    ]


def test_prompts_are_the_same_word_for_word_or_nearly():
    held_out = prompts(QUESTION, "What is 3 + 4?", "What is 3 - 4?", "Say hello", "nothing like it at all, never")
    training = prompts(
        "tom has 12 apples and gives 5 of them to his sister, who eats 3. How many apples are left in the end?",
        "what is  3 + 4 ?\n",
        "say HELLO",
        name="train",
    )
    found = compare(held_out, training)
    assert (found["prompts"], found["exact"], found["near"], found["share"]) == (5, 2, 1, 0.6)
    assert found["sets"] == {"heldout": {"prompts": 5, "exact": 2, "near": 1}}
    assert [(one["line"], one["training_line"], round(one["common"], 2)) for one in found["pairs"]] == [
        (1, 1, 0.77),  # 17 of 22 runs: the five with the changed number are not there
        (2, 2, 1.0),
        (4, 3, 1.0),
    ]
    assert found["pairs"][0]["file"] == "heldout.jsonl" and found["pairs"][0]["training_file"] == "train.jsonl"
    assert describe(found) == "3 of 5 held-out prompts (60.0%): 2 word for word, 1 nearly"


def test_the_most_alike_is_named_and_every_prompt_counts_once():
    training = prompts(QUESTION.replace("12", "13"), QUESTION, QUESTION, name="train")
    (pair,) = compare(prompts(QUESTION), training)["pairs"]
    assert (pair["training_line"], pair["common"]) == (2, 1.0)


def test_an_instruction_that_all_prompts_end_with_is_no_likeness():
    questions = [f"{word} sum{FORM}" for word in ("a", "b", "c", "d")]
    other = prompts(f"Something else entirely?{FORM}", name="train")
    assert compare(prompts(*questions), other)["near"] == 0
    assert compare(prompts(*questions), prompts(questions[1], name="train"))["exact"] == 1
    assert compare(prompts(*questions[:1]), other)["near"] == 1  # of one prompt nobody can tell


def test_all_that_the_user_says_is_compared_and_an_exact_one_needs_all_of_it():
    two = Prompt(tuple({"role": "user", "content": text} for text in ("one", "two")), "heldout", "f", 1)
    assert compare([two], prompts("one two"))["exact"] == 1
    assert compare([two], prompts("one"))["exact"] == 0
    assert compare([Prompt((), "heldout", "f", 1, tokens=((1,), (1,)))], prompts("", name="train"))["exact"] == 0
    long, longer = prompts("a b c d e f g"), prompts("a b c d e f g h i", name="train")
    (pair,) = compare(long, longer)["pairs"]
    assert pair["common"] == 0.99  # a part of it: not word for word
