"""The drafter that comes with a DeepSeek-V4: in bfloat16 and as the releases store it, read, exported, and served."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from dspark_jax import quickstart, start
from dspark_jax.config import (
    Config,
    DrafterConfig,
    InputError,
    MeshConfig,
    TargetArchitecture,
    TargetConfig,
    TrainConfig,
)
from dspark_jax.convert.__main__ import main as convert
from dspark_jax.convert.check import check_directory
from dspark_jax.convert.dialect import Answer
from dspark_jax.convert.export import Source, write_export
from dspark_jax.convert.hf import (
    drafter_tensors,
    expected_tensors,
    import_drafter,
    read_drafter_config,
    stored_tensors,
)
from dspark_jax.convert.layouts import read_layout
from dspark_jax.convert.servers import replay
from dspark_jax.convert.stages import stages_config, stages_tensors
from dspark_jax.run import Run
from dspark_jax.sharding import make_mesh, one_device
from dspark_jax.target.families import FAMILIES
from dspark_jax.target.loading import read_checkpoint
from dspark_jax.training.optim import make_optimizer
from dspark_jax.training.state import to_params

VOCAB, D, LAYERS = 24, 32, 4
CONFIG = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": VOCAB, "hidden_size": D,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32,
    "qk_rope_head_dim": 8, "q_lora_rank": 32, "o_lora_rank": 32, "o_groups": 2, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "routed_scaling_factor": 2.5,
    "scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "topk_method": "noaux_tc", "swiglu_limit": 10.0,
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "rms_norm_eps": 1e-6, "rope_theta": 10000,
    "compress_rope_theta": 160000, "compress_ratios": [0, 0, 4, 128, 0, 0], "sliding_window": 16, "hidden_act": "silu",
    "num_hash_layers": 2, "max_position_embeddings": 512, "tie_word_embeddings": False, "num_nextn_predict_layers": 1,
    "dspark_block_size": 5, "dspark_noise_token_id": 23, "dspark_target_layer_ids": [2, 3], "dspark_markov_rank": 8,
}  # fmt: skip
WANTED = DrafterConfig(
    kind="dspark5", num_layers=2, block_size=5, target_layer_ids=(2, 3), mask_token_id=23, markov_rank=8,
    sliding_window=16, layer_sizes={
        "num_attention_heads": 4, "head_dim": 32, "qk_rope_head_dim": 8, "q_lora_rank": 32, "o_lora_rank": 32,
        "o_groups": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
        "routed_scaling_factor": 2.5, "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
        "rope_theta": 10000,
    },
)  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    return expected_tensors(TargetArchitecture("qwen3", VOCAB, D, LAYERS, 4, 1, 32, 32), WANTED)


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.1, shape).astype(ml_dtypes.bfloat16) for name, shape in shapes().items()}


def write(path: Path, stored: dict[str, np.ndarray], **change: Any) -> Path:
    path.mkdir()
    models = {
        "embed.weight": (VOCAB, D),
        "head.weight": (VOCAB, D),
        "norm.weight": (D,),
        "layers.0.attn_norm.weight": (D,),
    }
    others = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in models.items()}
    save_file(stored | others, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({k: v for k, v in (CONFIG | change).items() if v is not None}))
    return path


def test_the_drafter_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    config, drafter = import_drafter(write(tmp_path / "v4", tensors()), one_device())
    assert config == WANTED
    found = drafter_tensors(drafter, config)
    assert set(found) == set(tensors()) and all(name.startswith("mtp.") for name in found)
    for name, value in tensors().items():
        np.testing.assert_array_equal(found[name].astype(ml_dtypes.bfloat16), value)


def test_training_begins_with_it(tmp_path: Path) -> None:
    """`train.init_from` names the checkpoint; every parameter is taken over."""
    directory = write(tmp_path / "v4", tensors())
    arch = TargetArchitecture("qwen3", VOCAB, D, LAYERS, 4, 1, 32, 32)
    config = Config(
        target=TargetConfig(architecture=arch), drafter=WANTED, train=TrainConfig(init_from=str(directory), steps=4)
    )
    start.check_start(config)
    run = Run(config, tmp_path / "run", one_device())
    begun = start.fresh_state(run, make_optimizer(config.optim, 4)).params
    _, drafter = import_drafter(directory, one_device())
    expected = to_params(drafter)
    assert jax.tree.structure(begun) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(begun), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def quantised(stored: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Tensors as the releases have them, and their values: FP8 in blocks, and FP4 of the experts that are chosen."""
    rng, codes, values = np.random.default_rng(1), dict(stored), dict[str, np.ndarray]()
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
    for name, shape in ((name, value.shape) for name, value in stored.items()):
        if ".experts." in name:
            four = rng.integers(0, 16, shape)
            exponents = rng.integers(120, 126, (shape[0], shape[1] // 32)).astype(np.uint8)
            codes[name] = (four[:, 0::2] + 16 * four[:, 1::2]).astype(np.uint8).view(np.int8)
            values[name] = table[four] * np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, axis=1)
        elif ".attn.w" in name or "shared_experts" in name or "main_proj" in name:
            codes[name] = stored[name].astype(ml_dtypes.float8_e4m3fn)
            exponents = rng.integers(120, 126, tuple(-(-size // 16) for size in shape)).astype(np.uint8)
            scale = np.kron(2.0 ** (exponents.astype(np.float32) - 127), np.ones((16, 16)))[: shape[0], : shape[1]]
            values[name] = codes[name].astype(np.float32) * scale
        else:
            values[name] = stored[name].astype(np.float32)
            continue
        codes[name.removesuffix("weight") + "scale"] = exponents.view(ml_dtypes.float8_e8m0fnu)
    return codes, values


RELEASED = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [16, 16]}


def test_a_quantised_drafter_has_the_values_that_its_codes_stand_for() -> None:
    codes, values = quantised(tensors())
    found = stages_tensors(
        codes | {"embed.weight": np.ones(1)}, CONFIG | {"quantization_config": RELEASED, "expert_dtype": "fp4"}, "here"
    )
    assert set(found) == set(values)
    for name, value in values.items():
        np.testing.assert_array_equal(np.asarray(found[name], np.float32), value, err_msg=name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func 'sigmoid'"),
        ({"n_shared_experts": 2}, "n_shared_experts 2"),
        ({"dspark_n_routed_experts": 128}, "dspark_n_routed_experts 128"),
        ({"dspark_markov_rank": None}, "missing dspark_markov_rank"),
        ({"dspark_noise_token_id": "x"}, "dspark_noise_token_id"),
        ({"dspark_target_layer_ids": []}, "dspark_target_layer_ids"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read_drafter_config(write(tmp_path / "v4", {}, **change))


def test_a_checkpoint_without_its_drafter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there are no tensors mtp.*"):
        import_drafter(write(tmp_path / "v4", {}), make_mesh(MeshConfig()))
    with pytest.raises(InputError, match="tensor mtp.1.markov_head.markov_w2.weight is missing"):
        import_drafter(
            write(tmp_path / "cut", {k: v for k, v in tensors().items() if "w2.weight" not in k or "markov" not in k}),
            one_device(),
        )
    with pytest.raises(InputError, match='quant_method "awq"'):
        stages_tensors(tensors(), {"quantization_config": {"quant_method": "awq"}}, "here")


def test_fields_that_are_not_there_have_the_values_of_the_releases() -> None:
    left_out = ("n_routed_experts", "qk_rope_head_dim", "head_dim", "sliding_window", "rope_theta")
    short = {name: value for name, value in CONFIG.items() if name not in left_out}
    found = stages_config(read_layout("here", short), short)
    assert found.layer_sizes["n_routed_experts"] == 256 and found.layer_sizes["qk_rope_head_dim"] == 64
    assert found.sliding_window == 128 and found.num_layers == 2 and found.layer_sizes["rope_theta"] == 10000


def source(tmp_path: Path, target: dict[str, Any]) -> Any:
    """The drafter of a checkpoint as what is to be exported for a target with this config."""
    config, drafter = import_drafter(write(tmp_path / "v4", tensors()), one_device())
    arch = TargetArchitecture("qwen3", VOCAB, D, LAYERS, 4, 1, 32, 32)
    return Source(lambda: stored_tensors(drafter, config), config, arch, target, {}, "org/v4")


def test_an_export_has_the_names_fields_and_bytes_of_the_checkpoint(tmp_path: Path) -> None:
    write_export(tmp_path / "out", source(tmp_path, CONFIG))
    config, drafter = import_drafter(tmp_path / "out", one_device())
    assert config == WANTED
    stored = read_checkpoint(tmp_path / "out")
    assert set(stored) == set(tensors())
    for name, value in tensors().items():
        exact = any(part in name for part in (".hc_", "attn_sink", "gate.bias"))  # in float32, as in the releases
        wanted = value.astype(np.float32) if exact else value
        assert stored[name].dtype == wanted.dtype and stored[name].tobytes() == wanted.tobytes(), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {"architectures", "dtype", "n_mtp_layers", "enable_confidence_head"}
    assert {name for name in written if written[name] != CONFIG.get(name)} <= changed
    assert written["n_mtp_layers"] == 2 and drafter.block_size == 5


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_an_export_for_a_quantised_target_is_quantised_as_the_releases_are(tmp_path: Path, experts: str) -> None:
    """With the names and types of the release. Values that are quantised do not change, others by a rounding."""
    target = CONFIG | {"quantization_config": RELEASED, "expert_dtype": experts}
    codes, values = quantised(tensors())
    write(tmp_path / "release", codes, quantization_config=RELEASED)
    given = values if experts == "fp4" else {name: value.astype(np.float32) for name, value in tensors().items()}
    arch = TargetArchitecture("qwen3", VOCAB, D, LAYERS, 4, 1, 32, 32)
    write_export(tmp_path / "out", Source(lambda: given.items(), WANTED, arch, target, {}, "org/v4"))
    stored = read_checkpoint(tmp_path / "out")
    assert set(stored) == set(codes)
    if experts == "fp4":
        types = {name: value.dtype for name, value in read_checkpoint(tmp_path / "release").items() if "mtp." in name}
        exact = {name for name in types if any(part in name for part in (".hc_", "attn_sink", "gate.bias"))}
        assert {name: value.dtype for name, value in stored.items() if name not in exact} == {
            name: kind for name, kind in types.items() if name not in exact
        }
    back = stages_tensors(stored, json.loads((tmp_path / "out" / "config.json").read_text()), "here")
    for name, value in given.items():
        error = np.abs(np.asarray(back[name], np.float32) - value).max() / np.abs(value).max()
        assert error <= (0 if experts == "fp4" else 2**-4), name


@pytest.mark.parametrize(
    ("target", "form", "said"),
    [
        (CONFIG, "speculators", "--format speculators has no word for the layers of a dspark5"),
        (CONFIG | {"model_type": "qwen3"}, "universal", "its target is a qwen3: no server would load it"),
        (CONFIG | {"quantization_config": {"quant_method": "awq"}}, "universal", "quant_method 'awq'"),
    ],
)
def test_what_no_server_would_load_is_not_exported(tmp_path: Path, target: dict, form: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        write_export(tmp_path / "out", source(tmp_path, target), form=form)
    assert not (tmp_path / "out").exists()


def verdicts(*, whole: bool = True, **change: Any) -> dict[str, Any]:
    arch = TargetArchitecture("qwen3", VOCAB, D, LAYERS, 4, 1, 32, 32)
    there = shapes() | ({"embed.weight": (VOCAB, D)} if whole else {})
    return {one.server: one for one in replay("export", CONFIG | {"n_mtp_layers": 2} | change, there, arch)}


def test_what_servers_make_of_it() -> None:
    found = verdicts()
    for name in ("vLLM", "SGLang"):
        assert not (found[name].refusals or found[name].wrong or found[name].unknown), found[name]
        assert found[name].reading == read_layout("here", CONFIG)
    others = [name for name in found if name not in ("vLLM", "SGLang")]
    assert all(found[name].unknown or found[name].refusals for name in others)
    assert "it makes 3 layers, the file has 2: set n_mtp_layers" in verdicts(n_mtp_layers=None)["vLLM"].refusals
    assert "one layer for each of the 2 tapped layers" in verdicts(n_mtp_layers=3)["SGLang"].refusals[0]
    alone = verdicts(whole=False)
    assert alone["SGLang"].unknown and not alone["vLLM"].unknown


@pytest.mark.slow
def test_check_scores_the_drafter_of_a_checkpoint(tmp_path: Path) -> None:
    """With a random target of these sizes; both are random, so that nothing is accepted but by chance."""
    directory = write(tmp_path / "v4", tensors(), n_mtp_layers=2)
    arch = TargetArchitecture.from_hf(directory)
    family = FAMILIES["deepseek_v4"].model()
    assert family is not None
    target: Any = family(arch, rngs=nnx.Rngs(0), scale=0.3)
    rng = np.random.default_rng(2)
    answers = [Answer(rng.integers(0, 20, 60).astype(np.int32), 4) for _ in range(3)]
    report = check_directory(directory, target, directory, answers, one_device())
    assert not report.unsupported and report.dialect is not None
    assert report.stated.dialect == "deepseek" and report.dialect.stated.tau >= 1
    assert not report.problems, report.problems
    damaged = {name: value for name, value in tensors().items() if not name.endswith("main_norm.weight")}
    report = check_directory(write(tmp_path / "cut", damaged), target, directory, answers, one_device())
    assert "tensor mtp.0.main_norm.weight is missing" in report.problems[0]


@pytest.mark.slow
@pytest.mark.parametrize("released", [True, False])
def test_import_and_export_as_commands(tmp_path: Path, released: bool, capsys: pytest.CaptureFixture[str]) -> None:
    stored, fields = tensors(), dict[str, Any]()
    if released:
        stored, fields = quantised(stored)[0], {"quantization_config": RELEASED, "expert_dtype": "fp4"}
    model, run, out = write(tmp_path / "v4", stored, **fields), tmp_path / "run", tmp_path / "out"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(quickstart.__path__[0]) / "target" / name, model)
    convert(["import", f"--drafter={model}", f"--target={model}", f"--workdir={run}"])
    convert(["export", f"--workdir={run}", f"--output={out}"])
    convert(["export", f"--drafter={model}", f"--target={model}", f"--output={tmp_path / 'again'}"])
    capsys.readouterr()
    want = {name: value for name, value in read_checkpoint(model).items() if name.startswith("mtp.")}
    for place in (out, tmp_path / "again"):
        found = read_checkpoint(place)
        assert set(found) == set(want)
        assert all(found[name].shape == value.shape for name, value in want.items())
    card = (out / "README.md").read_text()
    assert "embedding and LM head are the target's; they are not in the weights" in card and "Qwen3" not in card
