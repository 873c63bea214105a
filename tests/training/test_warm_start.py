"""Warm start: a run begins with another drafter's parameters, on any mesh; what does not fit is refused in one line."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax import start, train
from dspark_jax.config import DrafterConfig, InputError, MeshConfig
from dspark_jax.convert.export import Source, frozen_tensors, write_export
from dspark_jax.convert.hf import drafter_tensors, stored_tensors
from dspark_jax.kinds import as_kind
from dspark_jax.run import Run
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import abstract_drafter, build_drafter, init_state, to_params
from dspark_jax.training.warm_start import plan_takeover, warm_start
from dspark_jax.vocabulary import encode_vocabulary


def state_of(config, mesh, source):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(source)))
    return start.fresh_state(Run(config, source, mesh), make_optimizer(config.optim, 4))


@pytest.fixture
def source(config, save_untrained, meshes, tmp_path):
    """A run with another seed, made on one device."""
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=5))
    save_untrained(other, tmp_path / "source", meshes["one"])
    return tmp_path / "source", init_state(other, make_optimizer(config.optim, 1), meshes["one"]).params


def test_parameters_of_a_run(config, source, meshes):
    folder, expected = source
    state = state_of(config, meshes["cube"], folder)
    fresh = state_of(config, meshes["cube"], "")
    assert state.step == 0
    for name, value in expected.items():
        np.testing.assert_array_equal(state.params[name], value, name)
        assert state.params[name].sharding == fresh.params[name].sharding
    assert not np.array_equal(fresh.params["backbone.fc"], expected["backbone.fc"])


def test_the_target_may_be_another_one(config, source, meshes):
    """Its weights have changed, or its files are no longer there."""
    moved = dataclasses.replace(config, target=dataclasses.replace(config.target, path="/nowhere"))
    state = state_of(moved, meshes["one"], source[0])
    np.testing.assert_array_equal(state.params["backbone.fc"], source[1]["backbone.fc"])


def test_parameters_of_an_exported_directory(config, meshes, tmp_path):
    drafter = build_drafter(config, jax.random.key(9))
    arch, shape = config.target.architecture, config.drafter
    written = {
        **arch.to_hf(), "architectures": ["Qwen3DSparkModel"], "num_hidden_layers": shape.num_layers,
        "block_size": shape.block_size, "mask_token_id": shape.mask_token_id, "markov_rank": shape.markov_rank,
        "target_layer_ids": list(shape.target_layer_ids), "markov_head_type": "vanilla",
        "enable_confidence_head": True, "confidence_head_with_markov": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(written))
    save_file(drafter_tensors(drafter, shape), tmp_path / "model.safetensors")
    start.check_start(dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(tmp_path))))
    state = state_of(config, meshes["one"], tmp_path)
    for name, value in to_params(drafter).items():
        np.testing.assert_array_equal(state.params[name], value, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"markov_rank": 4},
            "its confidence head does not fit: confidence.weight has shape (40,), the config gives (36,); configure a "
            "drafter of its shape (drafter.num_layers=1, 2 drafter.target_layer_ids, drafter.markov_rank=8)",
        ),
        ({"num_layers": 2}, "its backbone does not fit: backbone.layers.attention.key has shape (1, 32, 2, 8), the"),
        ({"target_layer_ids": (0,)}, "its backbone does not fit: backbone.fc has shape (64, 32), the config gives (32"),
        (
            {"kind": "eagle3", "markov_rank": 0, "confidence_head": False, "mask_token_id": 0},
            "its backbone is another one: only the config's has fc; a drafter of kind 'dspark' cannot become one of "
            "kind 'eagle3'",
        ),
    ],
    ids=["rank", "depth", "taps", "kind"],
)
def test_another_drafter_is_refused_before_data_is_prepared(config, source, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(train, "prepare_run", lambda *_: pytest.fail("data was prepared"))
    changed = dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, **changes))
    changed.train.init_from, changed.mesh = str(source[0]), MeshConfig()
    if changes.get("kind") == "eagle3":
        changed.train.num_anchors = changed.data.max_length
    with pytest.raises(InputError) as caught:
        train.train(changed, tmp_path / "run")
    assert message in str(caught.value) and str(caught.value).startswith(f"train.init_from={source[0]}: ")


def kinds(config):
    """What becomes of what, by name: (old kind of drafter, new one)."""
    dspark = config.drafter
    dflash = dataclasses.replace(
        dspark, kind="dflash", markov_rank=0, confidence_head=False, confidence_with_markov=False
    )
    convolved = dataclasses.replace(dspark, conv_kernel_size=2, conv_group_size=8)
    second = as_kind(config, "dflash2").drafter
    second = dataclasses.replace(second, conv_group_size=8, markov_rank=8)
    return {
        "dflash to dspark": (dflash, dspark),
        "dspark to dspark with convolutions": (dspark, convolved),
        "dspark to dflash2": (dspark, second),
        "dflash2 to convolved dspark": (second, convolved),
        "fill-in to anchor-first": (dataclasses.replace(dflash, block_layout="fill_in"), dflash),
        "vanilla to rnn": (dspark, dataclasses.replace(dspark, markov_head_type="rnn")),
        "a confidence head": (
            dataclasses.replace(dspark, confidence_head=False, confidence_with_markov=False),
            dspark,
        ),
        "dspark to dflash": (dspark, dflash),
    }


@pytest.mark.parametrize(
    ("name", "new", "lines"),
    [
        (
            "dflash to dspark",
            ("markov.", "confidence."),
            ["taken over: backbone (1 layer)", "starting new: sequential head (vanilla, rank 8), confidence head"],
        ),
        (
            "dspark to dspark with convolutions",
            (".around_",),
            [
                "taken over: backbone (1 layer), sequential head (vanilla, rank 8), confidence head",
                "starting new: convolutions (as the identity)",
            ],
        ),
        (
            "dspark to dflash2",
            (".around_", "markov."),
            [
                "taken over: backbone (1 layer)",
                "starting new: sequential head (selector; it was vanilla), convolutions (as the identity)",
                "left out: confidence head",
                "trained with another setting: block_layout 'anchor_first' there, 'fill_in' here: every row predicts "
                "another token than it was trained for",
            ],
        ),
        (
            "dflash2 to convolved dspark",
            ("markov.", "confidence."),
            [
                "taken over: backbone (1 layer), convolutions",
                "starting new: sequential head (vanilla; it was selector), confidence head",
                "trained with another setting: block_layout 'fill_in' there, 'anchor_first' here: every row predicts "
                "another token than it was trained for",
            ],
        ),
        (
            "fill-in to anchor-first",
            (),
            [
                "taken over: backbone (1 layer)",
                "trained with another setting: block_layout 'fill_in' there, 'anchor_first' here: every row predicts "
                "another token than it was trained for",
            ],
        ),
        (
            "vanilla to rnn",
            ("markov.", "confidence."),
            [
                "taken over: backbone (1 layer)",
                "starting new: sequential head (rnn; it was vanilla), confidence head (it reads the sequential head, "
                "which starts new)",
            ],
        ),
        (
            "a confidence head",
            ("confidence.",),
            ["taken over: backbone (1 layer), sequential head (vanilla, rank 8)", "starting new: confidence head"],
        ),
        ("dspark to dflash", (), ["taken over: backbone (1 layer)", "left out: sequential head, confidence head"]),
    ],
)
def test_across_kinds(config, meshes, name, new, lines):
    """Values are the other drafter's where taken over, and a fresh run's where not; and it is all said."""
    old, wanted = kinds(config)[name]
    source = build_drafter(dataclasses.replace(config, drafter=old), jax.random.key(9))
    run = dataclasses.replace(config, drafter=wanted)
    fresh = init_state(run, make_optimizer(config.optim, 4), meshes["one"])
    state, takeover = warm_start(fresh, source, old, wanted)
    theirs = to_params(source)
    for path, value in state.params.items():
        begins = any(part in path for part in new)
        np.testing.assert_array_equal(value, fresh.params[path] if begins else theirs[path], err_msg=path)
        assert begins or value.sharding == fresh.params[path].sharding
    assert list(takeover.lines()) == lines


def test_a_backbone_with_convolutions_keeps_them(config):
    _, convolved = kinds(config)["dspark to dspark with convolutions"]
    found, wanted = (
        to_params(abstract_drafter(dataclasses.replace(config, drafter=one))) for one in (convolved, config.drafter)
    )
    with pytest.raises(InputError, match="trained with convolutions, the config's has none; set drafter.conv_kernel_s"):
        plan_takeover(found, wanted, convolved, config.drafter)


def test_heads_that_an_export_has_for_servers_only_start_new(config, meshes, tmp_path, capsys):
    """A DFlash is exported with an all-zero Markov head of another rank and a constant confidence."""
    old, _ = kinds(config)["dflash to dspark"]
    drafter = build_drafter(dataclasses.replace(config, drafter=old), jax.random.key(9))
    target = Path(config.target.path)
    raw, frozen = json.loads((target / "config.json").read_text()), frozen_tensors(target)
    tensors = dict(stored_tensors(drafter, old))
    source = Source(tensors.items, old, config.target.architecture, raw, frozen, "org/target")
    folder = write_export(tmp_path / "drafter", source, dtype="float32")
    start.check_start(dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(folder))))
    state, fresh = (state_of(config, meshes["one"], one) for one in (folder, ""))
    np.testing.assert_array_equal(state.params["backbone.fc"], to_params(drafter)["backbone.fc"])
    for name in ("markov.w1", "markov.w2", "confidence.offset"):
        np.testing.assert_array_equal(state.params[name], fresh.params[name])
    assert "starting new: sequential head (vanilla, rank 8), confidence head" in "".join(capsys.readouterr())


def test_nothing_there(config, tmp_path):
    for content, message in ((None, "no checkpoint and no config.json of a drafter here"), ("{}", "config.json")):
        if content:
            (tmp_path / "config.json").write_text(content)
        config.train.init_from = str(tmp_path)
        with pytest.raises(InputError, match=f"train.init_from={tmp_path}: .*{message}"):
            start.check_start(config)


def eagle3(**changes):
    """An EAGLE-3 of one layer of Llama."""
    return DrafterConfig(
        kind="eagle3", num_layers=1, block_size=3, target_layer_ids=(0, 1), mask_token_id=0, markov_rank=0,
        confidence_head=False, confidence_with_markov=False, qk_norms=False, **changes,
    )  # fmt: skip


def test_what_an_eagle3_was_trained_with_is_said_or_named(config):
    """Norms that have no parameters change what is computed; those that have, and heads, decide what fits."""

    def plan(old, new):
        found, wanted = (to_params(abstract_drafter(dataclasses.replace(config, drafter=one))) for one in (old, new))
        return list(plan_takeover(found, wanted, old, new).lines())

    def reduced(size):
        ids = encode_vocabulary(np.arange(size), config.target.architecture.vocab_size)
        return eagle3(draft_vocab_size=size, draft_vocabulary=ids)

    own = reduced(16)
    changed = dataclasses.replace(own, eagle3_norms=("norm_before_residual",))
    assert plan(own, changed) == [
        "taken over: backbone (1 layer, LM head of 16 tokens)",
        "trained with another setting: eagle3_norms () there, ('norm_before_residual',) here",
    ]
    with pytest.raises(InputError, match=r"key_norm; configure a drafter like it \(drafter.qk_norms=False\)"):
        plan(eagle3(), dataclasses.replace(eagle3(), qk_norms=True))
    with pytest.raises(InputError, match=r"drafter.draft_vocab_size=16\)"):
        plan(own, reduced(8))


def test_a_run_of_another_target_is_said(config, source, meshes, monkeypatch, capsys):
    begun = dataclasses.replace(config, train=dataclasses.replace(config.train, init_from=str(source[0])))
    start.tell_other_target(Run(begun, source[0], meshes["one"]))
    assert "another target" not in "".join(capsys.readouterr())
    monkeypatch.setattr(Run, "target_fingerprint", "other weights")
    start.tell_other_target(Run(begun, source[0], meshes["one"]))
    assert f"{source[0]} was trained for another target" in "".join(capsys.readouterr())
