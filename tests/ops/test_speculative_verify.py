"""The acceptance rule as an operation: every implementation against the rule in float64, row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import MeshConfig
from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.ops.sampling import Sampling, words
from dspark_jax.ops.speculative_verify import pallas_gpu, pallas_tpu, speculative_verify
from dspark_jax.sharding import make_mesh

B, G, V = 5, 3, 75
KERNELS = functools.partial(pallas_gpu.speculative_verify, size=16)
# Four tiles of two strips and one of a register; five lines of two parts, the last one of half a part.
TPU_KERNELS = functools.partial(pallas_tpu.speculative_verify, sizes=pallas_tpu.Sizes(tile=512, strip=2, part=256))
IMPLEMENTATIONS = {"xla": speculative_verify, "kernels for GPUs": KERNELS, "kernels for TPUs": TPU_KERNELS}
SIZES = {"xla": V, "kernels for GPUs": V, "kernels for TPUs": 2176}
CLOSE = 3e-6  # of a uniform to a border: either side is right


def problem(seed, temperature, ragged=False, v=V, candidates=False):
    """Arguments of the operation. Where requests have fewer than G + 1 rows, there are as many for nobody. With
    candidates, a draft can be one of half of the tokens only; the others have no logit."""
    rng = np.random.default_rng(seed)
    lengths = np.array([3, 1, 0, 2, 3]) if ragged else np.full(B, G)
    counts = lengths + 1
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    draft = rng.normal(size=(B, G, v)).astype(np.float32)
    target = np.full((B * (G + 1), v), 9.0, np.float32)
    tokens = np.zeros((B, G), np.int64)
    for b in range(B):
        for k in range(counts[b]):
            near = draft[b, min(k, G - 1)]
            # Like the drafter, so that some drafts are accepted.
            target[first[b] + k] = near + (0.7 if v == V else 0.3) * rng.normal(size=v)
    if candidates:
        draft = np.where(draft < np.median(draft, axis=-1, keepdims=True), -np.inf, draft)
    for b in range(B):
        for k in range(G):
            tokens[b, k] = draft[b, k].argmax() if temperature[b] == 0 else rng.choice(v, p=soft(draft[b, k], 1.0))
    uniforms = rng.random((B, G + 1)).astype(np.float32)
    arrays = (target, draft, first.astype(np.int32), tokens.astype(np.int32), lengths.astype(np.int32))
    return arrays, uniforms, Sampling(jnp.asarray(temperature, jnp.float32), greedy=not any(temperature))


def soft(logits, temperature):
    logits = np.asarray(logits, np.float64)
    if temperature == 0:
        return (np.arange(len(logits)) == logits.argmax()).astype(np.float64)
    weights = np.exp((logits - logits.max()) / temperature)
    return weights / weights.sum()


def run(implementation, arrays, uniforms, sampling, **options):
    accept, following = words(jnp.asarray(uniforms[:, :G])), words(jnp.asarray(uniforms[:, G]))
    operation = jax.jit(IMPLEMENTATIONS[implementation], compiler_options=options)
    return operation(*map(jnp.asarray, arrays), accept, following, sampling)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperature", [[0.0] * 5, [1.0, 0.0, 0.7, 1.0, 1.3]], ids=["greedy", "mixed"])
@pytest.mark.parametrize(("ragged", "candidates"), [(False, False), (True, False), (False, True)])
def test_equals_the_rule(implementation, temperature, ragged, candidates):
    counts = set()
    for seed in range(4):
        arrays, uniforms, sampling = problem(seed, temperature, ragged, SIZES[implementation], candidates)
        target, draft, first, tokens, lengths = arrays
        accepted, following = run(implementation, arrays, uniforms, sampling)
        for b, heat in enumerate(temperature):
            n = 0
            while n < lengths[b]:
                q, p = soft(target[first[b] + n], heat), soft(draft[b, n], heat)
                chance = min(1.0, q[tokens[b, n]] / max(p[tokens[b, n]], 1e-37))
                assert abs(uniforms[b, n] - chance) > CLOSE, "draw other numbers"
                if uniforms[b, n] >= chance:
                    break
                n += 1
            assert int(accepted[b]) == n
            counts.add(n)
            q = soft(target[first[b] + n], heat)
            weights = np.maximum(q - soft(draft[b, n], heat), 0) if n < lengths[b] else q
            ends = np.cumsum(weights) / weights.sum()
            token = int(following[b])
            assert weights[token] > 0
            assert ends[token] - weights[token] / weights.sum() - CLOSE <= uniforms[b, G] <= ends[token] + CLOSE
    assert len(counts) > 2  # some rejected at once, some later


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_plain_decoding_draws_from_the_target(implementation):
    rng, v = np.random.default_rng(1), SIZES[implementation]
    logits = jnp.asarray(rng.normal(size=(B, v)), jnp.float32)
    uniforms = words(jnp.asarray([0.0, 0.999999, 0.3, 0.5, 0.7], jnp.float32))
    none = jnp.zeros((B,), jnp.int32)
    empty = (jnp.zeros((B, 0, v)), jnp.arange(B, dtype=jnp.int32), jnp.zeros((B, 0), jnp.int32), none)
    arguments = (logits, *empty, jnp.zeros((B, 0, 2), jnp.int32), uniforms, Sampling.constant(1.0, B))
    accepted, tokens = jax.jit(IMPLEMENTATIONS[implementation])(*arguments)
    assert not accepted.any() and tokens[0] == 0 and tokens[1] == v - 1
    for b in range(2, B):
        assert int(tokens[b]) == int(np.argmax(np.cumsum(soft(logits[b], 1.0)) > [0, 0, 0.3, 0.5, 0.7][b]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_distributions_leave_no_residual(implementation):
    """p = q: every draft is accepted with probability 1, whatever the uniform."""
    v = SIZES[implementation]
    arrays, uniforms, sampling = problem(2, [1.0] * B, v=v)
    draft = arrays[1]
    target = np.concatenate([draft, draft[:, :1]], axis=1).reshape(-1, v)
    uniforms[:, :G] = np.float32(1 - 2**-24)
    accepted, following = run(implementation, (target, *arrays[1:]), uniforms, sampling)
    assert (np.asarray(accepted) == G).all()
    for b in range(B):
        assert int(following[b]) == int(np.argmax(np.cumsum(soft(draft[b, 0], 1.0)) > uniforms[b, G]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_rejection_that_leaves_nothing_draws_from_the_target(implementation):
    """The drafter's first row is the target's but for 4e-6 at its least token: no (q - p)+ that the rule divides by."""
    v = SIZES[implementation]
    (target, draft, first, tokens, lengths), uniforms, sampling = problem(2, [1.0] * B, v=v)
    draft[:, 0] = target.reshape(B, G + 1, v)[:, 0]
    tokens[:, 0] = draft[:, 0].argmin(axis=-1)
    draft[np.arange(B), 0, tokens[:, 0]] += np.float32(4e-6)
    uniforms[:, 0] = np.float32(1 - 2**-24)
    # As `tests.compiling` compiles for a CPU, equal logits have probabilities that differ in their last bit, so that
    # something is left.
    options = {"xla_cpu_use_fusion_emitters": True}
    accepted, following = run(implementation, (target, draft, first, tokens, lengths), uniforms, sampling, **options)
    assert not accepted.any()
    for b in range(B):
        ends = np.cumsum(soft(target[first[b]], 1.0))
        assert abs(ends - uniforms[b, G]).min() > CLOSE, "draw other numbers"
        assert int(following[b]) == int(np.argmax(ends > uniforms[b, G]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_of_equal_logits_the_first_is_taken(implementation):
    v = SIZES[implementation]
    logits = np.zeros((2, v), np.float32)
    logits[0, [5, 133, 517, 1029] if v > 1029 else [5, 21, 69]] = 1
    whole = functools.partial(jnp.zeros, dtype=jnp.int32)
    drafts = jnp.zeros((2, 0, v)), jnp.arange(2), whole((2, 0)), whole((2,))
    given = jnp.asarray(logits), *drafts, whole((2, 0, 2)), whole((2, 2)), Sampling.constant(0.0, 2)
    _, tokens = jax.jit(IMPLEMENTATIONS[implementation])(*given)
    assert tokens.tolist() == [5, 0]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_of_a_finished_request_are_those_of_the_next(implementation):
    """Its verdict means nothing; that of the others must be the same, whatever its temperature, drafts and length."""
    arrays, uniforms, sampling = problem(2, [1.0, 0.7, 1.3, 0.0, 0.9], ragged=True, v=SIZES[implementation])
    wanted = run(implementation, arrays, uniforms, sampling)
    target, draft, first, tokens, lengths = (np.insert(x, 3, x[3], axis=0) for x in arrays)
    target, lengths[3] = arrays[0], G
    uniforms, heat = (np.insert(np.asarray(x), 3, x[3], axis=0) for x in (uniforms, sampling.temperature))
    heat[3] = 0.2
    found = run(implementation, (target, draft, first, tokens, lengths), uniforms, Sampling(jnp.asarray(heat)))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.delete(ours, 3), theirs)


@pytest.mark.slow
def test_kernels_for_tpus_read_nothing_that_was_not_written(strict_tpu):
    """Interpreted as a TPU works: unset memory is NaN, reads beyond an array fail, races are found."""
    arrays, uniforms, sampling = problem(3, [1.0, 0.0, 0.7, 1.0, 1.3], ragged=True, v=1152)
    accept, following = words(jnp.asarray(uniforms[:, :G])), words(jnp.asarray(uniforms[:, G]))
    given = *map(jnp.asarray, arrays), accept, following, sampling
    kernels = functools.partial(pallas_tpu.speculative_verify, sizes=pallas_tpu.Sizes(640, 2, 256))
    for ours, theirs in zip(jax.jit(kernels)(*given), speculative_verify(*given), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not strict_tpu()


@pytest.mark.slow
def test_kernels_for_tpus_on_eight_devices_equal_one():
    """Requests are split; flat rows, requests that cannot be split and a split vocabulary are left to others."""
    arrays, uniforms, sampling = problem(3, [1.0, 0.0, 0.7, 1.0, 1.3], v=1152)
    target, draft, _, tokens, lengths = (jnp.asarray(np.concatenate([x, x])[: 8 * len(x) // 5]) for x in arrays)
    uniforms, heat = (np.concatenate([x, x])[:8] for x in (uniforms, np.asarray(sampling.temperature)))
    rest = tokens, lengths, words(jnp.asarray(uniforms[:, :G])), words(jnp.asarray(uniforms[:, G]))
    given = target, draft, None, *rest, Sampling(jnp.asarray(heat))
    wanted = speculative_verify(*given)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=4, tensor=1))):
        for ours, theirs in zip(jax.jit(TPU_KERNELS)(*given), wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        with pytest.raises(Unsupported, match="requests or flat rows are not split evenly"):
            TPU_KERNELS(*given[:2], jnp.arange(8) * (G + 1), *given[3:])
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))), pytest.raises(Unsupported, match="is split"):
        TPU_KERNELS(*given)


def test_kernels_for_tpus_refuse_other_vocabularies():
    arrays, uniforms, sampling = problem(2, [1.0] * B)
    given = *map(jnp.asarray, arrays), words(uniforms[:, :G]), words(uniforms[:, G]), sampling
    with pytest.raises(Unsupported, match="no multiple of 128"):
        speculative_verify(*given, implementation="pallas_tpu")


@pytest.mark.parametrize("kernels", [KERNELS, TPU_KERNELS], ids=["GPUs", "TPUs"])
def test_kernels_leave_filters_to_others(kernels):
    arrays, uniforms, sampling = problem(2, [1.0] * B)
    cut = Sampling(sampling.temperature, jnp.full((B,), 3))
    with pytest.raises(Unsupported, match="there are filters"):
        kernels(*map(jnp.asarray, arrays), words(uniforms[:, :G]), words(uniforms[:, G]), cut)


def test_shapes_are_checked():
    arrays, uniforms, sampling = problem(2, [1.0] * B)
    with pytest.raises(ValueError, match=r"following has shape \(5,\), it must be \(5, 2\)"):
        speculative_verify(*map(jnp.asarray, arrays), words(uniforms[:, :G]), uniforms[:, G], sampling)
