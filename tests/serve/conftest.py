"""A server in this process over a tiny target with a random drafter, and what `generate` answers in its place."""

import http.client
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import openai
import pytest
from flax import nnx

from dspark_jax.config import Config, DataConfig, DrafterConfig, MeshConfig, TargetConfig, resolve
from dspark_jax.data.chat import answer_text, load_tokenizer, stop_tokens
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import Models, generate
from dspark_jax.serve.pool import Member, Pool, Sizes
from dspark_jax.serve.server import Server, running
from dspark_jax.serve.service import Limits
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import compute_dtype, load_target

SIZES = Sizes(slots=3, capacity=192, max_queue=12)
LIMITS = Limits(body=4000, tokens=150, choices=5, header_seconds=0.6, body_seconds=0.6, send_seconds=0.6)
"""Small and short, so that tests of them are quick."""


@pytest.fixture(scope="session")
def served_config(tiny_target: Path) -> Config:
    """A DSpark of one layer with three drafts."""
    drafter = DrafterConfig("dspark", 1, 3, (0,), 319, 8, True, True)
    config = Config(
        "tiny", TargetConfig(str(tiny_target)), drafter, data=DataConfig(max_prompt_length=64, max_length=128)
    )
    return resolve(config)


@pytest.fixture(scope="session")
def members(served_config: Config, tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """A random drafter, and another one of the same target."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    target = load_target(served_config.target, mesh)
    arch, dtype = served_config.target.architecture, compute_dtype(served_config.drafter.dtype)
    found = []
    for seed, name in enumerate(("tiny", "other")):
        with jax.set_mesh(mesh):
            drafter = make_drafter(arch, served_config.drafter, rngs=nnx.Rngs(seed), dtype=dtype)
        models = Models(target, drafter).for_decoding(batch_size=SIZES.slots)
        target = models.target
        found.append(Member(name, models, "dspark", tmp_path_factory.mktemp(name)))
    return [Member(one.name, Models(target, one.models.drafter), one.kind, one.workdir) for one in found]


@pytest.fixture(scope="session")
def make_pool(served_config: Config, members: list[Member]) -> Callable[..., Pool]:
    """`make_pool(**sizes)`: pools whose engines share executables where their sizes are the same."""
    tokenizer = load_tokenizer(served_config.target.path)

    def make(**sizes: Any) -> Pool:
        return Pool(members, served_config, tokenizer, Sizes(**(vars(SIZES) | sizes)))

    return make


class Served(NamedTuple):
    """A server that runs, and its clients."""

    pool: Pool
    url: str
    server: Server
    client: openai.OpenAI

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict[str, str], Any]:
        """(status, headers, JSON) of a request; `body` is JSON, or bytes as they are."""
        host = self.url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=30)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request("POST", path, content, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        found = response.status, {name.lower(): value for name, value in response.getheaders()}
        text = response.read()
        connection.close()
        return *found, json.loads(text)

    def get(self, path: str) -> tuple[int, str]:
        """(status, text) of a page."""
        connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)
        connection.request("GET", path)
        response = connection.getresponse()
        found = response.status, response.read().decode()
        connection.close()
        return found


def client_of(url: str, **options: Any) -> openai.OpenAI:
    """A client that asks once."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120, **options)


@pytest.fixture(scope="module")
def served(make_pool: Callable[..., Pool]) -> Iterator[Served]:
    """One server for the tests of a module."""
    with make_pool() as pool, running(pool, limits=LIMITS) as (url, server):
        yield Served(pool, url, server, client_of(url))


@pytest.fixture(scope="session")
def reference(served_config: Config, members: list[Member]) -> Callable[..., list[str]]:
    """`reference(prompts, ...)`: texts by `generate` of the same models."""
    tokenizer = load_tokenizer(served_config.target.path)
    stops = stop_tokens(served_config.target.path, tokenizer)

    def answer(prompts: Sequence[Sequence[int]], tokens: int = 24, **settings: Any) -> list[str]:
        result = generate(
            members[0].models,
            [list(one) for one in prompts],
            max_new_tokens=tokens,
            stop_tokens=stops,
            batch_size=SIZES.slots,
            prompt_width=64,
            **settings,
        )
        return [answer_text(tokenizer, one.tolist()) for one in result.tokens]

    return answer
