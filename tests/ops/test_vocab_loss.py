"""The vocabulary loss against a float64 definition with explicit Jacobians, and its guarantees."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.config import MeshConfig
from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.ops.vocab_loss import vocab_loss
from dspark_jax.sharding import make_mesh, sharding
from dspark_jax.training.losses import vocab_terms

IMPLEMENTATIONS = ("xla", "reference", "pallas_tpu", "pallas_gpu")
CHUNKED = ("xla", "pallas_tpu", "pallas_gpu")
TERMS = vocab_terms({"ce": 0.1, "l1": 0.9})


def problem(b=2, t=5, v=37, d=8, r=3, dtype=np.float32, seed=0):
    """Arguments of `vocab_loss` by name; the second row has weight 0, labels hit both ends of the vocabulary."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return np.array(jnp.asarray(rng.standard_normal(shape), dtype))

    labels = rng.integers(0, v, (b, t)).astype(np.int32)
    labels.flat[0], labels.flat[-1] = 0, v - 1
    weights = rng.uniform(0.1, 1, (b, t)).astype(np.float32)
    weights.reshape(-1)[1:2] = 0.0
    return {
        "hidden": normal(b, t, d),
        "prev_embedding": normal(b, t, r) if r else None,
        "teacher": normal(b, t, d),
        "head": normal(v, d),
        "markov_w2": normal(v, r) if r else None,
        "labels": labels,
        "weights": weights,
    }


def softmax(logits):
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def definition(args, ce, l1):
    """Loss, metrics [B, T] and gradients (hidden, prev_embedding, markov_w2), row by row in float64; NaN: undefined."""
    x = {name: None if value is None else np.asarray(value, np.float64) for name, value in args.items()}
    metrics = np.zeros((3, *args["labels"].shape))
    grads = {name: np.zeros_like(x[name]) for name in ("hidden", "prev_embedding", "markov_w2") if x[name] is not None}
    loss = 0.0
    for row in np.ndindex(args["labels"].shape):
        logits = x["head"] @ x["hidden"][row]
        if "markov_w2" in grads:
            logits = logits + x["markov_w2"] @ x["prev_embedding"][row]
        p, q, label = softmax(logits), softmax(x["head"] @ x["teacher"][row]), args["labels"][row]
        distance = np.abs(p - q).sum()
        surprise = np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
        metrics[(slice(None), *row)] = surprise, distance, 1 - distance / 2
        if not x["weights"][row]:
            metrics[(slice(None), *row)] = np.nan
        loss += x["weights"][row] * (ce * surprise + l1 * distance)
        jacobian = np.diag(p) - np.outer(p, p)
        slope = x["weights"][row] * (ce * (p - np.eye(p.size)[label]) + l1 * jacobian @ np.sign(p - q))
        grads["hidden"][row] = slope @ x["head"]
        if "markov_w2" in grads:
            grads["prev_embedding"][row] = slope @ x["markov_w2"]
            grads["markov_w2"] += np.outer(slope, x["prev_embedding"][row])
    return loss, metrics, grads


def run(args, ce=0.1, l1=0.9, chunk=3, implementation=None, factor=1.0):
    """`VocabLoss` and gradients of factor * loss by name."""
    names = [name for name in ("hidden", "prev_embedding", "markov_w2") if args[name] is not None]
    terms = vocab_terms({"ce": ce, "l1": l1})

    @jax.jit
    def both(args):
        def loss(wanted):
            out = vocab_loss(**{**args, **wanted}, terms=terms, chunk=chunk, implementation=implementation)
            return factor * out.loss, out

        return jax.grad(loss, has_aux=True)({name: args[name] for name in names})

    grads, out = both(args)
    return out, grads


def assert_agrees(out, grads, want, tolerance, grad_tolerance):
    loss, metrics, want_grads = want
    np.testing.assert_allclose(out.loss, loss, rtol=tolerance, atol=tolerance)
    found = np.stack([out.values["ce"], out.values["l1"], out.accept])
    np.testing.assert_allclose(np.where(np.isnan(metrics), np.nan, found), metrics, rtol=tolerance, atol=tolerance)
    assert set(grads) == set(want_grads)
    for name, want_grad in want_grads.items():
        atol = grad_tolerance * np.abs(want_grad).max()
        np.testing.assert_allclose(np.asarray(grads[name], np.float64), want_grad, atol=atol, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "chunk"),
    [({}, 3), ({"r": 0}, 4), ({"t": 7, "v": 131, "d": 5}, 100), ({"b": 1, "t": 1, "v": 2, "d": 1, "r": 1}, 1)],
    ids=["padded chunks", "no Markov head", "one chunk", "smallest"],
)
def test_value_and_gradient_equal_the_definition(implementation, shape, chunk):
    args = problem(**shape)
    out, grads = run(args, chunk=chunk, implementation=implementation)
    assert_agrees(out, grads, definition(args, 0.1, 0.9), 5e-6, 5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_differs_by_its_own_rounding_only(implementation):
    args = problem(dtype=jnp.bfloat16, v=53)
    out, grads = run(args, implementation=implementation)
    assert grads["hidden"].dtype == jnp.bfloat16
    # Products of bfloat16 are exact in float32, so values are float32-accurate; slopes are rounded to bfloat16.
    assert_agrees(out, grads, definition(args, 0.1, 0.9), 1e-5, 2**-7)


def test_float32_master_weights_with_bfloat16_rows_get_float32_gradients():
    args = problem(dtype=jnp.bfloat16)
    wide = {name: args[name].astype(np.float32) for name in ("prev_embedding", "markov_w2", "head")}
    out, grads = run({**args, **wide})
    assert grads["markov_w2"].dtype == jnp.float32 and grads["prev_embedding"].dtype == jnp.float32
    assert_agrees(out, grads, definition(args, 0.1, 0.9), 1e-5, 2**-7)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_large_logits_do_not_overflow(implementation):
    args = problem()
    args["hidden"], args["teacher"] = 300 * args["hidden"], 300 * args["teacher"]
    out, grads = run(args, implementation=implementation)
    assert_agrees(out, grads, definition(args, 0.1, 0.9), 1e-3, 1e-3)  # logits of 1e3 have 1e-4 of rounding
    assert all(np.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("implementation", CHUNKED)
def test_rows_of_weight_zero_add_nothing_even_as_nan(implementation):
    args = problem(t=6)
    args["weights"][0, 3:] = 0.0
    want_out, want = run(args, implementation=implementation)
    unsupervised = args["weights"] == 0
    for name in ("hidden", "prev_embedding", "teacher"):
        args[name][unsupervised] = np.nan
    out, grads = run(args, implementation=implementation)
    np.testing.assert_array_equal(out.loss, want_out.loss)
    np.testing.assert_array_equal(out.values["ce"][~unsupervised], want_out.values["ce"][~unsupervised])
    for name in want:
        np.testing.assert_array_equal(grads[name], want[name], err_msg=name)
    assert not np.asarray(grads["hidden"])[unsupervised].any()


@pytest.mark.parametrize(("ce", "l1"), [(0.0, 0.9), (0.1, 0.0), (0.0, 0.0)])
def test_a_coefficient_of_zero_removes_the_term_but_not_its_metric(ce, l1):
    args = problem()
    out, grads = run(args, ce=ce, l1=l1)
    assert_agrees(out, grads, definition(args, ce, l1), 5e-6, 5e-6)


def test_equal_distributions_pull_nowhere():
    args = problem(r=0)
    args["hidden"], args["teacher"] = np.zeros_like(args["hidden"]), np.zeros_like(args["teacher"])
    out, grads = run(args, ce=0.0, l1=1.0)
    assert out.loss == 0.0 and (out.accept == 1.0).all()
    assert not np.asarray(grads["hidden"]).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_favourites_are_the_largest_logits(implementation):
    """Of the draft in their order, and the target's; in chunks that the rows do not fill."""
    args = problem(r=None)
    out = vocab_loss(**args, terms=TERMS, chunk=3, candidates=4, implementation=implementation)
    draft, teacher = (args[name].astype(np.float64) @ args["head"].T for name in ("hidden", "teacher"))
    np.testing.assert_array_equal(out.favourites.draft, np.argsort(-draft, axis=-1)[..., :4])
    np.testing.assert_array_equal(out.favourites.target, np.argmax(teacher, axis=-1))
    assert vocab_loss(**args, terms=TERMS, chunk=3, implementation=implementation).favourites is None
    with pytest.raises(ValueError, match="38 candidates of a vocabulary of 37"):
        vocab_loss(**args, terms=TERMS, chunk=3, candidates=38)


def test_gradients_scale_with_the_cotangent():
    args = problem()
    _, grads = run(args)
    _, scaled = run(args, factor=-0.25)
    for name, grad in grads.items():
        np.testing.assert_allclose(scaled[name], -0.25 * grad, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_head_teacher_weights_and_metrics_are_constants(implementation):
    args = problem()
    options = {"terms": TERMS, "chunk": 4, "implementation": implementation}

    def loss(frozen):
        return vocab_loss(**{**args, **frozen}, **options).loss

    def metrics(hidden):
        out = vocab_loss(**{**args, "hidden": hidden}, **options)
        return jnp.sum(out.values["ce"] + out.values["l1"] + out.accept)

    grads = jax.grad(loss)({name: args[name] for name in ("head", "teacher", "weights")})
    assert all(not np.asarray(grad).any() for grad in grads.values())
    assert not np.asarray(jax.grad(metrics)(args["hidden"])).any()


def test_value_alone_equals_value_with_gradient():
    args = problem()
    want, _ = run(args)
    alone = jax.jit(lambda args: vocab_loss(**args, terms=TERMS, chunk=3))(args)
    for got, expected in zip(jax.tree.leaves(alone), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_memory_does_not_grow_with_rows_times_vocabulary():
    v = 2048

    def temporary(t, implementation):
        args = problem(b=2, t=t, v=v, d=4, r=2)

        def loss(wanted):
            return vocab_loss(**{**args, **wanted}, terms=TERMS, chunk=16, implementation=implementation).loss

        wanted = {name: args.pop(name) for name in ("hidden", "prev_embedding", "markov_w2")}
        return jax.jit(jax.grad(loss)).lower(wanted).compile().memory_analysis().temp_size_in_bytes

    logits = 2 * (256 - 64) * v * 4  # bytes of the additional rows' logits
    assert temporary(256, "xla") - temporary(64, "xla") < logits / 50
    assert temporary(256, "reference") - temporary(64, "reference") > logits


@pytest.mark.parametrize(
    ("v", "b", "implementation", "tensor"),
    [
        (64, 4, "xla", 2),
        (37, 4, "xla", 2),
        pytest.param(37, 8, "pallas_tpu", 1, marks=pytest.mark.slow),
        pytest.param(37, 3, "pallas_tpu", 1, marks=pytest.mark.slow),
        pytest.param(37, 8, "pallas_gpu", 1, marks=pytest.mark.slow),
    ],
    ids=[
        "split vocabulary",
        "a vocabulary that the mesh does not divide",
        "kernel",
        "kernel, sequences not divided",
        "GPU's kernel",
    ],
)
def test_eight_devices_equal_one(v, b, implementation, tensor):
    args = problem(b=b, t=5, v=v)
    want, want_grads = run(args, chunk=2)
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, tensor=tensor))
    axes = {"head": ("vocab", "embed"), "markov_w2": ("vocab", "rank")}
    with jax.set_mesh(mesh):
        placed = {}
        for name, value in args.items():
            names = axes.get(name) or ("batch", *[None] * (value.ndim - 1))
            placed[name] = jax.device_put(value, sharding(names, value.shape, mesh))
        out, grads = run(placed, chunk=2, implementation=implementation)
    for got, expected in zip(jax.tree.leaves(out), jax.tree.leaves(want), strict=True):
        supervised = args["weights"] > 0 if expected.ndim else ...
        np.testing.assert_allclose(got[supervised], expected[supervised], rtol=2e-6, atol=2e-6)
    for name, grad in want_grads.items():
        np.testing.assert_allclose(grads[name], grad, atol=2e-6 * np.abs(grad).max(), err_msg=name)


@pytest.mark.slow
def test_the_kernel_reads_nothing_that_was_not_written(strict_tpu):
    """Interpreted as a TPU works: unset memory is NaN, reads beyond an array fail, races are found."""
    args = problem(b=1, t=11, v=131)  # the second program has three rows
    out, grads = run(args, chunk=100, implementation="pallas_tpu")
    assert_agrees(out, grads, definition(args, 0.1, 0.9), 5e-6, 5e-6)
    assert not strict_tpu()


def test_the_kernel_leaves_other_terms_and_split_vocabularies_to_xla():
    args, length = problem(t=6), vocab_terms({"length": 1.0})
    with pytest.raises(Unsupported, match="a term is not known to run in kernels"):
        vocab_loss(**args, terms=length, block=3, chunk=6, implementation="pallas_tpu")
    for kernels in ("pallas_tpu", "pallas_gpu"):
        with (
            jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))),
            pytest.raises(Unsupported, match="is split"),
        ):
            run(args, implementation=kernels)
    big = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    big |= {
        "head": jax.ShapeDtypeStruct((1 << 19, 8), jnp.float32),
        "markov_w2": jax.ShapeDtypeStruct((1 << 19, 3), jnp.float32),
    }
    rows = {name: jax.ShapeDtypeStruct((1, 1 << 13, *args[name].shape[2:]), args[name].dtype) for name in args}
    with pytest.raises(Unsupported, match="a chunk has over 2 to 31 logits"):
        whole = big | {name: rows[name] for name in rows if name not in ("head", "markov_w2")}
        jax.eval_shape(lambda args: vocab_loss(**args, terms=TERMS, chunk=5000, implementation="pallas_gpu"), whole)
    with pytest.raises(Unsupported, match="eight rows do not fit on the chip"):
        jax.eval_shape(lambda args: vocab_loss(**args, terms=TERMS, chunk=6, implementation="pallas_tpu"), big)


def test_chunks_exchange_rows_only():
    """Per chunk the devices reduce softmax statistics and row gradients; W2's gradient is reduced once, at the end."""
    args, v = problem(b=8, t=6, v=62), 62
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes = {"head": ("vocab", "embed"), "markov_w2": ("vocab", "rank")}
    for name, value in args.items():
        names = axes.get(name) or ("batch", *[None] * (value.ndim - 1))
        args[name] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding(names, value.shape, mesh))

    def loss(wanted, args):
        return vocab_loss(**args, **wanted, terms=TERMS, chunk=4).loss

    wanted = {name: args.pop(name) for name in ("hidden", "prev_embedding", "markov_w2")}
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(wanted, args).compile().as_text()
    loops, entry = text.split("ENTRY ")
    exchanged = [line for line in loops.splitlines() if re.search(r" all-(reduce|gather|to-all)\(", line)]
    gathered = [line for line in entry.splitlines() if " all-gather(" in line]
    assert exchanged and " while(" in entry
    assert all(f"[{v // 2},8]" in line for line in gathered), gathered  # the head's model axis, once; never rows
    for line in exchanged:
        shapes = re.findall(r"\[([\d,]+)\]", line.split("all-reduce(")[0])
        assert "all-reduce(" in line and not any(str(v // 2) in shape.split(",") for shape in shapes), line


def markov_states(io, weights):
    """What the golden drafter's head multiplies with W2, [B, A, G, R]: vanilla, gated or recurrent, or None."""
    if "markov_head.markov_w1.weight" not in weights:
        return None
    embedded, hidden = weights["markov_head.markov_w1.weight"][io["prev_token_ids"]], io["output_hidden"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def linear(name, *inputs):
        weight, bias = weights[f"markov_head.{name}.weight"], weights[f"markov_head.{name}.bias"]
        return np.concatenate(inputs, axis=-1) @ weight.T + bias

    if "markov_head.gate_proj.weight" in weights:
        return sigmoid(linear("gate_proj", hidden, embedded)) * embedded
    if "markov_head.joint_proj.weight" not in weights:
        return embedded
    state, outputs = np.zeros_like(embedded[:, :, 0]), []
    for k in range(embedded.shape[2]):
        joint = linear("joint_proj", state, embedded[:, :, k], hidden[:, :, k])
        gate, candidate, output = np.split(joint, 3, axis=-1)
        outputs.append(np.tanh(output))
        state = sigmoid(gate) * state + (1 - sigmoid(gate)) * np.tanh(candidate)
    return np.stack(outputs, axis=2)


def test_golden_rows(golden_block_case):
    io = load_file(golden_block_case.folder / "io.safetensors")
    weights = load_file(golden_block_case.folder / "draft" / "model.safetensors")
    target = json.loads((golden_block_case.target / "config.json").read_text())
    cap = target.get("text_config", target).get("final_logit_softcapping") or 0.0
    b, a, g, _ = io["output_hidden"].shape

    def flat(x):
        return None if x is None else x.reshape(b, a * g, *x.shape[3:])

    rows = np.minimum(io["label_indices"], io["input_ids"].shape[1] - 1) - 1
    rows = np.where(io["block_keep_mask"][..., None] > 0, rows, 0)
    teacher = io["target_last_hidden_states"][np.arange(b)[:, None, None], rows]
    out = vocab_loss(
        flat(io["output_hidden"]),
        flat(markov_states(io, weights)),
        flat(teacher),
        weights["lm_head.weight"],
        weights.get("markov_head.markov_w2.weight"),
        flat(io["target_ids"]).astype(np.int32),
        flat(io["loss_weight_mask"]),
        terms=TERMS,
        chunk=32,
        softcap=cap,
    )
    mask, found = flat(io["eval_mask"]) > 0, {**out.values, "accept": out.accept}
    for name, key in {"ce": "ce_per_token", "l1": "l1_per_token", "accept": "accept_rate"}.items():
        np.testing.assert_allclose(found[name][mask], flat(io[key])[mask], atol=2e-5, err_msg=name)


def test_refuses_what_does_not_fit():
    args = problem()
    options = {"terms": TERMS, "chunk": 4}
    with pytest.raises(ValueError, match="teacher is"):
        vocab_loss(**{**args, "teacher": args["teacher"][:, :2]}, **options)
    with pytest.raises(ValueError, match="go together"):
        vocab_loss(**{**args, "markov_w2": None}, **options)
    with pytest.raises(ValueError, match="chunk 0 must be positive"):
        vocab_loss(**args, **{**options, "chunk": 0})
    with pytest.raises(ValueError, match="'fast' is not one of"):
        vocab_loss(**args, **options, implementation="fast")
    with pytest.raises(ValueError, match="without hidden, prev_embedding gives the logits"):
        vocab_loss(**{**args, "hidden": None}, softcap=1.0, **options)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_head_of_the_drafters_own(implementation):
    """Without hidden states for the target's head: as if that gave nothing, in values and in gradients."""
    args = problem()

    def loss(prev, w2, hidden):
        given = {**args, "hidden": hidden, "prev_embedding": prev, "markov_w2": w2}
        return vocab_loss(**given, terms=TERMS, chunk=4, implementation=implementation).loss

    inputs = args["prev_embedding"], args["markov_w2"]
    found, want = (jax.value_and_grad(loss, argnums=(0, 1))(*inputs, hidden) for hidden in (None, 0 * args["hidden"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, want)
    assert float(jnp.abs(found[1][1]).max()) > 0
