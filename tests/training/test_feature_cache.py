"""Training from the feature cache: the losses of online training, up to how the features are stored."""

import copy
import dataclasses
import json
import shutil
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax import train as train_module
from dspark_jax.config import Config, InputError, MeshConfig, TargetArchitecture, TargetConfig, resolve
from dspark_jax.config_rules import problems
from dspark_jax.data.feature_codec import Identity
from dspark_jax.data.sources import Sample, write_samples
from dspark_jax.evaluate import evaluate
from dspark_jax.hub import with_architecture
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.target.frozen import read_frozen
from dspark_jax.target.loading import abstract_target, load_target
from dspark_jax.target.torch_model import TorchModel, load_torch_model
from dspark_jax.training.checkpoint import Checkpoints
from dspark_jax.training.feature_cache import feature_identity, feature_pass, open_features, prepare_features

LENGTH, VOCAB = 24, 67
TORCH = Identity("target", "tokenizer", "data", "torch", (-1, 0), 32, "bfloat16")


def make_data(workdir):
    rng, samples = np.random.default_rng(0), []
    for index in range(21):
        length = int(rng.integers(LENGTH // 2, LENGTH + 1))
        mask = (np.arange(length) >= 3).astype(np.uint8)
        samples.append(Sample(rng.integers(0, VOCAB - 1, length).astype(np.int32), mask, "random", index))
    write_samples(workdir / "data", samples)
    (workdir / "data" / "report.json").write_text('{"fingerprint": "made up"}')


def fit(config: Config, workdir, mesh: MeshConfig | None = None) -> list[dict]:
    if not (workdir / "data").exists():
        make_data(workdir)
    if config.data.features != "online":
        prepare_features(Run(config, workdir))
    config = dataclasses.replace(config, mesh=mesh or config.mesh)
    run = Run(config, workdir, make_mesh(config.mesh, jax.devices()[: 8 if mesh else 1]))
    with Checkpoints(run) as checkpoints, jax.set_mesh(run.mesh):
        train_module.fit(run, checkpoints)
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def single_device(monkeypatch):
    """`make_mesh` over one of the eight host devices, as the tiny configs ask for."""
    original = make_mesh
    one = lambda config, devices=None: original(config, devices or jax.devices()[:1])  # noqa: E731
    monkeypatch.setattr("dspark_jax.run.make_mesh", one)


@pytest.mark.slow
def test_losses_are_those_of_online_training(config, tmp_path, single_device):
    """From disk in two micro-batches, on one device and on eight; a run that is continued gives the same, exactly."""
    config.train.steps, config.train.checkpoint_every, config.train.log_every = 4, 2, 1
    losses, cube = {}, MeshConfig(2, 2, 2)
    for name, mesh in {"online": None, "bfloat16": None, "int8": cube}.items():
        changed = config
        if name != "online":
            data = dataclasses.replace(config.data, features="cache", feature_dtype=name)
            changed = dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, accumulate=2))
        losses[name] = [row["loss"] for row in fit(changed, tmp_path / name, mesh)]
    assert len(losses["online"]) == 4
    for name, tolerance in {"bfloat16": 2e-3, "int8": 5e-3}.items():
        np.testing.assert_allclose(losses[name], losses["online"], rtol=tolerance, err_msg=name)
        assert losses[name] != losses["online"]  # it did train from what is stored
    shutil.rmtree(tmp_path / "int8" / "checkpoints" / "4")
    assert [row["loss"] for row in fit(changed, tmp_path / "int8", cube)] == losses["int8"]


@pytest.mark.slow
def test_packed_sequences_have_the_features_of_their_samples(config, tmp_path, single_device):
    config.train.steps = config.train.log_every = config.train.checkpoint_every = 1
    config.data.pack, config.data.max_length = True, 2 * LENGTH
    losses = []
    for name in ("online", "cache"):
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, features=name))
        losses.append(fit(changed, tmp_path / name)[0]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)


def test_another_target_is_refused(config, tmp_path, single_device, new_target):
    make_data(tmp_path)
    config.data.features = "cache"
    prepare_features(Run(config, tmp_path))
    open_features(Run(config, tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("shard-*")}
    frozen = tmp_path / "features" / "frozen.safetensors"
    whole = frozen.read_bytes()
    for content, remedy in ((None, "no such file; run"), (whole[:-9], "truncated .*; remove it and run")):
        frozen.unlink()
        if content:
            frozen.write_bytes(content)
        with pytest.raises(InputError, match=f"frozen.safetensors: {remedy} python -m dspark_jax.prepare again"):
            read_frozen(frozen, config.target.architecture)
        frozen.unlink(missing_ok=True)
        prepare_features(Run(config, tmp_path))
        assert frozen.read_bytes() == whole
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").glob("shard-*")}
    other_type = "bfloat16" if config.target.dtype != "bfloat16" else "float32"
    with pytest.raises(InputError, match=rf"made with target\.dtype {config.target.dtype}, needed is {other_type}"):
        target = dataclasses.replace(config.target, dtype=other_type)
        open_features(Run(dataclasses.replace(config, target=target), tmp_path))
    other = new_target(tmp_path / "other", 5)
    config = dataclasses.replace(config, target=dataclasses.replace(config.target, path=str(other)))
    with pytest.raises(InputError, match=r"made with target\.path \(weights\) .* needed is"):
        open_features(Run(config, tmp_path))


@pytest.fixture(scope="module")
def olmo(tmp_path_factory):
    """A random OLMo, of which there is no definition here."""
    torch = pytest.importorskip("torch")
    from transformers import OlmoConfig, OlmoForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = OlmoForCausalLM(
        OlmoConfig(vocab_size=VOCAB, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, **shape)
    )
    path = tmp_path_factory.mktemp("olmo")
    model.save_pretrained(path)
    return path, model.eval()


def of_pytorch(config: Config, path) -> Config:
    config = dataclasses.replace(config, target=TargetConfig(path=str(path)))
    config.data.features, config.data.regenerate = "torch", False
    return resolve(config)


def test_a_model_without_a_definition_gives_its_features(config, olmo, tmp_path):
    """Against hooks in the model itself: raw outputs of layers, and the input of its LM head."""
    import torch

    path, model = olmo
    config = of_pytorch(config, path)
    assert (config.target.architecture.unsupported, config.target.architecture.head_dim) == ("olmo", 8)
    (tmp_path / "features").mkdir()
    start = feature_pass(Run(config, tmp_path), TORCH)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 9)).astype(np.int32)
    *tapped, last = start.args[0].run(tokens, (-1, 0))[0]
    features = torch.cat(tapped, -1)
    for row, (count, coded) in enumerate(zip((9, 6), start(tokens, np.asarray([9, 6], np.int32))(), strict=True)):
        stored = torch.cat([features, last], -1)[row, :count].numpy()
        np.testing.assert_array_equal(coded.values, stored.astype(coded.values.dtype))
        assert coded.finite and coded.values.shape == (count, 96)
    start.args[0].model.model.layers.append(torch.nn.Identity())
    with pytest.raises(InputError, match="no list of 3 layers in its OlmoModel; features of such a model cannot"):
        start(tokens, np.asarray([9, 6], np.int32))
    seen = {}
    hooks = [model.model.layers[0].register_forward_hook(lambda _, __, out: seen.update(layer=out))]
    hooks.append(model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.update(last=inputs[0])))
    with torch.inference_mode():
        logits = model(torch.as_tensor(tokens, dtype=torch.long)).logits
        embedded = model.get_input_embeddings()(torch.as_tensor(tokens, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    layer = seen["layer"][0] if isinstance(seen["layer"], tuple) else seen["layer"]
    np.testing.assert_allclose(features, torch.cat([embedded, layer], -1), atol=1e-6)
    np.testing.assert_allclose(last, seen["last"], atol=1e-6)
    from dspark_jax.target.frozen import load_frozen

    frozen = load_frozen(
        tmp_path / "features" / "frozen.safetensors",
        config.target.architecture,
        make_mesh(config.mesh, jax.devices()[:1]),
        np.float32,
    )
    np.testing.assert_allclose(frozen.unembed(last.numpy()), logits, atol=1e-5)
    np.testing.assert_allclose(frozen.embed(tokens), embedded, atol=1e-6)


@pytest.mark.parametrize("part, row", [("head", 40), ("embedding", 40)])
def test_what_is_not_finite_is_not_lent(olmo, part, row):
    """Row 40 is not among the tokens that the logits are computed of."""
    import torch

    model = copy.deepcopy(olmo[1])
    owner = model.get_output_embeddings() if part == "head" else model.get_input_embeddings()
    owner.weight = torch.nn.Parameter(owner.weight.detach().clone())
    owner.weight.data[row] = torch.nan
    with pytest.raises(InputError, match="^here: its (logits|embeddings) are not finite; look at its weights"):
        TorchModel(model, "here").frozen_matrices()


@pytest.mark.parametrize("field, value", [("hidden_size", 36), ("num_hidden_layers", "x"), ("hidden_act", 5)])
def test_a_model_that_does_not_load_is_one_line(olmo, tmp_path, field, value):
    path = shutil.copytree(olmo[0], tmp_path / "model")
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {field: value}))
    with pytest.raises(InputError, match="model: transformers cannot load it"):
        load_torch_model(str(path))


def test_a_checkpoint_with_missing_tensors_is_refused(olmo, tmp_path, capfd):
    """Transformers would draw them at random, and report it in a page of warnings."""
    path = shutil.copytree(olmo[0], tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"model: tensor model.layers.1.mlp.up_proj.weight and 1 more is missing; downl"
    ):
        load_torch_model(str(path))
    assert "".join(capfd.readouterr()) == ""


def test_it_may_come_from_the_hub(config, olmo, tmp_path, hub_cache):
    hub_cache("me/olmo", olmo[0])
    here = of_pytorch(config, olmo[0])
    config = dataclasses.replace(config, target=TargetConfig(path="me/olmo"))
    there = resolve(with_architecture(config))
    assert there.target.architecture == here.target.architecture
    tokens, lengths = np.arange(8, dtype=np.int32)[None] % VOCAB, np.asarray([8], np.int32)
    (tmp_path / "features").mkdir()
    near, far = (list(feature_pass(Run(one, tmp_path), TORCH)(tokens, lengths)())[0] for one in (here, there))
    np.testing.assert_array_equal(far.values, near.values)


def test_a_drafter_is_trained_for_it(config, olmo, tmp_path):
    config.train.steps, config.train.log_every, config.train.checkpoint_every = 2, 1, 2
    rows = fit(of_pytorch(config, olmo[0]), tmp_path)
    assert [np.isfinite(row["loss"]) for row in rows] == [True, True]


def test_the_teacher_forced_figure_is_what_training_reports(config, tmp_path, single_device, capsys):
    """Of a first step over all samples that changes nothing; along the answers of some of them it is another one."""
    config.data.features, config.data.feature_dtype = "cache", "bfloat16"
    config.train.steps = config.train.log_every = config.train.checkpoint_every = 1
    config.train.batch_size, config.optim.learning_rate = 21, 1e-30
    (row,) = fit(config, tmp_path)
    capsys.readouterr()
    found = evaluate(config, tmp_path, teacher_forced=100)
    assert json.loads((tmp_path / "eval" / "teacher_forced.json").read_text()) == found
    assert (found["kind"], found["samples"], found["features"], found["step"]) == ("teacher-forced", 21, "jax", 1)
    assert found["expected_tokens_per_round"] == pytest.approx(row["tau_expected"], rel=1e-4)
    rates = [row[f"accept@{k}"] for k in (1, 2, 3, 4)]
    np.testing.assert_allclose(found["conditional_acceptance"], rates, rtol=1e-4)
    said, (low, high) = capsys.readouterr().out, found["expected_tokens_per_round_ci95"]
    assert low < found["expected_tokens_per_round"] < high and "tau" not in found
    assert "step 1, teacher-forced: 126 blocks along the answers of 21 training samples, temperature 1" in said
    assert not (tmp_path / "eval" / "metrics.json").exists() and "nothing was decoded" in said
    fewer = evaluate(config, tmp_path, teacher_forced=4)
    assert fewer["samples"] == 4 and fewer["conditional_acceptance"] != found["conditional_acceptance"]
    config.data.features = "online"
    with pytest.raises(InputError, match="--teacher_forced=4 reads features that are stored, and a run with data.feat"):
        evaluate(config, tmp_path, teacher_forced=4)
    with pytest.raises(InputError, match="--teacher_forced=-1: at least one sample is needed"):
        evaluate(config, tmp_path, teacher_forced=-1)


def test_what_an_unsupported_target_cannot_do_is_said(config, olmo, monkeypatch):
    path, _ = olmo
    config = of_pytorch(config, path)
    wrong = copy.deepcopy(config)
    wrong.train.evaluate = True
    assert not list(problems(wrong))  # PyTorch runs it
    wrong.data.regenerate, wrong.mesh.decode.tensor = True, 2
    for said in (
        "data.regenerate=True: a olmo has no definition in JAX and does not answer here; set data.regenerate=False",
        "mesh.decode=data=-1 fsdp=1 tensor=2: a olmo is run by PyTorch, and decodes on one device; leave mesh.decode",
    ):
        assert any(said in line for line in problems(wrong))
    with pytest.raises(InputError, match="target: a olmo has no definition in JAX; with PyTorch its features can be"):
        abstract_target(config.target.architecture, np.float32)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"a olmo has no definition here, so PyTorch has to run it: that needs PyTo"):
        load_target(config.target, make_mesh(config.mesh, jax.devices()[:1]))


def test_shapes_of_other_families(tmp_path):
    names = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 99}
    (tmp_path / "config.json").write_text(json.dumps(names))
    found = TargetArchitecture.of_any_model(tmp_path)
    assert (found.hidden_size, found.head_dim, found.num_key_value_heads, found.intermediate_size) == (24, 8, 3, 96)
    assert found.rope_theta == 1e6
    names |= {"rope_parameters": {"rope_theta": 5e5}, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps(names))
    assert TargetArchitecture.of_any_model(tmp_path).rope_theta == 5e5
    del names["n_layer"], names["n_embd"]
    (tmp_path / "config.json").write_text(json.dumps(names))
    with pytest.raises(InputError, match="missing hidden_size, num_hidden_layers; add them to the file"):
        TargetArchitecture.of_any_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(names | {"n_layer": 2, "d_model": "24"}))
    with pytest.raises(InputError, match='hidden_size "24" is not a positive whole number'):
        TargetArchitecture.of_any_model(tmp_path)


def test_samples_that_nobody_describes_are_refused(config, tmp_path):
    with pytest.raises(InputError, match=r"/data: has no report\.json with a fingerprint; run prepare again"):
        feature_identity(Run(config, tmp_path))
