"""DSpark-5 against transformers' layers of DeepSeek-V4, which are given the keys of the context for a cache."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dspark_jax.config import Config, DataConfig, DrafterConfig, TargetArchitecture, TargetConfig, resolve
from dspark_jax.convert.hf import abstract_drafter, drafter_tensors, expected_tensors
from dspark_jax.convert.mapping import drafter_weights
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.engine import generate
from dspark_jax.engine.models import Models
from dspark_jax.kinds import as_kind
from dspark_jax.layer_sizes import layer_sizes, problems
from dspark_jax.ops.sampling import Sampling
from dspark_jax.sharding import one_device
from dspark_jax.target.families import FAMILIES
from dspark_jax.target.loading import fill_module

torch: Any = pytest.importorskip("torch")
modeling: Any = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

VOCAB, D, STAGES, G, W, RANK, NOISE = 23, 16, 2, 3, 6, 4, 22
SIZES = {
    "num_attention_heads": 4, "head_dim": 12, "qk_rope_head_dim": 4, "q_lora_rank": 10, "o_lora_rank": 3, "o_groups": 2,
    "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 9, "swiglu_limit": 0.6, "hc_mult": 4,
}  # fmt: skip
ARCH = TargetArchitecture("qwen3", VOCAB, D, 4, 2, 1, 8, 32, 1e-6, 1e4, False, 256)
TAPS = (1, 2, 3)  # the last layer, too


def config(**change: Any) -> DrafterConfig:
    base = DrafterConfig(num_layers=STAGES, block_size=G, target_layer_ids=TAPS, mask_token_id=NOISE, markov_rank=RANK)
    whole = Config(
        target=TargetConfig(architecture=ARCH), drafter=base, data=DataConfig(max_length=64, max_prompt_length=16)
    )
    whole = as_kind(whole, "dspark5")
    for name, value in ({"sliding_window": W, "layer_sizes": SIZES} | change).items():
        setattr(whole.drafter, name, value)
    return resolve(whole).drafter


def stage_names(stage: int) -> set[str]:
    """The tensors of a stage as the released checkpoints have them, the scales of quantised ones aside."""
    names = {f"attn.{x}.weight" for x in ("wq_a", "q_norm", "wq_b", "wkv", "kv_norm", "wo_a", "wo_b")} | {
        "attn.attn_sink"
    }
    names |= {"attn_norm.weight", "ffn_norm.weight", "ffn.gate.weight", "ffn.gate.bias"}
    names |= {f"hc_{part}_{x}" for part in ("attn", "ffn") for x in ("fn", "base", "scale")}
    experts = [f"experts.{e}" for e in range(SIZES["n_routed_experts"])] + ["shared_experts"]
    names |= {f"ffn.{expert}.w{n}.weight" for expert in experts for n in (1, 2, 3)}
    names |= {"main_proj.weight", "main_norm.weight"} if stage == 0 else set()
    if stage == STAGES - 1:
        names |= {"norm.weight", "hc_head_fn", "hc_head_base", "hc_head_scale", "confidence_head.proj.weight"}
        names |= {"markov_head.markov_w1.weight", "markov_head.markov_w2.weight"}
    return {f"mtp.{stage}.{name}" for name in names}


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = expected_tensors(ARCH, config())
    return {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}


@functools.cache
def drafter() -> Any:
    made = abstract_drafter(ARCH, config())
    fill_module(made, tensors(), drafter_weights(made, config()), "here", one_device(), np.float32)
    return made


@functools.cache
def target() -> Any:
    rng = np.random.default_rng(1)
    embedding, head = (rng.normal(size=(VOCAB, D)).astype(np.float32) for _ in range(2))
    return SimpleNamespace(
        embed=lambda ids: jnp.asarray(embedding)[ids], unembed=lambda x: x @ head.T, embedding=embedding, head=head
    )


def test_tensors_are_those_of_the_released_checkpoints() -> None:
    names = set().union(*(stage_names(stage) for stage in range(STAGES)))
    assert set(tensors()) == names
    back = drafter_tensors(drafter(), config())
    assert set(back) == names
    for name, value in tensors().items():
        np.testing.assert_array_equal(back[name], value)  # bit for bit


def test_flash_has_as_many_tensors_as_its_index() -> None:
    """4705 tensors, that of the release, if the matrices are counted twice (they have scales): those of attention,
    of the experts, and of the projection of features."""
    sizes = {
        "num_attention_heads": 64, "head_dim": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1024, "o_lora_rank": 1024,
        "o_groups": 8, "n_routed_experts": 256, "num_experts_per_tok": 6, "moe_intermediate_size": 2048,
    }  # fmt: skip
    flash = TargetArchitecture("qwen3", 129280, 4096, 43, 64, 1, 512, 2048, 1e-6, 1e4, False, 1048576)
    shapes = expected_tensors(flash, config(layer_sizes=sizes, markov_rank=256, num_layers=3))
    scaled = [name for name in shapes if any(part in name for part in (".attn.w", "experts.", "main_proj"))]
    assert len(shapes) + len(scaled) == 4705
    assert shapes["mtp.0.main_proj.weight"] == (4096, 12288)
    assert shapes["mtp.1.attn.wo_a.weight"] == (8192, 4096)
    assert shapes["mtp.1.attn.wq_b.weight"] == (32768, 1024)
    assert shapes["mtp.2.hc_ffn_fn"] == (24, 16384)
    assert shapes["mtp.2.confidence_head.proj.weight"] == (1, 4352)


class Context:
    """A cache that puts the keys of a context before those of the rows."""

    def __init__(self, keys: Any):
        self.keys = keys

    def update(self, keys: Any, values: Any, *_: Any, **__: Any) -> Any:
        del values
        both = torch.cat([self.keys, keys], dim=2)
        return both, both


def oracle_layers(stored: dict[str, np.ndarray]) -> Any:
    """Layers of transformers with stored tensors, in float64."""
    theirs = modeling.DeepseekV4Config(
        vocab_size=VOCAB, hidden_size=D, num_hidden_layers=STAGES, layer_types=["sliding_attention"] * STAGES,
        mlp_layer_types=["moe"] * STAGES, rms_norm_eps=ARCH.rms_norm_eps, rope_theta=1e4, n_shared_experts=1,
        routed_scaling_factor=1.5, hc_sinkhorn_iters=20, hc_eps=1e-6, sliding_window=W, partial_rotary_factor=4 / 12,
        attn_implementation="eager", **SIZES,
    )  # fmt: skip
    theirs._attn_implementation = theirs._experts_implementation = "eager"
    torch.set_default_dtype(torch.float64)
    try:
        layers = [modeling.DeepseekV4DecoderLayer(theirs, i) for i in range(STAGES)]
        head, rotary = modeling.DeepseekV4HyperHead(theirs), modeling.DeepseekV4RotaryEmbedding(theirs)
    finally:
        torch.set_default_dtype(torch.float32)
    last = f"mtp.{STAGES - 1}."
    put(
        stored,
        head,
        {"hc_fn": last + "hc_head_fn", "hc_base": last + "hc_head_base", "hc_scale": last + "hc_head_scale"},
    )
    for i, layer in enumerate(layers):
        names = {"self_attn.q_a_proj.weight": "attn.wq_a.weight", "self_attn.q_a_norm.weight": "attn.q_norm.weight",
                 "self_attn.q_b_proj.weight": "attn.wq_b.weight", "self_attn.kv_proj.weight": "attn.wkv.weight",
                 "self_attn.kv_norm.weight": "attn.kv_norm.weight", "self_attn.o_a_proj.weight": "attn.wo_a.weight",
                 "self_attn.o_b_proj.weight": "attn.wo_b.weight", "self_attn.sinks": "attn.attn_sink",
                 "input_layernorm.weight": "attn_norm.weight", "post_attention_layernorm.weight": "ffn_norm.weight",
                 "mlp.gate.weight": "ffn.gate.weight", "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
                 "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
                 "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
                 "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight"}  # fmt: skip
        names |= {f"{ours}.{x}": f"hc_{part}_{x}" for ours, part in (("attn_hc", "attn"), ("ffn_hc", "ffn"))
                  for x in ("fn", "base", "scale")}  # fmt: skip
        experts = {"mlp.experts.gate_up_proj": ("w1", "w3"), "mlp.experts.down_proj": ("w2",)}
        put(stored, layer, {name: f"mtp.{i}.{rest}" for name, rest in names.items()}, experts, i)
    return layers, head, rotary


def put(
    stored: dict[str, np.ndarray],
    module: Any,
    names: dict[str, str],
    experts: dict[str, tuple[str, ...]] | None = None,
    stage: int = 0,
) -> None:
    state = {name: stored[rest] for name, rest in names.items()}
    for name, parts in (experts or {}).items():
        rows = [[stored[f"mtp.{stage}.ffn.experts.{e}.{part}.weight"] for part in parts] for e in range(5)]
        state[name] = np.stack([np.concatenate(row) for row in rows])
    module.load_state_dict(
        {name: torch.tensor(value, dtype=torch.float64) for name, value in state.items()}, strict=True
    )
    module.double()


def normed(x: Any, weight: Any) -> Any:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + ARCH.rms_norm_eps) * weight


def oracle_block(
    features: np.ndarray, anchor: int, token: int, given: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """features [S, M D] of a document -> logits [G, V] without the Markov head, and collapsed streams [G, D]."""
    layers, head, rotary = oracle_layers(given or tensors())
    stored = {name: torch.tensor(value, dtype=torch.float64) for name, value in (given or tensors()).items()}
    last, rows = f"mtp.{STAGES - 1}.", np.arange(max(anchor - W, 0), anchor)
    context = normed(
        torch.tensor(features[rows]).double() @ stored["mtp.0.main_proj.weight"].T, stored["mtp.0.main_norm.weight"]
    )
    at, before = torch.arange(anchor, anchor + G)[None], torch.tensor(rows)[None]
    embedded = torch.tensor(target().embedding[[token] + [NOISE] * (G - 1)]).double()
    x = embedded[None, :, None].repeat(1, 1, SIZES["hc_mult"], 1)
    turns = {
        place: rotary(embedded, positions, layer_type="main") for place, positions in (("own", at), ("context", before))
    }
    for i, layer in enumerate(layers):
        keys = normed(context @ stored[f"mtp.{i}.attn.wkv.weight"].T, stored[f"mtp.{i}.attn.kv_norm.weight"])
        keys = modeling.apply_rotary_pos_emb(keys[None, None], *turns["context"]) if len(rows) else keys[None, None]
        x = layer(x, position_embeddings={"main": turns["own"]}, position_ids=at, attention_mask=None,
                  cache=Context(keys), input_ids=None)  # fmt: skip
        x = x[0] if isinstance(x, tuple) else x
    collapsed = head(x)[0]
    logits = normed(collapsed, stored[last + "norm.weight"]) @ torch.tensor(target().head).double().T
    return logits.detach().numpy(), collapsed.detach().numpy()


def walk(logits: np.ndarray, collapsed: np.ndarray, token: int) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Greedy drafts, the logits they come from, and confidences."""
    last = f"mtp.{STAGES - 1}."
    w1, w2 = (tensors()[f"{last}markov_head.markov_w{n}.weight"].astype(np.float64) for n in (1, 2))
    drafts, biased, trust = [], [], []
    for k in range(G):
        biased.append(logits[k] + w2 @ w1[token])
        trust.append(tensors()[last + "confidence_head.proj.weight"][0] @ np.concatenate([collapsed[k], w1[token]]))
        token = int(np.argmax(biased[-1]))
        drafts.append(token)
    return drafts, np.stack(biased), np.array(trust)


LENGTHS = (0, 1, 4, 11)  # fewer context rows than the window, and more


def features(length: int = 12) -> np.ndarray:
    return np.random.default_rng(2).normal(size=(length, len(TAPS) * D)).astype(np.float32)


def test_drafts_logits_and_confidences_are_the_oracles() -> None:
    count, rows = len(LENGTHS), features()
    lengths = jnp.asarray(LENGTHS)
    anchors = jnp.arange(count) + 3

    @jax.jit
    def propose(model: Any) -> Any:
        cache = model.init_cache(count, 12 + G + 1)
        places = jnp.broadcast_to(jnp.arange(12), (count, 12))
        cache = model.extend(cache, jnp.broadcast_to(rows, (count, *rows.shape)), places, places, lengths)
        uniforms = jnp.zeros((count, G, 2), jnp.int32)
        return model.propose(target(), cache, anchors, lengths, uniforms, Sampling.constant(0.0, count))[0]

    proposal = propose(drafter())
    for b, length in enumerate(LENGTHS):
        drafts, biased, trust = walk(*oracle_block(rows, length, int(anchors[b])), int(anchors[b]))
        assert proposal.tokens[b].tolist() == drafts
        np.testing.assert_allclose(proposal.logits[b], biased, rtol=1e-4, atol=2e-4)
        np.testing.assert_allclose(proposal.confidence[b], trust, rtol=1e-4, atol=2e-4)


def test_training_pass_is_the_oracles_in_packed_documents() -> None:
    """Two documents in a sequence: the second begins at row 5."""
    rows, start = features(14), 5
    tokens = np.random.default_rng(3).integers(0, VOCAB - 1, (1, 14))
    starts = np.where(np.arange(14) < start, 0, start)[None]
    anchors = Anchors(jnp.asarray([[3, 6, 12]]), jnp.ones((1, 3), bool))
    given = jnp.asarray(rows)[None], jnp.asarray(tokens), jnp.ones((1, 14)), anchors, jnp.asarray(starts)
    out = jax.jit(lambda model: model(target(), *given))(drafter())
    for index, anchor in enumerate((3, 6, 12)):
        first = int(starts[0, anchor])
        logits, collapsed = oracle_block(rows[first:], anchor - first, int(tokens[0, anchor]))
        np.testing.assert_allclose(target().unembed(out.hidden[0, index]), logits, rtol=1e-4, atol=2e-4)
        np.testing.assert_allclose(out.trusted[0, index], collapsed, rtol=1e-4, atol=2e-4)


@pytest.mark.slow
def test_gradients_are_the_oracles() -> None:
    """Along a random direction of all parameters, against differences of the oracle in float64."""
    rows, rng = features(), np.random.default_rng(4)
    tokens, anchors = (
        jnp.asarray(rng.integers(0, VOCAB - 1, (1, 12))),
        Anchors(jnp.asarray([[7]]), jnp.ones((1, 1), bool)),
    )
    weights = rng.normal(size=(2, G, D))
    model = drafter()

    def value(model: Any) -> jax.Array:
        out = model(target(), jnp.asarray(rows)[None], tokens, jnp.ones((1, 12)), anchors)
        return jnp.sum(weights[0] * target().unembed(out.hidden[0, 0])[:, :D]) + jnp.sum(weights[1] * out.trusted[0, 0])

    slopes = drafter_tensors(jax.jit(jax.grad(value))(model), config())
    unread = ("markov_head", "confidence_head", "gate.bias")
    assert all(
        np.any(slope) != any(part in name for part in unread)
        for name, slope in slopes.items()
        if "experts." not in name
    )
    direction = {name: rng.normal(size=slope.shape) for name, slope in slopes.items()}

    def at(step: float) -> float:
        moved = {name: stored + step * direction[name] for name, stored in tensors().items()}
        logits, collapsed = oracle_block(rows, 7, int(tokens[0, 7]), moved)
        return float(np.sum(weights[0] * logits[:, :D]) + np.sum(weights[1] * collapsed))

    expected = (at(1e-4) - at(-1e-4)) / 2e-4  # its streams are in float32
    found = sum(float(np.sum(slopes[name] * direction[name])) for name in slopes)
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_sizes_follow_from_the_target_or_are_stated() -> None:
    assert layer_sizes(ARCH, {}).o_groups == 2 and layer_sizes(ARCH, SIZES).head_dim == 12
    assert not list(problems(ARCH, SIZES))
    for stated, said in (
        ({"heads": 3}, "'heads', which is no size"),
        ({"hc_mult": 0}, "'hc_mult': 0; it must be positive"),
        ({"head_dim": 8.5}, "'head_dim': 8.5; it must be a whole number"),
        ({"num_experts_per_tok": 20}, "exceeds n_routed_experts 16"),
        ({"qk_rope_head_dim": 3}, "must be even"),
        ({"o_groups": 3}, "does not divide num_attention_heads 2"),
    ):
        assert said in next(problems(ARCH, stated)), stated
    with pytest.raises(Exception, match="drafter.sliding_window=0: every layer of dspark5 has a window"):
        config(sliding_window=0)
    with pytest.raises(Exception, match="markov_head_type=gated: dspark5 has the vanilla head"):
        config(markov_head_type="gated")


DEEPSEEK = {
    "model_type": "deepseek_v4", "vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": 4, "q_lora_rank": 10,
    "num_attention_heads": 4, "head_dim": 12, "qk_rope_head_dim": 4, "o_lora_rank": 3, "o_groups": 2,
    "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 9, "swiglu_limit": 0.6,
    "compress_ratios": [0, 4, 128, 0, 0, 0], "num_hash_layers": 1, "index_n_heads": 2, "index_head_dim": 6,
    "index_topk": 3, "sliding_window": 6, "max_position_embeddings": 512, "rope_theta": 5000.0,
}  # fmt: skip


@pytest.mark.slow
def test_a_deepseek_v4_answers_with_its_drafter_as_without() -> None:
    """The sizes of the drafter's layers are the target's; greedy answers are token-identical."""
    arch = TargetArchitecture.from_hf(DEEPSEEK)
    sizes = layer_sizes(arch, {})
    assert all(getattr(sizes, name) == value for name, value in SIZES.items()) and sizes.rope_theta == 5000.0
    family = FAMILIES[arch.model_type].model()
    assert family is not None
    model = family(arch, rngs=nnx.Rngs(0), scale=0.5)
    settings = DrafterConfig(
        kind="dspark5", num_layers=2, block_size=G, target_layer_ids=TAPS, mask_token_id=NOISE, markov_rank=RANK,
        sliding_window=W, initializer_range=0.5,
    )  # fmt: skip
    made = make_drafter(arch, settings, rngs=nnx.Rngs(1))
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    plain = generate(Models(model), prompts, max_new_tokens=12)
    drafted = generate(Models(model, made), prompts, max_new_tokens=12)
    for want, got in zip(plain.tokens, drafted.tokens, strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.slow
def test_a_few_steps_lower_the_loss() -> None:
    """Cross-entropy with the labels of some blocks, by Adam."""
    rows, rng, at = features(24), np.random.default_rng(5), np.array([[3, 8, 13, 18]])
    tokens, anchors = jnp.asarray(rng.integers(0, VOCAB - 1, (1, 24))), Anchors(jnp.asarray(at), jnp.ones((1, 4), bool))
    model: Any = make_drafter(ARCH, config(), rngs=nnx.Rngs(0))
    optimizer = optax.adam(1e-2)

    def loss(model: Any) -> jax.Array:
        out = model(target(), jnp.asarray(rows)[None], tokens, jnp.ones((1, 24)), anchors)
        logits = target().unembed(out.hidden) + model.markov.bias(model.markov.embed(out.prev_tokens))
        return optax.softmax_cross_entropy_with_integer_labels(logits, out.labels).mean()

    @jax.jit
    def step(model: Any, state: Any) -> Any:
        value, slopes = jax.value_and_grad(loss)(model)
        updates, state = optimizer.update(slopes, state)
        return optax.apply_updates(model, updates), state, value

    state, losses = optimizer.init(model), list[float]()
    for _ in range(8):
        model, state, value = step(model, state)
        losses.append(float(value))
    assert losses[-1] < 0.8 * losses[0], losses
