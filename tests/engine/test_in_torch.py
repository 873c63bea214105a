"""Targets that PyTorch runs: the tokens and accepted lengths of the same target in JAX, and of transformers alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import InputError, MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.engine.generate import generate
from dspark_jax.engine.models import Models
from dspark_jax.engine.schedulers import threshold
from dspark_jax.engine.serving import Engine
from dspark_jax.sharding import make_mesh
from dspark_jax.target.in_torch import in_torch, runs_in_torch
from dspark_jax.target.loading import load_target
from dspark_jax.target.torch_model import TorchModel, load_torch_model
from dspark_jax.target.torch_requests import COPY, CROP, WHOLE, TorchRequests
from tests.conftest import others_slow

torch = pytest.importorskip("torch")
G, NEW = 3, 20
OTHERS = [(1.0, False), (0.0, True), (1.0, True)]
PROMPTS = [[5, 9, 2, 7, 7, 1], [5, 9, 30], [8], [5, 9, 2, 7, 40, 41, 42, 43]]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"vocab_size": 67, "max_position_embeddings": 96, "initializer_range": 0.3}
FAMILIES = {  # name -> config, how rows are taken back
    "Olmo2": ({"num_key_value_heads": 2, "tie_word_embeddings": True}, CROP),
    "GPTNeoX": ({"tie_word_embeddings": False}, CROP),
    "Mistral": ({"num_key_value_heads": 2, "sliding_window": 5}, COPY),
}


@pytest.fixture(scope="module")
def mesh() -> Any:
    return make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, mesh: Any) -> Any:
    """name -> the model in PyTorch, and the target that it is here."""
    import transformers

    found = {}

    def make(name: str) -> Any:
        if name not in found:
            torch.manual_seed(0)
            config = getattr(transformers, f"{name}Config")(**SIZES, **FAMILIES[name][0])
            model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
            path = tmp_path_factory.mktemp(name)
            model.save_pretrained(path)
            arch = TargetArchitecture.of_any_model(path)
            found[name] = model, load_target(TargetConfig(str(path), architecture=arch, dtype="float32"), mesh)
        return found[name]

    return make


@pytest.fixture(scope="module")
def both(tiny_target: Any, mesh: Any) -> Any:
    """A Qwen3 in JAX, and the same in PyTorch."""
    config = TargetConfig(str(tiny_target), architecture=TargetArchitecture.from_hf(tiny_target), dtype="float32")
    ours, model = load_target(config, mesh), load_torch_model(str(tiny_target), "float32")
    return ours, in_torch(config.architecture, TorchRequests(model), model.frozen_matrices(), mesh, np.float32)


def drafter_of(models: Any, target: Any, answers: Any) -> Any:
    """One that drafts the pairs of tokens that it has seen in these answers: mostly right along them."""
    table = np.zeros((target.arch.vocab_size,) * 2, np.float32)
    for prompt, tokens in zip(PROMPTS, answers, strict=True):
        text = [*prompt, *tokens]
        table[text[:-1], text[1:]] = 4.0
    return models.bigram_drafter(table, G, (), models.table(len(table), 8)[0])


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers answers."""
    ids = torch.as_tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("temperature", "scheduled"), [(0.0, False), *(pytest.param(*one, marks=pytest.mark.slow) for one in OTHERS)]
)
def test_a_qwen3_in_pytorch_decodes_as_in_jax(both: Any, models: Any, temperature: float, scheduled: bool) -> None:
    """Same uniforms, same tokens, same accepted lengths: logits are the same up to float32 rounding, which decides
    nothing here. With a scheduler rows are verified as one flat batch."""
    ours, theirs = both
    drafter = models.near(ours, G, noise=0.5, confidence=True, taps=())
    if not temperature:
        drafter = drafter_of(models, ours, generate(Models(ours), PROMPTS, max_new_tokens=NEW).tokens)
    settings: dict[str, Any] = {"max_new_tokens": NEW, "temperature": temperature, "seed": 3, "batch_size": 3}
    if scheduled:
        settings |= {"scheduler": threshold(0.5), "verify_sizes": (4, 8)}
    here, there = (generate(Models(target, drafter), PROMPTS, **settings) for target in (ours, theirs))
    for name in ("tokens", "acceptance_lengths", "accepted_lengths", "proposal_lengths"):
        for a, b in zip(getattr(here, name), getattr(there, name), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)
    accepted = np.concatenate(there.accepted_lengths)
    assert set(accepted) >= {0, 1, 2}  # there was something to take back, and something to keep
    if not temperature:
        for prompt, tokens in zip(PROMPTS, there.tokens, strict=True):
            assert tokens.tolist() == greedy(theirs.requests.model.model, prompt, NEW)


def test_features_and_hidden_states_are_those_of_jax(both: Any) -> None:
    """Of every layer, the embeddings and the last one included; with a cache some rows of which are taken back."""
    tokens, taps = np.random.default_rng(0).integers(0, 320, (2, 12)), (-1, 0, 1)
    starts, counts = np.array([[0, 0], [5, 3], [6, 7]]), np.array([[5, 3], [4, 4], [4, 2]])
    whole, parts = [], []
    for target in both:
        positions = np.broadcast_to(np.arange(12), tokens.shape)
        whole.append(target.forward(tokens, positions, taps=taps))
        cache = target.init_cache(2, 16)
        for first, count in zip(starts, counts, strict=True):
            at = first[:, None] + np.arange(5)
            own = tokens[np.arange(2)[:, None], np.minimum(at, 11)]
            out = target.forward(own, at, cache, taps=taps, counts=count)
            cache = out.cache
        parts.append(out)
    for (one, other), real in ((whole, (12, 12)), (parts, (4, 2))):
        for row, count in enumerate(real):
            for name in ("features", "last_hidden"):
                a, b = (np.asarray(getattr(out, name))[row, :count] for out in (one, other))
                np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)
    for row, (first, count) in enumerate(zip(starts[-1], counts[-1], strict=True)):
        a, b = whole[0].last_hidden[row, first : first + count], parts[1].last_hidden[row, :count]
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", others_slow(FAMILIES, "Olmo2"))
def test_greedy_answers_are_those_of_transformers(made: Any, models: Any, name: str) -> None:
    """With drafts that are right now and then, past the window of those that have one; few rows are read twice."""
    model, target = made(name)
    assert runs_in_torch(target) and target.requests.way == FAMILIES[name][1]
    rows, run = [], target.requests._run

    def counting(taps: Any, tokens: np.ndarray, *rest: Any, **more: Any) -> Any:
        rows.append(len(tokens))
        return run(taps, tokens, *rest, **more)

    target.requests._run = counting
    wanted = [greedy(model, prompt, NEW) for prompt in PROMPTS]
    pair = Models(target, drafter_of(models, target, wanted))
    found = generate(pair, PROMPTS, max_new_tokens=NEW, batch_size=2)
    target.requests._run = run
    assert [tokens.tolist() for tokens in found.tokens] == wanted
    assert set(np.concatenate(found.accepted_lengths)) >= {0, 1, G}
    rounds = int(found.rounds.sum())
    again = 0 if FAMILIES[name][1] == CROP else G + 1
    assert sum(rows) <= 67 + sum(map(len, PROMPTS)) + (rounds + len(PROMPTS)) * (G + 1 + again)


RECURRENT = {  # linear attention, short convolutions, windows and sinks
    "Qwen3Next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "head_dim": 8}
    | {"linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16, "num_hidden_layers": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 4}
    | {"layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.parametrize("name", others_slow(RECURRENT, "Qwen3Next"))
def test_rows_are_taken_back_in_every_kind_of_state(name: str) -> None:
    """After every accepted length the rows that follow are those of one pass over the sequence."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "num_key_value_heads": 2, **RECURRENT[name]})
    requests = TorchRequests(TorchModel(getattr(transformers, f"{name}ForCausalLM")(config).eval(), name))
    assert requests.way == COPY
    tokens = np.random.default_rng(0).integers(0, 67, 30)
    wanted, at = requests._read((-1, 0), -1, tokens, 0), 7
    np.testing.assert_allclose(requests._read((-1, 0), 0, tokens[:7], 0), wanted[:7], atol=1e-4)
    for accepted in (1, 0, 3, 2, 0, 3, 3):
        rows = tokens[at : at + G + 1].copy()
        rows[accepted + 1 :] = (rows[accepted + 1 :] + 1) % 67
        asked = np.concatenate([tokens[:at], rows])
        found = requests._read((-1, 0), 0, asked, at)
        assert requests._read((-1, 0), 0, asked, at) is found  # as a request that has ended asks
        np.testing.assert_allclose(found[: accepted + 1], wanted[at : at + accepted + 1], atol=1e-4)
        at += accepted + 1


def test_a_cache_that_cannot_be_gone_back_in_is_not_used(
    made: Any, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that gives other hidden states: found when the model is loaded."""
    _, target = made("Olmo2")
    original = type(target.requests)._run

    def forgetful(self: Any, taps: Any, tokens: Any, cache: Any, *, keep: bool = True) -> Any:
        return original(self, taps, tokens, None, keep=keep)

    with monkeypatch.context() as patch:
        patch.setattr(TorchRequests, "_run", forgetful)
        requests = TorchRequests(target.requests.model)
    assert requests.way == WHOLE
    slow = jax.tree.map(lambda leaf: leaf, target)
    slow.requests = requests
    drafter = models.near(target, G, taps=())
    there, here = (generate(Models(one, drafter), PROMPTS[:2], max_new_tokens=9) for one in (slow, target))
    for a, b in zip(there.tokens, here.tokens, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_an_engine_gives_the_tokens_of_generate(made: Any, models: Any) -> None:
    """Slots pass from request to request, prompts come in chunks: rows are taken back in all of it."""
    _, target = made("GPTNeoX")
    pair = Models(target, models.near(target, G, noise=0.5, taps=()))
    wanted = generate(pair, PROMPTS, max_new_tokens=NEW, temperature=0.7).tokens
    engine = Engine(pair, slots=2, capacity=64, prefill_chunk=4)
    engine.warm_up(greedy=False)
    asked = [
        engine.submit(prompt, max_new_tokens=NEW, temperature=0.7, random_stream=number)
        for number, prompt in enumerate(PROMPTS)
    ]
    for request, tokens in zip(asked, wanted, strict=True):
        assert list(request.result().tokens) == tokens.tolist()
    engine.close()


def test_a_mesh_of_several_devices_is_refused(made: Any, mesh: Any) -> None:
    _, target = made("Olmo2")
    config = TargetConfig(target.requests.model.path, architecture=dataclasses.replace(target.arch))
    cube = make_mesh(MeshConfig(2, 2, 2), jax.devices())
    with pytest.raises(InputError, match="a olmo2 is run by PyTorch, which decodes on one device of one host, and the"):
        load_target(config, cube)


@pytest.mark.slow
def test_a_deepseek_v4_in_pytorch_is_the_one_in_jax(models: Any, mesh: Any, tmp_path: Any) -> None:
    """Tapped are means over its residual streams, and rejected rows are taken back in a cache of compressed rows."""
    from tests.target.random_models import V, load, write_model

    write_model("v4", tmp_path)
    ours, model = load(tmp_path, mesh), load_torch_model(str(tmp_path), "float32")
    tokens, taps = np.random.default_rng(0).integers(0, V, (2, 17)), (-1, 0, 2)
    features = np.concatenate([x.numpy() for x in model.run(tokens, taps)[0][:-1]], axis=-1)
    positions = jnp.broadcast_to(jnp.arange(17), tokens.shape)
    np.testing.assert_allclose(features, ours.forward(jnp.asarray(tokens), positions, taps=taps).features, atol=1e-5)
    theirs = in_torch(ours.arch, TorchRequests(model), model.frozen_matrices(), mesh, np.float32)
    wanted = generate(Models(ours), PROMPTS, max_new_tokens=NEW)
    drafter = drafter_of(models, ours, wanted.tokens)
    found = generate(Models(theirs, drafter), PROMPTS, max_new_tokens=NEW)
    for got, want in zip(found.tokens, wanted.tokens, strict=True):
        np.testing.assert_array_equal(got, want)
    lengths = np.concatenate(found.acceptance_lengths)
    assert lengths.max() > 2 and lengths.min() == 1  # some drafts are accepted, and some are taken back
