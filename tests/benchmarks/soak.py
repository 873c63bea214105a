"""Keeps the serving engine busy for a while, and checks that nothing goes wrong.

    python tests/benchmarks/soak.py --minutes 20
    python tests/benchmarks/soak.py --minutes 2 --workdir runs/quickstart_dspark --json soak.json

Clients submit prompts of the embedded target at random times, greedy and sampled, with stop strings, with budgets of
their own; they cancel at random, flood the queue until it refuses, and ask for impossible things. Checked are: every
request that was accepted ends with exactly one reason, streams what its result holds, and has the tokens of a reference
decode (a prefix of them if it was cancelled); every refusal is one clear line; memory stays flat. Without --workdir
the drafter is random, which costs speed and nothing else. Prints a JSON summary; status 1 if a check failed.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import json
import random
import resource
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dspark_jax.command import load_config
from dspark_jax.config import Config, InputError, resolve
from dspark_jax.data.chat import answer_text, prompt_tokens
from dspark_jax.data.prompts import read_prompts
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import Models, generate
from dspark_jax.engine.request import Request
from dspark_jax.engine.sampling import request_keys
from dspark_jax.engine.serving import Engine, QueueFull
from dspark_jax.evaluation.setup import open_decoder
from dspark_jax.ops.sampling import GREEDY_BELOW
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import compute_dtype

ROOT = Path(__file__).resolve().parents[2]
BUDGET, CAPACITY = 64, 256
TIE = 1e-3  # logits that are closer than this are equal but for rounding; the shape of a batch may decide between them
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "the prompt is empty"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": [5] * CAPACITY}, "exceed the engine's capacity"),
    ({"prompt": [5, 1 << 20]}, "outside the vocabulary"),
    ({"prompt": {"role": "user"}}, "give a list of token ids"),
    ({"max_new_tokens": "many"}, "an integer is needed"),
    ({"max_new_tokens": 0}, "is out of range; use 1 or more"),
    ({"temperature": "hot"}, "a number is needed"),
    ({"top_p": 7.0}, "out of range"),
    ({"stop_strings": "stop"}, "is no list of texts"),
    ({"presence_penalty": 1.0}, "no such parameter"),
    ({"max_tokens": 5}, "did you mean max_new_tokens?"),
]


@dataclasses.dataclass(frozen=True)
class Question:
    """Something to ask, and what must be answered.

    Attributes:
      prompt: token ids.
      settings: of its sampling.
      tokens: the reference answer at the largest budget.
      text: its text.
    """

    prompt: list[int]
    settings: dict[str, Any]
    tokens: list[int]
    text: str

    @property
    def greedy(self) -> bool:
        """Whether it is decoded greedily."""
        return self.settings["temperature"] < GREEDY_BELOW


def questions(config: Config, models: Models, tokenizer: Any, stops: Sequence[int], count: int) -> Any:
    """Greedy and sampled questions with their reference answers by `generate`."""
    prompts = read_prompts(config.eval.prompts, count // len(config.eval.prompts))
    rows = [prompt_tokens(tokenizer, prompt.messages[:1]) for prompt in prompts]
    rows = [ids for ids in rows if len(ids) + BUDGET <= CAPACITY]
    settings = [
        {"temperature": 0.0 if i % 3 else 0.9, "top_p": 1.0 if i % 2 else 0.95, "seed": i} for i in range(len(rows))
    ]
    keys = jnp.stack([request_keys(one["seed"], jnp.zeros(1, jnp.int32))[0] for one in settings])
    result = generate(
        models,
        rows,
        max_new_tokens=BUDGET,
        temperature=[one["temperature"] for one in settings],
        top_p=[one["top_p"] for one in settings],
        stop_tokens=stops,
        keys=keys,
        batch_size=8,
    )
    answers = [tokens.tolist() for tokens in result.tokens]
    return [
        Question(ids, one, tokens, answer_text(tokenizer, tokens))
        for ids, one, tokens in zip(rows, settings, answers, strict=True)
    ]


def decoded_alone(engine: Engine, asked: Sequence[Question]) -> list[Question]:
    """The questions, the sampled ones with what the idle engine answers to them one by one.

    Whatever company a request has later, in whichever slot, it must get the same. Greedy answers are those of
    `generate` as well; sampled ones often are not, since a drafter in bfloat16 gives other batch shapes slightly other
    probabilities, and which drafts are drawn and accepted hangs on them (the target's distribution does not).
    """
    found = []
    for one in asked:
        if not one.greedy:
            result = engine.submit(one.prompt, max_new_tokens=BUDGET, **one.settings).result()
            one = dataclasses.replace(one, tokens=list(result.tokens), text=result.text)
        found.append(one)
    return found


class Soak:
    """Clients of one engine, and what they have seen."""

    def __init__(self, engine: Engine, target: Any, asked: Sequence[Question], deadline: float):
        self.engine, self.target, self.asked, self.deadline = engine, target, asked, deadline
        self.lock = threading.Lock()
        self.counts: collections.Counter[str] = collections.Counter()
        self.failures: list[str] = []
        self.numbers: set[int] = set()
        self.first_token: collections.deque[float] = collections.deque(maxlen=20_000)

    def client(self, seed: int) -> None:
        """Asks until the time is up."""
        rng = random.Random(seed)
        while time.monotonic() < self.deadline:
            time.sleep(min(rng.expovariate(8.0), 1.0))
            chance = rng.random()
            if chance < 0.15:
                self.ask_badly(rng)
            elif chance < 0.18:
                self.flood(rng)
            else:
                self.ask(rng)

    def ask(self, rng: random.Random) -> None:
        """One good request, waited for, or cancelled on the way."""
        question = rng.choice(self.asked)
        budget = rng.choice([1, 7, 20, BUDGET])
        stop = None
        if question.greedy and rng.random() < 0.2 and len(question.text) > 12:
            start = rng.randrange(len(question.text) - 6)
            stop = question.text[start : start + rng.randrange(2, 6)]
        patience = rng.randrange(0, 8) if rng.random() < 0.2 else None
        strings = [stop] if stop else []
        try:
            handle = self.engine.submit(
                question.prompt,
                max_new_tokens=budget,
                stop_strings=strings,
                block=rng.random() < 0.5,
                **question.settings,
            )
        except QueueFull as error:
            self.refused(str(error), "the queue is full")
            return
        seen: list[int] = []
        text = ""
        for number, piece in enumerate(handle):
            seen += piece.tokens
            text += piece.text
            if number == patience:
                self.count("cancel_calls")
                handle.cancel()
        self.check(handle, question, budget, stop, seen, text)

    def ask_badly(self, rng: random.Random) -> None:
        """A request that must be refused."""
        change, message = rng.choice(BAD)
        try:
            handle = self.engine.submit(**({"prompt": [5, 6], "max_new_tokens": 4} | change))
        except InputError as error:
            self.count("bad_refused")
            self.refused(str(error), message)
        else:
            self.fail(f"accepted {change}")
            handle.cancel()

    def flood(self, rng: random.Random) -> None:
        """Fills the queue until it refuses, then takes everything back."""
        handles = []
        while True:
            try:
                handles.append(self.engine.submit(rng.choice(self.asked).prompt, max_new_tokens=BUDGET))
            except QueueFull as error:
                self.refused(str(error), "the queue is full")
                break
        for handle in handles:
            handle.cancel()
        for handle in handles:
            reason = handle.result().finish_reason
            self.ended(handle)
            if reason not in ("cancelled", "length", "stop"):
                self.fail(f"request {handle.number} of a flood ended by {reason}")

    def check(
        self, handle: Request, question: Question, budget: int, stop: str | None, seen: list[int], text: str
    ) -> None:
        """A finished request against its reference."""
        result = handle.result()
        self.ended(handle)
        with self.lock:
            if result.metrics.first_token_seconds is not None:
                self.first_token.append(result.metrics.first_token_seconds)
        if (tuple(seen), text) != (result.tokens, result.text):
            self.fail(f"request {handle.number} streamed something else than its result")
        expected = question.tokens[:budget]
        if result.finish_reason == "cancelled":
            expected = expected[: len(seen)]
        elif stop is not None and result.finish_reason == "stop" and len(seen) < len(expected):
            if stop in text or (text + stop) not in question.text:
                self.fail(f"request {handle.number} stopped at {text[-20:]!r}, not at {stop!r}")
            expected = expected[: len(seen)]
        if seen == expected:
            self.count("greedy_equal" if question.greedy else "sampled_equal")
        elif not question.greedy:
            self.count("sampled_different")
        elif self.tied(question, seen):
            self.count("greedy_tied")
        else:
            self.fail(
                f"request {handle.number}: {seen[:9]}... ({len(seen)}) is not {expected[:9]}... ({len(expected)})"
            )

    def tied(self, question: Question, seen: list[int]) -> bool:
        """Whether an answer leaves the reference at two logits that are equal but for rounding."""
        pairs = zip(question.tokens, seen, strict=False)
        at = next((i for i, (want, got) in enumerate(pairs) if want != got), None)
        if at is None:
            return False
        tokens = np.zeros((1, CAPACITY), np.int32)
        prefix = question.prompt + seen[:at]
        tokens[0, : len(prefix)] = prefix
        hidden = self.target.forward(jnp.asarray(tokens), jnp.arange(CAPACITY)[None]).last_hidden[:, len(prefix) - 1]
        logits = self.target.unembed(hidden)[0]
        return abs(float(logits[question.tokens[at]] - logits[seen[at]])) < TIE

    def ended(self, handle: Request) -> None:
        """Notes that a request has ended, which must happen once."""
        with self.lock:
            if handle.number in self.numbers:
                self.failures.append(f"request {handle.number} ended twice")
            self.numbers.add(handle.number)
            self.counts[f"ended_{handle.finish_reason}"] += 1

    def refused(self, line: str, message: str) -> None:
        """A refusal must be one line and say what it should."""
        if "\n" in line or message not in line:
            self.fail(f"unclear refusal: {line!r} instead of {message!r}")

    def count(self, name: str) -> None:
        """One more of those."""
        with self.lock:
            self.counts[name] += 1

    def fail(self, line: str) -> None:
        """A check that failed."""
        with self.lock:
            self.failures.append(line)


def memory() -> float:
    """Megabytes of this process in memory now (Linux), or at most so far (elsewhere)."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().split("\n") if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def watch(clients: Sequence[concurrent.futures.Future[None]], minutes: float) -> list[float]:
    """Memory every so often until all clients are done; the first fifth of the time is for warming up."""
    begun, samples = time.monotonic(), []
    while not all(one.done() for one in clients):
        concurrent.futures.wait(clients, timeout=max(minutes * 60 / 200, 0.2))
        if time.monotonic() - begun > 0.2 * minutes * 60:
            samples.append(memory())
    for one in clients:
        one.result()  # raises what a client raised
    return samples


def summary(soak: Soak, engine: Engine, samples: Sequence[float], minutes: float) -> dict[str, Any]:
    """Everything that was seen; closes the books."""
    totals, counts = engine.metrics, soak.counts
    ended = {name: counts[f"ended_{name}"] for name in totals.finished}
    third = max(len(samples) // 3, 1)
    early, late = float(np.median(samples[:third])), float(np.median(samples[-third:]))
    if ended != totals.finished or sum(ended.values()) != totals.submitted or len(soak.numbers) != totals.submitted:
        soak.fail(f"{totals.submitted} requests were accepted, clients saw {ended}, the engine {totals.finished}")
    if totals.rejected != counts["bad_refused"]:
        soak.fail(f"{counts['bad_refused']} bad requests were refused, the engine counts {totals.rejected}")
    if totals.finished["error"]:
        soak.fail(f"{totals.finished['error']} requests ended by an error")
    if counts["sampled_different"] > 0.01 * max(counts["sampled_equal"], 1):
        soak.fail(f"{counts['sampled_different']} sampled requests differ, {counts['sampled_equal']} are equal")
    if late - early > max(0.02 * early, 20):
        soak.fail(f"memory grew from {early:.0f} to {late:.0f} MB")
    waits = np.asarray(soak.first_token) if soak.first_token else np.zeros(1)
    return {
        "minutes": round(minutes, 2),
        "cpu_seconds": round(time.process_time(), 1),
        **dataclasses.asdict(totals),
        "tokens_per_second": round(totals.tokens / (60 * minutes), 1),
        **{name: counts[name] for name in ("greedy_equal", "greedy_tied", "sampled_equal", "sampled_different")},
        "cancel_calls": counts["cancel_calls"],
        "first_token_seconds": {"median": float(np.median(waits)), "p95": float(np.quantile(waits, 0.95))},
        "memory_megabytes": {"early": early, "late": late, "most": float(max(samples, default=0.0))},
        "failed_checks": len(soak.failures),
        "failures": soak.failures[:20],
        "passed": not soak.failures,
    }


def main() -> None:
    """Command line; see the module's text."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.py"), help="FILE[:ARG]")
    parser.add_argument("--workdir", help="a finished run; without one, a random drafter")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--queue", type=int, default=12, help="requests that may wait (default 12)")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--questions", type=int, default=36, help="different questions (default 36)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="also write the summary there")
    arguments = parser.parse_args()

    config = resolve(load_config(arguments.config))
    mesh = make_mesh(config.mesh)
    drafter = None
    if not arguments.workdir:
        dtype = compute_dtype(config.drafter.dtype)
        drafter = make_drafter(config.target.architecture, config.drafter, rngs=nnx.Rngs(arguments.seed), dtype=dtype)
    decoder = open_decoder(Run(config, Path(arguments.workdir or "."), mesh), drafter=drafter)
    models, tokenizer, stops = decoder.models, decoder.tokenizer, decoder.stop_tokens
    with jax.set_mesh(mesh):
        asked = questions(config, models, tokenizer, stops, arguments.questions)
        open_idle = functools.partial(
            Engine,
            models,
            slots=arguments.slots,
            capacity=CAPACITY,
            tokenizer=tokenizer,
            stop_tokens=stops,
            max_queue=arguments.queue,
            prefill_chunk=32,
        )
        asked = decoded_alone(open_idle(), asked)
        engine = open_idle()
    engine.warm_up(filtered=True)
    begun = time.monotonic()
    soak = Soak(engine, models.target, asked, begun + 60 * arguments.minutes)
    with engine, concurrent.futures.ThreadPoolExecutor(arguments.clients) as pool:
        clients = [pool.submit(soak.client, 1000 * arguments.seed + i) for i in range(arguments.clients)]
        samples = watch(clients, arguments.minutes)
    found = summary(soak, engine, samples, (time.monotonic() - begun) / 60)
    text = json.dumps(found, indent=1)
    print(text)
    if arguments.json:
        Path(arguments.json).write_text(text + "\n")
    raise SystemExit(0 if found["passed"] else 1)


if __name__ == "__main__":
    main()
