"""Answers from servers: a small server of this folder stands for vLLM, llama.cpp and others, and fails on demand."""

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from dspark_jax.config import (
    AnswersConfig,
    Config,
    DataConfig,
    DrafterConfig,
    InputError,
    TargetConfig,
    resolve,
    to_json,
)
from dspark_jax.data import chat
from dspark_jax.data.answer_log import AnswerLog
from dspark_jax.data.sources import SampleReader
from dspark_jax.engine import Models
from dspark_jax.engine.serving import Engine
from dspark_jax.prepare import prepare
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from tests.data.openai_server import Behaviour, OpenAIServer, by_seed
from tests.preparing import changed

pytest.importorskip("openai", reason="the package openai is not installed (.[answers])")

STOP = 294
ROOT = Path(__file__).resolve().parents[2]
Start = Callable[..., OpenAIServer]


@pytest.fixture(scope="module")
def tokenizer(tiny_target: Path) -> Any:
    return chat.load_tokenizer(tiny_target)


@pytest.fixture
def start(tokenizer: Any) -> Iterator[Start]:
    """`start(**behaviour)` is a server that runs until the test ends."""
    with contextlib.ExitStack() as stack:

        def start(**behaviour: Any) -> OpenAIServer:
            server = OpenAIServer(tokenizer, Behaviour(**({"answer": by_seed(STOP)} | behaviour)))
            stack.callback(server.close)
            return server

        yield start


@pytest.fixture(scope="module")
def config(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    path = tmp_path_factory.mktemp("prompts") / "math.jsonl"
    write_prompts(path, 11)
    data = DataConfig(prompts=(str(path),), max_prompt_length=120, max_length=140, min_loss_tokens=4, repeats=2)
    drafter = DrafterConfig(num_layers=1, target_layer_ids=(0,), mask_token_id=319)
    return resolve(Config(name="tiny", target=TargetConfig(path=str(tiny_target)), drafter=drafter, data=data))


@pytest.fixture(scope="module")
def expected(config: Config, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The samples of a run in which nothing went wrong, from a server as vLLM is, asked by tokens."""
    server = OpenAIServer(tokenizer, Behaviour(by_seed(STOP)))
    with contextlib.closing(server):
        report = prepare(asking(config, server), folder := tmp_path_factory.mktemp("expected"))
    assert once(server) and report["samples"] == 22 and report["answers_as_text"] == 0
    return samples(folder)


def write_prompts(path: Path, count: int) -> None:
    """Conversations of one and two turns."""
    lines = [{"turns": [f"how much is {i} " + "and one " * (i % 5)] * (1 + i % 2)} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def asking(config: Config, *servers: OpenAIServer, **answers: Any) -> Config:
    """The config with these servers."""
    urls = tuple(server.url for server in servers)
    settings = AnswersConfig(**({"endpoints": urls, "concurrency": 4, "retry_wait": 0.01} | answers))
    return changed(config, answers=settings)


def samples(workdir: Path) -> list[tuple[int, list[int], list[int]]]:
    found = SampleReader(workdir / "data")
    read = [found[i] for i in range(len(found))]
    return [(one.sample_id, one.tokens.tolist(), one.loss_mask.tolist()) for one in read]


def once(server: OpenAIServer) -> bool:
    """Whether no question was answered twice."""
    return set(server.answered.values()) == {1}


@pytest.mark.parametrize(
    ("kind", "mode", "path", "texts"),
    [
        ("llamacpp", "tokens", "/completion", 0),
        ("plain", "tokens", "/completions", 32),
        ("vllm", "chat", "/chat/completions", 0),
        ("llamacpp", "chat", "/chat/completions", 32),
    ],
)
def test_all_servers_in_both_modes_give_the_same_samples(
    config: Config, start: Start, tmp_path: Path, expected: Any, kind: str, mode: str, path: str, texts: int
) -> None:
    server = start(kind=kind, answer=by_seed(STOP, 0.01))  # long enough for questions to meet there
    report = prepare(asking(config, server, mode=mode), tmp_path / "run")
    assert samples(tmp_path / "run") == expected and report["answers_as_text"] == texts
    assert once(server) and len(server.requests) == 32 and 1 < server.most <= 4
    assert {request["path"] for request in server.requests} == {path}
    assert len({request["seed"] for request in server.requests}) == 32
    # The later turn of a conversation shows the answer before it; every answer ends in its stop token.
    (_, tokens, mask), *_ = [one for one in samples(tmp_path / "run") if one[0] == 2]
    assert tokens.count(STOP) == 4 and sum(on for token, on in zip(tokens, mask, strict=True) if token == STOP) == 2


def test_every_setting_is_sent_and_what_is_off_is_off(config: Config, start: Start, tmp_path: Path) -> None:
    """vLLM and llama.cpp have defaults of their own for what is not said."""
    server = start()
    prepare(asking(config, server), tmp_path / "run")
    off = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "model": "tiny"}
    assert server.requests[0].items() >= off.items() and server.requests[0]["stop_token_ids"] == [STOP]
    lengths = [len(request["prompt"]) + request["max_tokens"] for request in server.requests]
    assert set(lengths) == {140}

    server.requests.clear()
    settings = {"top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_new_tokens": 9, "mode": "chat"}
    report = prepare(asking(changed(config, temperature=0.5, thinking="on"), server, **settings), tmp_path / "run")
    sent = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "max_tokens": 9}
    assert all(request.items() >= sent.items() for request in server.requests)
    assert server.requests[0]["chat_template_kwargs"] == {"enable_thinking": True, "thinking": True}
    assert report["cut_answers"] > 0 and report["inputs"]["data"]["answers.max_new_tokens"] == 9


def test_a_target_here_gives_the_same_samples(
    config: Config, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedily: the server decodes with the engine of this package."""
    mesh = make_mesh(config.mesh, jax.devices()[:1])  # compiles faster
    monkeypatch.setattr("dspark_jax.answering.decoding_mesh", lambda *_: mesh)
    write_prompts(tmp_path / "math.jsonl", 4)
    settings = {
        "prompts": (str(tmp_path / "math.jsonl"),),
        "temperature": 0.0,
        "max_prompt_length": 100,
        "decode_batch_size": 4,
        "repeats": 1,
    }
    config = changed(config, **settings, answers=AnswersConfig(max_new_tokens=12))
    prepare(config, tmp_path / "here")
    with jax.set_mesh(mesh):
        engine = Engine(Models(load_target(config.target, mesh)), slots=4, capacity=140, stop_tokens=[STOP])

    def answer(prompt: Any, body: dict[str, Any]) -> Any:
        return engine.submit(prompt, max_new_tokens=body["max_tokens"]).result().tokens

    with engine:
        prepare(asking(config, start(answer=answer), max_new_tokens=12), tmp_path / "server")
    assert samples(tmp_path / "server") == samples(tmp_path / "here") and len(samples(tmp_path / "here")) == 4


FAULTS = ("500", "429:0.01", "503", "drop", "truncated", "html", "empty", "408")


def test_failures_are_asked_again_and_lose_nothing(
    config: Config, start: Start, tmp_path: Path, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    server = start(fault=lambda number: FAULTS[number // 2 % 8] if number < 32 and number % 2 else "")
    prepare(asking(config, server), tmp_path / "run")
    assert samples(tmp_path / "run") == expected
    assert once(server) and len(server.requests) == 32 + 16
    shown = capsys.readouterr().err
    assert f"answers: {server.url}: 500: " in shown and "failed=16" in shown


def test_a_server_that_hangs_or_is_gone_leaves_its_work_to_the_others(
    config: Config, start: Start, tmp_path: Path, expected: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    good, gone = start(), start()
    hanging = start(fault=lambda number: "hang")
    gone.close()
    prepare(asking(config, hanging, gone, good, timeout=0.2), tmp_path / "run")
    assert samples(tmp_path / "run") == expected and once(good)
    shown = capsys.readouterr().err
    assert f"answers: {hanging.url}: no answer within 0.2 seconds (data.answers.timeout); leaving it alone" in shown
    assert f"answers: {gone.url}: no connection" in shown and "leaving it alone for 0.01 s" in shown


def test_another_server_is_asked_what_one_has_failed_to_answer(config: Config, start: Start, tmp_path: Path) -> None:
    bad, good = start(fault=lambda number: "500"), start()
    prepare(asking(config, bad, good, concurrency=1, retries=1), tmp_path)
    assert len(bad.requests) == len(good.answered) == 32


def test_two_servers_share_the_work(config: Config, start: Start, tmp_path: Path) -> None:
    one, two = start(answer=by_seed(STOP, 0.01)), start(answer=by_seed(STOP, 0.01))
    prepare(asking(config, one, two), tmp_path)
    assert sum((one.answered + two.answered).values()) == 32 and min(len(one.requests), len(two.requests)) >= 8


def test_too_many_requests_make_the_client_ask_less(config: Config, start: Start, tmp_path: Path) -> None:
    server = start(answer=by_seed(STOP, 0.1), refusal_seconds=0.1)
    server.behaviour.fault = lambda number: "429" if server.now > 2 else ""
    prepare(asking(config, server, concurrency=16), tmp_path)
    assert once(server) and len(server.answered) == 32
    assert max(server.together[:16]) > 8 >= max(server.together[-10:])


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "key": (
        {"key": "secret"},
        {},
        r"refuses the key \(401: .*wrong key.*\); set the environment variable OPENAI_API_KEY",
    ),
    "model": ({}, {"model": "other"}, r"has no model 'other'; data\.answers\.model must be one of 'tiny'"),
    "room": ({"room": 139}, {}, r"takes 139 tokens, prompt and answer together, and data\.max_length=140 is more"),
    "500": ({"fault": lambda number: "500"}, {}, r"500: .*on demand.*, after 2 retries; when it answers again, run"),
    "429": ({"fault": lambda number: "429"}, {}, "429: .*on demand.*, after 2 retries"),
    "hang": ({"fault": lambda number: "hang"}, {"timeout": 0.1}, r"no answer within 0\.1 seconds .*, after 2 retries"),
    "html": ({"fault": lambda number: "html"}, {}, "its answer is no.* JSON.*, after 2 retries"),
    "400": ({"fault": lambda number: "400"}, {}, r"refuses every question \(400: .*on demand"),
    "404": ({"fault": lambda number: "404"}, {}, r"has no such page or model \(.*on demand.*\); check the URL"),
    "ids": (
        {"answer": lambda prompt, body: [65, 999, STOP]},
        {},
        r"an answer has token 999, target\.path has 320",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_no_retry_mends_is_one_line(
    config: Config, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    behaviour, answers, message = WRONG[case]
    server = start(**behaviour)
    with pytest.raises(InputError, match=f"{server.url}:? {message}") as caught:
        prepare(asking(config, server, **({"retries": 2} | answers)), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "data").exists()


def test_a_server_that_is_down_or_elsewhere_is_one_line(config: Config, start: Start, tmp_path: Path) -> None:
    server = start()
    settings = asking(config, server, endpoints=(server.url.removesuffix("/v1") + "/v2",))
    with pytest.raises(InputError, match=r"/v2 lists no models \(most URLs end in /v1\); name the target"):
        prepare(settings, tmp_path / "run")
    server.close()
    with pytest.raises(InputError, match=f"{server.url}: no connection .*, after 2 retries; when it answers again"):
        prepare(asking(config, server, retries=2), tmp_path / "run")


def test_the_key_comes_from_the_environment_and_is_stored_nowhere(
    config: Config, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "s3cr3t")
    prepare(asking(config, start(key="s3cr3t"), key_variable="MY_KEY"), tmp_path / "run")
    assert not any(b"s3cr3t" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_answers_that_are_no_use_are_set_aside_with_their_reason(config: Config, start: Start, tmp_path: Path) -> None:
    reasons = {0: "content_filter", 1: "error", 2: "error", 3: "error"}
    server = start(
        finish=lambda number, body: reasons.get(number, ""), fault=lambda number: "400" if number == 9 else ""
    )
    report = prepare(asking(config, server, concurrency=1, retries=2), tmp_path)
    assert report["rejected"]["server"] == 3 and report["samples"] + report["shortened"] >= 19
    rejected = [json.loads(line) for line in (tmp_path / "data" / "rejected.jsonl").read_text().splitlines()]
    details = [entry["detail"] for entry in rejected]
    assert details[:2] == ["turn 1: finish reason content_filter", "turn 1: finish reason error"]
    assert details[2].startswith("turn 1: 400: ")


OTHER = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + ' <|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("vllm", "at token .* ours has '<|im_end|>.*its has ' "),
        ("llamacpp", "at token"),
        ("other", "ours has .* tokens, its"),
    ],
)
def test_another_template_is_found_by_the_first_answer(
    config: Config, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, what: str
) -> None:
    server = start(kind=kind, template=OTHER)
    with pytest.raises(InputError, match=rf"reads another prompt than ours: in the question of .*math.jsonl:1, {what}"):
        prepare(asking(config, server, mode="chat", concurrency=1), tmp_path / "run")
    assert len(server.requests) == 1
    prepare(asking(config, server, mode="chat", check_prompts=False), tmp_path / "run")
    assert capsys.readouterr().err.count("reads another prompt than ours") == 1
    prepare(asking(config, server), tmp_path / "run")  # what is sent as tokens needs no template
    assert "reads another prompt" not in capsys.readouterr().err


def test_text_from_which_thoughts_were_taken_is_not_trained(config: Config, start: Start, tmp_path: Path) -> None:
    """A server's reasoning parser puts them elsewhere; with token ids nothing is missing."""
    thoughts = {"more": {"reasoning_content": "hm"}}
    with pytest.raises(InputError, match="no sample is left .* 22 not answered by the server"):
        prepare(asking(config, start(kind="other", **thoughts), mode="chat"), tmp_path / "text")
    assert prepare(asking(config, start(**thoughts), mode="chat"), tmp_path / "ids")["samples"] == 22


@pytest.mark.parametrize("written", [False, True])
def test_a_killed_preparation_asks_only_what_had_no_answer(
    config: Config, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    """Killed before or after an answer is in the file; what was written of another line is no answer."""
    whole, server = (start(finish=lambda _, body: "content_filter" * (body["seed"] % 5 == 0)) for _ in range(2))
    report = prepare(asking(config, whole, concurrency=1), tmp_path / "whole")
    put, puts = AnswerLog.put, iter(range(1000))

    def killed(self: AnswerLog, *arguments: Any, **named: Any) -> None:
        number = next(puts)
        if written or number % 7 != 6:
            put(self, *arguments, **named)
        if number % 7 == 6:
            self._file.write(b'{"id": 3, "tur')
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerLog, "put", killed)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            prepare(asking(config, server, concurrency=1), tmp_path / "run")
        assert not (tmp_path / "run" / "data").exists()
    monkeypatch.undo()
    found = prepare(asking(config, server, concurrency=1), tmp_path / "run")
    assert samples(tmp_path / "run") == samples(tmp_path / "whole") and 10 < len(samples(tmp_path / "run")) < 22
    assert found | {"seconds": 0} == report | {"seconds": 0}
    rejected = [(tmp_path / name / "data" / "rejected.jsonl").read_text() for name in ("whole", "run")]
    assert rejected[0] == rejected[1] and "content_filter" in rejected[0]
    assert len(server.requests) == len(whole.requests) + (0 if written else 3)


def test_the_order_of_arrival_does_not_matter(config: Config, start: Start, tmp_path: Path) -> None:
    def answer(prompt: Any, body: Any) -> list[int]:
        time.sleep(body["seed"] % 7 * 0.004)
        return list(by_seed(STOP)(prompt, body))

    reports = [
        prepare(asking(config, start(answer=answer), concurrency=most), tmp_path / str(most)) for most in (1, 16)
    ]
    assert reports[0] | {"seconds": 0} == reports[1] | {"seconds": 0}
    assert samples(tmp_path / "1") == samples(tmp_path / "16")


def test_what_the_samples_depend_on_has_a_fingerprint(config: Config, start: Start, tmp_path: Path) -> None:
    """Not which server it was, nor how it was asked; data that was made before there were servers stays up to date."""
    server = start()
    before = Run(config, tmp_path).data_inputs["data"]

    def fingerprint(config: Config) -> str:
        return Run(config, tmp_path).data_fingerprint

    assert not [name for name in before if name.startswith("answers")]
    first = fingerprint(asking(config, server))
    assert first != fingerprint(config)
    assert first == fingerprint(asking(config, start(), concurrency=9, timeout=3.0, key_variable="K"))
    for other in (
        {"mode": "chat"},
        {"model": "x"},
        {"top_p": 0.5},
        {"top_k": 3},
        {"min_p": 0.1},
        {"max_new_tokens": 5},
    ):
        assert first != fingerprint(asking(config, server, **other))
    here = fingerprint(changed(config, answers=AnswersConfig(top_k=3)))
    assert here not in (first, fingerprint(config))


def test_changed_answers_are_named(
    config: Config, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(asking(config, start(), top_k=3), tmp_path)
    prepare(asking(config, start()), tmp_path)
    assert "preparing again, data.answers.top_k=its default, was 3" in capsys.readouterr().err


def test_a_notebook_has_an_event_loop_already(config: Config, start: Start, tmp_path: Path) -> None:
    async def cell() -> dict[str, Any]:
        return prepare(asking(config, start()), tmp_path / "run")

    assert asyncio.run(cell())["samples"] == 22


@pytest.mark.slow
def test_hundreds_of_prompts_killed_twice_lose_and_double_nothing(config: Config, start: Start, tmp_path: Path) -> None:
    """By SIGKILL and by Ctrl-C, as processes of their own, with failures in between."""
    write_prompts(tmp_path / "math.jsonl", 240)
    config = changed(config, prompts=(str(tmp_path / "math.jsonl"),), repeats=1)
    whole = start()
    report = prepare(asking(config, whole), tmp_path / "whole")
    server = start(answer=by_seed(STOP, 0.05), fault=lambda number: FAULTS[number % 8] if number % 11 == 5 else "")
    (tmp_path / "tiny.py").write_text(
        "from dspark_jax.config import *\n"
        f"def get_config(arg=''):\n    return from_json({to_json(asking(config, server, concurrency=8))!r})\n"
    )
    arguments = ["--config", str(tmp_path / "tiny.py"), "--workdir", str(tmp_path / "run")]
    log, answered = tmp_path / "run" / "data.partial" / "answers.jsonl", 0
    for number in (signal.SIGKILL, signal.SIGINT, None):
        process = subprocess.Popen(
            [sys.executable, "-m", "dspark_jax.prepare", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        if number is not None:
            until = time.monotonic() + 60
            while not (log.exists() and log.read_bytes().count(b"\n") >= answered + 60):
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.01)
            process.send_signal(number)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130, None: 0}[number], said
        assert "Traceback" not in said and (number != signal.SIGINT or said.endswith("interrupted\n"))
        answered = log.read_bytes().count(b"\n") if number else 0
    assert samples(tmp_path / "run") == samples(tmp_path / "whole") and len(samples(tmp_path / "run")) == 240
    found = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert found | {"seconds": 0} == report | {"seconds": 0}
    # Asked twice were only those that were on their way at the kills.
    assert set(server.answered) == set(whole.answered)
    assert sum(server.answered.values()) <= len(whole.answered) + 2 * 8
