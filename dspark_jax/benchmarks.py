"""The paper's nine benchmarks: where each comes from, how its rows become prompts, and what the paper reports.

`BENCHMARKS` has one line per benchmark, in the paper's order. `prepare --benchmarks` writes their prompts, `evaluate`
knows a prompt set by its name. Prompts are those of the reference, text for text.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

Row = Mapping[str, Any]
T = TypeVar("T")

DOMAINS = ("math", "code", "chat")
"""In the paper's order."""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A prompt set of the paper.

    Attributes:
      title: as the paper writes it.
      domain: one of `DOMAINS`.
      source: a data set of the hub, as `data.prompts` names it.
      turns: the user's turns of a row of it.
      prompts: number of rows.
    """

    title: str
    domain: str
    source: str
    turns: Callable[[Row], list[str]]
    prompts: int


def _filled(form: str) -> Callable[[Row], list[str]]:
    """One turn: `form` with fields of the row in it."""
    return lambda row: [form.format(**row)]


_REASONED = "\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_TESTED = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n{prompt}\n```"
_PROGRAMMER = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program\n\n### Question:\n{question_content}\n\n### Format: {how}\n```python\n{code}\n```\n\n"
    "### Answer: (use the provided format with backticks)"
)


def _livecodebench(row: Row) -> list[str]:
    code, how = row.get("starter_code"), "Use the following code structure:"
    if not code:
        code, how = "# YOUR CODE HERE", "Write your code in the following format:"
    return [_PROGRAMMER.format(question_content=row["question_content"], how=how, code=code)]


def _alpaca(row: Row) -> list[str]:
    return [f"{row['instruction']}\n\nInput:\n{row['input']}" if row["input"] else row["instruction"]]


def _turns(row: Row) -> list[str]:
    return list(row["prompt"])


_LCB = "hub:livecodebench/code_generation_lite?file=test.jsonl," + ",".join(f"test{n}.jsonl" for n in range(2, 7))
_ARENA = "hub:lmarena-ai/arena-hard-auto?file=data/arena-hard-v2.0/question.jsonl"
_MBPP = "hub:google-research-datasets/mbpp?name=sanitized&split=test"
_QUESTION, _PROBLEM, _PROMPT = (
    _filled(form) for form in ("{question}" + _REASONED, "{problem}" + _REASONED, "{prompt}")
)

BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark("GSM8K", "math", "hub:openai/gsm8k?name=main&split=test", _QUESTION, 1319),
    "math500": Benchmark("MATH500", "math", "hub:HuggingFaceH4/MATH-500?split=test", _PROBLEM, 500),
    "aime25": Benchmark("AIME25", "math", "hub:MathArena/aime_2025?split=train", _PROBLEM, 30),
    "mbpp": Benchmark("MBPP", "code", _MBPP, _PROMPT, 257),
    "humaneval": Benchmark("HumanEval", "code", "hub:openai/openai_humaneval?split=test", _filled(_TESTED), 164),
    "livecodebench": Benchmark("LCB", "code", _LCB, _livecodebench, 1055),
    "mt-bench": Benchmark("MT-Bench", "chat", "hub:HuggingFaceH4/mt_bench_prompts?split=train", _turns, 80),
    "alpaca": Benchmark("Alpaca", "chat", "hub:tatsu-lab/alpaca?split=train", _alpaca, 52002),
    "arena-hard-v2": Benchmark("Arena-Hard", "chat", _ARENA, _PROMPT, 750),
}
"""By the name of the prompt set. LiveCodeBench's files are some GB, because tests are in them."""

TRAINING = {"open-perfectblend": "hub:mlabonne/open-perfectblend"}
"""The prompts that the paper's drafters were trained on, by the name that `data.prompts` may have for them."""

PAPER_TEMPERATURE = 1.0

_PAPER = {
    ("Qwen/Qwen3-4B", "eagle3"): (5.14, 4.62, 3.92, 3.69, 4.16, 3.77, 2.39, 2.26, 2.55),
    ("Qwen/Qwen3-4B", "dflash"): (5.40, 4.85, 4.15, 4.40, 4.74, 4.18, 3.07, 2.96, 2.83),
    ("Qwen/Qwen3-4B", "dspark"): (6.11, 5.70, 4.89, 5.13, 5.38, 4.86, 3.64, 3.54, 3.29),
    ("Qwen/Qwen3-8B", "eagle3"): (5.30, 4.77, 3.91, 3.96, 4.33, 4.17, 2.66, 2.54, 2.54),
    ("Qwen/Qwen3-8B", "dflash"): (5.33, 4.91, 4.07, 4.36, 4.64, 4.39, 3.11, 2.98, 2.81),
    ("Qwen/Qwen3-8B", "dspark"): (6.17, 5.78, 5.01, 5.16, 5.52, 5.17, 3.72, 3.58, 3.21),
    ("Qwen/Qwen3-14B", "eagle3"): (5.24, 4.60, 3.71, 3.81, 4.14, 4.01, 2.62, 2.47, 2.48),
    ("Qwen/Qwen3-14B", "dflash"): (5.41, 4.84, 3.98, 4.44, 4.59, 4.33, 3.10, 2.94, 2.72),
    ("Qwen/Qwen3-14B", "dspark"): (6.21, 5.74, 4.94, 5.26, 5.43, 5.02, 3.70, 3.58, 3.13),
    ("google/gemma-4-12B-it", "eagle3"): (5.87, 5.46, 4.83, 4.72, 5.37, 4.16, 3.19, 3.06, 2.72),
    ("google/gemma-4-12B-it", "dflash"): (5.45, 5.04, 4.22, 4.39, 4.95, 3.70, 2.98, 2.84, 2.59),
    ("google/gemma-4-12B-it", "dspark"): (6.05, 5.78, 5.12, 5.11, 5.64, 4.51, 3.49, 3.35, 2.92),
}
"""Tau of table 1 by target and kind of drafter, in the order of `BENCHMARKS`: temperature 1, all drafts verified."""


def by_domain(sets: Mapping[str, T]) -> dict[str, list[T]]:
    """What belongs to the benchmarks of each domain, of those that there are; prompt sets of other names are left out.

    Args:
      sets: something by the name of the prompt set.
    """
    found = {
        domain: [one for name, one in sets.items() if name in BENCHMARKS and BENCHMARKS[name].domain == domain]
        for domain in DOMAINS
    }
    return {domain: members for domain, members in found.items() if members}


def paper_tau(target: str, drafter: str) -> dict[str, float]:
    """What the paper reports, by benchmark; empty where it reports nothing.

    Args:
      target: id of the model.
      drafter: kind of drafter.
    """
    return dict(zip(BENCHMARKS, _PAPER.get((target, drafter), ()), strict=False))
