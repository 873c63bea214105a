"""The command line: a run becomes a directory with everything that is served with it, and back."""

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.config import (
    Config,
    DrafterConfig,
    InputError,
    MeshConfig,
    TargetArchitecture,
    TargetConfig,
    TrainConfig,
    resolve,
)
from dspark_jax.convert import check_command, sources
from dspark_jax.convert.__main__ import main, parser
from dspark_jax.convert.check import Report
from dspark_jax.convert.check_command import check_prompts
from dspark_jax.convert.export import Source, frozen_tensors, write_export
from dspark_jax.convert.hf import drafter_tensors, expected_tensors, import_drafter, read_drafter_config
from dspark_jax.convert.hub import push
from dspark_jax.convert.layouts import Layout
from dspark_jax.convert.mapping import FROZEN
from dspark_jax.convert.targets import fitting
from dspark_jax.data.features import frozen_file
from dspark_jax.sharding import make_mesh
from dspark_jax.start import check_start
from dspark_jax.target.frozen import save_frozen
from dspark_jax.training.checkpoint import load_drafter
from dspark_jax.training.state import to_params


def mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def run(tiny_target, save_untrained, tmp_path_factory):
    """A run of a drafter that was never trained, with a made-up evaluation and side files."""
    workdir = tmp_path_factory.mktemp("run")
    drafter = DrafterConfig(num_layers=1, block_size=3, target_layer_ids=(0,), mask_token_id=319, markov_rank=8)
    config = Config(
        name="tiny", target=TargetConfig(path=str(tiny_target)), drafter=drafter, train=TrainConfig(num_anchors=9)
    )
    config.data.max_length, config.data.max_prompt_length, config.mesh = 64, 32, MeshConfig(1, -1, 1)
    save_untrained(resolve(config), workdir, make_mesh(MeshConfig()))
    (workdir / "calibration.json").write_text('{"temperatures": [1.0, 1.1, 1.2]}')
    (workdir / "cost_table.json").write_text('{"sample_batch_tokens": [1], "sample_steps_per_sec": [9]}')
    report = {"samples": 3, "tokens": 500, "loss_tokens": 77, "inputs": {"data": {"regenerate": True}}}
    report["prompt_sets"] = {"sums": {"samples": 3, "tokens": 500, "loss_tokens": 77}}
    metrics = {"temperature": 1.0, "tau": 2.5, "tau_ci95": [2.25, 2.75]}
    metrics["prompt_sets"] = {"sums": {"tau": 2.5, "tau_ci95": [2.25, 2.75], "survival": [0.9, 0.6, 0.25]}}
    for file, content in {"data/report.json": report, "eval/metrics.json": metrics}.items():
        (workdir / file).parent.mkdir(exist_ok=True)
        (workdir / file).write_text(json.dumps(content))
    return workdir


def test_export_of_a_run_and_import_of_it(run, tiny_target, tmp_path, monkeypatch):
    """With the figures of the exported step, and of files that do not say of which step they are."""
    output, lines, figures = tmp_path / "out", list[str](), dict[str, str]()
    main(["export", f"--workdir={run}", f"--output={output}", "--dtype=float32", "--target-name=org/base"])
    names = {path.name for path in output.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md", "calibration.json", "cost_table.json"}
    assert json.loads((output / "config.json").read_text())["num_anchors"] == 9
    assert (output / "calibration.json").read_bytes() == (run / "calibration.json").read_bytes()
    card = (output / "README.md").read_text()
    for fact in ("base_model: org/base", "| sums | 3 | 500 | 77 |", "| sums | 2.50 | 2.25-2.75 | 0.90 | 0.25 |"):
        assert fact in card
    assert "--speculative-dspark-confidence-sts-path DIR/calibration.json" in card
    assert "vllm serve org/base --speculative-config" in card and "convert_hf_to_gguf.py DIR" in card

    monkeypatch.setattr(sources, "log", lines.append)
    for file, step in {"calibration.json": 0, "eval/metrics.json": 2, "data/report.json": 1}.items():
        figures[file] = (run / file).read_text()
        (run / file).write_text(json.dumps(json.loads(figures[file]) | {"step": step}))
    main(["export", f"--workdir={run}", f"--output={tmp_path / 'later'}"])
    for file, text in figures.items():
        (run / file).write_text(text)
    assert {path.name for path in (tmp_path / "later").iterdir()} == names - {"calibration.json"}
    card = (tmp_path / "later" / "README.md").read_text()
    assert "## Training data" in card and "## Accepted length" not in card and "sts-path" not in card
    left_out = [line for line in lines if "left out" in line]
    assert [line.split(": it is ")[1] for line in left_out] == [
        "of step 2, the drafter of step 1", "of step 0, the drafter of step 1",
    ]  # fmt: skip

    main(["import", f"--drafter={output}", f"--target={tiny_target}", f"--workdir={tmp_path / 'again'}"])
    config, back = load_drafter(tmp_path / "again", mesh())
    first_config, first = load_drafter(run, mesh())
    assert dataclasses.replace(config.drafter, dtype="auto") == first_config.drafter
    ours, theirs = to_params(first), to_params(back)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_z_labs_dflash_is_imported_and_goes_on_training(tiny_target, tmp_path):
    """With what their files state, and no more: no copies of the target's matrices, no word about the layout."""
    config = dataclasses.replace(
        DrafterConfig("dflash", 2, 5, (-1, 0), 319, 0, False, False), block_layout="fill_in"
    )  # fmt: skip
    shapes, rng = expected_tensors(TargetArchitecture.from_hf(tiny_target), config), np.random.default_rng(0)
    tensors = {name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items() if name not in FROZEN}
    raw = json.loads((tiny_target / "config.json").read_text()) | {
        "architectures": ["DFlashDraftModel"], "num_target_layers": 2, "num_hidden_layers": 2, "block_size": 6,
        "dflash_config": {"mask_token_id": 319, "target_layer_ids": [-1, 0]},
    }  # fmt: skip
    (tmp_path / "z-lab").mkdir()
    (tmp_path / "z-lab" / "config.json").write_text(json.dumps(raw))
    save_file(tensors, tmp_path / "z-lab" / "model.safetensors")
    main(["import", f"--drafter={tmp_path / 'z-lab'}", f"--target={tiny_target}", f"--workdir={tmp_path / 'run'}"])
    imported, drafter = load_drafter(tmp_path / "run", mesh())
    assert imported.drafter == config
    for name, value in drafter_tensors(drafter, config).items():
        np.testing.assert_array_equal(value, tensors[name], err_msg=name)
    check_start(dataclasses.replace(imported, train=TrainConfig(init_from=str(tmp_path / "z-lab"))))
    out = tmp_path / "out"
    main(["export", f"--workdir={tmp_path / 'run'}", f"--output={out}", "--dtype=float32", "--slim"])
    back, written = load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())
    assert back.keys() == tensors.keys() and all(np.array_equal(back[name], tensors[name]) for name in tensors)
    assert {name: written[name] for name in ("architectures", "block_size", "dflash_config")} == {
        name: raw[name] for name in ("architectures", "block_size", "dflash_config")
    }


@pytest.fixture(scope="module")
def olmo_run(save_untrained, tmp_path_factory):
    """A run for a target without a definition here, which scales its embedding by 4 and caps its logits at 30."""
    folder, rng = tmp_path_factory.mktemp("olmo"), np.random.default_rng(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64}
    config = {"model_type": "olmo", "architectures": ["OlmoForCausalLM"], "bos_token_id": 7, "pretraining_tp": 1}
    (folder / "config.json").write_text(json.dumps(config | sizes))
    stored = rng.normal(size=(64, 32)).astype(np.float32)
    save_file({"model.tok.weight": stored}, folder / "model.safetensors")  # its embedding may have any name
    drafter = DrafterConfig(num_layers=1, block_size=3, target_layer_ids=(0, 1), mask_token_id=63, markov_rank=8)
    config = Config(name="olmo", target=TargetConfig(path=str(folder)), drafter=drafter)
    config.data.features, config.data.regenerate, config.train.evaluate = "torch", False, False
    config.data.max_length, config.data.max_prompt_length, config.mesh = 64, 32, MeshConfig(1, -1, 1)
    workdir = folder / "run"
    save_untrained(resolve(config), workdir, make_mesh(MeshConfig()))
    (workdir / "features").mkdir()
    frozen = 4 * stored, rng.normal(size=(64, 32)).astype(np.float32)
    save_frozen(frozen_file(workdir / "features"), *frozen, 30.0)
    return workdir, folder, frozen


def test_export_of_a_drafter_for_a_target_without_a_definition(olmo_run, tmp_path, capsys):
    """To be served elsewhere: as the Qwen3 that it is, with the target's matrices from training."""
    workdir, target, frozen = olmo_run
    main(["export", f"--workdir={workdir}", f"--target={target}", f"--output={tmp_path / 'a'}", "--dtype=float32"])
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    assert (raw["model_type"], raw["architectures"], raw["num_target_layers"]) == ("qwen3", ["Qwen3DSparkModel"], 4)
    assert (raw["bos_token_id"], raw["intermediate_size"]) == (7, 48) and "pretraining_tp" not in raw
    for name, value in zip(FROZEN, frozen, strict=True):
        np.testing.assert_array_equal(load_file(tmp_path / "a" / "model.safetensors")[name], value)
    back, first = import_drafter(tmp_path / "a", mesh())[1], load_drafter(workdir, mesh())[1]
    for name, value in to_params(first).items():
        np.testing.assert_array_equal(value, to_params(back)[name], err_msg=name)
    card = (tmp_path / "a" / "README.md").read_text()
    for fact in ("The target is a olmo", "multiplies its embedding by 4;", "caps its logits at 30", "vllm serve"):
        assert fact in card
    assert (
        "SGLang cannot serve it: the target multiplies its embedding by 4" in card
        and "convert check --drafter DIR" in card
    )
    main(
        ["export", f"--drafter={tmp_path / 'a'}", f"--target={target}", f"--output={tmp_path / 'b'}", "--dtype=float32"]
    )
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert error_of(capsys, ["export", f"--workdir={workdir}", "--slim", f"--output={tmp_path / 'c'}"]).startswith(
        "error: --slim leaves out embedding and LM head, but the target multiplies its embedding by 4"
    )


def test_export_names_figures_of_another_type(run, tmp_path, capsys):
    file = run / "eval" / "metrics.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"temperature": None}))
    said = error_of(capsys, ["export", f"--workdir={run}", f"--output={tmp_path / 'a'}"])
    file.write_text(before)
    assert "metrics.json: temperature is None; remove it, and make it anew" in said and not (tmp_path / "a").exists()


@pytest.mark.slow
def test_check_needs_the_whole_of_such_a_target(olmo_run, tmp_path, capsys):
    workdir, target, _ = olmo_run
    main(["export", f"--workdir={workdir}", f"--output={tmp_path / 'a'}"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as status:
        main(["check", f"--drafter={tmp_path / 'a'}", f"--target={target}"])
    said = capsys.readouterr().err
    assert status.value.code == 2 and len(said.splitlines()) == 1
    assert "tensor lm_head.weight and 29 more is missing; download the checkpoint again" in said


def test_a_directory_is_converted(run, tiny_target, tmp_path):
    main(["export", f"--workdir={run}", f"--output={tmp_path / 'a'}"])
    source = [f"--drafter={tmp_path / 'a'}", f"--target={tiny_target}"]
    main(["export", *source, f"--output={tmp_path / 'b'}", "--format=speculators", "--slim"])
    assert import_drafter(tmp_path / "b", mesh())[0] == import_drafter(tmp_path / "a", mesh())[0]
    assert (tmp_path / "b" / "cost_table.json").exists()


def test_a_drafter_for_other_weights_is_said_to_be_one(run, tiny_target, tmp_path, monkeypatch):
    """It may be meant, for a target that was fine-tuned from its own; what is written is right for the target."""
    lines = list[str]()
    monkeypatch.setattr(sources, "log", lines.append)
    main(["export", f"--workdir={run}", f"--output={tmp_path / 'a'}"])
    shutil.copytree(tiny_target, tmp_path / "tuned")
    file = tmp_path / "tuned" / "model.safetensors"
    tuned = {name: value * (1.2 if "embed" in name else 1) for name, value in load_file(file).items()}
    save_file({name: np.asarray(value, np.float32) for name, value in tuned.items()}, file)
    for target, told in ((tiny_target, 0), (tmp_path / "tuned", 1)):
        source, output = [f"--drafter={tmp_path / 'a'}", f"--target={target}"], tmp_path / f"out{told}"
        for action, place in (("export", "--output"), ("import", "--workdir")):
            lines.clear()
            main([action, *source, f"{place}={output}_{action}"])
            said = [line for line in lines if "embed_tokens.weight is not the target's; it was trained for" in line]
            assert len(said) == told


def test_a_report_that_cannot_be_written_is_told_before_the_work(run, tiny_target, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["check", f"--drafter={run}", f"--target={tiny_target}", f"--json={tmp_path / 'none' / 'x.json'}"])
    assert f"{tmp_path / 'none'} is no directory" in capsys.readouterr().err


def test_a_field_of_the_drafters_is_named_with_its_file(run, tiny_target, tmp_path, capsys):
    main(["export", f"--workdir={run}", f"--output={tmp_path / 'a'}", "--format=speculators"])
    file = tmp_path / "a" / "config.json"
    raw = json.loads(file.read_text())
    raw["transformer_layer_config"]["rope_parameters"] = 7
    file.write_text(json.dumps(raw))
    with pytest.raises(SystemExit):
        main(["import", f"--drafter={file.parent}", f"--target={tiny_target}", f"--workdir={tmp_path / 'w'}"])
    assert f"error: {file}: rope_parameters 7 is not an object" in capsys.readouterr().err


def test_drafter_and_target_may_be_on_the_hub(run, tiny_target, tmp_path, monkeypatch):
    main(["export", f"--workdir={run}", f"--output={tmp_path / 'a'}"])
    there = {"org/drafter": tmp_path / "a", "org/base": tiny_target}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(there[name]))
    main(["export", "--drafter=org/drafter", "--target=org/base", f"--output={tmp_path / 'b'}"])
    assert "base_model: org/base" in (tmp_path / "b" / "README.md").read_text()
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["export", "--output=x"], "export needs --config or --workdir of a run, or --drafter DIR"),
        (["export", "--workdir=RUN", "--drafter=x", "--output=x"], "--workdir and --drafter: only one of the two"),
        (["export", "--workdir=nowhere", "--output=x"], "nowhere/checkpoints: no checkpoint here"),
        (["export", "--workdir=RUN", "--output=my-dflash"], "vLLM guesses the method from the path"),
        (["export", "--workdir=RUN", "--output=x", "--push=me/Qwen-DFlash"], "--push me/Qwen-DFlash: vLLM guesses the"),
        (["export", "--workdir=RUN", "--output=x", "--push=eagle3-lab/x"], "'eagle3' in it is not how this dspark"),
        (["check", "--drafter=x", "--target=x", "--limit=-1"], "--limit: -1 is not a whole number of at least 1"),
        (["check", "--drafter=x", "--target=x", "--tokens=0"], "--tokens: 0 is not a whole number of at least 1"),
        (["import", "--drafter=RUN", "--target=TARGET", "--workdir=x"], "config.json: no such file"),
    ],
)
def test_bad_input_is_one_line(run, tiny_target, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    argv = [part.replace("RUN", str(run)).replace("TARGET", str(tiny_target)) for part in argv]
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_.value.code == 2
    assert "error: " in error and message in error
    assert list(tmp_path.iterdir()) == []


def test_import_refuses_a_drafter_of_another_width(run, golden_vanilla_case, tmp_path, capsys):
    main(["export", f"--workdir={run}", f"--output={tmp_path / 'a'}"])
    target = golden_vanilla_case.target
    with pytest.raises(SystemExit):
        main(["import", f"--drafter={tmp_path / 'a'}", f"--target={target}", f"--workdir={tmp_path / 'w'}"])
    assert "vocab_size is 320" in capsys.readouterr().err


LAYERS_OWN = {"rope_theta": 777.0, "intermediate_size": 48, "rms_norm_eps": 1e-5, "num_key_value_heads": 2}


@pytest.mark.parametrize("name", LAYERS_OWN)
def test_import_refuses_layers_of_another_shape_and_conversion_keeps_it(name, tiny_target, tmp_path, capsys):
    """A run builds them in the target's shape: another RoPE base would go unnoticed there, and draft other tokens."""
    raw = json.loads((tiny_target / "config.json").read_text())
    arch = TargetArchitecture.from_hf(raw | {name: LAYERS_OWN[name]})
    config = DrafterConfig(num_layers=1, block_size=3, target_layer_ids=(0,), mask_token_id=319, markov_rank=8)
    tensors = {name: np.ones(shape) for name, shape in expected_tensors(arch, config).items() if name not in FROZEN}
    source = Source(tensors.items, config, arch, raw, frozen_tensors(tiny_target), "org/target")
    first = write_export(tmp_path / "a", source)
    argv = ["import", f"--drafter={first}", f"--target={tiny_target}", f"--workdir={tmp_path / 'w'}"]
    assert f"a: {name} is {LAYERS_OWN[name]}, that of {tiny_target} is {raw[name]}" in error_of(capsys, argv)
    assert not (tmp_path / "w").exists()
    main(["export", f"--drafter={first}", f"--target={tiny_target}", f"--output={tmp_path / 'b'}"])
    assert getattr(read_drafter_config(tmp_path / "b")[0], name) == LAYERS_OWN[name]
    assert (first / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["global_head_dim", "attention_k_eq_v", "partial_rotary_factor", "rope_theta"])
def test_what_gemma_layers_read_must_be_the_targets_and_nothing_else(name):
    target = TargetArchitecture("gemma4", 320, 32, global_head_dim=32, partial_rotary_factor=0.25, head_dim=16)
    fitting(Path("d"), dataclasses.replace(target, head_dim=8, sliding_rope_theta=2.0), "t", target, whole=True)
    other = dataclasses.replace(target, **{name: 2 * getattr(target, name) or True})
    with pytest.raises(InputError, match=f"^d: {name} is .*, that of t is "):
        fitting(Path("d"), other, "t", target, whole=True)


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("calibration.json", "{}", "no calibration (KeyError: 'temperatures'); run calibrate again, or remove it"),
        ("calibration.json", '{"temperatures": [1, 2]}', "has 2 temperatures; 3 positive ones are needed"),
        ("cost_table.json", '{"sample_batch_tokens": "x"}', "no cost table ("),
    ],
)
def test_what_no_server_could_use_is_not_exported(run, tiny_target, tmp_path, capsys, name, content, expected):
    """Neither from a run nor from a directory."""
    main(["export", f"--workdir={run}", f"--output={tmp_path / 'a'}"])
    (tmp_path / "a" / name).write_text(content)
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    for argv in ([f"--workdir={tmp_path / 'run'}"], [f"--drafter={tmp_path / 'a'}", f"--target={tiny_target}"]):
        assert f"/{name}: {expected}" in error_of(capsys, ["export", *argv, f"--output={tmp_path / 'b'}"])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run"]


def test_check_says_which_lines_are_no_prompts(tiny_target, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "a"}\nnonsense\n{}\n')
    options = argparse.Namespace(target=str(tiny_target), prompts=[str(file)], limit=0)
    asked, _ = check_prompts(options, 320)
    said = capsys.readouterr().err
    assert len(asked) == 1 and "2 lines are no prompts and are left out, the first is" in said and "p.jsonl:2" in said


def test_a_file_of_frozen_matrices_that_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / "there.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match="there.safetensors"):
        save_frozen(tmp_path / "there.safetensors", np.ones((2, 2)), np.ones((2, 2)), 0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]
    frozen_file(tmp_path).with_suffix(".tmp").mkdir()
    with pytest.raises(OSError, match="directory"):
        save_frozen(frozen_file(tmp_path), np.ones((2, 2)), np.ones((2, 2)), 0.0)
    with pytest.raises(FileNotFoundError, match="none/frozen.safetensors"):  # of which only the number is known here
        save_frozen(frozen_file(tmp_path / "none"), np.ones((2, 2)), np.ones((2, 2)), 0.0)


def test_export_refuses_a_target_of_another_vocabulary(run, tmp_path, golden_vanilla_case, capsys):
    main(["export", f"--workdir={run}", f"--output={tmp_path / 'a'}"])
    argv = ["export", f"--drafter={tmp_path / 'a'}", f"--target={golden_vanilla_case.target}"]
    error = error_of(capsys, [*argv, f"--output={tmp_path / 'b'}"])
    assert "vocab_size is 320" in error and error.endswith("this drafter is for another target")


def error_of(capsys, argv):
    """The one line that a command with bad input ends with."""
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_report_is_shown_even_if_its_file_cannot_be_written(tmp_path, capsys):
    stated = Layout("deepspec", "block", 7, (1, 9), 45, anchor_first=True, num_layers=5)
    report = Report(stated, ("it is broken",), (), None, ())
    with pytest.raises(InputError, match=r"^--json .*none/r.json: cannot be written \(No such file or directory\)"):
        check_command.show(report, str(tmp_path / "none" / "r.json"))
    assert "WRONG: it is broken" in capsys.readouterr().out
    check_command.show(report, str(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text())["problems"] == ["it is broken"]


class FakeHub:
    """Stands for `huggingface_hub.HfApi`."""

    def __init__(self, error: Exception | None = None):
        self.error = error
        self.calls = []

    def create_repo(self, repository, *, private, exist_ok):
        assert exist_ok
        self.calls.append(("create", repository, private))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repository}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        if self.error:
            raise self.error
        self.calls.append(("upload", repo_id, sorted(path.name for path in Path(folder_path).iterdir())))
        self.calls.append(("delete what is not among these", sorted(delete_patterns)))


def test_push_uploads_the_whole_directory(run, tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    main(["export", f"--workdir={run}", f"--output={tmp_path / 'out'}", "--push=me/drafter", "--private"])
    files = ["README.md", "calibration.json", "config.json", "cost_table.json", "model.safetensors"]
    calls = [("create", "me/drafter", True), ("upload", "me/drafter", files)]
    assert hub.calls == [*calls, ("delete what is not among these", files)]  # files is all that there can be


def test_push_errors_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match="no connection to the hub.*the export is complete: hf upload"):
        push(tmp_path, "me/drafter", api=FakeHub(ConnectionError("down")))
    with pytest.raises(InputError, match="use OWNER/NAME"):
        push(tmp_path, "a/b/c/d", api=huggingface_hub.HfApi(token="none"))


def test_offline_push_fails_in_one_line_and_keeps_the_export(run, tmp_path):
    command = [sys.executable, "-m", "dspark_jax.convert", "export", f"--workdir={run}", f"--output={tmp_path / 'out'}"]
    done = subprocess.run(
        [*command, "--push=me/drafter"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "none"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "offline mode is on (HF_HUB_OFFLINE)" in done.stderr.splitlines()[-1]
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_help_shows_the_commands():
    text = parser().format_help()
    assert "python -m dspark_jax.convert export --workdir" in text and "import" in text
