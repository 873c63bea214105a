"""The train step: exact accumulation, the same numbers on every mesh, learning, and what it reports."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import InputError, resolve
from dspark_jax.drafter.blocks import sample_anchors
from dspark_jax.kinds import as_kind
from dspark_jax.target.loading import load_target
from dspark_jax.training.loss import drafter_loss
from dspark_jax.training.micro_steps import MicroSteps
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import (
    TrainState,
    abstract_drafter,
    init_state,
    param_shardings,
    state_layout,
    to_module,
    to_params,
)
from dspark_jax.training.step import (
    FINITE,
    accumulate,
    add_metrics,
    anchor_keys,
    batch_layout,
    check_batch,
    make_train_step,
    place_batch,
)
from tests.conftest import others_slow


@pytest.fixture(scope="module")
def results():
    """(mesh, micro-batches) -> gradients and sums of the same eight sequences, each computed once."""
    return {}


def initial(config, meshes):
    return init_state(config, make_optimizer(config.optim, config.train.steps), meshes["one"])


@pytest.fixture
def compute(config, meshes, batch, results):
    """(mesh name, micro-batches) -> gradients of the normalised loss of the initial state at step 0, and `LossSums`."""

    def run(mesh="one", count=1):
        if (mesh, count) not in results:
            params = results.setdefault("params", jax.device_get(initial(config, meshes).params))
            results[mesh, count] = summed_gradients(config, meshes[mesh], batch, count, params)
        return results[mesh, count]

    return run


def summed_gradients(config, mesh, batch, count, params):
    """Gradients of the normalised loss, and its sums, computed on `mesh` in `count` micro-batches."""
    drafter, target = abstract_drafter(config), load_target(config.target, mesh)
    params = jax.device_put(params, param_shardings(drafter, mesh))

    def run(params, frozen, batch):
        total = accumulate(params, drafter, to_module(target, frozen), batch, jnp.int32(0), config)
        return total.normalised(), total.sums

    with jax.set_mesh(mesh):
        compiled = jax.jit(run)
        return jax.device_get(compiled(params, to_params(target), place_batch(batch, count, mesh)))


@pytest.fixture(scope="module")
def steps():
    """mesh name -> compiled train step; filled by `compiled_step`."""
    return {}


@pytest.fixture
def compiled_step(config, meshes, steps):
    """mesh name -> (fresh state, target parameters, compiled step) with a learning rate of 3e-3 without warm-up."""
    config.optim.learning_rate, config.optim.warmup_ratio = 3e-3, 0.0
    optimizer = make_optimizer(config.optim, 1000)

    def make(name):
        mesh, target = meshes[name], load_target(config.target, meshes[name])
        state, frozen = init_state(config, optimizer, mesh), to_params(target)
        if name not in steps:
            with jax.set_mesh(mesh):
                step = make_train_step(config, abstract_drafter(config), target, optimizer, mesh)
                steps[name] = step.lower(state, frozen, batch_layout(config, mesh)).compile()
        return state, frozen, steps[name]

    return make


def assert_gradients_equal(ours, theirs):
    """To float32 accuracy, measured by each parameter's largest entry (the two sum in different orders)."""
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert np.abs(value).max() > 0, name
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=3e-6 * np.abs(value).max(), err_msg=name)


def test_gradient_is_that_of_the_loss_as_it_is_defined(config, meshes, batch, compute):
    """Against autodiff of total / denominator over the whole batch at once, without the step's machinery."""
    found, sums = compute()
    target = load_target(config.target, meshes["one"])

    def loss(drafter):
        tokens, loss_mask = jnp.asarray(batch["tokens"]), jnp.asarray(batch["loss_mask"])
        out = target.forward(tokens, jnp.broadcast_to(jnp.arange(24), tokens.shape), taps=(-1, 0))
        keys = anchor_keys(0, jnp.int32(0), jnp.asarray(batch["sample_id"]))
        anchors = sample_anchors(keys, loss_mask, 6)
        outputs = drafter(target, out.features, tokens, loss_mask, anchors)
        return drafter_loss(drafter, target, outputs, out.last_hidden, config.loss, vocab_chunk=1000).normalised()

    drafter = to_module(abstract_drafter(config), initial(config, meshes).params)
    value, grads = jax.jit(jax.value_and_grad(loss))(drafter)
    np.testing.assert_allclose(sums.total / sums.denominator, value, rtol=1e-6)
    assert_gradients_equal(found, jax.device_get(to_params(grads)))


def test_accumulation_is_exact(compute):
    """Micro-batches of different supervised lengths: a mean of their means would be off by percents."""
    whole, sums = compute()
    pieces, piece_sums = compute(count=4)
    np.testing.assert_allclose(piece_sums.total, sums.total, rtol=1e-6)
    np.testing.assert_allclose(piece_sums.denominator, sums.denominator, rtol=1e-6)
    for name, ratio in sums.metrics.items():
        np.testing.assert_allclose(piece_sums.metrics[name].num, ratio.num, rtol=1e-5, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(piece_sums.metrics[name].den, ratio.den, rtol=1e-6, err_msg=name)
    assert_gradients_equal(pieces, whole)


@pytest.mark.parametrize("mesh, count", [("cube", 1), ("cube", 2)])
def test_a_mesh_changes_no_number(compute, mesh, count):
    one, sums = compute()
    many, many_sums = compute(mesh, count)
    np.testing.assert_allclose(many_sums.total, sums.total, rtol=1e-6)
    np.testing.assert_allclose(many_sums.denominator, sums.denominator, rtol=1e-6)
    assert_gradients_equal(many, one)


def test_a_step_is_adamw_on_the_clipped_gradient(meshes, batch, compute, compiled_step):
    """With AdamW's first step, from zero moments, written out: lr * g / (|g| + eps)."""
    grads, sums = compute()
    state, frozen, step = compiled_step("one")
    before = jax.device_get(state.params)
    after, metrics = step(state, frozen, place_batch(batch, 1, meshes["one"]))
    norm = np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in grads.values()))
    assert norm > 1.0  # so that clipping is at work
    np.testing.assert_allclose(metrics.ratios["grad_norm"].value(), norm, rtol=1e-5)
    np.testing.assert_allclose(metrics.ratios["loss"].value(), sums.total / sums.denominator, rtol=1e-6)
    assert metrics.ratios["tokens"].num == batch["lengths"].sum()
    assert after.step == 1
    for name, g in grads.items():
        g = np.asarray(g) / norm
        expected = before[name] - 3e-3 * g / (np.abs(g) + 1e-8)
        clear = np.abs(g) > 1e-5  # elsewhere eps and rounding decide the direction
        np.testing.assert_allclose(after.params[name][clear], expected[clear], rtol=0, atol=1e-6, err_msg=name)


def test_steps_learn_and_their_metrics_add_up(batch, meshes, compiled_step):
    state, frozen, step = compiled_step("one")
    placed, each, total = place_batch(batch, 1, meshes["one"]), [], None
    for _ in range(12):
        state, metrics = step(state, frozen, placed)
        each.append(jax.device_get(metrics.ratios["loss"]))
        total = metrics if total is None else add_metrics(total, metrics)
    assert state.step == 12 and int(total.not_finite) == FINITE
    assert each[-1].value() < 0.9 * each[0].value()
    expected = sum(ratio.num for ratio in each) / sum(ratio.den for ratio in each)
    assert total.ratios["loss"].value() == pytest.approx(expected, rel=1e-6)


def test_the_step_on_a_mesh_is_the_step_on_one_device(batch, meshes, compiled_step):
    """Three donated steps; the state stays in its shards."""
    losses, layouts = {}, {}
    for name in ("one", "cube"):
        state, frozen, step = compiled_step(name)
        placed, losses[name] = place_batch(batch, 1, meshes[name]), []
        for _ in range(3):
            old = state
            state, metrics = step(state, frozen, placed)
            losses[name].append(metrics.ratios["loss"].value())
        layouts[name] = zip(jax.tree.leaves(old), jax.tree.leaves(state), strict=True)
    np.testing.assert_allclose(losses["cube"], losses["one"], rtol=1e-5)
    for old, new in layouts["cube"]:
        assert old.is_deleted() and new.sharding.is_equivalent_to(old.sharding, old.ndim)


def test_the_first_step_that_is_not_finite_is_named(batch, meshes, compiled_step):
    state, frozen, step = compiled_step("one")
    placed = place_batch(batch, 1, meshes["one"])
    state, total = step(state, frozen, placed)
    poisoned = {**state.params, "backbone.norm": state.params["backbone.norm"].at[3].set(jnp.nan)}
    state = TrainState(state.step, poisoned, state.optimizer)
    for _ in range(2):
        state, metrics = step(state, frozen, placed)
        total = add_metrics(total, metrics)
    assert int(total.not_finite) == 2 and int(total.target_not_finite) == FINITE


def test_a_target_that_is_not_finite_is_told_from_a_loss_that_is_not(batch, meshes, compiled_step):
    state, frozen, step = compiled_step("one")
    placed = place_batch(batch, 1, meshes["one"])
    state, total = step(state, frozen, placed)
    poisoned = {**frozen, "layers.mlp.up": frozen["layers.mlp.up"].at[0, 3].set(jnp.inf)}
    state, metrics = step(state, poisoned, placed)
    total = add_metrics(total, metrics)
    assert int(total.not_finite) == 2 and int(total.target_not_finite) == 2


def test_anchors_depend_on_step_and_sample_only():
    keys = jax.random.key_data(anchor_keys(3, jnp.int32(7), jnp.arange(5)))
    np.testing.assert_array_equal(keys[3:4], jax.random.key_data(anchor_keys(3, jnp.int32(7), jnp.array([3]))))
    others = [anchor_keys(3, jnp.int32(8), jnp.arange(5)), anchor_keys(4, jnp.int32(7), jnp.arange(5))]
    seen = np.concatenate([keys, *map(jax.random.key_data, others)])
    assert len(np.unique(seen, axis=0)) == 15


@pytest.mark.slow
def test_micro_steps_with_given_features_are_the_step_with_the_target_in_it(config, meshes, batch, compute):
    """One call for each micro-batch, against one program for all of them."""
    online, sums = compute(count=4)
    mesh, target, tokens = meshes["one"], load_target(config.target, meshes["one"]), jnp.asarray(batch["tokens"])
    out = target.forward(tokens, jnp.broadcast_to(jnp.arange(24), tokens.shape), taps=(-1, 0))
    given = {**batch, "features": np.asarray(out.features), "last_hidden": np.asarray(out.last_hidden)}
    config.data.features = "cache"
    optimizer = make_optimizer(config.optim, config.train.steps)
    with jax.set_mesh(mesh):
        steps = MicroSteps(config, abstract_drafter(config), target, optimizer, mesh)
        total, state, losses = steps.zeros(), initial(config, meshes), []
        for index in range(4):
            micro = {name: rows[2 * index : 2 * index + 2] for name, rows in given.items()}
            total, loss = steps.add(total, state, to_params(target), place_batch(micro, 1, mesh))
            losses.append(float(loss))
    np.testing.assert_allclose([total.sums.total, sum(losses)], sums.total, rtol=1e-6)
    assert total.tokens == batch["lengths"].sum()
    assert_gradients_equal(jax.device_get(total.normalised()), online)


def test_the_target_is_an_argument_of_the_program(config, meshes):
    """A closed-over target would be a constant: copied into the executable and compiled with it."""
    mesh, optimizer = meshes["one"], make_optimizer(config.optim, 10)
    target = load_target(config.target, mesh)
    step = make_train_step(config, abstract_drafter(config), target, optimizer, mesh)
    state = state_layout(abstract_drafter(config), optimizer, mesh)
    text = step.lower(state, to_params(target), batch_layout(config, mesh)).as_text()
    sizes = [math.prod(int(n) for n in shape.split("x")[:-1]) for shape in _constants(text)]
    assert max(sizes, default=0) < 32 * 8  # smaller than any matrix of either model


def _constants(text):
    """Tensor types (`67x32xf32`) of the constants in StableHLO text that are spelled out, not splats."""
    for line in text.splitlines():
        if "stablehlo.constant dense<" in line and ("[" in line or '"0x' in line):
            yield line.rsplit("tensor<", 1)[1].split(">")[0]


@pytest.mark.parametrize(
    "mesh, batch_size, accumulate, expected",
    [
        ("cube", 6, 1, "train.batch_size=6 is not divisible by train.accumulate=1 x 4 ways.*of 4, or fewer ways"),
        ("cube", 8, 8, "not divisible by train.accumulate=8 x 4 ways.*use a multiple of 32, train.accumulate=2$"),
        ("cube", 8, 4, "use a multiple of 16"),
    ],
)
def test_a_batch_that_the_mesh_cannot_divide_is_refused(config, meshes, mesh, batch_size, accumulate, expected):
    config.train.batch_size, config.train.accumulate = batch_size, accumulate
    with pytest.raises(InputError, match=expected):
        check_batch(config, meshes[mesh])


@pytest.mark.parametrize("kind", ["eagle3", "mtp"])
def test_rows_that_an_override_left_out_are_refused(config, meshes, kind):
    """The preset has taken data.max_length for the number of rows, and it is raised afterwards."""
    config = as_kind(config, kind)
    check_batch(config, meshes["one"])
    config.data.max_length = 32
    message = f"train.num_anchors=24: {kind} is trained on every row .* data.max_length=32; set train.num_anchors=32"
    with pytest.raises(InputError, match=message):
        check_batch(config, meshes["one"])


@pytest.mark.parametrize(
    "kind", others_slow(["dflash", "dflash2", "dspark5", "eagle3", "eagle3_llama", "mtp", "rnn"], "dflash")
)
def test_every_kind_trains_with_the_same_step_on_any_mesh(config, meshes, batch, kind):
    """Gradients reach every parameter, and are those of one device on eight."""
    config.drafter.target_layer_ids, config.drafter.block_size = (0,), 2
    config = as_kind(config, kind)
    if kind == "eagle3_llama":  # whose vocabulary no axis of the mesh divides
        config.drafter.draft_vocab_size, config.drafter.eagle3_norms = 21, ("norm_before_residual", "fc_norm")
    config = resolve(config)
    params = jax.device_get(initial(config, meshes).params)
    assert ("vocabulary.head" in params) == (kind == "eagle3_llama")
    assert ("markov.w1" in params) == (kind in ("rnn", "dflash2", "dspark5"))
    assert ("markov.joint" in params) == (kind == "rnn")
    grads, sums = summed_gradients(config, meshes["one"], batch, 1, params)
    assert set(grads) == set(params) and ("confidence" in sums.metrics) == (kind in ("rnn", "dspark5"))
    chooses = "backbone.layers.mlp.correction"  # among experts, and does not weigh them
    assert (chooses in grads) == (kind == "dspark5") and not np.any(grads.pop(chooses, 0))
    on_cube, _ = summed_gradients(config, meshes["cube"], batch, 1, params)
    on_cube.pop(chooses, None)
    streams = {name for name in grads if "streams" in name}  # which are almost alike at first: sums of what cancels
    for name in streams:
        value, other = grads.pop(name), on_cube.pop(name)
        np.testing.assert_allclose(other, value, rtol=0, atol=1e-3 * np.abs(value).max(), err_msg=name)
    assert_gradients_equal(on_cube, grads)


@pytest.mark.slow
def test_eagle3_trains_on_given_features_without_embeddings(config, meshes, batch):
    """A feature cache holds the stated taps; the embeddings come from the tokens."""
    config.drafter.target_layer_ids, config.drafter.block_size = (0,), 2
    config = resolve(as_kind(config, "eagle3"))
    params = jax.device_get(initial(config, meshes).params)
    want, _ = summed_gradients(config, meshes["one"], batch, 1, params)
    target = load_target(config.target, meshes["one"])
    tokens = jnp.asarray(batch["tokens"])
    out = target.forward(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), taps=(0,))
    given = batch | {"features": np.asarray(out.features), "last_hidden": np.asarray(out.last_hidden)}
    assert_gradients_equal(summed_gradients(config, meshes["one"], given, 1, params)[0], want)
