"""Real llama.cpp answers prompts for training: greedily, the samples are those of the target here, kills or not."""

import importlib.util
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.config import AnswersConfig, Config, resolve
from dspark_jax.data.sources import SampleReader
from dspark_jax.prepare import prepare
from tests.benchmarks import answers as benchmark
from tests.servers.conftest import HERE, ROOT, TARGET

pytestmark = pytest.mark.servers


@pytest.fixture(scope="module")
def url(given: Any, gguf: Any) -> Iterator[str]:
    """Of llama.cpp's server."""
    command = [given("--llama-python"), str(HERE / "http_llama_cpp.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        asked = {"target": str(gguf(TARGET)), "context": 512, "slots": 4}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        line = next(line for line in process.stdout if line.startswith("RESULT "))
        yield json.loads(line.removeprefix("RESULT "))["url"] + "/v1"
        process.kill()


def quickstart(**answers: Any) -> Config:
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs" / "quickstart.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.target.dtype, config.data.limit, config.data.temperature = "float32", 8, 0.0
    config.data.answers = AnswersConfig(**answers)
    return resolve(config)


def samples(workdir: Path) -> dict[int, list[int]]:
    found = SampleReader(workdir / "data")
    return {found[i].sample_id: found[i].tokens.tolist() for i in range(len(found))}


def test_llama_cpp_answers_as_the_target_does_here(url: str, tmp_path: Path) -> None:
    prepare(quickstart(), tmp_path / "here")
    wanted = samples(tmp_path / "here")
    for mode in ("tokens", "chat"):
        report = prepare(quickstart(endpoints=(url,), mode=mode), tmp_path / mode)
        found = samples(tmp_path / mode)
        same = sum(found.get(number) == tokens for number, tokens in wanted.items())
        print(f"llama.cpp {mode}: {same} of {len(wanted)}, {report['answers_as_text']} answers as text")
        assert same >= len(wanted) - 2, "a tie, or in chat mode a text that has two tokenisations"
        assert (report["answers_as_text"] == 0) == (mode == "tokens")


def test_a_thousand_prompts_killed_twice_lose_and_double_nothing(url: str) -> None:
    config = benchmark.quickstart(1000, temperature=0.0)
    config.data.answers = AnswersConfig(endpoints=(url,))
    found = benchmark.killed_twice(config, None)
    print(f"llama.cpp, killed twice: {found}")
    assert found["samples"] >= 1000 and found["lost"] == found["doubled"] == 0
    assert found["same"] >= 0.99 * found["samples"], "answers together with others are summed in another order: ties"
