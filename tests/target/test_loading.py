"""Reading checkpoints: values, and one clear line for each way in which one can be broken."""

import dataclasses
import hashlib
import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import dspark_jax
from dspark_jax.command import load_config
from dspark_jax.config import InputError, MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert.export import frozen_tensors
from dspark_jax.sharding import make_mesh
from dspark_jax.target import families, loading
from dspark_jax.target.checks import all_finite
from dspark_jax.target.loading import fingerprint, load_target, parameter_paths, read_safetensors, tokenizer_fingerprint
from dspark_jax.target.model import Target

ARCH = TargetArchitecture("qwen3", 40, 16, 3, 4, 2, 8, 24, 1e-6, 1e4, False, 64)


def tensors_of(target: Target) -> dict[str, np.ndarray]:
    """The parameters under their Hugging Face names, in bfloat16."""
    tensors, weights = {}, target.family.weights(target.arch)
    for path, variable in parameter_paths(target).items():
        weight, value = weights[path], np.asarray(variable.get_value()).astype(ml_dtypes.bfloat16)
        layers = list(value) if weight.stacked else [value]
        pairs = zip(weight.names(len(layers)), layers, strict=True)
        tensors |= {name: weight.store(layer) for name, layer in pairs}
    return tensors


@pytest.fixture
def directory(tmp_path):
    """A checkpoint of two shards with an index."""
    tensors = tensors_of(Target(ARCH, rngs=nnx.Rngs(3)))
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(ARCH.to_hf()))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def load(directory):
    arch = TargetArchitecture.from_hf(directory)
    return load_target(TargetConfig(path=str(directory), architecture=arch), make_mesh(MeshConfig(2, 2, 2)))


def test_every_value_arrives_on_its_shards(directory):
    expected = parameter_paths(Target(ARCH, rngs=nnx.Rngs(3)))
    loaded = parameter_paths(load(directory))
    assert set(loaded) == set(expected)
    for path, variable in loaded.items():
        want = np.asarray(expected[path].get_value()).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(variable.get_value(), want)
    query = loaded["layers.attention.query"].get_value()
    assert query.dtype == jnp.float32
    assert query.sharding.spec == jax.P(None, "fsdp", "tensor", None)


def test_missing_shard(directory):
    (directory / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-2.safetensors: no such file"):
        load(directory)


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_shard(directory, keep):
    path = directory / "model-1.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model-1.safetensors: truncated safetensors file \(\d+ bytes"):
        load(directory)


def test_not_a_safetensors_file(directory):
    (directory / "model-1.safetensors").write_bytes(struct.pack("<Q", 20) + b"x" * 40)
    with pytest.raises(InputError, match="header is not JSON"):
        load(directory)


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "header",
    [
        [], 3, None, {"a": 3}, {"a": None}, {"a": {}}, {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
        {"a": ENTRY | {"dtype": ["F32"]}}, {"a": ENTRY | {"shape": [-2, -2]}}, {"a": ENTRY | {"shape": ["4"]}},
        {"a": ENTRY | {"shape": [4.0]}}, {"a": ENTRY | {"shape": 4}}, {"a": ENTRY | {"data_offsets": None}},
        {"a": ENTRY | {"data_offsets": [-16, 0]}}, {"a": ENTRY | {"data_offsets": [16, 0]}},
        {"a": ENTRY | {"data_offsets": [16]}}, {"a": ENTRY | {"data_offsets": ["0", "16"]}},
    ],
)  # fmt: skip
def test_a_damaged_header(tmp_path, header):
    """Where offsets are negative, the header itself would be read as weights."""
    text = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(InputError, match=r"x.safetensors: damaged header \(.*\); download the file again"):
        read_safetensors(tmp_path / "x.safetensors")


def test_sizes_beyond_64_bits_are_no_smaller(tmp_path):
    text = json.dumps({"a": ENTRY | {"shape": [2**62, 4], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with pytest.raises(InputError, match="tensor a has 0 bytes, shape .* needs others"):
        read_safetensors(tmp_path / "x.safetensors")


def test_a_directory_is_no_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(InputError, match="model.safetensors: a directory, not a file"):
        read_safetensors(tmp_path / "model.safetensors")


def rewrite(directory, change):
    """Replaces the shards by one file with `change` applied to its tensors."""
    tensors = tensors_of(Target(ARCH, rngs=nnx.Rngs(3)))
    change(tensors)
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, directory / "model.safetensors")


def test_a_tensor_in_two_shards(directory):
    """Which of the two is the model's depends on who reads them."""
    tensors = dict(read_safetensors(directory / "model-2.safetensors"))
    name = next(iter(read_safetensors(directory / "model-1.safetensors")))
    save_file(tensors | {name: read_safetensors(directory / "model-1.safetensors")[name]}, directory / "b.safetensors")
    (directory / "b.safetensors").replace(directory / "model-2.safetensors")
    with pytest.raises(InputError, match=f"model-2.safetensors: tensor {name} is in another shard as well"):
        load(directory)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "and no other weights; give the directory of a whole model"),
        (("training_args.bin", "optimizer.pt"), "and no other weights"),
        (("pytorch_model.bin",), r"only weights that PyTorch has pickled \(pytorch_model.bin\); .*save_pretrained"),
        (("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"), "only weights that PyTorch has pickled"),
        (("adapter_model.safetensors",), r"only an adapter \(adapter_model.safetensors\); merge it"),
        (("model-00001-of-00002.safetensors",), "only shards without their model.safetensors.index.json"),
        (("model-Q4_K_M.gguf",), r"only weights of llama.cpp \(model-Q4_K_M.gguf\)"),
        (("weights.safetensors",), r"only tensors under another name \(weights.safetensors\)"),
    ],
)
def test_what_is_there_instead_of_weights_is_named(tmp_path, files, message):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=f"model.safetensors: no such file, {message}"):
        loading.read_checkpoint(tmp_path)


def tied(directory, head, prefix="model."):
    """Rewrites the config as tied, and one of the shards with an LM head; returns the names of both."""
    tensors = dict(read_safetensors(directory / "model-2.safetensors"))
    parts = [read_safetensors(directory / f"model-{i}.safetensors") for i in (1, 2)]
    embedding = (parts[0] | parts[1])[f"{prefix}embed_tokens.weight"]
    save_file({**tensors, "lm_head.weight": head(np.array(embedding))}, directory / "b.safetensors")
    (directory / "b.safetensors").replace(directory / "model-2.safetensors")
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": True}))


def untied_head(embedding):
    embedding[-1, -1] += 1
    return embedding


@pytest.fixture
def without_head(directory):
    """The same without an LM head, in two shards still."""
    tensors = dict(read_safetensors(directory / "model-1.safetensors"))
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "a.safetensors")
    (directory / "a.safetensors").replace(directory / "model-1.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    del index["weight_map"]["lm_head.weight"]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def test_a_head_beside_tied_embeddings_must_be_the_same(without_head):
    """The config says the embedding, transformers and servers take the stored head."""
    tied(without_head, lambda embedding: embedding)
    assert not hasattr(load(without_head), "lm_head")
    assert set(frozen_tensors(without_head)) == {"embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("head", [untied_head, lambda x: x[:-1], lambda x: x.astype(np.float32) * 2])
def test_another_head_beside_tied_embeddings_is_refused(without_head, head):
    tied(without_head, head)
    message = "tie_word_embeddings true, but lm_head.weight is not model.embed_tokens.weight; set it to false if"
    for read in (load, frozen_tensors):
        with pytest.raises(InputError, match=message):
            read(without_head)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("at_once", [0, 1 << 30])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_tensor_that_is_not_finite_is_named(directory, name, at_once, value, monkeypatch):
    def change(tensors):
        tensors[name].reshape(-1)[-1] = value

    rewrite(directory, change)
    monkeypatch.setattr(loading, "_AT_ONCE", at_once)
    with pytest.raises(InputError, match=f"tensor {name} holds values that are not finite in float32; download"):
        load(directory)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_single_value_that_is_not_finite_is_found_wherever_it_is(dtype):
    values = np.full((300, 3, 1000), np.finfo(np.float32).max / 2).astype(dtype)
    for view in (values, values.T, values[::2, :, :7], values[0, 0, 0]):
        assert all_finite(view)
    for at in ((0, 0, 0), (299, 2, 999), (298, 1, 3)):
        values[at] = np.nan
        assert not all_finite(values) and not all_finite(values.T) and not all_finite(values[at])
        values[at] = 1.0
    assert all_finite(np.zeros((0, 3), dtype))


def test_missing_tensor(directory):
    rewrite(directory, lambda t: t.pop("model.layers.2.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"model.layers.2.mlp.up_proj.weight is missing"):
        load(directory)


def test_wrong_shape(directory):
    rewrite(directory, lambda t: t.update({"model.norm.weight": np.ones(17, np.float32)}))
    with pytest.raises(InputError, match=r"model.norm.weight has shape \(17,\), the config gives \(16,\)"):
        load(directory)


def test_unknown_tensor(directory):
    rewrite(directory, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(3, np.float32)}))
    with pytest.raises(InputError, match=r"q_proj.bias is unknown"):
        load(directory)


def test_index_names_a_tensor_that_is_not_there(directory):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.ghost.weight"] = "model-1.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model.ghost.weight is in the index but not in the file"):
        load(directory)


def test_stacks_that_are_built_on_the_devices_hold_the_same(directory, monkeypatch):
    expected = parameter_paths(load(directory))
    monkeypatch.setattr(loading, "_AT_ONCE", 0)
    for path, variable in parameter_paths(load(directory)).items():
        value, other = variable.get_value(), expected[path].get_value()
        np.testing.assert_array_equal(value, other)
        assert value.sharding == other.sharding, path


def test_a_large_checkpoint_shows_progress_and_gives_its_pages_back(directory, monkeypatch, capsys):
    """Every tensor's, once; what that is worth in memory is measured by tests/benchmarks/loading.py."""
    advice = []
    monkeypatch.setattr(loading, "_advise", lambda tensor, what: advice.append((tensor.offset, tensor.filename, what)))
    monkeypatch.setattr(loading, "_AT_ONCE", 0)
    load(directory)
    tensors = [t for i in (1, 2) for t in read_safetensors(directory / f"model-{i}.safetensors").values()]
    assert sorted(advice) == sorted((t.offset, t.filename, "MADV_DONTNEED") for t in tensors)
    assert "loading 1/1 MB " in capsys.readouterr().err


def test_integers_are_no_weights(directory):
    rewrite(directory, lambda t: t.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(InputError, match=r"model.norm.weight has dtype int8, so it is quantised"):
        load(directory)


def test_an_unknown_type_is_named(directory):
    path = directory / "model-1.safetensors"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"dtype":"BF16"', b'"dtype":"F8_Z"', 1))
    with pytest.raises(InputError, match=r"has dtype F8_Z; convert it to bfloat16"):
        load(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "no valid weight_map"),
        ('{"metadata": {}}', "no valid weight_map"),
        ('{"weight_map": [1]}', "no valid weight_map"),
        ('{"weight_map": {"a": 3}}', "3 is no name of a file"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "is no name of a file"),
    ],
)
def test_a_damaged_index(directory, text, message):
    (directory / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load(directory)


def test_fingerprints_tell_models_and_tokenizers_apart(directory):
    before = fingerprint(directory), tokenizer_fingerprint(directory)
    assert before == (fingerprint(directory), tokenizer_fingerprint(directory))

    def change(tensors):
        tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"] * 2

    rewrite(directory, change)
    (directory / "tokenizer.json").write_text('{"a": 1}')
    assert fingerprint(directory) != before[0]
    assert tokenizer_fingerprint(directory) != before[1]


@dataclasses.dataclass
class Newer(TargetArchitecture):
    """With one more field."""

    added: int = 0


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("dspark_qwen3_4b", "63d6efc307ab40c27c07e3f4dda26616"),
        ("dspark_qwen3_8b", "ed8348204d0692842973631d8fd7af2a"),
        ("dspark_qwen3_14b", "4583de534cc418b94c13591352008236"),
        ("dspark_gemma4_12b", "ace7eb676916a3a0eae5695cd425fe09"),
    ],
)
def test_what_a_fingerprint_says_of_a_shape_stays(preset, expected):
    """Whatever is added to `TargetArchitecture`: another value would refuse every checkpoint that exists."""
    arch = load_config(preset).target.architecture
    for shape in (arch, Newer(**vars(arch))):
        assert hashlib.sha256(families.of_shape(shape).identity(shape).encode()).hexdigest()[:32] == expected


def test_the_fingerprint_of_the_embedded_target_stays():
    target = Path(dspark_jax.__file__).parent / "quickstart" / "target"
    assert fingerprint(target) == "af5678cf6177874ebd58c2268f9f69d2"


@pytest.mark.parametrize("at", (0, -1))
def test_a_fingerprint_is_of_both_ends_of_a_large_tensor(directory, at):
    """Of 8192 values it reads 2048."""
    name, before = "model.embed_tokens.weight", []
    for value in (1.0, 2.0):

        def change(tensors, value=value):
            tensors[name] = np.zeros((128, 64), ml_dtypes.bfloat16)
            tensors[name].reshape(-1)[at] = value

        rewrite(directory, change)
        before.append(fingerprint(directory))
    assert before[0] != before[1]


def test_a_model_in_eight_bits_has_a_fingerprint_and_is_refused(directory):
    """PyTorch may run it and lend its features."""

    def change(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)

    rewrite(directory, change)
    assert len(fingerprint(directory)) == 32
    with pytest.raises(InputError, match="model.norm.weight is FP8, but config.json has no quant.* put back"):
        load(directory)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weight_scale_inv", "is a part of quantised weights, but config.json has no quantization_config"),
        ("weight_packed", "is a part of quantised weights, but config.json has no quantization_config"),
        ("qweight", "is a part of weights quantised by GPTQ or AWQ, .* use the checkpoint in bfloat16"),
        ("SCB", "is a part of weights quantised by bitsandbytes"),
    ],
)
def test_what_comes_with_quantised_tensors_is_called_so(directory, name, message):
    """Before an unknown tensor is: `weight_scale_inv` says nothing to those who do not know how FP8 is stored."""
    rewrite(directory, lambda t: t.update({f"model.layers.0.mlp.up_proj.{name}": np.ones((1, 1), np.float32)}))
    with pytest.raises(InputError, match=f"up_proj.{name} {message}"):
        load(directory)


def test_a_config_that_says_quantised(directory):
    raw = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match='quantised checkpoint .*quant_method "gptq".* use the checkpoint in bfloat16'):
        load(directory)
    assert "quantised" in TargetArchitecture.of_any_model(directory).unsupported  # PyTorch may run it


def test_reading_is_lazy(directory):
    assert all(isinstance(t, np.memmap) for t in read_safetensors(directory / "model-1.safetensors").values())


def test_a_gemma_4_of_several_modalities_is_loaded_for_its_text(tmp_path):
    """As transformers saves it: the text model under `model.language_model.`, its shape in `text_config`."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    text = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 40, "head_dim": 8,
        "global_head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_global_key_value_heads": 1,
        "attention_k_eq_v": True, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 8, "max_position_embeddings": 64, "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 5.0, "initializer_range": 0.12,
    }  # fmt: skip
    vision = {"patch_size": 2, "mm_embed_dim": 8, "mm_posemb_size": 4, "output_proj_dims": 8}
    config = transformers.Gemma4UnifiedConfig(
        text_config=text, vision_config=vision, audio_config={"audio_embed_dim": 8}
    )
    torch.manual_seed(0)
    model = transformers.Gemma4UnifiedForConditionalGeneration(config).eval()
    tokens = np.random.default_rng(0).integers(3, 97, (2, 19))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
        expected = model(input_ids=torch.tensor(tokens)).logits.numpy()
    model.save_pretrained(tmp_path)
    names = set(loading.read_checkpoint(tmp_path))
    assert any("embed_vision" in name for name in names) and any("embed_audio" in name for name in names)
    arch = TargetArchitecture.from_hf(tmp_path)
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    target = load_target(TargetConfig(path=str(tmp_path), dtype="float32", architecture=arch), mesh)
    out = target.forward(jnp.asarray(tokens), jnp.broadcast_to(jnp.arange(19), tokens.shape))
    # Logits are capped at 5, and both sides compute in float32.
    np.testing.assert_allclose(target.unembed(out.last_hidden), expected, atol=1e-4)
