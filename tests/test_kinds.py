"""Kinds of drafters as settings: what changes, what stays, what is refused."""

import dataclasses

import pytest
from flax import nnx

from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    InputError,
    LossConfig,
    OptimConfig,
    TargetArchitecture,
    TargetConfig,
    resolve,
)
from dspark_jax.drafter import make_drafter
from dspark_jax.kinds import as_kind, names

ARCH = TargetArchitecture("qwen3", 67, 32, 4, 4, 2, 8, 64, 1e-6, 1e4, True, 256)


@pytest.fixture
def base() -> Config:
    drafter = DrafterConfig(num_layers=2, block_size=5, target_layer_ids=(0, 2), mask_token_id=66, markov_rank=8)
    return Config(
        target=TargetConfig(architecture=ARCH), drafter=drafter, data=DataConfig(max_length=64, max_prompt_length=16)
    )


@pytest.mark.parametrize("kind", names())
def test_only_drafter_loss_and_rows_change(base: Config, kind: str) -> None:
    before = dataclasses.asdict(base)
    config = resolve(as_kind(base, kind))
    assert dataclasses.asdict(base) == before
    after = dataclasses.asdict(config)
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"drafter", "loss", "train"}
    one_by_one = kind in ("eagle3", "eagle3_llama", "mtp")
    rows = 64 if one_by_one or kind == "distilled" else base.train.num_anchors
    assert config.train == dataclasses.replace(base.train, num_anchors=rows)
    assert config.drafter.block_size == (1 if kind == "mtp" else 5)
    assert config.drafter.mask_token_id == (0 if one_by_one else 66)
    assert config.drafter.target_layer_ids == ((3,) if kind == "mtp" else (0, 2))
    assert (config.drafter.markov_rank == 0) == (kind in ("dflash", "fill_in") or one_by_one)
    assert config.drafter.qk_norms == (kind != "eagle3_llama")
    assert (config.drafter.block_layout == "fill_in") == (kind in ("fill_in", "dflash2"))
    assert config.drafter.block_rows == config.drafter.block_size + (kind in ("fill_in", "dflash2"))
    assert config.drafter.conv_kernel_size == (2 if kind == "dflash2" else 0)
    config.loss.ce, config.loss.extra["mine"] = 9.0, 1.0  # the presets are not shared
    assert as_kind(base, kind).loss.ce != 9.0 and "mine" not in as_kind(base, kind).loss.extra


def test_kinds_differ_in_what_they_are_named_after(base: Config) -> None:
    """Of a config with its own loss and head: dspark has the Markov head, length only another term for the l1 term."""
    base = dataclasses.replace(
        base,
        loss=LossConfig(decay=2.0, ce=0.3, l1=0.7, confidence=0.5),
        drafter=dataclasses.replace(base.drafter, markov_head_type="rnn"),
    )
    assert [as_kind(base, kind).drafter.markov_head_type for kind in ("dspark", "length", "gated", "rnn")] == [
        "vanilla", "vanilla", "gated", "rnn",
    ]  # fmt: skip
    assert as_kind(base, "length").loss == LossConfig(decay=2.0, ce=0.3, l1=0.0, confidence=0.5, length=1.0)
    assert as_kind(base, "distilled").loss == LossConfig(decay=2.0, ce=0.0, l1=0.7, confidence=0.5, soft_ce=1.0)
    assert as_kind(base, "dspark").loss == base.loss


def test_what_does_not_go_with_a_reduced_vocabulary(base: Config) -> None:
    """Data tokens may be outside it, and weight decay would change a head that is not trained."""
    config = as_kind(base, "eagle3")
    config.drafter.draft_vocab_size = 16
    for change, message in (
        ({"loss": dataclasses.replace(config.loss, ce=0.5)}, "loss.ce=0.5: the data has tokens outside"),
        ({"optim": OptimConfig(weight_decay=0.1)}, "drafter.train_head=False with optim.weight_decay=0.1"),
    ):
        drafter = dataclasses.replace(config.drafter, train_head="optim" not in change)
        with pytest.raises(InputError, match=message):
            resolve(dataclasses.replace(config, drafter=drafter, **change))


def test_other_kinds_have_nothing_of_eagle3s(base: Config) -> None:
    """Not even made of a config of EAGLE-3."""
    config = as_kind(base, "eagle3_llama")
    config.drafter.draft_vocab_size, config.drafter.eagle3_norms = 16, ("fc_norm",)
    made = resolve(as_kind(config, "dflash")).drafter
    assert (made.qk_norms, made.draft_vocab_size, made.eagle3_norms) == (True, 0, ())


def test_an_unknown_kind_is_refused(base: Config) -> None:
    with pytest.raises(
        InputError, match="drafter kind 'medusa' is unknown; use one of: dspark, dflash, dflash2, dspark5, eagle3"
    ):
        as_kind(base, "medusa")


def test_a_drafter_that_another_program_had_added_is_refused_when_it_is_made(base: Config) -> None:
    for change in ({"kind": "mine"}, {"markov_head_type": "mine"}):
        (field,) = change
        with pytest.raises(InputError, match=f"drafter.{field}='mine' is unknown; use "):
            make_drafter(ARCH, dataclasses.replace(base.drafter, **change), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("eagle3", {"num_layers": 2}, "drafter.num_layers=2: eagle3 has one layer; set it to 1"),
        ("mtp", {"block_size": 2}, "drafter.block_size=2: mtp drafts one token per round; set it to 1"),
        ("mtp", {"target_layer_ids": (1, 3)}, r"drafter.target_layer_ids=\(1, 3\): mtp reads one layer"),
        ("eagle3", {"target_layer_ids": (0, 3)}, "contains 3, the last layer"),
        ("eagle3", {"markov_rank": 4}, "drafter.kind='eagle3' has no heads"),
        ("rnn", {"markov_head_type": "lstm"}, "drafter.markov_head_type='lstm' is unknown; use vanilla, gated, rnn or"),
        ("eagle3", {"block_layout": "fill_in"}, "eagle3 has no blocks; set it to anchor_first"),
        ("dspark", {"block_layout": "zlab"}, "drafter.block_layout='zlab' is unknown; use anchor_first or fill_in"),
        ("eagle3", {"conv_kernel_size": 2}, "drafter.conv_kernel_size=2: eagle3 has no blocks; set it to 0"),
        ("dflash2", {"conv_kernel_size": 7}, "drafter.conv_kernel_size=7 exceeds the 6 rows of a block; lower it"),
        ("dflash2", {"conv_group_size": 3}, "drafter.conv_group_size=3 does not divide the target's width 32"),
        ("dflash2", {"selector_top_k": 68}, "drafter.selector_top_k=68 exceeds the vocabulary of 67; lower it"),
        ("dspark", {"qk_norms": False}, "drafter.qk_norms=False: dspark has no such setting; set it to True"),
        ("mtp", {"eagle3_norms": ("fc_norm",)}, r"drafter.eagle3_norms=\('fc_norm',\): mtp has no such setting"),
        (
            "eagle3",
            {"eagle3_norms": ("pre_norm",)},
            "drafter.eagle3_norms='pre_norm' is unknown; use norm_before_residual,",
        ),
        ("eagle3", {"eagle3_norms": ("fc_norm", "norm_before_fc")}, "which exclude each other; leave one out"),
        ("eagle3", {"draft_vocab_size": 68}, "drafter.draft_vocab_size=68 exceeds the target's vocabulary of 67"),
        ("eagle3", {"train_head": False}, "are about a head that draft_vocab_size=0 leaves out; set it"),
        (
            "eagle3",
            {"draft_vocab_size": 8, "draft_vocabulary": "x"},
            "drafter.draft_vocabulary: it is no list of tokens",
        ),
        (
            "dspark",
            {"kind": "hydra"},
            "drafter.kind='hydra' is unknown; use dspark, dflash, dflash2, dspark5, eagle3 or",
        ),
    ],
)
def test_what_does_not_hold(base: Config, kind: str, change: dict, message: str) -> None:
    config = as_kind(base, kind)
    with pytest.raises(InputError, match=message):
        resolve(dataclasses.replace(config, drafter=dataclasses.replace(config.drafter, **change)))
