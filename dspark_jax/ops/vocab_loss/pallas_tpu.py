"""`vocab_loss` with the work between the products as a Pallas kernel for TPUs: a few whole rows of logits lie on the
chip while the terms go over them, as often as they like, so that logits are read and slopes written once. The products
are XLA's. Compiled for TPUs, and run in interpret mode; never run on a TPU.

    grid (P, m / 8)   `xla.rowwise` of eight rows
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from dspark_jax import platform
from dspark_jax.ops import mosaic
from dspark_jax.ops.vocab_loss import xla
from dspark_jax.ops.vocab_loss.result import VocabLoss
from dspark_jax.ops.vocab_loss.term import VocabTerm
from dspark_jax.ops.vocab_loss.xla import Logits, RowResults, Settings, rowwise
from dspark_jax.sharding import parts_of, per_device

_ROWS = 8
"""Of a program: what a register holds of one lane."""

_VALUES = 5
"""Arrays [8, V] of float32 that the compiler keeps beside the blocks, at most, with the terms that we have."""


class _Case(NamedTuple):
    """What the kernel is specialised to."""

    settings: Settings
    dtype: Any
    capped: bool  # there are logits before the Markov bias
    memory: int


def vocab_loss(
    hidden: jax.Array | None,
    prev_embedding: jax.Array | None,
    teacher: jax.Array,
    head: jax.Array,
    markov_w2: jax.Array | None,
    labels: jax.Array,
    weights: jax.Array,
    *,
    terms: Mapping[str, tuple[VocabTerm, float]],
    block: int = 1,
    softcap: float = 0.0,
    chunk: int,
    candidates: int = 0,
) -> VocabLoss:
    """See `api.vocab_loss`. Over a mesh, devices split the sequences."""
    v = head.shape[0]
    capped = bool(softcap) and markov_w2 is not None
    mosaic.check(
        a_term_is_not_known_to_run_in_kernels=all(term.in_kernels for term, _ in terms.values()),
        a_term_depends_on_other_rows=not any(term.blockwise for term, _ in terms.values()),
        the_vocabulary_is_split_over_devices=parts_of("vocab") == 1,
        eight_rows_do_not_fit_on_the_chip=_memory(v, (teacher if hidden is None else hidden).dtype, capped=capped)
        <= platform.tpu_kernel_memory(),
    )
    arrays = hidden, prev_embedding, teacher, head, markov_w2, labels, weights
    settings: Any = {"terms": terms, "block": block, "softcap": softcap, "chunk": chunk, "candidates": candidates}
    return xla.vocab_loss(*arrays, **settings, by_row=_rowwise)


def _memory(v: int, dtype: Any, *, capped: bool) -> int:
    """Bytes on the chip: two blocks of every input and output, and values."""
    words = 2 * (2 + capped) + _VALUES
    return _ROWS * v * (4 * words + 2 * (1 + capped) * jnp.dtype(dtype).itemsize) + (1 << 20)


def _rowwise(logits: Logits, labels: jax.Array, weights: jax.Array, settings: Settings, dtype: Any) -> RowResults:
    """See `xla.Rowwise`."""
    wide = [logits.draft, logits.teacher, *([] if logits.capped is None else [logits.capped])]
    narrow = [x[..., None] for x in (logits.label, labels, weights)]
    capped = logits.capped is not None
    case = _Case(settings, dtype, capped, _memory(logits.draft.shape[-1], dtype, capped=capped))
    axes = ("batch", None, None)
    split = per_device(
        functools.partial(_rowwise_here, case=case),
        [axes] * (len(wide) + len(narrow)),
        [axes] * (2 + capped + len(settings.terms)),
    )
    *slopes, accept, values = _named(case, split(*wide, *narrow))
    return RowResults(values, accept, slopes[0], slopes[-1])


def _named(case: _Case, arrays: Any) -> list[Any]:
    """[slope, bent where it is another, accept, values by term] of the kernel's results."""
    count = 1 + case.capped
    accept, *values = (x[..., 0] for x in arrays[count:])
    return [*arrays[:count], accept, dict(zip((name for name, *_ in case.settings.terms), values, strict=True))]


def _rowwise_here(*arrays: jax.Array, case: _Case) -> tuple[jax.Array, ...]:
    """On one device: rows [P, m, V] and [P, m, 1]."""
    count, singles = 2 + case.capped, 1 + len(case.settings.terms)
    p, m, v = arrays[0].shape
    row = pl.BlockSpec((None, _ROWS, v), lambda i, j: (i, j, 0))
    one = pl.BlockSpec((None, _ROWS, 1), lambda i, j: (i, j, 0))
    slope, single = jax.ShapeDtypeStruct((p, m, v), case.dtype), jax.ShapeDtypeStruct((p, m, 1), jnp.float32)
    found = mosaic.call(
        functools.partial(_kernel, case=case),
        [],
        arrays,
        [row] * count + [one] * 3,
        [slope] * (count - 1) + [single] * singles,
        [row] * (count - 1) + [one] * singles,
        grid=(p, pl.cdiv(m, _ROWS)),
        parallel=2,
        exponentials=2 * p * m * v,
        memory=case.memory,
    )
    return tuple(found)


def _kernel(*refs: Any, case: _Case) -> None:
    """References: logits of the draft and of the teacher (and those before the bias) [8, V], the label's logit, label
    and weight [8, 1]; slopes [8, V] (and those before the cap), acceptance and values [8, 1]."""
    count = 2 + case.capped
    draft, teacher, *capped = (ref[...] for ref in refs[:count])
    label, labels, weights = (ref[...][:, 0] for ref in refs[count : count + 3])
    logits = Logits(draft, teacher, capped[0] if capped else None, label)
    found = rowwise(logits, labels, weights, case.settings, case.dtype)
    outs = [found.slope, found.bent] if case.capped else [found.bent]
    outs += [x[:, None] for x in (found.accept, *found.values.values())]
    for ref, value in zip(refs[count + 3 :], outs, strict=True):
        ref[...] = value
