"""DeepSeek-V4: compressed rows that are taken back, the published names and storage, what a config may not say."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from dspark_jax.config import MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.errors import InputError
from dspark_jax.ops.cached_attention import Rows
from dspark_jax.sharding import make_mesh
from dspark_jax.target import compressed_attend, families
from dspark_jax.target.decode_weights import decode_weights
from dspark_jax.target.hyper_model import HyperTarget
from dspark_jax.target.loading import load_target, parameter_paths
from dspark_jax.target.model import layer_pattern
from tests.conftest import others_slow
from tests.target.passes import stepper

V, BLOCK, LENGTH = 31, 4, 34
RAW = {
    "model_type": "deepseek_v4", "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "moe_intermediate_size": 32, "head_dim": 16, "qk_rope_head_dim": 4, "q_lora_rank": 12,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "num_hash_layers": 1, "o_groups": 2, "o_lora_rank": 6,
    "index_n_heads": 16, "index_head_dim": 8, "index_topk": 3, "sliding_window": 5, "rope_theta": 100.0,
    "compress_rope_theta": 500.0, "compress_ratios": [0, 4, 128, 0, 0], "compress_rate_hca": 6,
    "max_position_embeddings": 64, "hc_mult": 2, "swiglu_limit": 1.0,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "beta_fast": 32,
                     "beta_slow": 1},
}  # fmt: skip
ARCH = TargetArchitecture.from_hf(RAW)


@pytest.fixture(scope="module")
def target():
    return decode_weights(HyperTarget(ARCH, rngs=nnx.Rngs(0), scale=0.3), jnp.float32)


@pytest.fixture(scope="module")
def step(target):
    return stepper(target)


@pytest.fixture(scope="module")
def texts(target):
    tokens = np.random.default_rng(0).integers(0, V, (2, LENGTH))
    whole = jax.jit(lambda: target.forward(tokens, jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)).last_hidden)()
    return tokens, np.asarray(whole)


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("accepted", range(1, BLOCK + 1))
def test_rows_that_are_taken_back_leave_no_trace(target, step, texts, accepted):
    """After every accepted length the next rounds are, bit by bit, those after other rejected rows."""
    tokens, whole = texts
    _, prompt = step(tokens[:, :7], [0, 0], target.init_cache(2, 40, BLOCK))
    found = []
    for wrong in (5, 29):
        fed, at, cache, rounds = tokens[:, 7 : 7 + BLOCK].copy(), 7, prompt, []
        for _ in range(5):
            fed[:, accepted:] = wrong
            hidden, cache = step(fed, [at, at], cache)
            close(hidden[:, :accepted], whole[:, at : at + accepted])
            rounds.append(hidden[:, :accepted])
            at += accepted
            fed = tokens[:, at : at + BLOCK].copy()
        last, cache = step(fed, [at, at], cache)
        close(last, whole[:, at : at + BLOCK])
        # what the rows before the next one have made, and no other
        made = [(part.made[:, :, : (at + 1) // rate]) for part, rate in ((cache[kind], rate) for kind, rate in RATES)]
        found.append((*rounds, last, *made))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


RATES = (("compressed_sparse_attention/moe", 4), ("heavily_compressed_attention/moe", 6))


def test_requests_go_back_by_rows_of_their_own(target, step, texts):
    tokens, whole = texts
    cache, at = target.init_cache(2, 40, BLOCK), np.array([0, 0])
    for taken in ([4, 1], [2, 4], [1, 3], [3, 2], [4, 4], [1, 2], [3, 4]):
        fed = np.stack([tokens[b, at[b] : at[b] + BLOCK] for b in range(2)])
        for b in range(2):
            fed[b, taken[b] :] = 9
        hidden, cache = step(fed, at, cache)
        for b in range(2):
            close(hidden[b, : taken[b]], whole[b, at[b] : at[b] + taken[b]])
        at = at + taken


@pytest.mark.parametrize("width", others_slow((3, 16, 8, 5), 3, 16))
def test_a_prompt_in_chunks_is_the_prompt(target, step, texts, width):
    """Chunks that could be taken back and longer ones, the last one padded; then a round, in a slot used before."""
    tokens, whole = texts
    _, cache = step(tokens[:, 3:21], [0, 0], target.init_cache(2, 40, BLOCK))
    for start in range(0, 20, width):
        count = min(width, 20 - start)
        fed = np.full((2, width), 9)
        fed[:, :count] = tokens[:, start : start + count]
        hidden, cache = step(fed, [start] * 2, cache, np.array([count] * 2))
        close(hidden[:, :count], whole[:, start : start + count])
    hidden, cache = step(tokens[:, 20:24], [20, 20], cache)
    close(hidden, whole[:, 20:24])


def test_blocks_of_queries_are_all_queries(target, texts, monkeypatch):
    """Of a text that is longer than a block, and no multiple of it."""
    tokens, whole = texts
    monkeypatch.setattr(compressed_attend, "_BLOCK", 8)
    found = jax.jit(lambda: target.forward(tokens, jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)).last_hidden)()
    close(found, whole)


@pytest.mark.slow
def test_flat_rows_are_the_rows_of_each_request(target, step, texts):
    """Requests with 3, 0 and 2 rows in one flat batch; the one without rows goes on as if nothing had been."""
    tokens, whole = (np.concatenate([part, part[:1]]) for part in texts)
    _, cache = step(tokens[:, :6], [0, 0, 0], target.init_cache(3, 40, BLOCK))
    at, counts = np.array([6, 6, 6]), np.array([3, 0, 2])
    rows = Rows.of(jnp.asarray(counts), jnp.asarray(at), size=8, most=BLOCK)
    flat = rows.flatten(jnp.asarray(tokens[:, 6 : 6 + BLOCK]))[None]
    out = jax.jit(lambda cache: target.forward(flat, rows.at[None], cache, rows=rows))(cache)
    found = rows.pad(out.last_hidden[0])
    for b, count in enumerate(counts):
        close(found[b, :count], whole[b, 6 : 6 + count])
    at = at + counts
    hidden, _ = step(np.stack([tokens[b, at[b] : at[b] + BLOCK] for b in range(3)]), at, out.cache)
    for b in range(3):
        close(hidden[b], whole[b, at[b] : at[b] + BLOCK])


PUBLISHED = {
    *(f"attn.{name}" for name in ("attn_sink", "kv_norm.weight", "q_norm.weight", "wkv.weight")),
    *(f"attn.{name}.weight" for name in ("wo_a", "wo_b", "wq_a", "wq_b")),
    *("attn_norm.weight", "ffn_norm.weight", "ffn.gate.weight"),
    *(f"ffn.{name}.{w}.weight" for name in ("experts.0", "shared_experts") for w in ("w1", "w2", "w3")),
    *(f"hc_{name}_{part}" for name in ("attn", "ffn") for part in ("base", "fn", "scale")),
}
COMPRESSOR = "attn.compressor.ape attn.compressor.norm.weight attn.compressor.wgate.weight attn.compressor.wkv.weight"
INDEX = ["attn.indexer.wq_b.weight", "attn.indexer.weights_proj.weight"]
INDEX += [name.replace("attn.", "attn.indexer.") for name in COMPRESSOR.split()]


def test_tensors_have_the_published_names():
    """Those of DeepSeek-V4-Flash; what belongs to its drafter is left out."""
    family = families.of_shape(ARCH)
    found = {name for weight in family.weights(ARCH).values() for name in weight.names(3)}
    assert {"embed.weight", "head.weight", "norm.weight", "hc_head_base", "hc_head_fn", "hc_head_scale"} == {
        name for name in found if not name.startswith("layers.")
    }
    others = [
        ["ffn.gate.tid2eid"],
        ["ffn.gate.bias", *COMPRESSOR.split(), *INDEX],
        ["ffn.gate.bias", *COMPRESSOR.split()],
    ]
    for i, own in enumerate(others):
        layer = {name.removeprefix(f"layers.{i}.") for name in found if name.startswith(f"layers.{i}.")}
        assert {name for name in layer if ".experts." not in name or ".experts.0." in name} == {*PUBLISHED, *own}
    assert family.ignores("mtp.0.main_proj.weight") and not any(map(family.ignores, found))


FLASH = RAW | {
    "vocab_size": 129280, "hidden_size": 4096, "num_hidden_layers": 43, "num_attention_heads": 64, "head_dim": 512,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 6, "num_hash_layers": 3,
    "o_groups": 8, "o_lora_rank": 1024, "q_lora_rank": 1024, "qk_rope_head_dim": 64, "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 512, "sliding_window": 128, "compress_rate_hca": None, "hc_mult": 4,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0, 0, 0],
}  # fmt: skip


def test_the_shape_of_flash_gives_the_published_tensors():
    """72317 of them, scales and the three stages of its drafter, which have no compressed rows, counted in."""
    arch = TargetArchitecture.from_hf(FLASH)
    family = families.of_shape(arch)
    found = [name for weight in family.weights(arch).values() for name in weight.names(43)]
    assert len(found) == len(set(found))

    def files(names):
        scaled = (".attn.w", ".experts.", ".shared_experts.", ".indexer.wq_b.")
        return len(names) + sum(any(part in name for part in scaled) for name in names)

    stage = [name.replace(".0.", ".3.", 1) for name in found if name.startswith("layers.0.")]  # a table, or corrections
    of_drafter = 3 * files(stage) + len(["main_proj", "scale", "main_norm", "confidence", "norm"]) + 2 + 3
    assert files(found) + of_drafter == 72317
    first, pattern = layer_pattern(family.kinds(arch))
    assert (len(first), len(pattern)) == (3, 2)


def e8m0(rng, shape):
    return (2.0 ** rng.integers(-7, -4, shape)).astype(ml_dtypes.float8_e8m0fnu)


def fp8(rng, name, shape, into):
    """A matrix in blocks of 128 x 128, as published."""
    codes = rng.normal(size=shape, scale=4).astype(ml_dtypes.float8_e4m3fn)
    scales = e8m0(rng, tuple(-(-n // 128) for n in shape))
    into |= {name: codes, name.replace(".weight", ".scale"): scales}
    large = np.repeat(np.repeat(scales.astype(np.float32), 128, 0), 128, 1)[: shape[0], : shape[1]]
    return codes.astype(np.float32) * large


def fp4(rng, name, shape, into):
    """A matrix of an expert: two codes in a byte, which has a sign there, and 32 values to a scale."""
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    codes = rng.integers(0, 16, shape).astype(np.uint8)
    scales = e8m0(rng, (shape[0], shape[1] // 32))
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).view(np.int8)
    into |= {name: packed, name.replace(".weight", ".scale"): scales}
    return numbers[codes] * np.repeat(scales.astype(np.float32), 32, 1)


def published(directory, table=4, **change):
    """A checkpoint in two shards as DeepSeek publishes it, with FP8 and FP4; returns the values of all tensors."""
    rng, family = np.random.default_rng(0), families.of_shape(ARCH)
    shapes = {path: variable.get_value().shape for path, variable in parameter_paths(abstract()).items()}
    stored, values = dict[str, np.ndarray](), dict[str, np.ndarray]()
    for path, weight in family.weights(ARCH).items():
        shape = shapes[path][weight.stacked + bool(weight.experts) :]
        for name in weight.names(3):
            size = weight.stored_shape(shape)
            if weight.below:
                values[name] = stored[name] = rng.integers(0, table, size)
            elif ".experts." in name:
                values[name] = fp4(rng, name, size, stored)
            elif ".attn.w" in name or ".shared_experts." in name or name.endswith("indexer.wq_b.weight"):
                values[name] = fp8(rng, name, size, stored)
            else:
                dtype = np.float32 if weight.exact else ml_dtypes.bfloat16
                stored[name] = rng.normal(size=size, scale=0.3).astype(dtype)
                values[name] = stored[name].astype(np.float32)
    stored["mtp.0.main_norm.weight"] = np.ones(32, np.float32)
    quantised = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "scale_fmt": "ue8m0",
                 "weight_block_size": [128, 128]}  # fmt: skip
    raw = RAW | {"quantization_config": quantised, "expert_dtype": "fp4"} | change
    (directory / "config.json").write_text(json.dumps(raw))
    where = {name: f"model-{i % 2 + 1}-of-2.safetensors" for i, name in enumerate(stored)}
    for file in set(where.values()):
        save_file({name: stored[name] for name in stored if where[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return values


def abstract():
    return nnx.eval_shape(lambda: HyperTarget(ARCH, rngs=nnx.Rngs(0)))


def load(directory):
    config = TargetConfig(path=str(directory), architecture=TargetArchitecture.from_hf(directory))
    return load_target(config, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))


def test_the_published_storage_is_read(tmp_path):
    values, family = published(tmp_path), families.of_shape(ARCH)
    loaded: Any = load(tmp_path)
    for path, weight in family.weights(ARCH).items():
        found = np.asarray(parameter_paths(loaded)[path].get_value())
        single = found.shape[weight.stacked + bool(weight.experts) :]
        expected = [weight.load(values[name], single) for name in weight.names(3)]
        np.testing.assert_array_equal(found.reshape(len(expected), *single), expected, err_msg=path)
    assert loaded.hash_sliding_layers.mlp.table[...].dtype == jnp.int32
    tokens = jnp.arange(9)[None]
    assert np.isfinite(loaded.unembed(loaded.forward(tokens, tokens).last_hidden)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_routed_experts": 3}, "is of a layer or expert that config"),
        ({"expert_dtype": "fp8"}, r"w\d.weight is int8, not FP8"),
        ({"expert_dtype": "int4"}, 'expert_dtype "int4"'),
    ],
)
def test_a_config_of_other_weights_is_refused(tmp_path, change, message):
    published(tmp_path, **change)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_a_table_of_other_experts_is_refused(tmp_path):
    published(tmp_path, table=5)
    with pytest.raises(InputError, match=r"layers.0.ffn.gate.tid2eid holds numbers that are not from 0 to 3"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_ratios": [0, 4, 7]}, r"layer_types or compress_ratios has 3 entries .*'7'"),
        ({"compress_ratios": [0, 4]}, "layer_types or compress_ratios has 2 entries"),
        ({"mlp_layer_types": ["moe", "dense", "moe"]}, "mlp_layer_types has 3 entries .*'dense'"),
        ({"num_hash_layers": "all"}, 'num_hash_layers "all" is not a whole number'),
        ({"compress_rate_hca": 0}, "compress_rates .* are not whole numbers"),
        ({"qk_rope_head_dim": 3}, "3 of 16 numbers of a head turn, which are no whole pairs"),
        ({"o_groups": 3}, "o_groups 3 does not divide num_attention_heads 4"),
        ({"index_head_dim": 2}, "index_head_dim 2 is below the 4 that turn"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 is above n_routed_experts 4"),
        ({"num_local_experts": 8}, "n_routed_experts 4 and num_local_experts 8 differ"),
        ({"scoring_func": "softmax"}, 'scoring_func "softmax" is not supported'),
        ({"n_shared_experts": 2}, "n_shared_experts 2 is not supported"),
        ({"topk_method": "greedy"}, 'topk_method "greedy" is not supported'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type 'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": RAW["rope_scaling"] | {"attention_factor": 1.2}}, "attention_factor other than 1"),
        ({"model_type": "deepseek_v41"}, "model_type 'deepseek_v41' is not supported"),
    ],
)
def test_what_a_deepseek_v4_may_not_say(change, message):
    with pytest.raises(InputError, match=message):
        TargetArchitecture.from_hf(RAW | change)


def test_a_config_that_is_written_is_read_as_the_same():
    assert TargetArchitecture.from_hf(ARCH.to_hf()) == ARCH
