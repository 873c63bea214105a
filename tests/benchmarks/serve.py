"""What HTTP costs, and a soak: the server of this process, with clients in another one.

    python tests/benchmarks/serve.py --workdir runs/quickstart_dspark --users 8
    python tests/benchmarks/serve.py --workdir runs/quickstart_dspark --soak 600

Throughput: so many users ask for greedy answers one after the other, in turns directly from the `Engine` (threads of
this process, token ids) and over HTTP (chats as text, whole answers and streams). Tokens per second are those of the
best of `--repeats`; `lost` is the median over the turns, each against the direct one beside it. The clients share the
processor with the server, which the direct users hardly need. `processor_seconds` are of this process alone, for a
thousand tokens: they say what HTTP costs where others use the machine as well.

Soak: clients ask, stream, leave, fill the queue, and send what is malformed. Checked are: every whole answer is the one
that the idle engine gave, everything wrong is the 4xx that it should be, nothing is left when all are gone, the counts
of the engine add up, and what is allocated is flat (beside it: memory of the process, with what the allocator keeps of
freed memory, and how many programs were compiled meanwhile). Status 1 if a check failed.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import ctypes
import gc
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax

import dspark_jax
from dspark_jax.data.prompts import read_prompts
from dspark_jax.run import Run
from dspark_jax.serve.pool import Pool, Sizes
from dspark_jax.serve.server import Server, running
from dspark_jax.serve.service import Limits

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LIMITS = Limits(body=100_000, header_seconds=2.0, body_seconds=2.0)
HELLO = {"messages": [{"role": "user", "content": "Hello."}]}

WRONG: list[tuple[str, bytes, int]] = [
    (TEXT, b"{", 400),
    (TEXT, b'{"prompt": "\xff"}', 400),
    (TEXT, b'{"prompt": "a", "prompt": "b"}', 400),
    (TEXT, b"[" * 90_000, 400),
    (TEXT, b'{"prompt": "a", "max_tokens": "many"}', 400),
    (TEXT, b'{"prompt": "a", "temperature": NaN}', 400),
    (TEXT, b'{"prompt": "a", "n": 1000}', 400),
    (TEXT, json.dumps({"prompt": "word " * 15_000}).encode(), 400),
    (TEXT, b'{"prompt": "' + b"a" * 300_000 + b'"}', 413),
    (CHAT, b'{"messages": [{"role": "robot", "content": "a"}]}', 400),
    (CHAT, json.dumps(HELLO | {"model": "nobody"}).encode(), 404),
    (CHAT, json.dumps(HELLO | {"colour": "red"}).encode(), 400),
    (CHAT, json.dumps(HELLO | {"logprobs": True}).encode(), 400),
    ("/nowhere", b"{}", 404),
]


class Client:
    """Asks one server, on a connection that is kept."""

    def __init__(self, url: str):
        self.host = url.removeprefix("http://")
        self.connection = http.client.HTTPConnection(self.host, timeout=600)

    def open(self, path: str, body: bytes) -> http.client.HTTPResponse:
        """A response whose head has come."""
        self.connection.request("POST", path, body, {"Content-Type": "application/json"})
        return self.connection.getresponse()

    def ask(self, path: str, body: bytes) -> tuple[int, Any]:
        """(status, JSON)."""
        response = self.open(path, body)
        return response.status, json.loads(response.read())

    def events(self, path: str, body: bytes) -> Iterator[Any]:
        """The events of a stream."""
        response = self.open(path, body)
        assert response.status == 200, response.read()
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
        response.read()

    def leave(self) -> None:
        """Closes the connection; the next request opens another one."""
        self.connection.close()


def chat(text: str, tokens: int, **more: Any) -> bytes:
    """The body of a greedy request."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
    return json.dumps(body | more).encode()


def together(users: int, texts: Sequence[str], ask: Callable[[int, str], int]) -> tuple[float, int]:
    """(seconds, tokens) of threads that ask for all texts; `ask(user, text)` gives the tokens of an answer."""
    waiting, lock, tokens = collections.deque(texts), threading.Lock(), [0] * users
    barrier = threading.Barrier(users + 1)

    def user(number: int) -> None:
        barrier.wait()
        while True:
            with lock:
                if not waiting:
                    return
                text = waiting.popleft()
            tokens[number] += ask(number, text)

    with concurrent.futures.ThreadPoolExecutor(users) as threads:
        found = [threads.submit(user, number) for number in range(users)]
        barrier.wait()
        began = time.perf_counter()
        for one in found:
            one.result()
    return time.perf_counter() - began, sum(tokens)


def direct(pool: Pool, texts: Sequence[str], users: int, budget: int) -> tuple[float, int]:
    """The same without HTTP."""
    engine = pool.engine(pool.default)
    prompts = {text: pool.prompt([{"role": "user", "content": text}]) for text in texts}

    def ask(_: int, text: str) -> int:
        return len(engine.submit(prompts[text], max_new_tokens=budget).result().tokens)

    return together(users, texts, ask)


def client_process(spec: dict[str, Any]) -> None:
    """What the other process does: measures, or soaks; prints what it has found."""
    if "seconds" in spec:
        print(json.dumps(soaked(spec)))
        return
    clients = [Client(spec["url"]) for _ in range(spec["users"])]

    def ask(user: int, text: str) -> int:
        if not spec["stream"]:
            status, body = clients[user].ask(CHAT, chat(text, spec["budget"]))
            assert status == 200, body
            return body["usage"]["completion_tokens"]
        body = chat(text, spec["budget"], stream=True, stream_options={"include_usage": True})
        return list(clients[user].events(CHAT, body))[-1]["usage"]["completion_tokens"]

    print(json.dumps(together(spec["users"], spec["texts"], ask)))


def in_another_process(spec: dict[str, Any]) -> subprocess.Popen[str]:
    """Starts `client_process`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, "--client", json.dumps(spec)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def throughput(
    pool: Pool, url: str, server: Server, texts: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens per second of every way, and what is lost."""
    del server
    speeds: dict[str, list[float]] = collections.defaultdict(list)
    costs: dict[str, list[float]] = collections.defaultdict(list)
    direct(pool, texts[: options.users], options.users, options.tokens)  # everything is compiled and warm
    for _ in range(options.repeats):
        used = time.process_time()
        seconds, tokens = direct(pool, texts, options.users, options.tokens)
        costs["direct"].append(1000 * (time.process_time() - used) / tokens)
        speeds["direct"].append(tokens / seconds)
        for name, stream in (("whole", False), ("stream", True)):
            spec = {"url": url, "users": options.users, "texts": texts, "budget": options.tokens, "stream": stream}
            used = time.process_time()
            output, _ = in_another_process(spec).communicate()
            costs[name].append(1000 * (time.process_time() - used) / tokens)
            seconds, found = json.loads(output)
            assert found == tokens, f"{found} tokens over HTTP, {tokens} directly"
            speeds[name].append(tokens / seconds)
    lost = {
        name: statistics.median(1 - one / beside for one, beside in zip(speeds[name], speeds["direct"], strict=True))
        for name in ("whole", "stream")
    }
    best = {name: max(found) for name, found in speeds.items()}
    least = {name: min(found) for name, found in costs.items()}
    return {"tokens_per_second": best, "lost": lost, "processor_seconds": least, "speeds": speeds, "costs": costs}


# The soak, in the process of the clients.


def soaked(spec: dict[str, Any]) -> dict[str, Any]:
    """What was seen, and what went wrong."""
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    end = time.monotonic() + spec["seconds"]

    def user(seed: int) -> None:
        rng, client = random.Random(seed), Client(spec["url"])
        deeds = (_whole, _stream, _leaving, _malformed, _malformed, _slow, _flood)
        weights = (8, 6, 3, 4, 4, 0.3, 0.2)
        while time.monotonic() < end:
            time.sleep(min(rng.expovariate(8.0), 1.0))
            deed = rng.choices(deeds, weights)[0]
            try:
                wrong = deed(client, rng, spec)
            except (OSError, http.client.HTTPException, ValueError) as error:
                wrong = f"{type(error).__name__}: {error}"
                client.leave()
            counts[deed.__name__.strip("_")] += 1
            if wrong:
                failures.append(f"{deed.__name__.strip('_')}: {wrong}")

    with concurrent.futures.ThreadPoolExecutor(spec["users"]) as threads:
        for one in [threads.submit(user, seed) for seed in range(spec["users"])]:
            one.result()
    return {"counts": counts, "failures": failures[:20], "failed": len(failures)}


def _whole(client: Client, rng: random.Random, spec: dict[str, Any]) -> str:
    text = rng.choice(spec["texts"])
    status, body = client.ask(CHAT, chat(text, spec["budget"], model=rng.choice(spec["models"])))
    if status == 429:
        return ""
    found = body["choices"][0]["message"]["content"] if status == 200 else body
    return "" if found == spec["answers"][text] else f"{found!r} instead of {spec['answers'][text]!r}"


def _stream(client: Client, rng: random.Random, spec: dict[str, Any]) -> str:
    text = rng.choice(spec["texts"])
    response = client.open(CHAT, chat(text, spec["budget"], stream=True))
    lines = response.read().split(b"\n")
    if response.status == 429:
        return ""
    events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    found = "".join(one["choices"][0]["delta"].get("content", "") for one in events if one.get("choices"))
    return "" if found == spec["answers"][text] else f"{found!r} instead of {spec['answers'][text]!r}"


def _leaving(client: Client, rng: random.Random, spec: dict[str, Any]) -> str:
    """Goes away, in the middle of an answer or before."""
    body = chat(rng.choice(spec["texts"]), spec["budget"], temperature=1.0, stream=rng.random() < 0.5, n=2)
    client.connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    time.sleep(rng.random() * 0.1)
    client.leave()
    return ""


def _malformed(client: Client, rng: random.Random, spec: dict[str, Any]) -> str:
    del spec
    path, body, expected = rng.choice(WRONG)
    status, found = client.ask(path, body)
    clear = isinstance(found.get("error"), dict) and found["error"]["message"] and "\n" not in found["error"]["message"]
    return "" if status == expected and clear else f"{body[:40]!r} was answered with {status} {found}"


def _slow(client: Client, rng: random.Random, spec: dict[str, Any]) -> str:
    """A head or a body that does not come."""
    del spec
    host, port = client.host.split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(head[: rng.choice([0, 20, len(head)])])
        found = raw.recv(1000)
    return "" if found.startswith(b"HTTP/1.1 408 ") else f"{found[:60]!r} instead of 408"


def _flood(client: Client, rng: random.Random, spec: dict[str, Any]) -> str:
    """More than the queue holds; those that are taken go away."""
    del client
    clients, body = [Client(spec["url"]) for _ in range(40)], chat(rng.choice(spec["texts"]), spec["budget"], n=4)
    for one in clients:
        one.connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
    time.sleep(0.5)
    for one in clients:
        one.leave()
    return ""


def memory() -> float:
    """Megabytes of this process that are in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().split("\n") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


class _Malloc(ctypes.Structure):
    """`struct mallinfo2` of glibc: ten sizes; the fifth is of memory maps, the eighth of what is in use elsewhere."""

    _fields_: ClassVar = [("sizes", ctypes.c_size_t * 10)]


def allocated() -> float:
    """Megabytes that are allocated and not freed, as glibc counts them: what it keeps of freed ones is not in it."""
    read = ctypes.CDLL(None).mallinfo2
    read.restype = _Malloc
    sizes = read().sizes
    return (sizes[4] + sizes[7]) / 2**20


class Compiled:
    """Counts the programs that JAX compiles from now on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._see)

    def _see(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        self.count += event == "/jax/core/compile/backend_compile_duration"


def soak(pool: Pool, url: str, server: Server, texts: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Serves the other process, and closes the books."""
    engine = pool.engine(pool.default)
    prompts = [pool.prompt([{"role": "user", "content": text}]) for text in texts]
    answers = {
        text: engine.submit(ids, max_new_tokens=options.tokens).result().text
        for text, ids in zip(texts, prompts, strict=True)
    }
    spec = {"url": url, "users": options.users, "texts": texts, "answers": answers, "budget": options.tokens}
    clients = in_another_process(spec | {"models": pool.names, "seconds": options.soak})
    began, samples, compiled = time.monotonic(), list[tuple[float, float, int]](), Compiled()
    while clients.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            clients.wait(options.soak / 200)
        gc.collect()
        samples.append((round(memory(), 1), round(allocated(), 1), compiled.count))
    assert clients.stdout is not None
    seconds, found = time.monotonic() - began, json.loads(clients.stdout.read())
    end = time.monotonic() + 30
    while server.service.in_flight and time.monotonic() < end:
        time.sleep(0.1)
    engines = {" ".join(key): vars(one.metrics) for key, one in pool.engines.items()}
    left = {key: one.running + one.waiting for key, one in pool.engines.items()}
    checks = {
        "failed_answers": found["failed"] == 0,
        "nothing_is_left": server.service.in_flight == 0 and not any(left.values()),
        "counts_add_up": all(one["submitted"] == sum(one["finished"].values()) for one in engines.values()),
        "no_engine_failed": not any(one["finished"]["error"] for one in engines.values()),
        "memory_is_flat": _grown([one[1] for one in samples]) < 20,
    }
    responses = {f"{path} {status}": count for (path, status), count in server.service.metrics.responses.items()}
    report = {"seconds": round(seconds), "checks": checks, "responses": responses, "engines": engines, **found}
    names, parts = ("memory_megabytes", "allocated_megabytes", "programs_compiled"), list(zip(*samples, strict=True))
    series = {name: part[:: max(len(part) // 20, 1)] for name, part in zip(names, parts, strict=True)}
    return (
        report
        | series
        | {"grown_megabytes": {name: _grown(part) for name, part in zip(names[:2], parts, strict=False)}}
    )


def _grown(samples: Sequence[float]) -> float:
    """Megabytes from the second fifth of the time to the last one."""
    fifth = max(len(samples) // 5, 1)
    return round(statistics.median(samples[-fifth:]) - statistics.median(samples[fifth : 2 * fifth] or samples), 1)


def main() -> None:
    """Command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", help="of a run")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=16, help="of each evaluation set (default: 16)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most (default: 64)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="soak so long, instead of measuring")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        client_process(json.loads(options.client))
        return
    config = dspark_jax.load_config(str(Path(options.workdir) / "config.json"))
    read = [one for file in config.eval.prompts for one in read_prompts([file], options.prompts, print)]
    texts = [str(one.messages[0]["content"]) for one in read]
    sizes = Sizes(slots=8, capacity=512, max_queue=64)
    with Pool.open(Run(config, Path(options.workdir)), sizes) as pool:
        if options.soak:
            pool.warm_up()
        else:
            pool.engine(pool.default).warm_up(sampled=False)
        with running(pool, limits=LIMITS) as (url, server):
            measure = soak if options.soak else throughput
            found = measure(pool, url, server, texts, options)
    found["load"] = os.getloadavg()
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    raise SystemExit(0 if all(found.get("checks", {}).values()) else 1)


if __name__ == "__main__":
    main()
