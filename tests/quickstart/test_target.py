"""The shipped target directory: complete, small, and as good as its card says, by an independent implementation."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.flax import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig

from dspark_jax.config import TargetArchitecture
from dspark_jax.target.model import Target
from tests.quickstart.builder import pretrain
from tests.quickstart.builder.corpus import DOMAINS
from tests.quickstart.builder.export import tensors, write_target
from tests.quickstart.builder.packing import rows
from tests.quickstart.builder.report import answer

# Held-out answer loss in nats per token; an untrained or wrongly exported model is at 8.3.
LOSS_BOUND = {"math": 1.0, "code": 4.0, "chat": 5.0}


def test_directory_is_complete_and_small(target_folder):
    files = {file.name: file.stat().st_size for file in target_folder.iterdir()}
    assert set(files) == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                          "tokenizer_config.json", "README.md"}  # fmt: skip
    assert sum(files.values()) <= 12.5e6


def test_config_is_qwen3(target_folder):
    config = AutoConfig.from_pretrained(target_folder, local_files_only=True)
    assert config.model_type == "qwen3" and config.architectures == ["Qwen3ForCausalLM"]
    assert TargetArchitecture.from_hf(target_folder) == pretrain.ARCHITECTURE


def test_weights_are_the_expected_tensors(target_folder):
    shapes = jax.eval_shape(lambda: tensors(pretrain.new_model()))
    expected = {name: value.shape for name, value in shapes.items()}
    with safe_open(target_folder / "model.safetensors", "np") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        assert {file.get_slice(name).get_dtype() for name in found} == {"BF16"}
    assert found == expected and "lm_head.weight" not in found


@pytest.fixture(scope="module")
def oracle(target_folder):
    torch = pytest.importorskip("torch")
    from transformers import Qwen3ForCausalLM

    torch.set_num_threads(2)
    return Qwen3ForCausalLM.from_pretrained(target_folder, local_files_only=True, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def heldout(oracle, target_folder, split):
    """By domain, over answer tokens of held-out conversations: mean loss, mean entropy, mass on unused rows."""
    import torch

    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    found = {}
    for domain in DOMAINS:
        batch = next(rows(tokenizer, split["heldout"], {domain: 1.0}, 6, seed=1))
        tokens = torch.tensor(batch.tokens, dtype=torch.long)
        with torch.no_grad():
            log_p = oracle(tokens).logits.log_softmax(-1)[:, :-1]
        per_token = {
            "loss": -log_p.gather(-1, tokens[:, 1:, None])[..., 0],
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "unused": log_p[..., 4080:].exp().sum(-1),
        }
        answers = batch.weights[:, 1:] == 1
        found[domain] = {name: float(value.numpy()[answers].mean()) for name, value in per_token.items()}
    return found


@pytest.mark.parametrize("domain", DOMAINS)
def test_heldout_loss(heldout, domain):
    assert heldout[domain]["loss"] < LOSS_BOUND[domain]


@pytest.mark.parametrize("domain", DOMAINS)
def test_unused_rows_are_practically_never_drawn(heldout, domain):
    assert heldout[domain]["unused"] < 1e-3


def test_entropy_differs_by_domain(heldout):
    assert heldout["math"]["entropy"] < heldout["code"]["entropy"] < heldout["chat"]["entropy"]


def test_export_keeps_the_function(tmp_path, target_folder):
    torch = pytest.importorskip("torch")
    from transformers import Qwen3ForCausalLM

    arch = TargetArchitecture("qwen3", 4096, 32, 2, 4, 2, 8, 48, max_position_embeddings=64)
    model = Target(arch, rngs=nnx.Rngs(3), scale=0.2)
    model = nnx.merge(*_rounded(model))
    write_target(model, Tokenizer.from_file(str(target_folder / "tokenizer.json")), tmp_path / "target")
    assert not (tmp_path / "target.new").exists()
    tokens = np.arange(40).reshape(2, 20) * 7 % 4080
    out = model.forward(tokens, np.broadcast_to(np.arange(20), (2, 20))).last_hidden
    twin = Qwen3ForCausalLM.from_pretrained(tmp_path / "target", local_files_only=True, dtype=torch.float32)
    with torch.no_grad():
        expected = twin(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(model.unembed(out)), expected, atol=2e-4, rtol=0)


def _rounded(model):
    """The model with parameters that bfloat16 holds exactly."""
    graph, params = nnx.split(model)
    return graph, jax.tree.map(lambda p: np.asarray(p).astype(ml_dtypes.bfloat16).astype(np.float32), params)


def test_sampler_stops_and_measures(target_folder):
    arch = TargetArchitecture("qwen3", 4096, 16, 1, 2, 1, 8, 16, max_position_embeddings=512)
    model = Target(arch, rngs=nnx.Rngs(0))
    tokenizer = Tokenizer.from_file(str(target_folder / "tokenizer.json"))
    found = answer(model, tokenizer, ["What is 1 + 1?", "Hi."])
    assert found.entropy == pytest.approx(np.log(4096), rel=0.02)  # a fresh model is nearly uniform
    assert found.lengths.shape == (2,) and (found.lengths <= 256).all()


def test_card_states_the_figures(target_folder):
    card = (target_folder / "README.md").read_text("utf-8")
    for word in ("held-out loss", "tokens trained on", "Licence", "What it is not"):
        assert word in card
    config = json.loads((target_folder / "config.json").read_text("utf-8"))
    assert sum(v.size for v in load_file(target_folder / "model.safetensors").values()) == _parameters(config)


def _parameters(c):
    d, f, h = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    n, k = c["num_attention_heads"], c["num_key_value_heads"]
    layer = 2 * d * n * h + 2 * d * k * h + 3 * d * f + 2 * d + 2 * h
    return c["vocab_size"] * d + c["num_hidden_layers"] * layer + d
