"""Targets in the layout of Llama against transformers in PyTorch, on small random models: one suite for all of them."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dspark_jax import platform
from dspark_jax.command import load_config, parse
from dspark_jax.config import DrafterConfig, MeshConfig, TargetArchitecture, TargetConfig, to_json
from dspark_jax.config_fields import Unsupported
from dspark_jax.convert.check import check_directory
from dspark_jax.convert.dialect import Answer
from dspark_jax.convert.export import Source, frozen_tensors, write_export
from dspark_jax.convert.hf import read_drafter_config, stored_tensors
from dspark_jax.convert.targets import fitting, frozen_of_target
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import Models, generate
from dspark_jax.errors import InputError
from dspark_jax.ops.expert_mlp.api import OPERATION
from dspark_jax.sharding import make_mesh
from dspark_jax.target import families
from dspark_jax.target.decode_weights import decode_weights, unstacked
from dspark_jax.target.experts import Experts
from dspark_jax.target.loading import abstract_target, load_target

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, TAPS = 67, (-1, 0, 2)
SIZES = dict(
    vocab_size=V, hidden_size=32, num_hidden_layers=4, intermediate_size=48, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.15,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LAYERS = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
HYBRID = {
    "num_hidden_layers": 4, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default", "mrope_section": [1, 1, 0]},
}  # fmt: skip
SCALED = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}
V4 = {  # so many heads of the index that no score is 0: of equal scores PyTorch takes any
    "num_key_value_heads": 1, "intermediate_size": None, "moe_intermediate_size": 24, "head_dim": 16,
    "q_lora_rank": 12, "n_routed_experts": 8, "num_experts_per_tok": 3, "num_hash_layers": 1, "o_groups": 2,
    "o_lora_rank": 6, "index_n_heads": 16, "index_head_dim": 8, "index_topk": 3, "sliding_window": 6,
    "qk_rope_head_dim": 4, "swiglu_limit": 0.5, "rope_theta": 100.0, "compress_rope_theta": 500.0,
    "compress_rate_csa": 4, "compress_rate_hca": 8, "compress_ratios": [0, 4, 128, 4, 128, 0], "rope_scaling": SCALED,
    "num_hidden_layers": 5,
}  # fmt: skip
MIXED = {**MOE, "shared_expert_intermediate_size": 20}
OSS = {
    "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 64, "head_dim": 16, "sliding_window": 6,
    "swiglu_limit": 0.5, "rope_parameters": {**YARN, "truncate": False},
}  # fmt: skip
CASES = {  # model class, its fields besides `SIZES`
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama2": ("Llama", {"rope_parameters": {"rope_theta": 100.0}, "num_key_value_heads": 4}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN, "head_dim": 16}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_theta": 100.0}, "tie_word_embeddings": True}),
    "moe": ("Qwen3Moe", {**MOE, "rope_parameters": YARN, "mlp_only_layers": [2], "norm_topk_prob": True}),
    "moe_all": ("Qwen3Moe", {**MOE, "rope_parameters": {"rope_theta": 100.0}, "tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN, "num_key_value_heads": 1}),
    "hybrid": ("Qwen3_5", HYBRID),
    "v4": ("DeepseekV4", V4),
    "hybrid_tied": ("Qwen3_5", {**HYBRID, "tie_word_embeddings": True, "layer_types": LAYERS}),
    "gpt_oss": ("GptOss", OSS),
    "hybrid_moe": ("Qwen3_5Moe", {**HYBRID, **MIXED}),
}
ONE = tuple({name: case for case, (name, _) in CASES.items()}.values())
"""A case of every family, for what does not depend on the fields."""


def load(directory, mesh):
    return load_target(TargetConfig(path=str(directory), architecture=TargetArchitecture.from_hf(directory)), mesh)


def mixed(case):
    """Whether it has experts."""
    return "moe" in case or case in ("gpt_oss", "v4")


def alone():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def write_model(case, directory):
    """A random model of a case, saved in three files or more, with norms and biases that matter."""
    name, fields = CASES[case]
    torch.manual_seed(0)
    kind = f"{name}TextConfig" if name.startswith("Qwen3_5") else f"{name}Config"
    given = {name: value for name, value in (SIZES | fields).items() if value is not None}
    config = getattr(transformers, kind)(**given)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if "Moe" in name or name in ("DeepseekV4", "GptOss"):
        model.set_experts_implementation("eager")  # the others have no float64
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "norm" in path:
                parameter.uniform_(0.5, 1.5)
            elif path.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.5)
            elif path.endswith("A_log"):  # states that last, as those that do not can be next to 0, and are normed
                parameter.uniform_(-5, -1)
            elif path.endswith(("sinks", "base", "position_bias")):
                parameter.normal_(0, 0.5)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.2)
            elif path.endswith("tid2eid"):
                buffer.copy_(torch.stack([torch.randperm(8)[:3] for _ in range(V)]))
    model.save_pretrained(directory, max_shard_size=4 * sum(p.numel() for p in model.parameters()) // 4)
    assert len(list(directory.glob("*.safetensors"))) >= 3
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """case -> (directory, model of transformers, ours), made once."""
    known = {}

    def of(case):
        if case not in known:
            directory = tmp_path_factory.mktemp(case)
            model = write_model(case, directory)
            known[case] = directory, model, load(directory, alone())
        return known[case]

    return of


def oracle(model, tokens):
    """Hidden states at the taps and logits, in float64."""
    with torch.no_grad():
        out = model.double()(torch.tensor(tokens), output_hidden_states=True)
    states = [out.hidden_states[i + 1].numpy() for i in TAPS]
    states = [x.mean(axis=2) if x.ndim == 4 else x for x in states]  # of several streams
    return np.concatenate(states, axis=-1), out.logits.numpy()


def assert_close(case, ours, theirs):
    """float32 accuracy: a few hundred roundings of the largest value.

    Linear attention norms what can be next to 0, in float32 in transformers as well.
    """
    share = 3e-5 if case.startswith(("hybrid", "v4")) else 6e-6
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=share * np.abs(theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_logits_and_taps_are_those_of_transformers(made, case):
    """Of training's and decoding's form, and of two documents that are packed into one sequence."""
    _, model, target = made(case)
    tokens = np.random.default_rng(0).integers(0, V, (2, 40))
    starts = jnp.asarray([[0] * 40, [0] * 14 + [14] * 26])
    expected = [oracle(model, tokens[:1]), oracle(model, tokens[1:, :14]), oracle(model, tokens[1:, 14:])]
    for form in (target, unstacked(target), decode_weights(target, jnp.float32)):

        @jax.jit
        def run(form=form):
            out = form.forward(tokens, jnp.arange(40) - starts, taps=TAPS, starts=starts)
            return out.features, form.unembed(out.last_hidden)

        for found, part in zip(run(), range(2), strict=True):
            assert_close(case, found[:1], expected[0][part])
            assert_close(case, found[1:, :14], expected[1][part])
            assert_close(case, found[1:, 14:], expected[2][part])


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_is_that_of_transformers(made, case):
    """Two requests of different lengths in uneven pieces, with stale rows of a rolled-back draft in between."""
    _, model, target = made(case)
    target = decode_weights(target, jnp.float32)
    tokens = np.random.default_rng(1).integers(0, V, (2, 30))
    expected, _ = oracle(model, tokens)
    cache, starts = target.init_cache(2, 48, 16), np.array([0, 0])
    step = jax.jit(lambda t, p, c: target.forward(t, p, c, taps=TAPS))
    for lengths in ([15, 9], [1, 1], [6, 12], [8, 8]):
        fed = np.full((2, 16), 7)  # rows after a request's own are drafts that get rejected
        for b, length in enumerate(lengths):
            fed[b, :length] = tokens[b, starts[b] : starts[b] + length]
        out = step(fed, starts[:, None] + np.arange(16), cache)
        cache = out.cache
        for b, length in enumerate(lengths):
            assert_close(case, out.features[b, :length], expected[b, starts[b] : starts[b] + length])
        starts = starts + np.array(lengths)
    assert (starts == 30).all()


@pytest.mark.parametrize("case", ONE)
def test_a_mesh_computes_what_one_device_does(made, case):
    directory, _, target = made(case)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, V, (4, 12)))
    positions = jnp.broadcast_to(jnp.arange(12), tokens.shape)
    mesh = make_mesh(MeshConfig(2, 2, 2), jax.devices())

    def run(model):
        trained = model.forward(tokens, positions).last_hidden
        decoding = decode_weights(model, jnp.float32)
        cached = decoding.forward(tokens, positions, decoding.init_cache(4, 12)).last_hidden
        return model.unembed(trained), model.unembed(cached)

    with jax.set_mesh(mesh):
        split: Any = load(directory, mesh)
        found = jax.jit(run)(split)
    layers = getattr(split, next(iter(split.stacks.values())))
    matrix = layers.mlp.gate[...].sharding.spec  # experts are split, each of them whole
    assert matrix == (jax.P(None, "tensor", "fsdp", None) if mixed(case) else jax.P(None, "fsdp", "tensor"))
    for a, b in zip(found, jax.jit(run)(target), strict=True):
        assert_close(case, np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("case", ["v4", "hybrid_moe"])
def test_shapes_alone_have_the_types_of_loaded_weights(made, case):
    """Some are held in float32, and tables of experts are whole numbers, whatever the compute type is."""
    directory, _, target = made(case)
    loaded = load_target(TargetConfig(str(directory), "bfloat16", target.arch), alone())
    types = {
        name: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(model)]
        for name, model in {"loaded": loaded, "shapes": abstract_target(target.arch, jnp.bfloat16)}.items()
    }
    assert types["loaded"] == types["shapes"]
    kinds = {dtype for _, dtype in types["loaded"]}
    assert kinds == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)} | (
        {jnp.dtype(jnp.int32)} if case == "v4" else set()
    )


MIXTURES = [(case, "pallas_tpu") for case in ONE if mixed(case)] + [("moe_all", "xla")]


@pytest.mark.parametrize(("case", "implementation"), MIXTURES)
def test_experts_that_stay_in_their_stack_are_the_same(made, case, implementation, monkeypatch):
    """As a TPU decodes, with a kernel that is told the layer, on a mesh that splits the experts."""
    directory, _, target = made(case)
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, V, (2, 7)))
    positions = jnp.broadcast_to(jnp.arange(7), tokens.shape)
    expected = jax.jit(lambda: target.forward(tokens, positions).last_hidden)()
    monkeypatch.setattr(platform, "unstacks_layers", lambda: False)
    monkeypatch.setitem(OPERATION.order, "cpu", [implementation])
    mesh = make_mesh(MeshConfig(1, 1, 2), jax.devices()[:2])
    with jax.set_mesh(mesh):
        decoding = decode_weights(load(directory, mesh), jnp.float32)
        mixtures = [getattr(decoding, name).mlp for name in decoding.stacks.values()]
        assert any(isinstance(mlp, Experts) and mlp.number is not None for mlp in mixtures)
        found = jax.jit(lambda: decoding.forward(tokens, positions, decoding.init_cache(2, 8)).last_hidden)()
    assert_close(case, found, np.asarray(expected))


DRAFTER = DrafterConfig(
    num_layers=1, block_size=3, target_layer_ids=(0, 2), mask_token_id=V - 1, markov_rank=4, initializer_range=0.2
)


@pytest.mark.parametrize("case", ONE)
def test_greedy_answers_with_a_drafter_are_those_of_transformers(made, case):
    _, model, target = made(case)
    drafter = make_drafter(target.arch, DRAFTER, rngs=nnx.Rngs(1))
    prompts = [[3, 5, 7, 9], [11, 2]]
    found = generate(Models(target, drafter), prompts, max_new_tokens=12).tokens
    assert [len(answer) for answer in found] == [12, 12]
    for prompt, answer in zip(prompts, found, strict=True):
        text = [*prompt, *answer]
        logits = oracle(model, np.asarray([text]))[1][0]
        assert list(answer) == list(np.argmax(logits, -1)[len(prompt) - 1 : -1])


@pytest.mark.parametrize("case", ONE)
def test_a_drafter_for_it_is_exported_with_layers_of_a_qwen3(made, case, tmp_path):
    directory, _, target = made(case)
    arch, raw = target.arch, json.loads((directory / "config.json").read_text())
    drafter = make_drafter(arch, DRAFTER, rngs=nnx.Rngs(1))
    stored, frozen = dict(stored_tensors(drafter, DRAFTER)), frozen_tensors(directory)
    of_target = frozen_of_target(frozen, directory, arch, 0.0)
    assert target.family.title in of_target.notes[0] and not of_target.own_embedding
    source = Source(stored.items, DRAFTER, arch, raw, frozen, "org/model", notes=of_target.notes)
    path = write_export(tmp_path / "draft", source, dtype="float32")
    written = json.loads((path / "config.json").read_text())
    assert (written["architectures"], written["model_type"]) == (["Qwen3DSparkModel"], "qwen3")
    assert written["rope_parameters"] == {"rope_theta": arch.rope_theta, "rope_type": "default"}
    assert not {"num_experts", "mlp_bias", "moe_intermediate_size", "qkv_bias", "hc_mult"} & set(written)
    shape, settings = read_drafter_config(path)
    fitting(path, shape, str(directory), arch, whole=True)
    answer = Answer(np.random.default_rng(3).integers(0, V, 24).astype(np.int32), 4)
    found = check_directory(path, target, directory, [answer], alone())
    assert found.dialect is not None and not found.unsupported
    notes = [note for verdict in found.verdicts if not verdict.refusals for note in verdict.notes]
    assert any(f"not run with a {target.family.title} as the target" in note for note in notes)
    assert not [problem for problem in found.problems if "another target" in problem or "tensor" in problem]
    assert settings == dataclasses.replace(DRAFTER, initializer_range=settings.initializer_range)


@pytest.mark.parametrize("case", CASES)
def test_a_config_that_is_written_is_read_as_the_same(made, case):
    arch = made(case)[2].arch
    assert TargetArchitecture.from_hf(arch.to_hf()) == arch


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
FUSED = "model.layers.1.mlp.experts.gate_up_proj"


def changed(directory, to, config=None, tensors=None):
    """A copy with other fields, and with tensors that are replaced, added, or taken out (None)."""
    shutil.copytree(directory, to)
    raw = json.loads((to / "config.json").read_text()) | (config or {})
    (to / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    found = {}
    for file in to.glob("*.safetensors"):
        found |= load_file(file)
        file.unlink()
    (to / "model.safetensors.index.json").unlink()
    found |= tensors or {}
    save_file({name: value for name, value in found.items() if value is not None}, to / "model.safetensors")
    return to


@pytest.mark.parametrize(
    ("case", "config", "tensors", "message"),
    [
        ("moe_all", {"num_local_experts": None}, {}, "config.json gives more layers or experts than the weights have"),
        ("moe_all", {"num_local_experts": 6}, {}, r"experts.6.\w+_proj.weight is of a layer or expert that config"),
        ("llama2", {"num_hidden_layers": 3}, {}, r"layers.3.\S+ is of a layer or expert that config"),
        ("moe_all", {}, {EXPERT: None}, f"{EXPERT} is missing; as there are others like it.* a file is not whole"),
        ("moe_all", {}, {EXPERT: np.zeros((23, 32), np.float32)}, r"shape \(23, 32\), the config gives \(24, 32\)"),
        ("qwen2", {}, {"model.layers.1.self_attn.k_proj.bias": None}, "layers.1.self_attn.k_proj.bias is missing"),
        ("llama2", {}, {"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)}, "is unknown to llama"),
        (
            "moe_all",
            {},
            {FUSED: np.zeros((8, 48, 32), np.float32)},
            f"{FUSED} has all experts of a layer, and .* is one",
        ),
        (
            "moe_all",
            {},
            {FUSED: np.zeros((8, 47, 32), np.float32)},
            r"\(8, 47, 32\), which is not gate_proj and up_proj",
        ),
        ("moe_all", {}, {"model.layers.1.mlp.experts.odd": np.zeros(3, np.float32)}, "odd is unknown to qwen3_moe"),
        ("llama3", {}, {"lm_head.weight": np.zeros((V, 32), np.float32)}, "lm_head.weight is not model.embed_tokens"),
    ],
)
def test_weights_that_are_not_those_of_the_config(made, tmp_path, case, config, tensors, message):
    with pytest.raises(InputError, match=message):
        load(changed(made(case)[0], tmp_path / "changed", config, tensors), alone())


@pytest.mark.parametrize("case", ["moe_all", "hybrid_moe"])
def test_experts_that_are_stored_as_one_tensor(made, tmp_path, case):
    """As Qwen3.5's are published, in the layout that transformers has in memory."""
    directory, model, target = made(case)
    held = {name: value.float().numpy() for name, value in model.state_dict().items()}
    fused = {name: value for name, value in held.items() if ".mlp.experts." in name}
    assert fused and all(name.rpartition(".")[2] in ("gate_up_proj", "down_proj") for name in fused)
    single = {name: None for file in directory.glob("*.safetensors") for name in load_file(file) if ".experts." in name}
    found = load(changed(directory, tmp_path / "fused", tensors=single | fused), alone())
    for name in ("gate", "up", "down"):
        one, other = getattr(found.layers.mlp, name), getattr(target.layers.mlp, name)
        np.testing.assert_array_equal(one[...], other[...])


def test_mxfp4_experts_of_gpt_oss_are_those_of_transformers(made, tmp_path):
    """As they are published: codes and scales of all experts of a layer, the outputs of gate and up alternating."""
    from transformers.integrations.mxfp4 import _convert_moe_packed_tensors

    directory, _, target = made("gpt_oss")
    rng, expected, tensors = np.random.default_rng(4), {}, dict[str, np.ndarray | None]()
    for i in range(4):
        for name, outputs, inputs in (("gate_up_proj", 128, 32), ("down_proj", 32, 64)):
            blocks = rng.integers(0, 256, (8, outputs, inputs // 32, 16), np.uint8)
            scales = rng.integers(120, 126, (8, outputs, inputs // 32), np.uint8)
            base = f"model.layers.{i}.mlp.experts.{name}"
            tensors |= {base: None, f"{base}_blocks": blocks, f"{base}_scales": scales}
            given = torch.from_numpy(blocks), torch.from_numpy(scales)
            expected[i, name] = _convert_moe_packed_tensors(*given, dtype=torch.float32).numpy()  # [E, inputs, outputs]
    stated = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    found = load(changed(directory, tmp_path / "quantised", stated, tensors), alone())
    for i in range(4):
        layers, at = (found.layers, found.sliding_layers)[i % 2 == 0], i // 2
        both = expected[i, "gate_up_proj"]
        np.testing.assert_array_equal(layers.mlp.gate[...][at], both[..., ::2])
        np.testing.assert_array_equal(layers.mlp.up[...][at], both[..., 1::2])
        np.testing.assert_array_equal(layers.mlp.down[...][at], expected[i, "down_proj"])
    np.testing.assert_array_equal(found.layers.mlp.down_bias[...], target.layers.mlp.down_bias[...])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types without any layer of full attention"),
        ({"layer_types": ["sliding_attention"]}, "layer_types has 1 entries .* for 4 layers"),
        ({"sliding_window": None, "num_experts": 9}, "num_experts and num_local_experts differ"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is above num_local_experts 8"),
        ({"attention_bias": False}, "attention_bias false is not supported"),
    ],
)
def test_what_a_gpt_oss_may_not_say(change, message):
    raw = transformers.GptOssConfig(**SIZES | OSS).to_dict()
    assert TargetArchitecture.from_hf(raw).layer_types == ("sliding_attention", "full_attention") * 2
    with pytest.raises(InputError, match=message):
        TargetArchitecture.from_hf(raw | change)


def test_frequencies_that_older_checkpoints_hold_are_left_out(made, tmp_path):
    """Llama 2's files have them; transformers computes them, too."""
    directory, _, target = made("llama2")
    stored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(4)}
    found = load(changed(directory, tmp_path / "older", tensors=stored), alone())
    np.testing.assert_array_equal(found.layers.attention.query[...], target.layers.attention.query[...])


def llama(**change):
    raw = transformers.LlamaConfig(**SIZES | {"rope_parameters": dict(LLAMA3)}).to_dict()
    return {name: value for name, value in (raw | change).items() if value is not None}


def test_an_older_llama_is_read_as_transformers_does():
    old = llama(rope_parameters=None, rope_theta=None, head_dim=None, num_key_value_heads=None)
    found, theirs = TargetArchitecture.from_hf(old), transformers.LlamaConfig.from_dict(dict(old))
    assert found.rope_theta == theirs.rope_parameters["rope_theta"] == 1e4
    assert (found.head_dim, found.num_key_value_heads) == (theirs.head_dim, theirs.num_key_value_heads) == (8, 4)
    scaling = {name: value for name, value in LLAMA3.items() if name != "rope_theta"}
    beside = llama(rope_parameters=None, rope_theta=500.0, rope_scaling=scaling)
    assert TargetArchitecture.from_hf(beside) == TargetArchitecture.from_hf(llama())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attention_bias": True}, Unsupported, "attention_bias true"),
        ({"mlp_bias": True}, Unsupported, "mlp_bias true"),
        ({"rope_parameters": LLAMA3 | {"rope_type": "dynamic"}}, Unsupported, "rope_type 'dynamic'"),
        ({"rope_parameters": LLAMA3 | {"partial_rotary_factor": 0.5}}, Unsupported, "partial_rotary_factor 0.5"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, InputError, "no 'low_freq_factor', which rope_type"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": "1"}}, InputError, "low_freq_factor '1' .* is not a number"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 5.0}}, InputError, "must be below high_freq_factor"),
    ],
)
def test_what_a_llama_may_not_say(change, error, message):
    with pytest.raises(error, match=message):
        TargetArchitecture.from_hf(llama(**change))


def moe(**change):
    raw = {"model_type": "qwen3_moe", **SIZES, **MOE, "rope_theta": 100.0}
    return {name: value for name, value in (raw | change).items() if value is not None}


def test_layers_with_experts_are_those_of_transformers():
    for step, dense in ((1, []), (2, []), (2, [1]), (1, [0, 3])):
        raw = moe(decoder_sparse_step=step, mlp_only_layers=dense)
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig.from_dict(dict(raw)))
        arch = TargetArchitecture.from_hf(raw)
        kinds = [kind == "full_attention" for kind in families.of_shape(arch).kinds(arch)]
        assert kinds == [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    assert TargetArchitecture.from_hf(moe(num_experts=None)).own["num_experts"] == 128


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mlp_only_layers": [4]}, InputError, r"mlp_only_layers \[4\] is no list of numbers of layers below 4"),
        ({"mlp_only_layers": [0, 1, 2, 3]}, Unsupported, "without any layer with experts"),
        ({"decoder_sparse_step": 5}, Unsupported, "without any layer with experts"),
        ({"num_experts_per_tok": 9}, InputError, "num_experts_per_tok 9 is above num_experts 8"),
        ({"num_local_experts": 4}, InputError, "num_experts and num_local_experts differ"),
        ({"norm_topk_prob": "yes"}, InputError, 'norm_topk_prob "yes" is neither true nor false'),
        ({"use_sliding_window": True}, Unsupported, "use_sliding_window true"),
    ],
)
def test_what_a_mixture_may_not_say(change, error, message):
    with pytest.raises(error, match=message):
        TargetArchitecture.from_hf(moe(**change))


def test_the_config_of_a_run_is_read_with_a_familys_own_fields(tmp_path):
    """Those of an import: `--config config.json` is what its error messages say."""
    config = load_config("dspark_qwen3_30b_a3b")
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    found, _, _ = parse(["--config", str(file)])
    assert found.target.architecture.own == config.target.architecture.own != {}
