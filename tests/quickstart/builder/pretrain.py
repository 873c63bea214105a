"""Pre-training of the embedded model: optimizer, jitted step, wall-clock schedule, checkpoints of its own."""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax.contrib import MuonDimensionNumbers, muon
from tqdm import tqdm

from dspark_jax.config import TargetArchitecture
from dspark_jax.ops.product import bfloat16_product, transposed
from dspark_jax.target.model import Target
from tests.quickstart.builder.fast_forward import last_hidden
from tests.quickstart.builder.packing import Rows
from tests.quickstart.builder.tokenizer import VOCAB_SIZE

ARCHITECTURE = TargetArchitecture(
    model_type="qwen3", vocab_size=VOCAB_SIZE, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, intermediate_size=768, rms_norm_eps=1e-6, rope_theta=1e6,
    tie_word_embeddings=True, max_position_embeddings=2048,
)  # fmt: skip
Z_LOSS = 1e-4  # keeps the logits of the unused vocabulary rows and the partition function in bounds


@dataclass(frozen=True)
class Budget:
    """How long to train: by wall clock or by steps, whichever is given. `peak` is the learning rate."""

    minutes: float | None = None
    steps: int | None = None
    peak: float = 4e-3
    warmup: float = 0.02
    flat_until: float = 0.25
    floor: float = 0.01

    def done(self, step: int, seconds: float) -> float:
        """The fraction of the budget that is used; 1 or more means finished."""
        return step / self.steps if self.steps else seconds / (60 * (self.minutes or 1.0))

    def rate(self, done: float) -> float:
        """Warmup, flat, linear decay, as a function of the used fraction: a slow machine still finishes its decay."""
        if done < self.warmup:
            return self.peak * max(done / self.warmup, 0.02)
        decay = (1 - done) / (1 - self.flat_until)
        return self.peak * min(1.0, max(decay, self.floor))


@dataclass
class Progress:
    """What has been done so far; saved with the weights."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0  # without padding
    batch_rows: int = 0


def new_model(seed: int = 0) -> Target:
    """A randomly initialised embedded model in float32."""
    return Target(ARCHITECTURE, rngs=nnx.Rngs(seed))


def model_of(params: Any) -> Target:
    """The model that has these parameters."""
    return nnx.merge(nnx.graphdef(nnx.eval_shape(new_model)), params)


def _input_axes(path: tuple[Any, ...], leaf: jax.Array) -> int:
    """How many axes after the layer axis are inputs of a stacked matrix; 0 for embedding and norms."""
    if leaf.ndim < 3:
        return 0
    return 2 if "'out'" in jax.tree_util.keystr(path) or ".out" in jax.tree_util.keystr(path) else 1


def optimizer() -> optax.GradientTransformation:
    """Muon for the layers' matrices, Adam for embedding and norms, at rate 1: the step multiplies by the schedule.

    Updates of matrices have a root mean square of 0.2, which is about Adam's.
    """
    rule = muon(
        1.0,
        weight_decay=0.1,
        adam_b1=0.9,
        adam_b2=0.98,
        adam_learning_rate=1.0,
        muon_weight_dimension_numbers=_matrix_axes,  # pyright: ignore[reportArgumentType]  (a function will do)
        consistent_rms=0.2,
    )
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def _matrix_axes(params: Any) -> Any:
    """Inputs and outputs of every stacked matrix; None where Muon does not apply."""

    def axes(path: tuple[Any, ...], leaf: jax.Array) -> MuonDimensionNumbers | None:
        inputs = _input_axes(path, leaf)
        ends = 1 + inputs
        return MuonDimensionNumbers(tuple(range(1, ends)), tuple(range(ends, leaf.ndim))) if inputs else None

    return jax.tree_util.tree_map_with_path(axes, params)


def token_losses(model: Target, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cross-entropy, log-partition), both [B, S-1], of predicting tokens[:, 1:]."""
    hidden = last_hidden(model, tokens).reshape(tokens.size, -1)
    logits = bfloat16_product(hidden, transposed(model.embedding[...])).reshape(*tokens.shape, -1)[
        :, :-1
    ]  # [B, S-1, V]
    partition = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return partition - picked, partition


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(
    params: Any, state: Any, tokens: jax.Array, weights: jax.Array, rate: jax.Array
) -> tuple[Any, Any, jax.Array]:
    """One update at learning rate `rate` from tokens and weights [B, S]: parameters, optimizer state, mean loss."""

    def loss_of(params: Any) -> tuple[jax.Array, jax.Array]:
        losses, partition = token_losses(model_of(params), tokens)
        weight = weights[:, 1:] / weights[:, 1:].sum()
        loss = jnp.sum(losses * weight)
        return loss + Z_LOSS * jnp.sum(jnp.square(partition) * weight), loss

    grads, loss = jax.grad(loss_of, has_aux=True)(params)
    updates, state = optimizer().update(grads, state, params)
    return jax.tree.map(lambda p, u: p + rate * u, params, updates), state, loss


@jax.jit
def answer_losses(params: Any, tokens: jax.Array, weights: jax.Array) -> jax.Array:
    """[2]: the summed cross-entropy of answer tokens, and their number."""
    losses, _ = token_losses(model_of(params), tokens)
    answers = weights[:, 1:] == 1.0
    return jnp.stack([jnp.sum(losses * answers), jnp.sum(answers)])


def heldout_loss(params: Any, sets: list[Rows]) -> float:
    """Mean cross-entropy of answer tokens, in nats."""
    total, count = np.sum([answer_losses(params, rows.tokens, rows.weights) for rows in sets], axis=0)
    return float(total / count)


def save(path: Path, params: Any, state: Any, progress: Progress) -> None:
    """Writes the checkpoint beside its final name and renames it: a kill leaves the old one or the new one."""
    leaves: dict[str, Any] = {f"{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves((params, state)))}
    temporary = path.with_suffix(".tmp.npz")
    with temporary.open("wb") as file:
        np.savez(file, progress=np.array(json.dumps(asdict(progress))), **leaves)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load(path: Path, params: Any, state: Any) -> tuple[Any, Any, Progress]:
    """Reads a checkpoint into the structure of freshly initialised `params` and `state`."""
    leaves, tree = jax.tree.flatten((params, state))
    with np.load(path) as file:
        progress = Progress(**json.loads(str(file["progress"])))
        stored = [file[f"{i:04d}"] for i in range(len(leaves))]
    if any(a.shape != b.shape for a, b in zip(leaves, stored, strict=True)):
        raise ValueError(f"{path}: shapes differ from this architecture; start afresh in another folder")
    params, state = jax.tree.unflatten(tree, [jnp.asarray(a) for a in stored])
    return params, state, progress


def fresh(seed: int) -> tuple[Any, Any]:
    """(parameters, optimizer state) before the first step."""
    params = nnx.state(new_model(seed))
    return params, optimizer().init(params)


def train(
    batches: Callable[[int], Iterator[Rows]],
    heldout: dict[str, list[Rows]],
    checkpoint: Path,
    budget: Budget,
    *,
    seed: int = 0,
    resume: bool = False,
    save_every: float = 180.0,
) -> tuple[Any, Progress]:
    """Trains until the budget is used, from `batches(first step)`; returns parameters and progress."""
    params, state = fresh(seed)
    progress = Progress()
    if resume and checkpoint.exists():
        params, state, progress = load(checkpoint, params, state)
    source = batches(progress.step)
    began, saved, smooth = time.monotonic() - progress.seconds, time.monotonic(), None
    bar = tqdm(total=1.0, initial=min(budget.done(progress.step, progress.seconds), 1.0), unit="budget",
               mininterval=10, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")  # fmt: skip
    while (done := budget.done(progress.step, progress.seconds)) < 1:
        batch = next(source)
        rate = jnp.float32(budget.rate(done))
        params, state, loss = train_step(params, state, batch.tokens, batch.weights, rate)
        smooth = float(loss) if smooth is None else 0.98 * smooth + 0.02 * float(loss)
        progress.step += 1
        progress.tokens += int((batch.weights > 0).sum())
        progress.batch_rows = len(batch.tokens)
        progress.seconds = time.monotonic() - began
        bar.set_postfix_str(
            f"step {progress.step} loss {smooth:.3f} {progress.tokens / progress.seconds:.0f} tok/s", False
        )
        bar.update(min(budget.done(progress.step, progress.seconds), 1.0) - done)
        if time.monotonic() - saved > save_every:
            save(checkpoint, params, state, progress)
            saved = time.monotonic()
            nll = {domain: heldout_loss(params, sets) for domain, sets in heldout.items()}
            tqdm.write(f"step {progress.step} {progress.seconds / 60:.1f} min {progress.tokens / 1e6:.2f} M tokens "
                       f"lr {float(rate):.5f} train {smooth:.3f} held-out "
                       + " ".join(f"{d} {v:.3f}" for d, v in nll.items()))  # fmt: skip
    bar.close()
    save(checkpoint, params, state, progress)
    return params, progress
