"""Every command of the README with targets that have experts, states or sinks, as transformers writes them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax import calibrate, command, evaluate, generate, prepare, train
from dspark_jax.convert.__main__ import main as convert
from dspark_jax.data.chat import load_tokenizer, prompt_tokens, stop_tokens

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = dict(
    vocab_size=320, hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.15,
)  # fmt: skip
MOE = dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32)
HYBRID = dict(
    layer_types=["linear_attention", "full_attention", "linear_attention"], linear_num_key_heads=2,
    linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
)  # fmt: skip
V4 = dict(
    num_key_value_heads=1, moe_intermediate_size=32, q_lora_rank=24, n_routed_experts=8, num_experts_per_tok=2,
    num_hash_layers=1, o_groups=2, o_lora_rank=8, index_n_heads=16, index_head_dim=8, index_topk=3, sliding_window=6,
    qk_rope_head_dim=4, compress_rate_csa=4, compress_rate_hca=8, compress_ratios=[0, 4, 128, 4], num_hidden_layers=4,
)  # fmt: skip
CASES = {  # model class, its config's class, fields besides `SIZES`
    "DeepSeek-V4": ("DeepseekV4", "DeepseekV4Config", V4),
    "hybrid mixture": ("Qwen3_5Moe", "Qwen3_5MoeTextConfig", HYBRID | MOE | {"shared_expert_intermediate_size": 24}),
    "GPT-OSS": ("GptOss", "GptOssConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 8}),
}
PROMPT = "the sum of the numbers"
CHANGES = (
    "drafter.num_layers=1", "drafter.block_size=3", "drafter.target_layer_ids=(0,1)", "drafter.mask_token_id=319",
    "drafter.markov_rank=8", "data.max_prompt_length=32", "data.max_length=48", "train.steps=4", "train.batch_size=8",
    "train.num_anchors=8", "train.checkpoint_every=2", "eval.max_new_tokens=12", "eval.speed_prompts=1",
    "eval.bootstrap=50", "data.limit=8", "eval.limit=2", "mesh.decode.data=1", "mesh.decode.fsdp=-1",
)  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def made(request: Any, tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random model in several bfloat16 files, and the same in PyTorch."""
    folder = tmp_path_factory.mktemp("target")
    name, config, fields = CASES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, config)(**SIZES | fields)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16)
    for path, table in model.named_buffers():
        if path.endswith("tid2eid"):
            table.copy_(torch.stack([torch.randperm(8)[:2] for _ in range(SIZES["vocab_size"])]))
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_target / name, folder)
    return folder, model.float().eval()


def greedy(model: Any, prompt: list[int], count: int, stops: Any) -> list[int]:
    """The answer that PyTorch gives, up to a stop token."""
    text = list(prompt)
    while len(text) < len(prompt) + count and text[-1] not in stops:
        with torch.no_grad():
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    return text[len(prompt) :]


@pytest.mark.slow
def test_every_command(made: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, model = made
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the sum of {i} numbers"}) + "\n" for i in range(8)))

    def run(workdir: str, *more: str) -> list[str]:
        paths = [f"target.path={target}", f"data.prompts=('{prompts}',)", f"eval.prompts=('{prompts}',)"]
        settings = [f"--config.{change}" for change in (*paths, *CHANGES, *more)]
        return ["--config=quickstart", f"--workdir={tmp_path / workdir}", *settings]

    def metrics(workdir: str) -> list[float]:
        lines = (tmp_path / workdir / "metrics.jsonl").read_text().splitlines()
        return [line["loss"] for line in map(json.loads, lines) if "loss" in line]

    one, mesh = ("train.log_every=1",), ("mesh.data=-1", "mesh.fsdp=2", "mesh.tensor=2")
    command.run(prepare.prepare, argv=run("run", *one))
    shutil.copytree(tmp_path / "run", tmp_path / "split")
    command.run(train.train, argv=run("run", *one, "train.evaluate=False"))
    command.run(evaluate.evaluate, argv=run("run", *one))
    assert json.loads((tmp_path / "run" / "eval" / "metrics.json").read_text())["greedy_identical"]
    command.run(calibrate.calibrate, define=calibrate._define, argv=run("run", *one))
    assert (tmp_path / "run" / "calibration.json").exists()
    command.run(train.train, argv=run("split", *mesh, "train.log_every=1", "train.evaluate=False"))
    np.testing.assert_allclose(metrics("split"), metrics("run"), rtol=1e-3)

    capsys.readouterr()
    ask = [f"--prompt={PROMPT}"]
    command.run(generate.generate, define=generate._define, argv=run("run", *one) + ask)
    answer = capsys.readouterr().out
    tokenizer = load_tokenizer(target)
    question = prompt_tokens(tokenizer, [{"role": "user", "content": PROMPT}])
    tokens = greedy(model, question, 12, stop_tokens(target, tokenizer))
    assert answer.strip() == tokenizer.decode(tokens, skip_special_tokens=True).strip()

    export, imported = tmp_path / "export", tmp_path / "imported"
    convert(["export", f"--workdir={tmp_path / 'run'}", f"--output={export}"])
    convert(["check", f"--drafter={export}", f"--target={target}", f"--prompts={prompts}", "--tokens=24"])
    convert(["import", f"--drafter={export}", f"--target={target}", f"--workdir={imported}"])
    capsys.readouterr()
    there = run("imported", *one, "drafter.dtype=auto") + ask  # an import does not know what it was trained in
    command.run(generate.generate, define=generate._define, argv=there)
    assert capsys.readouterr().out == answer
