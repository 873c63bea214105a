"""Shared by all tests: eight host devices on CPU, and the golden vectors where they are present."""

import dataclasses
import gc
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.compiling import QUICKLY

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda runs the kernels of tests/ops on a card
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 {QUICKLY}"
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell's `&` ignores Ctrl-C, and the commands that tests start and interrupt would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


MOST_MAPS = 30_000
"""Memory maps of the process from which executables are dropped: Linux allows 65530, and beyond them compiling crashes.
Every compiled program takes some, and the whole suite compiles thousands."""


@pytest.fixture(autouse=True)
def few_executables() -> Iterator[None]:
    """Drops the executables that have piled up."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        import jax

        jax.clear_caches()
        gc.collect()


NO_GOLDEN = "golden vectors are not beside this checkout (../shared/golden)"


@pytest.fixture(scope="session")
def golden() -> Path:
    """The numeric test vectors of the PyTorch reference, kept beside the checkout and not part of the project."""
    path = SHARED / "golden"
    if not path.exists():
        pytest.skip(NO_GOLDEN)
    return path


@dataclasses.dataclass(frozen=True)
class GoldenCase:
    """A drafter of the golden vectors, as its `case.json` describes it.

    Attributes:
      folder: has `draft/`, `io.json`, `io.safetensors`, `grads.safetensors` and `decode.json`.
      target: the directory of its target.
      about: family (qwen3, gemma4), kind (dspark, DFlash included; eagle3), head, ...
    """

    folder: Path
    target: Path
    about: dict[str, Any] = dataclasses.field(hash=False)

    def read(self, name: str) -> Any:
        """The content of a JSON file of the case."""
        return json.loads((self.folder / name).read_text("utf-8"))


def others_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test of which only the `quick` ones belong to the short suite."""
    return [value if value in quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


GOLDEN_CASES: dict[str, dict[str, Any]] = {
    "golden_case": {},
    "golden_block_case": {"kind": "dspark"},
    "golden_vanilla_case": {"kind": "dspark", "family": "qwen3", "head": "vanilla"},
    "golden_eagle3_case": {"kind": "eagle3", "family": "qwen3"},
    "golden_gemma4_block_case": {"kind": "dspark", "family": "gemma4"},
    "golden_gemma4_eagle3_case": {"kind": "eagle3", "family": "gemma4"},
}
"""Argument of a test or fixture -> which cases it is given in turn: whatever lies there is read, under any name."""


def golden_cases(wanted: dict[str, Any]) -> list[Any]:
    """The cases with these facts as parameters of a test; one that is skipped where there are none."""
    found = []
    for file in sorted((SHARED / "golden" / "cases").glob("*/case.json")):
        content = json.loads(file.read_text("utf-8"))
        case = GoldenCase(file.parent, (file.parent / content["target"]).resolve(), content["case"])
        if all(case.about.get(name) == value for name, value in wanted.items()):
            found.append(pytest.param(case, id=file.parent.name))
    return found or [pytest.param(None, id="none", marks=pytest.mark.skip(reason=NO_GOLDEN))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives every test the golden cases that it asks for."""
    for name in set(GOLDEN_CASES) & set(metafunc.fixturenames):
        metafunc.parametrize(name, golden_cases(GOLDEN_CASES[name]), scope="session")


@pytest.fixture(scope="session")
def save_untrained() -> Callable[..., None]:
    """`save(config, workdir, mesh)` writes the checkpoint of a freshly initialised drafter, as a run would."""

    def save(config: Any, workdir: Path, mesh: Any) -> None:
        from dspark_jax.run import Run
        from dspark_jax.training.checkpoint import Checkpoints
        from dspark_jax.training.optim import make_optimizer
        from dspark_jax.training.state import init_state

        with Checkpoints(Run(config, workdir)) as checkpoints:
            checkpoints.save(1, init_state(config, make_optimizer(config.optim, 1), mesh), {})

    return save


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """An empty bucket for gs:// and s3://, on a machine that has fetched nothing; call it to have another machine."""
    from dspark_jax.buckets import inputs, places
    from tests import fake_bucket

    folder, numbers = tmp_path / "the bucket", itertools.count()
    folder.mkdir()
    monkeypatch.setenv(fake_bucket.FOLDER, str(folder))
    monkeypatch.setattr(fake_bucket.FakeBucket, "before", staticmethod(lambda what, key: None))
    fake_bucket.register()

    def another() -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine{next(numbers)}"))
        monkeypatch.setattr(places, "_OPEN", {})
        inputs.local_folder.cache_clear()
        inputs._file.cache_clear()

    another()
    return another


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """`add(hub_id, directory)` fills a hub cache that holds nothing else, without network; it is `tmp_path`."""
    import shutil

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def add(hub_id: str, directory: Path) -> None:
        folder, commit = tmp_path / f"models--{hub_id.replace('/', '--')}", "0123456789abcdef" * 2 + "01234567"
        shutil.copytree(directory, folder / "snapshots" / commit)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)

    return add


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a random two-layer Qwen3 and a byte-level BPE tokenizer with a ChatML template."""
    import json

    import numpy as np
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tiny_target")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(["user assistant system the answer is the sum of the numbers\n\n"] * 9, trainer)
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
        "{{- '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    state = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(state))

    vocabulary, width, mlp = 320, 32, 64
    config = {
        "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": mlp,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True, "max_position_embeddings": 512,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (32, width), "self_attn.k_proj": (16, width), "self_attn.v_proj": (16, width),
        "self_attn.o_proj": (width, 32), "self_attn.q_norm": (16,), "self_attn.k_norm": (16,),
        "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp),
        "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    tensors = {"model.embed_tokens.weight": rng.normal(0, 0.3, (vocabulary, width))}
    tensors["model.norm.weight"] = np.ones(width)
    for layer in range(2):
        for name, shape in shapes.items():
            values = np.ones(shape) if len(shape) == 1 else rng.normal(0, 0.3, shape)
            tensors[f"model.layers.{layer}.{name}.weight"] = values
    save_file({name: np.asarray(value, np.float32) for name, value in tensors.items()}, folder / "model.safetensors")
    return folder
