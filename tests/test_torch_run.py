"""A target that only PyTorch has, from its prompts to the export: features, training, tau, calibration, check."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import pytest

from dspark_jax.calibrate import calibrate
from dspark_jax.compare import _measure_times
from dspark_jax.config import (
    Config,
    DataConfig,
    DrafterConfig,
    EvalConfig,
    InputError,
    MeshConfig,
    OptimConfig,
    TargetConfig,
    TrainConfig,
    resolve,
)
from dspark_jax.convert.__main__ import main as convert
from dspark_jax.evaluate import evaluate
from dspark_jax.evaluation.comparison_plan import make_plan
from dspark_jax.evaluation.held_out import check_held_out
from dspark_jax.evaluation.setup import load_run
from dspark_jax.generate import generate
from dspark_jax.profile import profile
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh
from dspark_jax.target.in_torch import runs_in_torch
from dspark_jax.train import train
from tests.conftest import others_slow

torch = pytest.importorskip("torch")
SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 256, "initializer_range": 0.08}
FAMILIES = {"Olmo2": True, "GPTNeoX": False}  # name -> tied embeddings


@pytest.fixture
def config(tiny_target: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Config:
    """Of a small random model with a tokenizer, and conversations with answers."""
    import transformers

    name = getattr(request, "param", "Olmo2")
    torch.manual_seed(0)
    shape = getattr(transformers, f"{name}Config")(**SIZES, tie_word_embeddings=FAMILIES[name], eos_token_id=0)
    getattr(transformers, f"{name}ForCausalLM")(shape).save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_target / file, tmp_path / "model" / file)
    answer = {"role": "assistant", "content": "the answer is the sum of the numbers " * 3}
    talks = [{"messages": [{"role": "user", "content": f"say {i}"}, answer]} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in talks))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"prompt": f"how much {i}"}) + "\n" for i in range(4)))
    return resolve(
        Config(
            name="foreign",
            target=TargetConfig(path=str(tmp_path / "model")),
            drafter=DrafterConfig(
                num_layers=1, block_size=3, target_layer_ids=(0,), mask_token_id=319, markov_rank=8
            ),
            data=DataConfig(
                prompts=(str(tmp_path / "train.jsonl"),),
                max_length=96, max_prompt_length=64, features="torch", regenerate=False, min_loss_tokens=8,
            ),
            optim=OptimConfig(learning_rate=3e-3),
            train=TrainConfig(steps=12, batch_size=4, num_anchors=8, log_every=12, checkpoint_every=12, vocab_chunk=64),
            mesh=MeshConfig(1, 1, 1),
            eval=EvalConfig(
                prompts=(str(tmp_path / "test.jsonl"),), batch_size=4, max_new_tokens=12, bootstrap=20,
                temperatures=(1.0,),
            ),
        )
    )  # fmt: skip


@pytest.fixture(autouse=True)
def single_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make_mesh` over one of the eight host devices."""
    one = lambda config, devices=None: make_mesh(config, devices or jax.devices()[:1])  # noqa: E731
    monkeypatch.setattr("dspark_jax.run.make_mesh", one)
    for module in ("__main__", "sources"):
        monkeypatch.setattr(f"dspark_jax.convert.{module}.make_mesh", one)
    monkeypatch.setattr("dspark_jax.evaluation.plots.Plot.svg", lambda self, theme: "<svg/>")


@pytest.mark.parametrize("config", others_slow(FAMILIES), indirect=True)
def test_from_prompts_to_the_export(config: Config, tmp_path: Path, capsys: Any) -> None:
    workdir, out = tmp_path / "run", tmp_path / "out"
    train(config, workdir)  # which prepares, and evaluates at the end
    said = capsys.readouterr()
    metrics = json.loads((workdir / "eval/metrics.json").read_text())
    assert "model runs in PyTorch (" in said.err and metrics["target_runs_in"] == "PyTorch"
    assert f"macro average            {metrics['tau']:.2f} (" in said.out and metrics["tau"] > 1.3
    assert "speed is not measured, as the target runs in PyTorch" in said.out
    assert metrics["greedy_identical"] and metrics["tokens_per_second"] is None
    found = calibrate(config, workdir)
    assert len(found[1.0]["temperatures"]) == 3
    request = generate(config, workdir, prompt="how much?", temperature=1.0, max_new_tokens=12)
    assert request.done and "tau" in capsys.readouterr().err
    convert(["export", f"--workdir={workdir}", f"--output={out}", "--dtype=float32"])
    assert "convert check --drafter DIR" in (out / "README.md").read_text()
    capsys.readouterr()
    try:
        convert(["check", f"--drafter={out}", f"--target={config.target.path}", "--limit=4", "--tokens=32"])
    except SystemExit as status:  # what it has learned in 12 steps is little
        assert status.code in (1, 3)
    said = capsys.readouterr().out
    assert "tokens per round as stated" in said and "embed_tokens" not in said and "lm_head" not in said
    convert(["import", f"--drafter={out}", f"--target={config.target.path}", f"--workdir={tmp_path / 'back'}"])
    back = load_run(tmp_path / "back")
    assert runs_in_torch(back.models.target) and back.models.block_size == 3


def test_what_a_target_in_pytorch_cannot_do_is_one_line(config: Config, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(InputError, match="profile: a olmo2 has no definition in JAX and is run by PyTorch, request"):
        profile(config, tmp_path)
    with pytest.raises(InputError, match="--traffic=2,4: a olmo2 has no definition in JAX and is run by PyTorch"):
        evaluate(config, tmp_path, traffic="2,4")
    config.train.evaluate_every = 12
    cube = Run(config, tmp_path, make_mesh(MeshConfig(2, 2, 2), jax.devices()))
    with pytest.raises(InputError, match="train.evaluate_every=12: a olmo2 is run by PyTorch, which decodes on one"):
        check_held_out(cube)
    check_held_out(Run(config, tmp_path))
    plan, now = make_plan(config, "main", 1), {"eval.prompts": None}
    assert _measure_times(Run(config, tmp_path), plan, now, {}, lambda *_: "never asked") == {}
    assert "compare: the time of a round is not measured: a olmo2 is run by PyTorch" in "".join(capsys.readouterr())
