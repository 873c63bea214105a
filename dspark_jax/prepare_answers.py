"""Answers to the prompts of a run, by its target here or by servers: of one host's share, or of all."""

import contextlib
import copy
import os
import time
from collections.abc import Mapping
from pathlib import Path

from dspark_jax.answering import target_decoder
from dspark_jax.config import Config
from dspark_jax.data.answer_log import log_file
from dspark_jax.data.chat import load_tokenizer, stop_tokens
from dspark_jax.data.parts import count_parts, part_of
from dspark_jax.data.prompts import Prompt, read_prompts
from dspark_jax.data.regenerate import (
    Answered,
    AnswerLog,
    Conversation,
    Decode,
    Dialogues,
    Limits,
    Rejected,
    conversations,
    regenerate,
)
from dspark_jax.data.samples import Tally
from dspark_jax.data.servers import ask_servers
from dspark_jax.data.thinking import Thinking
from dspark_jax.hosts import Hosts, wait_for_files
from dspark_jax.progress import Progress, log
from dspark_jax.run import Run
from dspark_jax.tokenizer import ChatTokenizer


def training_prompts(config: Config, tally: Tally) -> list[Prompt]:
    """The prompts of a config that are answered before training; lines that are none are set aside."""
    data = config.data
    tokenised, reasoning = not data.regenerate, data.thinking != "off"
    prompts = read_prompts(data.prompts, data.limit, tally.malformed, tokenised=tokenised, reasoning=reasoning)
    return part_of(prompts, 0, count_parts(config))


def gather_answers(
    run: Run,
    tokenizer: ChatTokenizer,
    prompts: list[Prompt],
    partial: Path,
    decode: Decode | None,
    tally: Tally,
    hosts: Hosts,
) -> list[Answered]:
    """Conversations of this host's prompts, answered by the target; those that were before a kill are read back."""
    config, data = run.config, run.config.data

    def owns(sample_id: int) -> bool:
        return hosts.owns(sample_id // data.repeats)

    todo = conversations(prompts, data.repeats, data.system_prompt, Thinking.of(data))
    todo = [conversation for conversation in todo if owns(conversation.sample_id)]
    turns = sum(len(conversation.questions) for conversation in todo)
    limits = Limits.of(data)
    stops = stop_tokens(config.target.path, tokenizer)

    def reject(conversation: Conversation, error: Rejected) -> None:
        tally.reject(conversation.sample_id, conversation.prompt, error)

    with (
        contextlib.closing(AnswerLog(log_file(partial, hosts.index), owns)) as answers,
        Progress("prepare", turns, unit="answer") as progress,
    ):

        def step(turns: int, shown: Mapping[str, float] | None = None) -> None:
            progress.advance(turns, shown)
            hosts.check()

        if len(answers):
            log(f"data: {len(answers)} answers are there already")
        if not data.answers.endpoints:
            decoder = decode or (lambda ask: target_decoder(run)(ask))  # loads the target if there is a question
            return regenerate(tokenizer, todo, decoder, stops, limits, answers, reject, step)

        started, before = time.monotonic(), len(answers)

        def advance(turns: int, failures: int) -> None:
            rate = (len(answers) - before) / max(time.monotonic() - started, 1e-3)
            step(turns, {"answers/s": rate, "failed": failures})

        asking = copy.deepcopy(config)  # all hosts together ask as many questions at a time as one
        asking.data.answers.concurrency = max(data.answers.concurrency // hosts.count, 1)
        dialogues = Dialogues(tokenizer, stops, limits, step)
        found = ask_servers(todo, asking, dialogues, answers, reject, advance, progress.print)
        tally.counts["answers_as_text"] = answers.texts
        return found


def answer_share(run: Run, partial: Path, decode: Decode | None, hosts: Hosts) -> None:
    """Answers the questions of this host's prompts, into a log of its own; then host 0 has the answers of all."""
    # What is set aside is counted later, when samples are made of all answers.
    with contextlib.closing(Tally(Path(os.devnull))) as tally:
        tokenizer = load_tokenizer(run.config.target.path)
        gather_answers(run, tokenizer, training_prompts(run.config, tally), partial, decode, tally, hosts)
    said = hosts.meet(length=log_file(partial, hosts.index).stat().st_size)
    if hosts.first:
        wait_for_files({log_file(partial, number): facts["length"] for number, facts in enumerate(said)})
