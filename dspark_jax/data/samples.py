"""Conversations to samples: what is kept, what is set aside, and the counts of both."""

import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.config import DataConfig
from dspark_jax.data.chat import (
    PLAIN,
    ChatError,
    Options,
    ReasoningError,
    answer_text,
    answered_tokens,
    encode,
    prompt_tokens,
    render,
    thoughts_cut,
    tokens_and_mask,
    with_system,
)
from dspark_jax.data.messages import Message, has_answered, has_tools
from dspark_jax.data.prompts import Malformed, Prompt, set_name
from dspark_jax.data.regenerate import Answered, Rejected, options_of
from dspark_jax.data.sources import Sample
from dspark_jax.data.statistics import Histogram, script
from dspark_jax.data.thinking import NEVER, Thinking
from dspark_jax.data.turns import renderable, samples_of_answers, samples_of_turns, shows_thoughts
from dspark_jax.tokenizer import ChatTokenizer

REASONS = {
    "malformed": "malformed line",
    "tools": "with tools that the chat template does not show",
    "parts": "with parts that are not text",
    "tokenised": "tokenised already",
    "reasoning": "with reasoning",
    "template": "refused by the chat template",
    "prompt_too_long": "prompt too long",
    "empty_answer": "empty answer",
    "unanswered": "without an answer",
    "server": "not answered by the server",
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
      sources: prompts and what was set aside of each prompt set.
      scripts: prompts by the script of what the user says first.
      lengths: of what comes before the first supervised token, and of what is supervised.
      thinking: samples whose answers were asked for with thinking.
      mixed: where a share of the prompts is asked so, that share, the number of them, and of all prompts.
      further: ids of samples beyond one per conversation; later conversations have theirs moved by as many.
    """

    def __init__(self, path: Path):
        """Starts an empty file at `path`."""
        self.rejected: Counter[str] = Counter()
        self.counts: Counter[str] = Counter(cut_answers=0, shortened=0, split_differently=0, thoughts_cut=0)
        self.unused: Counter[str] = Counter()
        self.prompt_sets: dict[str, Counter[str]] = {}
        self.sources: dict[str, Counter[str]] = {}
        self.scripts: Counter[str] = Counter()
        self.lengths = {"prompt": Histogram(), "answer": Histogram()}
        self.thinking = self.further = 0
        self.mixed: tuple[float, int, int] | None = None
        self._file = path.open("w", encoding="utf-8")

    def malformed(self, line: Malformed) -> None:
        """Sets aside a line of a prompt file."""
        self._source(set_name(line.file)).update(set_aside=1)
        self._put(line.kind, {"file": line.file, "line": line.line, "detail": line.reason, "text": line.text})

    def reject(self, sample_id: int, prompt: Prompt, error: Rejected) -> None:
        """Sets aside a conversation."""
        self._source(prompt.prompt_set).update(set_aside=1)
        messages = [dict(message) for message in prompt.messages]
        where = {"file": prompt.file, "line": prompt.line, "sample_id": sample_id}
        self._put(error.reason, {**where, "detail": str(error), "messages": messages})

    def read(self, prompts: Sequence[Prompt], thinking: Thinking = NEVER) -> None:
        """Counts prompts, those that are asked with thinking, and fields of them that are not used."""
        if thinking.mode == "mixed":
            self.mixed = thinking.share, sum(map(thinking.asks, prompts)), len(prompts)
        for prompt in prompts:
            self._source(prompt.prompt_set).update(prompts=1)
            self.unused.update(prompt.unused)
            said = (message["content"] or "" for message in prompt.messages if message["role"] == "user")
            self.scripts.update([script(text) for text in itertools.islice(said, 1)])

    def add(self, sample: Sample, *, thinking: bool = False) -> None:
        """Counts a sample; `thinking`: its answers were asked for with thinking."""
        self.lengths["prompt"].add(int(np.argmax(sample.loss_mask)))
        self.lengths["answer"].add(int(sample.loss_mask.sum()))
        self.thinking += int(thinking)
        counts = self.prompt_sets.setdefault(sample.prompt_set, Counter())
        counts.update(samples=1, tokens=len(sample.tokens), loss_tokens=int(sample.loss_mask.sum()))

    def merge(self, other: "Tally", lines: Iterable[str]) -> None:
        """Adds the counts of conversations after these, which were made into samples elsewhere.

        Args:
          other: their tally, closed.
          lines: those of its file.
        """
        for line in lines:
            entry = json.loads(line)
            if "sample_id" in entry:
                entry["sample_id"] += self.further
            self._write(entry)
        for ours, theirs in ((self.rejected, other.rejected), (self.counts, other.counts), (self.unused, other.unused)):
            ours.update(theirs)
        for ours, theirs in ((self.prompt_sets, other.prompt_sets), (self.sources, other.sources)):
            for name, counts in theirs.items():
                ours.setdefault(name, Counter()).update(counts)
        for name, histogram in other.lengths.items():
            self.lengths[name].merge(histogram)
        self.thinking += other.thinking
        self.further += other.further

    def report(self) -> dict[str, Any]:
        """All counts, JSON-able."""
        totals = sum(self.prompt_sets.values(), Counter())
        sets = {name: dict(counts) for name, counts in self.prompt_sets.items()}
        counts = {"rejected": dict(self.rejected), **self.counts, "unused": dict(self.unused)}
        thinking: dict[str, Any] = {"samples": self.thinking, "share": self.thinking / max(totals["samples"], 1)}
        if self.mixed:
            asked, thinks, prompts = self.mixed
            thinking |= {"asked_share": asked, "prompts": thinks, "prompts_share": thinks / max(prompts, 1)}
        return {
            **totals,
            **counts,
            "prompt_sets": sets,
            "sources": {name: dict(counts) for name, counts in self.sources.items()},
            "scripts": dict(self.scripts.most_common()),
            "lengths": {name: one.report() for name, one in self.lengths.items()},
            "thinking": thinking,
        }

    def _source(self, name: str) -> Counter[str]:
        return self.sources.setdefault(name, Counter(prompts=0, set_aside=0))

    def _put(self, reason: str, entry: dict[str, Any]) -> None:
        self.rejected[reason] += 1
        self._write({"reason": reason, **entry})

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def __getstate__(self) -> dict[str, Any]:
        """Its counts: a tally that is stored, or sent elsewhere, has no file any more."""
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def describe(rejected: dict[str, int]) -> str:
    """Counts by reason in words, e.g. "2 malformed line, 1 empty answer"."""
    return ", ".join(f"{count} {REASONS[reason]}" for reason, count in rejected.items()) or "none"


def describe_thinking(thinking: Mapping[str, Any]) -> str:
    """The share of samples with thinking in words, as `Tally.report` states it."""
    words = f"{thinking['share']:.0%} of the samples with thinking"
    if "asked_share" in thinking:
        words += (
            f" ({thinking['prompts']} prompts, {thinking['prompts_share']:.1%}; "
            f"data.thinking_share={thinking['asked_share']:g})"
        )
    return words


def describe_unused(unused: Mapping[str, int]) -> str:
    """Fields of prompts that are not used in words: names and numbers of prompts, as `Tally.unused` counts them."""
    names = ", ".join(f"`{name}` of {count}" for name, count in unused.items())
    return f"fields of prompts that are not used: {names}"


Tokens = tuple[list[int], list[int]]
"""Ids and loss mask."""


def answered_samples(
    tokenizer: ChatTokenizer, answered: Iterable[Answered], config: DataConfig, tally: Tally
) -> Iterator[Sample]:
    """Samples of conversations that the target has answered, with the very ids that it generated."""
    for item in answered:
        tally.counts.update(cut_answers=int(item.cut), shortened=int(bool(item.shortened)))
        tokens = functools.partial(_answered_tokens, tokenizer, item, config, tally)
        yield from _samples(item.conversation.sample_id, item.conversation.prompt, tokens, config, tally)


def _answered_tokens(tokenizer: ChatTokenizer, item: Answered, config: DataConfig, tally: Tally) -> list[Tokens]:
    options, answer = item.conversation.options, item.answer.tolist()

    def by_turn() -> list[Tokens]:
        turns, one = [], item
        while one is not None:
            turns.append((one.messages, one.answer.tolist()))
            one = one.before
        return samples_of_answers(tokenizer, turns[::-1], options, config.supervised)

    if options.thinking:
        found = by_turn()
    else:
        found = _whole(lambda: answered_tokens(tokenizer, item.messages, answer, options), by_turn)
    if not item.cut:
        full = [*item.messages, {"role": "assistant", "content": answer_text(tokenizer, answer)}]
        again = encode(tokenizer, render(tokenizer, full, options=options))["input_ids"]
        tally.counts["split_differently"] += int(again != found[-1][0])
    return found


def _whole(together: Callable[[], Tokens], by_turn: Callable[[], list[Tokens]]) -> list[Tokens]:
    """A conversation without thoughts in one sample; by turns if its template shows earlier turns in another way."""
    try:
        return [together()]
    except ReasoningError:
        raise
    except ChatError:
        return by_turn()


def given_samples(
    tokenizer: ChatTokenizer, prompts: Sequence[Prompt], config: DataConfig, tally: Tally, start: int = 0
) -> Iterator[Sample]:
    """Samples of conversations with the answers that their files bring along.

    A conversation has one sample, or one per turn where the template does not keep earlier turns as they were written
    (see `turns`); ids count on from those. `start` is the number of the first prompt.
    """
    for number, prompt in enumerate(prompts, start):
        tokens = functools.partial(_given_tokens, tokenizer, prompt, config, tally)
        yield from _samples(number, prompt, tokens, config, tally)


def _given_tokens(tokenizer: ChatTokenizer, prompt: Prompt, config: DataConfig, tally: Tally) -> list[Tokens]:
    if prompt.tokens is not None:
        ids, mask = map(list, prompt.tokens)
        if max(ids) >= len(tokenizer):
            raise Rejected(
                "malformed", f"token id {max(ids)}, and the tokenizer has {len(tokenizer)}; use the target's"
            )
        found = [(ids, mask)]
    else:
        options = options_of(prompt, Thinking.of(config))
        given = with_system(prompt.messages, config.system_prompt)
        messages = _trainable(tokenizer, given, prompt, options, config)
        tally.counts["shortened"] += int(len(messages) < len(given))
        by_turn = functools.partial(samples_of_turns, tokenizer, messages, options, config.supervised)
        if options != PLAIN or has_tools(messages):
            found = by_turn()
        else:
            found = _whole(lambda: tokens_and_mask(tokenizer, messages), by_turn)
            tally.counts["thoughts_cut"] += int(thoughts_cut(tokenizer, messages))
    tally.counts["cut_answers"] += sum(len(ids) > config.max_length for ids, _ in found)
    return found


def _trainable(
    tokenizer: ChatTokenizer, messages: Sequence[Message], prompt: Prompt, options: Options, config: DataConfig
) -> Sequence[Message]:
    """A conversation up to its last answer that can be trained; Rejected says why there is none, of the last one."""
    answered = any(message["role"] == "assistant" for message in messages)
    where = f"`{prompt.reasoning}`" if prompt.reasoning else "a think block"
    if config.thinking == "off" and answered and (prompt.reasoning or shows_thoughts(tokenizer, messages)):
        raise Rejected(
            "reasoning",
            f"it has {where}, and answers are trained without thinking; set data.thinking=given to train "
            "it, or take it out (with data.regenerate=True the target answers itself, without thinking)",
        )
    first: Rejected | None = None
    # It ends before the first answer that is none: what comes later was not said after it.
    silent = (end for end, one in enumerate(messages, 1) if one["role"] == "assistant" and not has_answered(one))
    longest = next(silent, len(messages))
    for end in range(longest, 0, -1):
        if end < longest and messages[end - 1]["role"] != "assistant":
            continue
        try:
            _check_last(tokenizer, messages[:end], options, config)
        except Rejected as error:
            first = first or error
        else:
            return messages[:end]
    assert first is not None
    raise first


def _check_last(tokenizer: ChatTokenizer, messages: Sequence[Message], options: Options, config: DataConfig) -> None:
    """Rejects what does not end in an answer to a prompt that is not too long."""
    *asked, last = messages
    if last["role"] != "assistant":
        raise Rejected("unanswered", "the last message is not the assistant's, and data.regenerate is off")
    if not has_answered(last):
        raise Rejected("empty_answer", f"message {len(messages)}: the answer is empty, or was cut while it thought")
    if options != PLAIN or has_tools(asked):
        asked = renderable(tokenizer, asked, options)
    length = len(prompt_tokens(tokenizer, asked, options))
    if length > config.max_prompt_length:
        raise Rejected("prompt_too_long", f"{length} tokens, data.max_prompt_length={config.max_prompt_length}")


def _samples(
    number: int, prompt: Prompt, tokens: Callable[[], list[Tokens]], config: DataConfig, tally: Tally
) -> list[Sample]:
    """The samples of conversation `number`, or none: then it has been set aside."""
    sample_id, made = number + tally.further, list[Sample]()
    try:
        for ids, mask in tokens():
            mask = mask[: config.max_length]
            if sum(mask) < config.min_loss_tokens:
                few = f"{sum(mask)} supervised tokens, data.min_loss_tokens={config.min_loss_tokens}"
                tally.reject(sample_id, prompt, Rejected("too_few_loss_tokens", few))
                continue
            arrays = np.asarray(ids[: config.max_length], np.int32), np.asarray(mask, np.uint8)
            made.append(Sample(*arrays, prompt_set=prompt.prompt_set, sample_id=sample_id + len(made)))
            tally.add(made[-1], thinking=Thinking.of(config).asks(prompt))
    except ChatError as error:
        tally.reject(sample_id, prompt, Rejected(error.reason, str(error)))
    except Rejected as error:
        tally.reject(sample_id, prompt, error)
    tally.further += max(len(made) - 1, 0)
    return made
