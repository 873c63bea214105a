"""`convert check` names every wrong dialect that loads without complaint, and everything else that is wrong."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from dspark_jax.config import DrafterConfig, InputError, MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert import check_command, dialect
from dspark_jax.convert.__main__ import main, parser
from dspark_jax.convert.check import UNKNOWN, VERDICTS, WRONG, Report, check_directory, frozen_problems
from dspark_jax.convert.dialect import Answer, Score, find_dialect, readings
from dspark_jax.convert.drafter_files import Verdict
from dspark_jax.convert.export import Source, frozen_tensors, write_export
from dspark_jax.convert.hf import read_drafter_config, stored_tensors
from dspark_jax.convert.layouts import Layout, read_layout
from dspark_jax.drafter import make_drafter
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.vocabulary import encode_vocabulary
from tests.convert.conftest import DRAFTER

MASKS = (45, 47, 46, 0)


@pytest.fixture
def copy(world, tmp_path):
    """Copies a drafter with other settings; a key that is given as None is removed."""

    def make(drafter: str = "good", name: str = "drafter", **settings) -> Path:
        directory = shutil.copytree(world.drafters[drafter], tmp_path / name)
        raw = json.loads((directory / "config.json").read_text())
        for key, value in settings.items():
            for where in (raw, raw["dflash_config"], raw["dspark_config"]):
                if where is raw or key in where:
                    where[key] = value
                if value is None:
                    where.pop(key, None)
        (directory / "config.json").write_text(json.dumps(raw))
        return directory

    return make


def report(world, directory) -> Report:
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        return check_directory(directory, world.target, world.path, world.answers, mesh, masks=MASKS)


def verdicts(found: Report) -> dict[str, tuple[str, str]]:
    return {verdict.server: found.served(verdict) for verdict in found.verdicts}


def test_a_good_export_passes_everywhere(world, copy):
    found = report(world, copy())
    assert found.problems == () and found.good
    assert found.dialect.stated.tau > 1.7 and found.dialect.teacher > 0.4
    assert {server: word for server, (word, _) in verdicts(found).items()} == {
        "vLLM": "serves", "SGLang": "serves", "llama.cpp": "serves", "speculators": "refuses",
        "tpu-inference": "refuses", "sglang-jax": "refuses", "TensorRT-LLM": "unknown", "vllm-ascend": "serves",
    }  # fmt: skip
    assert "export with --format speculators" in verdicts(found)["speculators"][1]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"target_layer_ids": [1, 2]}, r"layer ids \[1, 2\] are one too high .* outputs of layers \[0, 1\] are meant"),
        ({"target_layer_ids": [-1, 0]}, r"layer ids \[-1, 0\] are one too low: the outputs of layers \[0, 1\]"),
        ({"mask_token_id": 0}, "mask token is 45, the file says 0"),
        ({"sample_from_anchor": False}, "blocks are anchor-first .* set sample_from_anchor to true"),
    ],
)
def test_wrong_settings_are_named(world, copy, settings, problem):
    found = report(world, copy(**settings))
    assert not found.good
    assert len(found.problems) == 1
    assert re.search(problem, found.problems[0]), found.problems
    assert "tokens per round instead of" in found.problems[0]
    words = verdicts(found)
    assert words["vLLM"][0] == "differs" and "it reads" in words["vLLM"][1]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"mask_token_id": 999}, "mask_token_id 999 is outside the target's vocabulary 0..47"),
        ({"mask_token_id": -5}, "mask_token_id -5 is outside the target's vocabulary 0..47"),
        ({"block_size": 100_000}, r"block_size 100000 exceeds the target's \d+ positions"),
    ],
)
def test_settings_that_no_row_stands_for_are_not_tried(world, copy, settings, problem):
    """An index outside a table is cut to its last row, which might well be the mask's."""
    found = report(world, copy(**settings))
    assert found.verdict == "wrong" and found.dialect is None
    assert re.fullmatch(problem, found.problems[0])


def test_a_little_more_proves_nothing_wrong(world, copy, monkeypatch):
    """Another reading has to be clearly better."""
    monkeypatch.setattr(dialect, "CLEARLY", 9.0)
    found = report(world, copy(name="close", target_layer_ids=[1, 2]))
    assert found.problems == () and found.verdict == UNKNOWN and found.dialect.best is found.dialect.stated
    assert "another reading accepts a little more" in found.unknown and "one too high" in found.unknown
    assert verdicts(found)["vLLM"][0] == "serves"


def test_a_fill_in_drafter_is_named(world, copy):
    found = report(world, copy("fill-in"))
    assert [problem.split(",")[0] for problem in found.problems] == [
        "its blocks are fill-in (row k predicts anchor + k)"
    ]
    right = report(world, copy("fill-in", "right", sample_from_anchor=False))
    assert right.problems == ()
    assert verdicts(right)["vLLM"][0] == "serves"


def test_z_labs_dflash_works_in_every_server_that_fills_blocks_in(world, tmp_path, copy):
    """In its own layout: settings in `dflash_config`, no heads, no copies of the target's matrices."""
    directory = copy("fill-in", "z-lab")
    raw = json.loads((directory / "config.json").read_text())
    heads = [name for name in raw if name.startswith(("markov_", "confidence_", "enable_", "sample_", "dspark_"))]
    raw = {name: value for name, value in raw.items() if name not in (*heads, "mask_token_id", "target_layer_ids")}
    raw |= {"architectures": ["DFlashDraftModel"], "dflash_config": {"mask_token_id": 45, "target_layer_ids": [0, 1]}}
    (directory / "config.json").write_text(json.dumps(raw))
    tensors = load_file(directory / "model.safetensors")
    own = {name: value for name, value in tensors.items() if not name.startswith(("markov", "conf", "embed", "lm_"))}
    save_file(own, directory / "model.safetensors")
    found = report(world, directory)
    words = {server: word for server, (word, _) in verdicts(found).items()}
    assert words.pop("speculators") == "refuses" and set(words.values()) == {"serves"}, words
    assert found.verdict == "works" and found.stated.drafts == 3
    assert found.dialect.stated.tau > 1.4
    shifted = json.dumps(raw | {"dflash_config": raw["dflash_config"] | {"target_layer_ids": [1, 2]}})
    (directory / "config.json").write_text(shifted)
    assert "layer ids [1, 2] are one too high" in report(world, directory).problems[0]


@pytest.mark.slow
def test_windows_and_scaled_rope_are_scored(world, copy):
    """A window that is wider than the text changes nothing; frequencies that it was not trained with do."""
    window = {"layer_types": ["sliding_attention"], "use_sliding_window": True, "sliding_window": 64}
    found = report(world, copy(**window, is_causal=False))
    assert found.verdict == "works" and verdicts(found)["vLLM"][0] == "serves"
    linear = {"rope_type": "linear", "factor": 30.0, "rope_theta": 1e4}
    other = report(world, copy("good", "other", rope_parameters=linear, rope_scaling=None))
    assert other.unsupported == () and other.dialect.stated.tau < found.dialect.stated.tau - 0.05


@pytest.mark.slow
def test_dflash2_is_scored_and_not_wrong(world, tmp_path):
    """An untrained one: it accepts next to nothing, in every dialect. With parts that are unknown it is not scored."""
    config = dataclasses.replace(
        DRAFTER, kind="dflash2", block_size=3, block_layout="fill_in", markov_head_type="selector",
        confidence_head=False, confidence_with_markov=False, conv_kernel_size=2,
    )  # fmt: skip
    drafter = make_drafter(world.target.arch, config, rngs=nnx.Rngs(0))
    raw = json.loads((world.path / "config.json").read_text())
    tensors = list(stored_tensors(drafter, config))
    source = Source(lambda: tensors, config, world.target.arch, raw, frozen_tensors(world.path), "org/target")
    directory = write_export(tmp_path / "second", source, dtype="float32")
    found = report(world, directory)
    assert found.problems == () and found.verdict == UNKNOWN and "next to nothing" in found.unknown
    assert found.stated.drafts == 3 and "a selector of rank 8 among 16" in found.lines()[0]
    assert (
        "its selector hands on 272 numbers in a row of the hidden size, which is 32" in verdicts(found)["llama.cpp"][1]
    )
    raw = json.loads((directory / "config.json").read_text())
    raw["dflash_config"]["selector_top_k"] = 5  # 5 and 5 x 5 fit
    (directory / "config.json").write_text(json.dumps(raw))
    assert "numbers in a row" not in verdicts(report(world, directory))["llama.cpp"][1]
    raw = json.loads((directory / "config.json").read_text())
    raw["dflash_config"]["output_multiplier"], raw["layer_types"] = 0.5, ["sliding_attention"]
    (directory / "config.json").write_text(json.dumps(raw))
    found = report(world, directory)
    assert found.problems == () and found.verdict == UNKNOWN
    causal = "blocks that are attended causally, as those of layers with a window are where is_causal is not false"
    assert found.unsupported == (causal, "output_multiplier 0.5")
    assert verdicts(found)["vLLM"][0] == "loads"


def test_layer_ids_of_an_eagle3_drafter_are_scored(world):
    """Its own drafts are counted; an untrained one agrees with nothing, in any dialect, which is said and not wrong."""
    config = DrafterConfig(
        kind="eagle3", num_layers=1, block_size=3, target_layer_ids=(0, 1), markov_rank=0, confidence_head=False
    )
    drafter = make_drafter(world.target.arch, config, rngs=nnx.Rngs(0))
    found = find_dialect(drafter, world.target, Layout("deepspec", "eagle3", 3, (0, 1), -1, True, 1), world.answers)
    assert {score.layout.taps for score in found.scores} == {(0, 1), (-1, 0), (1, 2)}
    assert all(score.tau < 1.2 for score in found.scores)
    assert found.findings() == [] and "accepts next to nothing in any dialect" in found.weak


@pytest.mark.parametrize("ids", [(0, 2), (-1, 1)])
def test_first_drafts_of_eagle3_are_scored_as_it_is_trained(world, ids):
    """The training pass says what it expects after every token; layer ids may begin with the embeddings or not."""
    config = DrafterConfig(
        kind="eagle3", num_layers=1, block_size=2, target_layer_ids=ids, markov_rank=0, confidence_head=False,
        initializer_range=0.3,
    )  # fmt: skip
    drafter = make_drafter(world.target.arch, config, rngs=nnx.Rngs(0))
    found = find_dialect(drafter, world.target, Layout("deepspec", "eagle3", 2, ids, -1, True, 1), world.answers)
    expected = []
    for answer in world.answers:
        tokens, mask = answer.tokens[None], np.ones((1, len(answer.tokens)), np.int32)
        out = world.target.forward(tokens, np.arange(len(answer.tokens))[None], taps=drafter.taps)
        anchors = Anchors(np.arange(len(answer.tokens))[None], mask.astype(bool))
        trained = drafter(world.target, out.features, tokens, mask, anchors).hidden[0, :, 0]
        draft, teacher = (jax.nn.softmax(world.target.unembed(x), axis=-1) for x in (trained, out.last_hidden[0]))
        shared = np.minimum(draft[:-1], teacher[1:]).sum(axis=-1)  # row t drafts after token t + 1
        last = len(answer.tokens) - 8
        expected += [shared[i - 1] for i in np.unique(np.linspace(answer.start, last, 48).astype(int))]
    np.testing.assert_allclose(found.stated.overlap, expected, atol=1e-5)


def test_a_reading_that_accepts_next_to_nothing_is_no_dialect(world, copy, monkeypatch):
    """Of two that might as well draft at random, one is better by chance or by little else."""
    monkeypatch.setattr(dialect, "NOTHING", 9.0)
    monkeypatch.setattr(dialect, "LEARNED", 9.0)
    found = report(world, copy(target_layer_ids=[1, 2]))
    most = max(score.tau for score in found.dialect.scores)
    assert found.dialect.best is found.dialect.stated and most > found.dialect.stated.tau + 0.1
    assert found.problems == () and found.verdict == UNKNOWN
    assert f"next to nothing in any dialect ({most:.2f} tokens per round at most)" in found.unknown


def test_a_wrong_dialect_is_wrong_however_little_the_stated_one_accepts(world, copy, monkeypatch):
    """What another reading accepts decides, once it is enough to tell: the low one is a symptom then, not a lack."""
    monkeypatch.setattr(dialect, "NOTHING", 1.8)
    found = report(world, copy(mask_token_id=0, target_layer_ids=[1, 2]))
    assert found.dialect.stated.tau < dialect.NOTHING < found.dialect.best.tau
    assert found.verdict == WRONG and found.unknown == "" and len(found.problems) == 2


@pytest.mark.parametrize("length", [9, 36])
def test_a_drafter_without_an_opinion_has_no_dialect(world, length):
    """Of 9 tokens, 2 are anchors with a whole block after them: 10 places in all, however often they are drafted."""
    answers = [Answer(answer.tokens[: answer.start + length], answer.start) for answer in world.answers]
    config = read_drafter_config(world.drafters["good"])[1]
    for seed in range(3):
        drafter = make_drafter(world.target.arch, config, rngs=nnx.Rngs(seed))
        stated = Layout("deepspec", "block", 4, (0, 1), 45, anchor_first=True, num_layers=1)
        found = find_dialect(drafter, world.target, stated, answers, MASKS)
        assert len(found.stated.overlap) == 5 * (length - 7)
        assert found.best is found.stated
        told = Report(stated, tuple(found.findings()), (), found, ())
        short = "UNKNOWN: too little text to tell its dialect: 5 answers of the target have 10 places to draft from, 16"
        long = "UNKNOWN: it accepts next to nothing in any dialect"
        assert [line.startswith(short if length == 9 else long) for line in told.lines()[2:-1]] == [True]
        assert not told.good and told.to_json()["unknown"] == (found.unknown or found.weak)


def test_a_good_drafter_and_too_little_text(world, copy):
    """Nothing is wrong with it, nothing is known of it; what a server reads otherwise is still said."""
    short = dataclasses.replace(world, answers=[Answer(one.tokens[:13], one.start) for one in world.answers])
    found = report(short, copy(is_causal=False))
    assert found.problems == () and not found.good and verdicts(found)["vLLM"][0] == "serves"
    found = report(short, copy(name="other", dspark_target_layer_ids=[1, 2]))
    assert found.problems == () and verdicts(found)["SGLang"][0] == "differs"
    assert verdicts(found)["SGLang"][1].endswith("vanilla Markov head of rank 8")


def test_a_better_reading_is_better_by_something():
    """A constant gain has no deviation at all; neighbours are alike, and one answer is no evidence."""
    layout, zero = Layout("deepspec", "block", 4, (0, 1), 45, anchor_first=True, num_layers=1), np.full(16, 0.5)

    def make(overlap, answer=None):
        answer = np.arange(16) // 2 if answer is None else answer
        return Score(layout, zero, np.asarray(overlap), answer[: len(overlap)], zero)

    scores = {gain: make(zero + gain) for gain in (0.0, 1e-6, 0.009, 0.011)}
    assert [score.beats(scores[0.0]) for score in scores.values()] == [False, False, False, True]
    assert not make(zero[:15] + 0.3).beats(make(zero[:15]))  # too few places
    assert not make(zero + 0.3, np.arange(16) // 8).beats(make(zero, np.arange(16) // 8))  # in too few answers
    noise = np.resize([0.2, 0.2, -0.2, -0.2], 16)  # three standard errors of the eight stretches are 0.227
    assert [make(zero + gain + noise).beats(scores[0.0]) for gain in (0.22, 0.23)] == [False, True]
    few = np.repeat([0.5, -0.01], [12, 4])  # in two answers of eight it is worse, which is more than one in five
    assert not make(zero + few).beats(scores[0.0]) and make(zero + np.abs(few)).beats(scores[0.0])


def test_layer_ids_need_no_order():
    """Lower ones than the embeddings are not tried, wherever they are."""
    stated = Layout("deepspec", "block", 4, (1, -1), 45, anchor_first=True, num_layers=1)
    assert {layout.taps for layout in readings(stated, 4)} == {(1, -1), (2, 0)}
    assert {layout.taps for layout in readings(dataclasses.replace(stated, taps=(3, 0)), 4)} == {(3, 0), (2, -1)}


def test_blocks_of_one_row_have_one_reading():
    """The other one, in which row 0 is thrown away, has nothing left."""
    stated = Layout("deepspec", "block", 1, (0, 2), 45, anchor_first=True, num_layers=1)
    assert all(layout.anchor_first for layout in readings(stated, 4))
    with pytest.raises(InputError, match="block_size=1 of a fill-in block"):
        find_dialect(None, None, dataclasses.replace(stated, anchor_first=False), [Answer(np.arange(20), 1)])


def test_golden_eagle3_is_best_as_it_is(golden_eagle3_case):
    best_as_it_is(golden_eagle3_case, serves=False)  # no server takes the reference's own EAGLE-3 directory


def test_golden_dspark_of_gemma4_is_best_as_it_is(golden_gemma4_block_case):
    best_as_it_is(golden_gemma4_block_case, serves=True)


def best_as_it_is(case, *, serves):
    """Trained by the reference: along its own greedy answers every other reading is worse by more than chance."""
    folder, path, mesh = case.folder, case.target, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    target = load_target(TargetConfig(str(path), "float32", TargetArchitecture.from_hf(path)), mesh)
    runs = case.read("decode.json")["runs"][:3]
    answers = [Answer(np.asarray(run["output_ids"], np.int32), run["num_input_tokens"]) for run in runs]
    found = check_directory(folder / "draft", target, path, answers, mesh, masks=[target.arch.vocab_size - 1])
    assert found.problems == ()
    stated = found.dialect.stated
    assert [stated.beats(other) for other in found.dialect.scores[1:]] == [True] * (len(found.dialect.scores) - 1)
    assert found.good == serves


def test_a_pre_norm_teacher_is_named(world, copy):
    found = report(world, copy("raw"))
    assert ["distilled from the target without its final norm" in problem for problem in found.problems] == [True]
    assert found.dialect.best is found.dialect.stated


def test_frozen_copies_of_another_target_are_named(world, copy):
    directory = copy()
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 0.1
    save_file(tensors, directory / "model.safetensors")
    assert ["lm_head.weight is not the target's" in problem for problem in report(world, directory).problems] == [True]


def change_tensors(directory: Path, **tensors: np.ndarray) -> Path:
    save_file(load_file(directory / "model.safetensors") | tensors, directory / "model.safetensors")
    return directory


def test_values_that_are_not_finite_are_named(world, copy):
    """Every comparison with NaN is false, and XLA's minimum of NaN and a number may be the number."""
    directory = change_tensors(copy(), **{"fc.weight": np.full((32, 64), np.nan, np.float32)})
    found = report(world, directory)
    assert not found.good and found.dialect.stated.tau == 1.0
    assert found.problems == ("tensor fc.weight holds values that are not finite: train or download it again",)
    assert found.verdict == WRONG and "accepts next to nothing" in found.unknown
    frozen = np.asarray(load_file(directory / "model.safetensors")["lm_head.weight"])
    frozen[5, 7] = np.nan
    found = frozen_problems({"lm_head.weight": frozen}, frozen_tensors(world.path))
    assert len(found) == 1 and "lm_head.weight is not the target's" in found[0]


def test_a_drafter_for_a_target_of_another_size_is_named(world, copy, golden_vanilla_case):
    found = report(world, golden_vanilla_case.folder / "draft")
    assert found.dialect is None and not found.good
    assert any(re.match(r"it is for another target: hidden size \d+, the target has 32$", p) for p in found.problems)
    assert any(re.match(r"it is for another target: vocab size \d+, the target has 48$", p) for p in found.problems)
    found = report(world, copy(target_layer_ids=[3, 4]))
    assert found.problems == ("it is for another target: layer ids [3, 4], the target's are -1..3",)


def test_a_part_of_the_vocabulary_makes_no_other_target(world, copy):
    tensors = {"lm_head.weight": np.zeros((20, 32), np.float32), "d2t": np.arange(20)}
    found = report(world, change_tensors(copy(), **tensors))
    assert found.problems == () and "a reduced draft vocabulary (tensor d2t)" in found.unknown


def test_a_drafter_that_cannot_be_loaded_is_still_replayed(world, copy):
    directory = copy()
    tensors = load_file(directory / "model.safetensors")
    del tensors["fc.weight"]
    save_file(tensors, directory / "model.safetensors")
    found = report(world, directory)
    assert found.dialect is None and "fc.weight is missing" in found.problems[0]
    assert len(found.lines()) >= 6


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type 'dynamic'"),
        (
            {"layer_types": ["sliding_attention"]},
            "blocks that are attended causally, as those of layers with a window are where is_causal is not false",
        ),
        ({"is_causal": True}, "blocks that are attended causally"),
    ],
)
def test_what_is_merely_unknown_here_is_not_wrong(world, copy, settings, part):
    """Status 3: it is not scored, servers' rules are replayed all the same."""
    directory = copy(**settings)
    found = report(world, directory)
    assert found.problems == () and found.dialect is None and found.verdict == "not known here"
    assert f"UNKNOWN: not implemented here, so it is not scored: {part}" in found.lines()
    assert verdicts(found)["vLLM"][0] == "loads" and "it reads anchor-first blocks of 4" in verdicts(found)["vLLM"][1]
    with pytest.raises(InputError, match="is not supported; "):
        read_drafter_config(directory)
    assert VERDICTS == {"works": 0, "wrong": 1, "not known here": 3}
    change_tensors(directory, **{"fc.weight": np.full((32, 64), np.nan, np.float32)})
    assert report(world, directory).verdict == "wrong"  # whatever else is unknown


def test_a_part_that_nobody_here_has_heard_of_is_not_wrong(world, copy):
    """A tensor of a kind that is known, but not in the config, is a mistake of the file."""
    found = report(world, change_tensors(copy(), **{"layers.0.self_attn.sinks": np.zeros(2, np.float32)}))
    assert found.problems == () and found.unsupported == ("tensor layers.0.self_attn.sinks",)
    assert found.verdict == UNKNOWN
    directory = copy("good", "other")
    found = report(world, change_tensors(directory, **{"markov_head.gate_proj.bias": np.zeros(8, np.float32)}))
    assert found.verdict == WRONG and "markov_head.gate_proj.bias is unknown" in found.problems[0]


def test_what_no_server_is_known_to_load(world, copy):
    """It is wrong; but one that is not implemented here may be for a server of which that is not known."""
    raw = json.loads((copy() / "config.json").read_text())
    stated = read_layout("x", raw)
    refusing = Verdict("vLLM", ("no",), (), (), None)
    asked = Verdict("TensorRT-LLM", (), (), (), None, unknown=("not verified",))
    for unsupported, found, verdict in (
        ((), (refusing,), WRONG),
        ((), (refusing, asked), WRONG),
        (("a part",), (refusing,), WRONG),
        (("a part",), (refusing, asked), UNKNOWN),
    ):
        told = Report(stated, (), unsupported, None, found)
        assert told.verdict == verdict
    assert "TensorRT-LLM unknown  not verified" in told.lines()
    written = told.to_json()["servers"]["TensorRT-LLM"]
    assert written["verdict"] == "unknown" and written["date"].startswith("20") and "1.4" in written["version"]


def test_command_ends_with_status_1_on_a_wrong_dialect(world, copy, tmp_path, capsys, monkeypatch):
    """The target's answers are replaced by those that the drafter knows."""
    prompts = [one.tokens[:4].tolist() for one in world.answers]
    written = SimpleNamespace(tokens=[one.tokens[4:] for one in world.answers])
    monkeypatch.setattr(check_command, "check_prompts", lambda *_: (prompts, list(MASKS)))
    monkeypatch.setattr(check_command, "generate", lambda *_, **__: written)
    with pytest.raises(SystemExit) as exit_:
        main(["check", f"--drafter={copy('fill-in')}", f"--target={world.path}", f"--json={tmp_path / 'r.json'}"])
    assert exit_.value.code == 1
    assert "WRONG: its blocks are fill-in" in capsys.readouterr().out
    saved = json.loads((tmp_path / "r.json").read_text())
    assert saved["servers"]["vLLM"]["verdict"] == "differs"
    best = max(saved["scores"], key=lambda one: one["tau"])
    assert not best["anchor_first"]


def test_prompts_of_the_check(world, tiny_target, tmp_path):
    options = parser().parse_args(["check", "--drafter=x", f"--target={tiny_target}", "--limit=2"])
    prompts, masks = check_command.check_prompts(options, 320)
    assert len(prompts) == 2 and {319, 151669, 4} <= set(masks)
    options.prompts = [str(tmp_path / "p.jsonl")]
    (tmp_path / "p.jsonl").write_text('{"turns": ["the sum", "of"]}\n')
    assert len(check_command.check_prompts(options, 320)[0]) == 1
    options.target = str(world.path)
    assert [len(prompt) for prompt in check_command.check_prompts(options, 48)[0]] == [12, 12]


@pytest.mark.parametrize("norms", [False, True], ids=["llama", "tensors of qwen3"])
def test_eagle3_is_looked_at_with_the_layers_that_its_file_has(world, tmp_path, norms):
    """Its own head is not compared with the target's. With norms of queries and keys it is scored with them, whatever
    class config.json names, and servers' class for Llama's layers is none for it."""
    config = DrafterConfig(
        kind="eagle3", num_layers=1, block_size=3, target_layer_ids=(-1, 0, 1), markov_rank=0, confidence_head=False,
        confidence_with_markov=False, qk_norms=False, draft_vocab_size=30,
        draft_vocabulary=encode_vocabulary(np.arange(2, 32), world.target.arch.vocab_size),
    )  # fmt: skip
    drafter = make_drafter(world.target.arch, config, rngs=nnx.Rngs(0))
    raw = json.loads((world.path / "config.json").read_text())
    tensors = dict(stored_tensors(drafter, config))
    source = Source(lambda: tensors.items(), config, world.target.arch, raw, frozen_tensors(world.path), "org/target")
    directory = write_export(tmp_path / "drafter", source, dtype="float32")
    if norms:
        weights = load_file(directory / "model.safetensors")
        weights |= {f"midlayer.self_attn.{name}_norm.weight": np.ones(16, np.float32) for name in "qk"}
        save_file(weights, directory / "model.safetensors")
    found = report(world, directory)
    assert found.unsupported == () and found.problems == () and found.dialect is not None
    said = verdicts(found)
    assert {said[name][0] == "refuses" for name in ("SGLang", "vLLM")} == {norms}
    assert "EAGLE-3 with a layer of Llama, outputs of layers [-1, 0, 1], 30 tokens" in found.lines()[0]
