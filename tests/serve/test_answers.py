"""Answers over HTTP, asked for with the `openai` package: the texts are those of `generate`, and nothing is lost."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from dspark_jax.config import Config
from dspark_jax.data.chat import answer_text
from dspark_jax.engine.request import Piece, RequestMetrics, RequestResult
from dspark_jax.engine.serving import Engine, QueueFull
from dspark_jax.serve.answers import Group
from dspark_jax.serve.pool import Member, Pool
from dspark_jax.serve.server import running
from tests.serve.conftest import Served, client_of

TEXT = "how much is one and one"
HELLO: list[Any] = [{"role": "user", "content": TEXT}]
GREEDY: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 24, "temperature": 0}


@pytest.fixture(scope="module")
def answer(served: Served, reference: Callable[..., list[str]]) -> str:
    """The greedy answer to HELLO by `generate`."""
    return reference([served.pool.prompt(HELLO)], temperature=0.0)[0]


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@contextlib.contextmanager
def paused(engine: Engine) -> Iterator[None]:
    """Within it the engine makes no step."""
    with engine._driving:
        yield


def test_a_greedy_answer_is_that_of_generate(served: Served, answer: str) -> None:
    whole = served.client.chat.completions.create(**GREEDY)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (answer, "stop")
    assert whole.usage is not None and whole.usage.prompt_tokens == len(served.pool.prompt(HELLO))
    ids = served.pool.prompt(HELLO)
    text = served.pool.render(HELLO)
    for prompt in (ids, text, [text], [ids]):
        again = served.client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0)
        assert [one.text for one in again.choices] == [answer]
    several = served.client.completions.create(model="tiny", prompt=[text, "sum"], max_tokens=5, temperature=0, n=2)
    assert [one.index for one in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text and answer.startswith(several.choices[0].text)
    assert several.choices[2].text == several.choices[3].text and several.choices[0].finish_reason == "length"
    assert several.usage is not None and several.usage.completion_tokens == 20
    assert several.usage.prompt_tokens == len(ids) + len(served.pool.tokenizer("sum")["input_ids"])


def test_a_stream_is_the_same_text_in_pieces(served: Served, answer: str) -> None:
    chunks = list(served.client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    *answers, last = chunks
    assert answers[0].choices[0].delta.role == "assistant"
    texts = [one.choices[0].delta.content for one in answers if one.choices[0].delta.content]
    assert "".join(texts) == answer and len(texts) > 3
    assert [one.choices[0].finish_reason for one in answers] == [None] * (len(answers) - 1) + ["stop"]
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens > len(texts)
    assert all(one.usage is None for one in answers) and len({one.id for one in chunks}) == 1
    ids = served.pool.prompt(HELLO)
    plain = list(served.client.completions.create(model="tiny", prompt=ids, max_tokens=24, temperature=0, stream=True))
    assert "".join(one.choices[0].text for one in plain) == answer and plain[-1].choices[0].finish_reason == "stop"


def test_every_model_writes_the_same_greedy_text(served: Served, answer: str) -> None:
    assert [one.id for one in served.client.models.list()] == ["tiny", "other", "plain"]
    assert served.client.models.retrieve("other").id == "other"
    for model in ("other", "plain"):
        found = served.client.chat.completions.create(**(GREEDY | {"model": model}))
        assert (found.model, found.choices[0].message.content) == (model, answer)
    status, _, body = served.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})
    assert (status, body["model"]) == (200, "tiny")  # the default


def test_stop_strings_end_in_the_middle_of_tokens(served: Served, answer: str) -> None:
    request = served.pool.engine("tiny").submit(served.pool.prompt(HELLO), max_new_tokens=24)
    pieces = [answer_text(served.pool.tokenizer, [token]) for token in request.result().tokens]
    edges = [(a[-1] + b[0], at) for at, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False), 1) if a and b]
    stop, at = next((stop, at) for stop, at in edges if stop.isprintable() and stop.isascii() and len(pieces[at]) > 1)
    expected = answer[: answer.index(stop)]
    for given in (stop, ["never there", stop]):
        found = served.client.chat.completions.create(**GREEDY, stop=given).choices[0]
        assert (found.message.content, found.finish_reason) == (expected, "stop")
    chunks = served.client.chat.completions.create(**GREEDY, stop=stop, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == expected
    first = request.result().tokens[2]
    found = served.client.chat.completions.create(**GREEDY, extra_body={"stop_token_ids": [first]})
    assert found.usage is not None and found.usage.completion_tokens == 3


def sampled(served: Served, seed: int | None, n: int = 3) -> list[str]:
    options: dict[str, Any] = GREEDY | {"temperature": 1.0, "seed": seed}
    found = served.client.chat.completions.create(**options, n=n)
    return [one.message.content or "" for one in found.choices]


def test_a_seed_gives_the_same_answers_alone_and_under_load(served: Served) -> None:
    """Choice i has the random numbers of prompt i in `generate([prompt] * n, seed=seed)`."""
    engine, ids = served.pool.engine("tiny"), served.pool.prompt(HELLO)
    requests = [
        engine.submit(ids, max_new_tokens=24, temperature=1.0, seed=5, random_stream=stream) for stream in range(3)
    ]
    expected = [one.result().text for one in requests]
    assert sampled(served, 5) == expected and len(set(expected)) == 3
    with concurrent.futures.ThreadPoolExecutor(5) as threads:
        others = [threads.submit(sampled, served, seed, 1) for seed in range(10, 13)]
        assert threads.submit(sampled, served, 5).result() == expected
        assert len({one.result()[0] for one in others}) == 3
    assert sampled(served, None, 1) != sampled(served, None, 1)


def test_a_client_that_goes_away_cancels_its_requests(served: Served) -> None:
    engine = served.pool.engine("tiny")
    ended = engine.metrics.finished
    before = ended["cancelled"]
    with paused(engine):
        stream = served.client.chat.completions.create(**GREEDY, n=2, stream=True)
        next(iter(stream))
        stream.close()
        until(lambda: ended["cancelled"] == before + 2)
        body = b'{"prompt": "sum", "max_tokens": 20}'
        host, port = served.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as raw:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: engine.waiting)
        until(lambda: ended["cancelled"] == before + 3)
    until(lambda: served.server.service.in_flight == 0)
    assert engine.waiting == 0


TEMPLATE = (
    "{%- if tools %}<tools>{{ tools | tojson }}</tools>{%- endif %}"
    "{%- for message in messages %}<{{ message.role }}>{{ message.content or '' }}"
    "{%- for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}{%- endfor %}</>{%- endfor %}"
    "{%- if add_generation_prompt %}<assistant>{{- '' if enable_thinking else '<no thoughts>' }}{%- endif %}"
)


def test_chats_are_rendered_with_tools_thinking_and_the_system_prompt(
    served: Served, served_config: Config, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    config = dataclasses.replace(served_config, data=dataclasses.replace(served_config.data, system_prompt="Be brief."))
    tokenizer = served.pool.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "Add."}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
    ]
    tools = [{"type": "function", "function": {"name": "add"}}]

    def submit(self: Engine, ids: list[int], **_: Any) -> None:
        asked.append(tokenizer.decode(ids))
        raise QueueFull("seen")

    monkeypatch.setattr(Engine, "submit", submit)
    with Pool(members, config, tokenizer, served.pool.sizes) as pool, running(pool) as (url, server):
        other = Served(pool, url, server, client_of(url))
        for more in ({}, {"chat_template_kwargs": {"enable_thinking": True}}):
            for body in ({"messages": HELLO}, {"messages": messages, "tools": tools}):
                assert other.post("/v1/chat/completions", body | more)[0] == 429
    shown = '<tools>[{"type": "function", "function": {"name": "add"}}]</tools><system>Be brief.</><user>Add.</>'
    shown += '<assistant><call>{"name": "add", "arguments": {"a": 1}}</><tool>3</><assistant>'
    first = f"<system>Be brief.</><user>{TEXT}</><assistant>"
    assert asked == [f"{first}<no thoughts>", f"{shown}<no thoughts>", first, shown]


def test_a_full_queue_is_429(served: Served) -> None:
    """All answers of a request are queued, or none."""
    engine, most = served.pool.engine("tiny"), served.pool.sizes.max_queue
    short: dict[str, Any] = {"model": "tiny", "prompt": "sum", "max_tokens": 2, "temperature": 0}
    with concurrent.futures.ThreadPoolExecutor(most) as threads:
        with paused(engine):
            asked = [threads.submit(served.client.completions.create, **short) for _ in range(most - 1)]
            until(lambda: engine.waiting == most - 1)
            with pytest.raises(openai.RateLimitError) as refused:
                served.client.completions.create(**short, n=2)
            assert engine.waiting == most - 1
        answers = {one.result().choices[0].text for one in asked}
    assert refused.value.response.headers["retry-after"] == "1"
    assert refused.value.code == "queue_full" and "12 requests wait" in refused.value.message
    assert len(answers) == 1


def test_metrics_are_the_engines(served: Served) -> None:
    served.client.chat.completions.create(**GREEDY)
    status, text = served.get("/metrics")
    assert status == 200
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r'dspark_\w+(\{(\w+="[^"]*",?)*\})? [0-9.e+-]+', line) for line in lines)
    named = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
    labels, engine = 'model="tiny",scheduler="fixed"', served.pool.engine("tiny")
    assert named[f"dspark_tokens_total{{{labels}}}"] == engine.metrics.tokens > 0
    assert named[f"dspark_emitted_total{{{labels}}}"] >= named[f"dspark_shares_total{{{labels}}}"] > 0
    assert named[f'dspark_finished_total{{{labels},reason="stop"}}'] == engine.metrics.finished["stop"]
    assert named[f"dspark_slots{{{labels}}}"] == 3 and named["dspark_draining"] == 0
    counts = [
        named[f'dspark_{name}_count{{model="tiny"}}'] for name in ("time_to_first_token_seconds", "request_seconds")
    ]
    assert counts[0] == counts[1] > 0
    assert named['dspark_responses_total{path="/v1/chat/completions",status="200"}'] > 0
    families = [line for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families))


def test_draining_finishes_what_is_there_and_refuses_the_rest(make_pool: Callable[..., Pool], answer: str) -> None:
    with make_pool() as pool, running(pool) as (url, server):
        client, engine = client_of(url), pool.engine("tiny")
        kept = Served(pool, url, server, client)
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            with paused(engine):
                asked = [threads.submit(client.chat.completions.create, **GREEDY) for _ in range(7)]
                stream = client.chat.completions.create(**GREEDY, stream=True)
                until(lambda: server.service.in_flight == 8)
                server.leave_soon()  # what the first signal does
                until(lambda: pool.draining)
                status, headers, body = kept.post("/v1/completions", {"prompt": "sum"})
                assert (status, body["error"]["code"]) == (503, "shutting_down") and "retry-after" in headers
                assert kept.get("/health")[0] == 503
            assert [one.result().choices[0].message.content for one in asked] == [answer] * 7
            assert "".join(one.choices[0].delta.content or "" for one in stream if one.choices) == answer


def test_closing_tells_clients_that_their_answers_are_cut(make_pool: Callable[..., Pool]) -> None:
    with make_pool() as pool, running(pool) as (url, server):
        client, engine = client_of(url), pool.engine("tiny")
        with concurrent.futures.ThreadPoolExecutor(1) as threads, paused(engine):
            stream = client.chat.completions.create(**GREEDY, stream=True)
            whole = threads.submit(client.chat.completions.create, **GREEDY)
            until(lambda: engine.waiting == 2)
            server.leave_soon(at_once=True)
            with pytest.raises(openai.InternalServerError, match="closed before the answer was complete"):
                whole.result()
            with pytest.raises(openai.APIError, match="closed before the answer was complete"):
                list(stream)


@pytest.mark.slow
def test_a_hundred_at_a_time_have_the_answers_of_generate(
    make_pool: Callable[..., Pool], reference: Callable[..., list[str]]
) -> None:
    with make_pool(max_queue=100) as pool, running(pool) as (url, _):
        client, barrier = client_of(url), threading.Barrier(100)
        texts = [f"the sum of {i} and {i * i}" for i in range(50)]
        prompts = [pool.prompt([{"role": "user", "content": text}]) for text in texts]
        expected = reference(prompts, temperature=0.0)
        with concurrent.futures.ThreadPoolExecutor(100) as threads:

            def ask(number: int) -> str:
                barrier.wait()
                messages: list[Any] = [{"role": "user", "content": texts[number % 50]}]
                options = GREEDY | {"messages": messages}
                if number < 50:
                    return client.chat.completions.create(**options).choices[0].message.content or ""
                chunks = client.chat.completions.create(**options, stream=True)
                return "".join(one.choices[0].delta.content or "" for one in chunks)

            found = list(threads.map(ask, range(100)))
    assert found == expected * 2 and len(set(found)) > 25


@pytest.mark.slow
def test_seeds_are_those_of_generate(served: Served, reference: Callable[..., list[str]]) -> None:
    expected = reference([served.pool.prompt(HELLO)] * 3, temperature=1.0, seed=5)
    assert sampled(served, 5) == expected


class Racing(list[Piece]):
    """Pieces to which the engine's thread adds one while they are looked at."""

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if len(self) == 1:
            self.append(Piece((2,), "b"))
        return found


def test_a_piece_that_comes_while_pieces_are_read_is_not_lost() -> None:
    pieces, results = Racing([Piece((1,), "a")]), iter((False, True))
    ended = RequestResult((1, 2), "ab", "stop", None, RequestMetrics())

    class Asked(SimpleNamespace):
        @property
        def done(self) -> bool:
            return next(results)

    async def follow() -> list[str]:
        asked = Asked(pieces=pieces, prompt=[1], cancel=bool, result=lambda _: ended)
        asked.on_change = lambda call: None
        service = SimpleNamespace(metrics=SimpleNamespace(observe=lambda *_: None))
        group = Group(service, SimpleNamespace(n=1, model="a"), [asked])  # pyright: ignore[reportArgumentType]
        found = []
        group._event.set()
        async for news in group.follow(asyncio.Event().wait):  # pyright: ignore[reportArgumentType]
            found.append(news.text)
            group._event.set()
        return found

    assert asyncio.run(follow()) == ["a", "b"]
