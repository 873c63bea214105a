"""Conversations to samples: what is kept, what is set aside, and the counts of both."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.config import DataConfig
from dspark_jax.data.chat import (
    ChatError,
    answer_text,
    answered_tokens,
    encode,
    prompt_tokens,
    render,
    thoughts_cut,
    tokens_and_mask,
    with_system,
)
from dspark_jax.data.prompts import Malformed, Prompt
from dspark_jax.data.regenerate import Answered, Rejected
from dspark_jax.data.sources import Sample
from dspark_jax.tokenizer import ChatTokenizer

REASONS = {
    "malformed": "malformed line",
    "tools": "with tools",
    "reasoning": "with reasoning",
    "template": "refused by the chat template",
    "prompt_too_long": "prompt too long",
    "empty_answer": "empty answer",
    "unanswered": "without an answer",
    "too_few_loss_tokens": "too few supervised tokens",
}
"""Why a line or conversation gives no sample: the word in `rejected.jsonl` and in the report, and what is shown."""


class Tally:
    """Counts of a preparation, and the file in which everything that gives no sample is set aside.

    Attributes:
      rejected: number of lines and conversations set aside, by reason.
      counts: cut_answers (ran into the length limit), shortened (later turns are missing), split_differently (the text
        of the answer tokenises to other ids than those that were generated), thoughts_cut (the chat template leaves
        think blocks of answers out, as it does when the target is asked).
      unused: number of prompts that have a field which is not used, by its name.
      prompt_sets: samples, tokens and loss_tokens of each prompt set.
    """

    def __init__(self, path: Path):
        """Starts an empty file at `path`."""
        self.rejected: Counter[str] = Counter()
        self.counts: Counter[str] = Counter(cut_answers=0, shortened=0, split_differently=0, thoughts_cut=0)
        self.unused: Counter[str] = Counter()
        self.prompt_sets: dict[str, Counter[str]] = {}
        self._file = path.open("w", encoding="utf-8")

    def malformed(self, line: Malformed) -> None:
        """Sets aside a line of a prompt file."""
        self._put(line.kind, {"file": line.file, "line": line.line, "detail": line.reason, "text": line.text})

    def reject(self, sample_id: int, prompt: Prompt, error: Rejected) -> None:
        """Sets aside a conversation."""
        messages = [dict(message) for message in prompt.messages]
        where = {"file": prompt.file, "line": prompt.line, "sample_id": sample_id}
        self._put(error.reason, {**where, "detail": str(error), "messages": messages})

    def read(self, prompts: Iterable[Prompt]) -> None:
        """Counts fields of prompts that are not used."""
        for prompt in prompts:
            self.unused.update(prompt.unused)

    def add(self, sample: Sample) -> None:
        """Counts a sample."""
        counts = self.prompt_sets.setdefault(sample.prompt_set, Counter())
        counts.update(samples=1, tokens=len(sample.tokens), loss_tokens=int(sample.loss_mask.sum()))

    def report(self) -> dict[str, Any]:
        """All counts, JSON-able."""
        totals = sum(self.prompt_sets.values(), Counter())
        sets = {name: dict(counts) for name, counts in self.prompt_sets.items()}
        counts = {"rejected": dict(self.rejected), **self.counts, "unused": dict(self.unused)}
        return {**totals, **counts, "prompt_sets": sets}

    def _put(self, reason: str, entry: dict[str, Any]) -> None:
        self.rejected[reason] += 1
        self._file.write(json.dumps({"reason": reason, **entry}, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def describe(rejected: dict[str, int]) -> str:
    """Counts by reason in words, e.g. "2 malformed line, 1 empty answer"."""
    return ", ".join(f"{count} {REASONS[reason]}" for reason, count in rejected.items()) or "none"


def describe_unused(unused: Mapping[str, int]) -> str:
    """Fields of prompts that are not used in words: names and numbers of prompts, as `Tally.unused` counts them."""
    names = ", ".join(f"`{name}` of {count}" for name, count in unused.items())
    return f"fields of prompts that are not used: {names}"


def answered_samples(
    tokenizer: ChatTokenizer, answered: Iterable[Answered], config: DataConfig, tally: Tally
) -> Iterator[Sample]:
    """Samples of conversations that the target has answered, with the very ids that it generated."""
    for item in answered:
        tally.counts.update(cut_answers=int(item.cut), shortened=int(bool(item.shortened)))

        def tokens(item: Answered = item) -> tuple[list[int], list[int]]:
            ids, mask = answered_tokens(tokenizer, item.messages, item.answer.tolist())
            if not item.cut:
                full = [*item.messages, {"role": "assistant", "content": answer_text(tokenizer, item.answer.tolist())}]
                again = encode(tokenizer, render(tokenizer, full))["input_ids"]
                tally.counts["split_differently"] += int(again != ids)
            return ids, mask

        yield from _sample(item.conversation.sample_id, item.conversation.prompt, tokens, config, tally)


def given_samples(
    tokenizer: ChatTokenizer, prompts: Sequence[Prompt], config: DataConfig, tally: Tally
) -> Iterator[Sample]:
    """Samples of conversations with the answers that their files bring along."""
    for sample_id, prompt in enumerate(prompts):

        def tokens(prompt: Prompt = prompt) -> tuple[list[int], list[int]]:
            messages = with_system(prompt.messages, config.system_prompt)
            if messages[-1]["role"] != "assistant":
                raise Rejected("unanswered", "the last message is not the assistant's, and data.regenerate is off")
            if prompt.reasoning:
                raise Rejected(
                    "reasoning",
                    f"it has `{prompt.reasoning}`, and answers are trained without thinking; take it out if they are "
                    "answers without it (with data.regenerate=True the target answers itself, without thinking)",
                )
            if not messages[-1]["content"].strip():
                raise Rejected("empty_answer", "the last answer is empty")
            length = len(prompt_tokens(tokenizer, messages[:-1]))
            if length > config.max_prompt_length:
                raise Rejected("prompt_too_long", f"{length} tokens, data.max_prompt_length={config.max_prompt_length}")
            ids, mask = tokens_and_mask(tokenizer, messages)
            tally.counts["thoughts_cut"] += int(thoughts_cut(tokenizer, messages))
            tally.counts["cut_answers"] += int(len(ids) > config.max_length)
            return ids, mask

        yield from _sample(sample_id, prompt, tokens, config, tally)


def _sample(
    sample_id: int,
    prompt: Prompt,
    tokens: Callable[[], tuple[list[int], list[int]]],
    config: DataConfig,
    tally: Tally,
) -> Iterator[Sample]:
    """The sample, or none: then the conversation has been set aside."""
    try:
        ids, mask = tokens()
        mask = mask[: config.max_length]
        if sum(mask) < config.min_loss_tokens:
            raise Rejected(
                "too_few_loss_tokens", f"{sum(mask)} supervised tokens, data.min_loss_tokens={config.min_loss_tokens}"
            )
    except ChatError as error:
        tally.reject(sample_id, prompt, Rejected(error.reason, str(error)))
    except Rejected as error:
        tally.reject(sample_id, prompt, error)
    else:
        arrays = np.asarray(ids[: config.max_length], np.int32), np.asarray(mask, np.uint8)
        sample = Sample(*arrays, prompt_set=prompt.prompt_set, sample_id=sample_id)
        tally.add(sample)
        yield sample
