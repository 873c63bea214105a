"""Kernels and decoding rounds compiled for an H100, on a machine that has none: that they compile, and what they copy.

Skipped where the CUDA plugin or ptxas are missing; `.ci/run` brings the plugin.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dspark_jax.config import Config, DrafterConfig, TargetArchitecture, TargetConfig
from dspark_jax.drafter import make_drafter
from dspark_jax.engine import schedulers
from dspark_jax.engine.models import Models
from dspark_jax.engine.slots import Mode, open_slots, serve_round
from dspark_jax.ops.attention import attention
from dspark_jax.ops.block_attention import block_attention
from dspark_jax.ops.cached_attention import Rows, cached_attention
from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.ops.expert_mlp import Parts, expert_mlp
from dspark_jax.ops.markov_sample import markov_sample
from dspark_jax.ops.sampling import Sampling
from dspark_jax.ops.speculative_verify import speculative_verify
from dspark_jax.ops.vocab_loss import passes, vocab_loss
from dspark_jax.planning.cases import Case, cases
from dspark_jax.presets import released
from dspark_jax.sharding import MESH_AXES
from dspark_jax.target.decode_weights import training_weights
from dspark_jax.target.model import Target
from dspark_jax.training.losses import vocab_terms
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, state_layout, to_params
from dspark_jax.training.step import batch_layout, make_train_step
from tests.compiled import cards
from tests.ops.test_vocab_loss_terms import Everything

pytestmark = pytest.mark.slow

HEADS, KEY_HEADS, WIDTH, VOCABULARY = 32, 8, 128, 151936  # Qwen3-4B


def mesh_of(*shape: int, card: str = "h100") -> Mesh:
    """Cards as a mesh (data, fsdp, tensor)."""
    devices = np.asarray(cards.devices(card)[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def compiled(run: Any, *arguments: Any, mesh: Mesh) -> Any:
    """`run` for the card; arguments are shapes, of which arrays with a first axis of 4 are split over data and fsdp."""

    def placed(x: Any) -> Any:
        spec = PartitionSpec(("data", "fsdp")) if mesh.size > 1 and x.ndim and x.shape[0] == 4 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        return jax.jit(run).lower(*jax.tree.map(placed, arguments)).compile()


def shape(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize(("batch", "devices"), [(1, (1, 1, 1)), (4, (2, 2, 2))])
def test_block_attention(batch: int, devices: tuple[int, ...]) -> None:
    """Forward and backward at the released training shape: no array of scores, and no device waits for another."""

    def both(*arrays: Any) -> Any:
        out, pull = jax.vjp(lambda *x: block_attention(*x, *arrays[5:], scale=WIDTH**-0.5), *arrays[:5])
        return out, pull(out)

    context, own = shape(batch, 4096, KEY_HEADS, WIDTH), shape(batch, 512, 7, KEY_HEADS, WIDTH)
    anchors, keep = shape(batch, 512, dtype=jnp.int32), shape(batch, 512, dtype=jnp.bool_)
    query = shape(batch, 512, 7, HEADS, WIDTH)
    program = compiled(both, query, context, context, own, own, anchors, keep, mesh=mesh_of(*devices))
    text = program.as_text()
    assert text.count("xla.gpu.triton") >= 4
    assert not re.search(r"= \S+ all-(gather|reduce)", text)
    assert program.memory_analysis().temp_size_in_bytes < 40 << 20  # a dense mask takes 8.4 GB


def test_attention_that_cudnn_does_not_take() -> None:
    """A chunk of a prompt against its cache, heads with sinks, and heads of 512: one kernel, no array of scores."""
    cases: dict[str, dict[str, Any]] = {
        "limits": {"t": 256, "limits": True},
        "sinks": {"heads": 64, "width": 64, "window": 128, "sinks": True},
        "wide heads": {"heads": 16, "key_heads": 1, "width": 512},
    }
    for name, how in cases.items():
        how = {"t": 4096, "heads": HEADS, "key_heads": KEY_HEADS, "width": WIDTH, "window": 0} | how

        def run(query: Any, key: Any, value: Any, limit: Any, sinks: Any, how: Any = how) -> Any:
            given = {"limit": limit if "limits" in how else None, "sinks": sinks if "sinks" in how else None}
            return attention(query, key, value, scale=0.1, window=how["window"], **given)

        query, context = shape(2, how["t"], how["heads"], how["width"]), shape(2, 4096, how["key_heads"], how["width"])
        rest = shape(2, how["t"], dtype=jnp.int32), shape(how["heads"], dtype=jnp.float32)
        program = compiled(run, query, context, context, *rest, mesh=mesh_of(1, 1, 1))
        assert program.as_text().count("xla.gpu.triton") == 1, name
        assert program.memory_analysis().temp_size_in_bytes < 8 << 20, name  # a head's scores take 67 MB


@pytest.mark.parametrize(("batch", "length"), [(1, 1024), (32, 4096)])
def test_cached_attention(batch: int, length: int) -> None:
    cache = shape(batch, KEY_HEADS, length, WIDTH)
    for causal, window, front, sinks in ((True, 0, 0, 0), (False, 0, 0, 0), (True, 512, 8, 0), (True, 512, 8, HEADS)):
        settings = causal, window, front, jnp.arange(sinks) / 8 if sinks else None

        def run(query: Any, key: Any, value: Any, positions: Any, settings: Any = settings) -> Any:
            how = dict(zip(("causal", "window", "front", "sinks"), settings, strict=True))
            return cached_attention(query, key, value, Rows.whole(positions, 8), scale=0.1, **how)

        query, positions = shape(batch * 8, HEADS, WIDTH), shape(batch, dtype=jnp.int32)
        assert "xla.gpu.triton" in compiled(run, query, cache, cache, positions, mesh=mesh_of(1, 1, 1)).as_text()


@pytest.mark.parametrize("greedy", [True, False])
def test_the_sequential_head_and_the_acceptance_rule(greedy: bool) -> None:
    batch, size, float32, int32 = 32, 7, jnp.float32, jnp.int32

    def run(base: Any, target: Any, w1: Any, w2: Any, anchors: Any, draws: Any, accept: Any, following: Any) -> Any:
        sampling = Sampling(jnp.full((batch,), 0.0 if greedy else 1.0), greedy=greedy)
        tokens, logits = markov_sample(base, w1, w2, anchors, draws, sampling)
        first, lengths = jnp.arange(0, batch * (size + 1), size + 1), jnp.full((batch,), size)
        drafts = (logits.swapaxes(0, 1), first, tokens.T, lengths)
        return speculative_verify(target, *drafts, accept, following, sampling)

    program = compiled(
        run,
        shape(size, batch, VOCABULARY, dtype=float32),
        shape(batch * (size + 1), VOCABULARY, dtype=float32),
        shape(VOCABULARY, 2, 128),
        shape(VOCABULARY, 256),
        shape(batch, dtype=int32),
        shape(size, batch, 2, dtype=int32),
        shape(batch, size, 2, dtype=int32),
        shape(batch, 2, dtype=int32),
        mesh=mesh_of(1, 1, 1),
    )
    assert program.as_text().count("xla.gpu.triton") >= 2 * size + 1
    logits = size * batch * VOCABULARY * 4  # one copy, since the argument is not given up
    assert program.memory_analysis().temp_size_in_bytes < 1.2 * logits


@pytest.mark.parametrize(("terms", "softcap", "devices"), [
    ({"ce": 0.1, "l1": 0.9}, 0.0, (1, 1, 1)),
    ({"ce": 0.1, "l1": 0.9}, 30.0, (2, 2, 1)),
    ({"kl": 0.1, "soft_ce": 0.1, "reverse_kl": 0.1, "jsd": 0.1, "nla": 0.1, "lk_hybrid": 0.1}, 0.0, (1, 1, 1)),
    ({"length": 0.5, "dpace": 0.5}, 0.0, (1, 1, 1)),
])  # fmt: skip
def test_the_vocabulary_loss(terms: dict[str, float], softcap: float, devices: tuple[int, ...]) -> None:
    """Kernels from the logits to their slopes: no array of logits but the two that are read, and the slopes."""
    blocks, chunk, d, batch = 256, 896, 2560, 4 if np.prod(devices) > 1 else 1

    def run(hidden: Any, prev: Any, w2: Any, teacher: Any, head: Any, labels: Any, weights: Any) -> Any:
        def loss(hidden: Any, prev: Any, w2: Any) -> Any:
            arrays, settings = (hidden, prev, teacher, head, w2, labels, weights), {"block": 7, "softcap": softcap}
            return vocab_loss(*arrays, terms=vocab_terms(terms), chunk=chunk, **settings).loss

        return jax.grad(loss, argnums=(0, 1, 2))(hidden, prev, w2)

    rows = shape(batch, blocks * 7, d)
    narrow = [shape(batch, blocks * 7, dtype=dtype) for dtype in (jnp.int32, jnp.float32)]
    head, w2 = shape(VOCABULARY, d), shape(VOCABULARY, 256, dtype=jnp.float32)
    program = compiled(run, rows, shape(batch, blocks * 7, 256), w2, rows, head, *narrow, mesh=mesh_of(*devices))
    text, logits = program.as_text(), chunk * VOCABULARY * 4
    assert text.count("xla.gpu.triton") >= 3
    added = re.findall(rf"= f32\[(?:1,)?{chunk},{VOCABULARY}\]\S* add\(", text)
    assert len(added) == (softcap > 0)  # the bias comes after the cap
    joined = 0 if softcap else VOCABULARY * (d + 256) * 2
    arrays = logits * (4.5 if softcap else 2.5) + 4 * VOCABULARY * 256 * 4  # and sums of W2's gradient
    assert program.memory_analysis().temp_size_in_bytes < joined + arrays


def test_a_term_with_every_known_step() -> None:
    """What `passes` takes apart, the compiler puts together, gradients that are derived automatically as well."""

    def run(hidden: Any, teacher: Any, head: Any, labels: Any, weights: Any) -> Any:
        def loss(hidden: Any) -> Any:
            terms = {"own": (Everything(), 1.0)}
            arrays = hidden, None, teacher, head, None, labels, weights
            return vocab_loss(*arrays, terms=terms, chunk=64, implementation="pallas_gpu").loss

        return jax.grad(loss)(hidden)

    arrays = shape(1, 64, 64), shape(1, 64, 64), shape(4000, 64), shape(1, 64, dtype=jnp.int32)
    arrays += (shape(1, 64, dtype=jnp.float32),)
    steps = set(re.findall(r" = (\w+)", str(jax.make_jaxpr(run)(*arrays))))
    assert not passes.ELEMENTWISE - steps
    assert compiled(run, *arrays, mesh=mesh_of(1, 1, 1)).as_text().count("xla.gpu.triton") >= 3


@pytest.mark.parametrize("rows", [32, 1024])
@pytest.mark.parametrize(("e", "k", "d", "f", "biases"), [(128, 8, 2048, 768, False), (32, 4, 2880, 2880, True)])
def test_the_experts_of_a_mixture(e: int, k: int, d: int, f: int, biases: bool, rows: int) -> None:
    """Qwen3-30B-A3B's and GPT-OSS's, in a round and for a prompt: two kernels, and no copy of a matrix of all."""

    def run(rows: Any, chosen: Any, weights: Any, *parts: Any) -> Any:
        return expert_mlp(rows, chosen, weights, Parts(*parts), lambda gate, up: jax.nn.silu(gate) * up)

    added = (shape(e, f), shape(e, f), shape(e, d)) if biases else ()
    given = (shape(rows, d), shape(rows, k, dtype=jnp.int32), shape(rows, k))
    matrices = (shape(e, d, f), shape(e, d, f), shape(e, f, d))
    text = compiled(run, *given, *matrices, *added, mesh=mesh_of(1, 1, 1)).as_text()
    assert text.count("xla.gpu.triton") == 2
    assert not large_copies(text, e * d * f)


@pytest.mark.parametrize(
    ("card", "target", "requests", "drafts"),
    [
        ("h100", "google/gemma-4-12B-it", 32, 16),
        ("h100", "Qwen/Qwen3-30B-A3B", 256, 7),
        ("ada", "Qwen/Qwen3-4B", 64, 7),
        ("ada", "google/gemma-4-12B-it", 32, 7),
    ],
)
def test_what_the_command_kernels_tries(card: str, target: str, requests: int, drafts: int, monkeypatch: Any) -> None:
    """At the sizes of released configs, also where there is less shared memory; none is left to another one."""
    cards.has_shared_memory_of(card, monkeypatch)
    config, left = released("", target, "dspark"), []
    config = dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, block_size=drafts))
    for case in cases(config, requests=requests):
        for name in {*case.operation.order["gpu"]} - {"xla", "cudnn"}:

            def run(*arrays: Any, name: str = name, case: Case = case) -> Any:
                return case.function(*arrays, implementation=name)

            try:
                compiled(run, *jax.eval_shape(case.arrays), mesh=mesh_of(1, 1, 1, card=card))
            except Unsupported as refusal:
                left.append(f"{case.operation.name}.{name}, {case.label}: {refusal}")
    assert not left


def large_copies(text: str, least: int) -> list[str]:
    """Instructions of a compiled program that copy, convert or transpose an array of `least` bytes or more."""
    sizes = {"f32": 4, "bf16": 2, "s32": 4}
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?[\w.-]*(copy|convert|transpose)[\w.-]* = (f32|bf16|s32)\[([\d,]+)\]", line)
        if match and np.prod([int(x) for x in match[3].split(",")]) * sizes[match[2]] >= least:
            found.append(line.strip()[:160])
    return found


@pytest.mark.parametrize(("greedy", "family"), [(True, "qwen3"), (False, "qwen3"), (False, "qwen3_moe")])
def test_a_decoding_round_copies_neither_weights_nor_caches(greedy: bool, family: str) -> None:
    """A small model, in the form in which it is held: every weight and every cache is over 100 KB, nothing else is."""
    mixture = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    mixture |= {"decoder_sparse_step": 1, "mlp_only_layers": []}
    arch = TargetArchitecture(family, 3000, 256, 3, 4, 2, 64, 768, 1e-6, 1e6, True, 2048)
    arch = dataclasses.replace(arch, own=mixture) if family == "qwen3_moe" else arch
    config = DrafterConfig(num_layers=2, target_layer_ids=(0, 1), mask_token_id=2999, markov_rank=128)
    mesh = mesh_of(1, 1, 1)

    def models() -> Any:
        made = Target(arch, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
        drafter = make_drafter(arch, config, rngs=nnx.Rngs(1), dtype=jnp.bfloat16)
        narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, made)
        return Models(narrow, drafter).for_decoding(batch_size=4)

    with jax.set_mesh(mesh):
        both = jax.eval_shape(models)
        scheduler = jax.eval_shape(schedulers.fixed)
        opened = functools.partial(open_slots, count=4, rows=1024, stops=2)
        slots = jax.eval_shape(opened, both, scheduler)
        everything = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec())),
            (both, slots, jax.ShapeDtypeStruct((4,), jnp.bool_), scheduler),
        )
        program = serve_round.lower(*everything, mode=Mode(greedy=greedy)).compile()
    text = program.as_text()
    assert "xla.gpu.triton" in text
    assert not large_copies(text, 100_000), large_copies(text, 100_000)


def large_slices(text: str, least: int) -> list[str]:
    """Instructions of a compiled program that take a slice of `least` elements or more out of a stack."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* dynamic-slice\(", text)
    return [dims for dims in found if np.prod([int(x) for x in dims.split(",")]) >= least]


def test_a_train_step_copies_no_layer_of_the_target_and_keeps_attention() -> None:
    """Of a stack it would copy every matrix before a product reads it."""
    arch = TargetArchitecture("qwen3", 3000, 512, 4, 8, 4, 64, 1024, 1e-6, 1e6, True, 2048)
    drafting = DrafterConfig(
        num_layers=1, target_layer_ids=(0, 1), mask_token_id=2999, markov_rank=128, dtype="bfloat16"
    )
    config = Config("h100", TargetConfig(architecture=arch, dtype="bfloat16"), drafting)
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=2, accumulate=1, num_anchors=16),
        data=dataclasses.replace(config.data, max_length=256),
    )
    mesh, optimizer, drafter = mesh_of(1, 1, 1), make_optimizer(config.optim, 1), abstract_drafter(config)

    def program(form: Callable[[Target], Target], recompute: str = "nothing") -> str:
        chosen = dataclasses.replace(config, train=dataclasses.replace(config.train, recompute=recompute))

        def made() -> Target:
            target = Target(arch, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
            return form(jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, target))

        target, whole = jax.eval_shape(made), NamedSharding(mesh, PartitionSpec())
        frozen = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for name, x in to_params(target).items()}
        step = make_train_step(chosen, drafter, target, optimizer, mesh)
        return (
            step.lower(state_layout(drafter, optimizer, mesh), frozen, batch_layout(config, mesh)).compile().as_text()
        )

    with jax.set_mesh(mesh):
        assert len(large_slices(program(lambda target: target), 100_000)) >= 7  # those of attention and MLP
        plain = program(training_weights)
        assert not large_slices(plain, 100_000)
        kernels = {how: program(training_weights, how).count("xla.gpu.triton") for how in ("cheap", "layers")}
    assert kernels["layers"] > kernels["cheap"] == plain.count("xla.gpu.triton")  # attention, once more
