"""Terms of the loss in float64: against automatic differentiation, or loops whose gradients are differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.ops.dispatch import Unsupported
from dspark_jax.ops.vocab_loss import VocabTerm, vocab_loss
from dspark_jax.ops.vocab_loss.api import OPERATION
from dspark_jax.training.losses import vocab_terms

B, T, G, V, D, R = 2, 12, 4, 23, 6, 3
MASK = np.array([[1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 1]], bool)


def problem(seed=0):
    """Arguments by name: blocks of four rows, whole, cut and empty."""
    rng = np.random.default_rng(seed)
    args = {"hidden": (B, T, D), "prev_embedding": (B, T, R), "teacher": (B, T, D), "head": (V, D), "markov_w2": (V, R)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in args.items()}
    arrays["labels"] = rng.integers(0, V, (B, T)).astype(np.int32)
    return arrays | {"weights": (rng.uniform(0.1, 1, (B, T)) * MASK).astype(np.float32)}


def definition(args, soft_ce, length):
    """Loss and gradients of the plain formulas, differentiated automatically, in float64; block by block."""

    def loss(wanted):
        x = {**fixed, **wanted}
        logits = x["hidden"] @ x["head"].T + x["prev_embedding"] @ x["markov_w2"].T
        q = jax.nn.softmax(x["teacher"] @ x["head"].T)
        log_p = jax.nn.log_softmax(logits)
        total = soft_ce * jnp.sum(x["weights"] * -jnp.sum(q * log_p, axis=-1))
        distance = jnp.sum(jnp.abs(jnp.exp(log_p) - q), axis=-1)
        for b in range(B):
            for start in range(0, T, G):
                survival = 1.0
                for row in range(start, start + G):
                    if MASK[b, row]:
                        survival = survival * (1 - 0.5 * distance[b, row])
                        total = total + length * (1 - survival)
                    else:
                        survival = 0.0
        return total

    with jax.enable_x64(True):
        wide = {n: jnp.asarray(v, jnp.float64 if v.dtype == np.float32 else None) for n, v in args.items()}
        names = ("hidden", "prev_embedding", "markov_w2")
        fixed = {name: value for name, value in wide.items() if name not in names}
        value, grads = jax.value_and_grad(loss)({name: wide[name] for name in names})
        return float(value), {name: np.asarray(grad) for name, grad in grads.items()}


def run(args, implementation, chunk, **terms):
    names = ("hidden", "prev_embedding", "markov_w2")

    def loss(wanted):
        out = vocab_loss(
            **{**args, **wanted}, terms=vocab_terms(terms), block=G, chunk=chunk, implementation=implementation
        )
        return out.loss, out

    (value, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))({name: args[name] for name in names})
    return value, out, grads


@pytest.mark.parametrize(
    ("implementation", "terms"),
    [
        *((name, terms) for terms in ((1.0, 0.0), (0.0, 1.0), (0.3, 0.7)) for name in ("xla", "reference")),
        ("pallas_tpu", (1.0, 0.0)),
        ("pallas_gpu", (0.3, 0.7)),
    ],
)
def test_equals_the_float64_definition(implementation, terms):
    args, (soft_ce, length) = problem(), terms
    value, out, grads = run(args, implementation, 5, soft_ce=soft_ce, length=length)
    want, want_grads = definition(args, soft_ce, length)
    np.testing.assert_allclose(value, want, rtol=3e-6)
    assert ("soft_ce" in out.values) == (soft_ce != 0)
    for name, grad in want_grads.items():
        np.testing.assert_allclose(grads[name], grad, atol=5e-6 * np.abs(grad).max(), err_msg=name)


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_blocks_stay_whole_in_every_chunk(chunk):
    args = problem()
    value, _, grads = run(args, "xla", chunk, soft_ce=0.0, length=1.0)
    want, _, want_grads = run(args, "xla", T * B, soft_ce=0.0, length=1.0)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    for name, grad in want_grads.items():
        np.testing.assert_allclose(grads[name], grad, atol=2e-6 * np.abs(grad).max(), err_msg=name)


def test_unsupervised_rows_may_be_nan():
    args = problem()
    want, _, want_grads = run(args, "xla", 5, soft_ce=0.5, length=1.0)
    for name in ("hidden", "prev_embedding", "teacher"):
        args[name][~MASK] = np.nan
    value, _, grads = run(args, "xla", 5, soft_ce=0.5, length=1.0)
    np.testing.assert_array_equal(value, want)
    for name, grad in want_grads.items():
        np.testing.assert_array_equal(grads[name], grad, err_msg=name)


def test_impossible_drafts_leave_the_gradient_finite():
    """Acceptances of exactly 0 and 1, where a product divided by its factor would be 0 / 0."""
    args = problem()
    args["prev_embedding"] *= 0
    args["hidden"] = args["teacher"].copy()
    args["hidden"][:, 1::4] *= -300
    value, _, grads = run(args, "xla", 5, soft_ce=0.0, length=1.0)
    assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads.values())


def test_refuses_rows_that_are_no_blocks():
    with pytest.raises(ValueError, match="12 rows are no multiple of block 5"):
        vocab_loss(**problem(), terms=vocab_terms({"length": 1.0}), block=5, chunk=4)


def test_chunks_without_supervision_are_left_out():
    """A conditional in the compiled program, and the same numbers as with one chunk of everything."""
    args = problem()
    args["weights"][:, :8] = 0.0  # whole chunks of two

    def loss(hidden, chunk):
        return vocab_loss(**{**args, "hidden": hidden}, terms=vocab_terms({"ce": 0.5, "l1": 0.5}), chunk=chunk).loss

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    assert "conditional" in step.lower(args["hidden"], 2).compile().as_text()
    (value, grad), (want, want_grad) = step(args["hidden"], 2), step(args["hidden"], 100)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad, atol=1e-6)


def probabilities(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def kl(p, q):
    return np.sum(q * np.log(q / p))


def lk_hybrid(p, q, before):
    share, apart = np.exp(-3 * np.minimum(before, q).sum()), 1 - np.minimum(p, q).sum()
    return share * kl(p, q) + (1 - share) * apart


ROWWISE = {
    "kl": lambda p, q, before: kl(p, q),
    "reverse_kl": lambda p, q, before: kl(q, p),
    "jsd": lambda p, q, before: 0.5 * kl((p + q) / 2, q) + 0.5 * kl((p + q) / 2, p),
    "nla": lambda p, q, before: -np.log(np.minimum(p, q).sum()),
    "lk_hybrid": lk_hybrid,
    "greedy_ce": lambda p, q, before: -np.log(p[np.argmax(q)]),
}
"""(draft's, target's distribution, the draft's again as a constant) -> value of a row."""


def pace(chosen, mask):
    """D-PACE's weights of one block, from the probabilities of its labels and what is supervised of it."""
    weights = np.zeros(G)
    for j in range(G):
        for k in range(j, G):
            if mask[j] and mask[k]:
                weights[j] += np.prod([0.5 * chosen[i] + 0.5 for i in range(k + 1) if mask[i]])
    return weights


def loops(args, name):
    """Values [B, T] and the gradient [B, T, D] of a term's sum in the hidden states: row by row, by differences."""
    x = {key: np.asarray(value, np.float64) for key, value in args.items()}
    logits = x["hidden"] @ x["head"].T + x["prev_embedding"] @ x["markov_w2"].T
    teacher, labels = x["teacher"] @ x["head"].T, args["labels"]
    values, grad, weights = np.zeros((B, T)), np.zeros((B, T, D)), x["weights"]
    for b, t in zip(*np.nonzero(MASK), strict=True):
        before, q = probabilities(logits[b, t]), probabilities(teacher[b, t])
        if name == "dpace":
            block = slice(t - t % G, t - t % G + G)
            chosen = [probabilities(row)[label] for row, label in zip(logits[b, block], labels[b, block], strict=True)]
            weight, scale = pace(chosen, MASK[b, block])[t % G], 1.0

            def value(row, weight=weight, label=labels[b, t]):
                return -weight * np.log(probabilities(row)[label])
        else:
            scale = weights[b, t]

            def value(row, q=q, before=before):
                return ROWWISE[name](probabilities(row), q, before)

        values[b, t] = value(logits[b, t])
        steps = 1e-6 * np.eye(V)
        slope = [(value(logits[b, t] + step) - value(logits[b, t] - step)) / 2e-6 for step in steps]
        grad[b, t] = scale * np.asarray(slope) @ x["head"]
    return values, grad


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, "xla") for name in (*ROWWISE, "dpace")]
    + [(name, "pallas_gpu") for name in (*ROWWISE, "dpace") if name != "greedy_ce"]
    + [("dpace", "reference"), ("kl", "pallas_tpu")],
)
def test_losses_of_the_field_equal_loops(name, implementation):
    args = problem(4)
    want, want_grad = loops(args, name)
    value, out, grads = run(args, implementation, 5, **{name: 0.7})
    np.testing.assert_allclose(np.asarray(out.values[name])[MASK], want[MASK], rtol=2e-5, atol=1e-6)
    each = np.where(MASK, 1.0 if name == "dpace" else args["weights"], 0)
    np.testing.assert_allclose(value, 0.7 * np.sum(each * want), rtol=5e-6)
    np.testing.assert_allclose(grads["hidden"], 0.7 * want_grad, atol=1e-5 * np.abs(want_grad).max())


@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu"])
def test_losses_of_the_field_are_finite_where_nothing_is_accepted(implementation):
    """And where single probabilities are too small for float32, as those of a vocabulary's padding are."""
    args = problem(5)
    args["hidden"], args["teacher"] = -30 * args["hidden"], 30 * args["hidden"]
    args["hidden"][0, 0] = args["teacher"][0, 0]
    args |= {key: np.where(MASK[..., None], args[key], np.nan) for key in ("hidden", "teacher")}
    names = [name for name in (*ROWWISE, "dpace") if implementation == "xla" or name != "greedy_ce"]
    value, out, grads = run(args, implementation, 5, **dict.fromkeys(names, 1.0))
    assert np.isfinite(value) and all(np.isfinite(grad).all() for grad in grads.values())
    assert all(np.isfinite(np.asarray(values)[MASK]).all() for values in out.values.values())


class Largest(VocabTerm):
    """The draft's largest probability: a maximum of what needs a sum, differentiated automatically."""

    def value(self, rows):
        """See `VocabTerm.value`."""
        return jnp.max(rows.draft, axis=-1) * rows.draft_scale[..., 0] * jnp.sum(rows.teacher * rows.is_label, axis=-1)


class Spread(VocabTerm):
    """Something that is not 0 where a probability is: a tile that sticks out of the vocabulary must not count."""

    def value(self, rows):
        """See `VocabTerm.value`."""
        return jnp.sum(jnp.exp(-rows.draft * rows.draft_scale), axis=-1)


class Everything(VocabTerm):
    """Every step that a pass over the vocabulary may take."""

    def value(self, rows):
        """See `VocabTerm.value`."""
        p, q, one = rows.draft * rows.draft_scale, jnp.copy(rows.teacher * rows.teacher_scale), jax.lax
        some = [jnp.exp(-p), one.exp2(p), one.expm1(p), one.log(1 + p), one.log1p(q - p / 2)]
        some += [one.sqrt(1 + p), one.rsqrt(1 + p), one.square(p), p**3, one.pow(1 + p, 1 + q), one.tanh(p)]
        some += [one.logistic(-p), jnp.abs(p - q), jnp.maximum(p, q), jnp.minimum(p, 0.1), one.sign(q - p) * p]
        some += [p.astype(jnp.bfloat16).astype(jnp.float32) * q]
        chosen = ((p > 0.05) & ~(q >= 0.2)) | (p < q) | ((p <= 0.01) & (p != q)) | (p == 0.5)
        return jnp.sum(jnp.where(chosen, sum(some), q), axis=-1)


class Sorted(VocabTerm):
    """Something that needs a whole row at once."""

    def value(self, rows):
        """See `VocabTerm.value`."""
        return jnp.sort(rows.draft, axis=-1)[..., 0]


class Priced(VocabTerm):
    """Something with an array of its own over the vocabulary, which no kernel is given."""

    def value(self, rows):
        """See `VocabTerm.value`."""
        return jnp.sum(rows.draft * rows.draft_scale * np.linspace(1.0, 2.0, V, dtype=np.float32), axis=-1)


class Counted(VocabTerm):
    """Something that adds up whole numbers: tokens that are likelier than the target says."""

    def value(self, rows):
        """See `VocabTerm.value`."""
        above = rows.draft * rows.draft_scale > rows.teacher * rows.teacher_scale
        return rows.distance * jnp.sum(above, axis=-1).astype(jnp.float32)


@pytest.mark.parametrize(
    ("term", "reason"), [(Priced(), "has an array of its own over the vocabulary"), (Counted(), "sums int32")]
)
def test_what_kernels_are_not_given_is_left_to_xla(term, reason, monkeypatch):
    args, settings = problem(6), {"terms": {"own": (term, 0.5)}, "chunk": 5}

    def gradient(hidden):
        return jax.grad(lambda hidden: vocab_loss(**{**args, "hidden": hidden}, **settings).loss)(hidden)

    want = gradient(jnp.asarray(args["hidden"]))
    with pytest.raises(Unsupported, match=f"a term of the loss {reason}"):
        vocab_loss(**args, **settings, implementation="pallas_gpu")
    monkeypatch.setattr(OPERATION, "order", {"cpu": ["pallas_gpu", "xla"]})
    np.testing.assert_array_equal(gradient(jnp.asarray(args["hidden"])), want)


def test_a_term_of_ones_own_is_split_into_passes_or_left_to_xla():
    args = problem(6)

    def both(term, implementation):
        settings = {"terms": {"own": (term, 0.5)}, "chunk": 5, "implementation": implementation}

        def loss(hidden):
            out = vocab_loss(**{**args, "hidden": hidden}, **settings)
            return out.loss, out.values["own"]

        return jax.value_and_grad(loss, has_aux=True)(jnp.asarray(args["hidden"]))

    for term in (Largest(), Spread(), Everything()):
        (value, values), grad = both(term, "pallas_gpu")
        (want, want_values), want_grad = both(term, "xla")
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_allclose(np.asarray(values)[MASK], np.asarray(want_values)[MASK], rtol=1e-6)
        np.testing.assert_allclose(grad, want_grad, atol=2e-6 * np.abs(want_grad).max())
        assert np.abs(want_grad).max() > 1e-3
    for term in (Sorted(), vocab_terms({"greedy_ce": 1.0})["greedy_ce"][0]):
        with pytest.raises(Unsupported, match="a term of the loss takes (sort|argmax) of whole rows"):
            jax.eval_shape(
                lambda term=term: vocab_loss(**args, terms={"own": (term, 1.0)}, chunk=5, implementation="pallas_gpu")
            )
