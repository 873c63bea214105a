import copy
import dataclasses
import functools
import json
import math
import typing

import pytest

from dspark_jax.command import field_paths
from dspark_jax.config import (
    AnswersConfig,
    Config,
    DecodeMeshConfig,
    InputError,
    TargetArchitecture,
    TargetConfig,
    from_json,
    resolve,
    to_json,
)
from dspark_jax.config_rules import problems
from dspark_jax.ranges import RANGES

ARCH = TargetArchitecture("qwen3", 512, 64, 6, 4, 2, 16, 128, 1e-6, 1e6, True, 4096)


def valid(**parts) -> Config:
    """A config without problems, with some fields of its parts replaced."""
    config = Config(name="t", target=TargetConfig(architecture=ARCH))
    config.drafter.target_layer_ids, config.drafter.mask_token_id = (0, 2, 4), 511
    for part, fields in parts.items():
        setattr(config, part, dataclasses.replace(getattr(config, part), **fields))
    return config


def test_a_valid_config_has_no_problems():
    assert list(problems(valid())) == []


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"drafter": {"target_layer_ids": (0, 5)}}, ["target_layer_ids=(0, 5) contains 5, the last layer", "-1 to 4"]),
        ({"drafter": {"target_layer_ids": (0, 7)}}, ["contains 7, outside -1..4", "6-layer target"]),
        ({"drafter": {"target_layer_ids": (-2, 1)}}, ["contains -2, outside"]),
        ({"drafter": {"target_layer_ids": (2, 0)}}, ["ascending"]),
        ({"drafter": {"target_layer_ids": ()}}, ["ascending"]),
        ({"drafter": {"mask_token_id": 512}}, ["mask_token_id=512 is outside the vocabulary 0..511"]),
        ({"drafter": {"mask_token_id": -1}}, ["mask_token_id=-1"]),
        ({"drafter": {"kind": "dsprk"}}, ["drafter.kind='dsprk'", "dspark, dflash, dflash2, dspark5, eagle3 or mtp"]),
        ({"drafter": {"kind": "dflash"}}, ["no heads", "markov_rank=0"]),
        ({"drafter": {"markov_rank": 0}}, ["markov_rank=0 must be positive"]),
        ({"loss": {"ce": 0.0, "l1": 0.0, "confidence": 0.0}}, ["no term with a weight above 0", "loss.ce=1.0"]),
        (
            {"loss": {"ce": 0.0, "l1": 0.0}, "drafter": {"confidence_head": False, "confidence_with_markov": False}},
            ["no term with a weight above 0"],
        ),
        ({"loss": {"extra": {"selector": 1.0}}}, ["'selector', the loss of a head that", "'vanilla'"]),
        ({"train": {"steps": 0}}, ["train.steps=0 must be positive"]),
        ({"train": {"accumulate": 3}}, ["batch_size=512 is not divisible by train.accumulate=3"]),
        ({"data": {"max_prompt_length": 4096}}, ["max_prompt_length=4096 leaves no room"]),
        ({"data": {"max_length": 5000}}, ["max_length=5000 exceeds", "4096"]),
        ({"data": {"temperature": -1.0}}, ["data.temperature=-1.0 must be 0 or above"]),
        (
            {"data": {"answers": AnswersConfig(("localhost:8000",))}},
            ["endpoints has 'localhost:8000'; URLs such as http:"],
        ),
        ({"data": {"answers": AnswersConfig(("http://a/v1",) * 2)}}, ["names a server twice"]),
        (
            {"data": {"answers": AnswersConfig(mode="text")}},
            ["data.answers.mode='text' is unknown; use tokens or chat"],
        ),
        ({"data": {"answers": AnswersConfig(top_p=0.0)}}, ["data.answers.top_p=0.0 must be above 0 and at most 1"]),
        ({"data": {"answers": AnswersConfig(("http://a/v1",)), "regenerate": False}}, ["needs data.regenerate=True"]),
        ({"eval": {"temperatures": (1.0, -0.5)}}, ["eval.temperatures contains -0.5; each must be 0 or above"]),
        ({"eval": {"temperatures": (math.nan,)}}, ["eval.temperatures contains nan"]),
        ({"optim": {"learning_rate": math.inf}}, ["optim.learning_rate=inf must be positive, and finite"]),
        ({"optim": {"b2": 1.0}}, ["optim.b2=1.0 must be at least 0 and below 1"]),
        ({"optim": {"warmup_ratio": 4.0}}, ["optim.warmup_ratio=4.0 must be from 0 to 1"]),
        ({"train": {"seed": 2**31}}, ["train.seed=2147483648 must be a whole number from 0 to 2147483647"]),
        ({"target": {"dtype": "fp8"}}, ["target.dtype='fp8'", "bfloat16"]),
        ({"mesh": {"data": -1}}, ["mesh=(-1, -1, 1)"]),
        ({"mesh": {"decode": DecodeMeshConfig(tensor=-1)}}, ["mesh.decode=(-1, 1, -1)", "tensor may be 0"]),
        ({"mesh": {"decode": DecodeMeshConfig(fsdp=-1)}}, ["mesh.decode=(-1, -1, 0)", "at most one of the first two"]),
        ({"target": {"architecture": TargetArchitecture()}}, ["target.path=''", "Hugging Face"]),
    ],
)
def test_each_wrong_fact_is_one_line_with_value_and_remedy(parts, expected):
    found = list(problems(valid(**parts)))
    assert len(found) == 1 and "\n" not in found[0]
    for text in expected:
        assert text in found[0]
    with pytest.raises(InputError, match=r".+"):
        resolve(valid(**parts))


OTHER = {"drafter.mask_token_id", "drafter.markov_rank", "drafter.target_layer_ids", "mesh.data", "mesh.fsdp"}
OTHER |= {
    "mesh.tensor",
    "mesh.decode.data",
    "mesh.decode.fsdp",
    "mesh.decode.tensor",
}  # their ranges follow from other fields


def test_servers_answer_for_a_target_that_does_not_run_here():
    other = dataclasses.replace(ARCH, unsupported="qwen3 with rope_type 'yarn'")
    parts = {"target": {"architecture": other}}
    (problem,) = problems(valid(**parts, data={"features": "torch"}))
    assert problem.startswith("data.regenerate=True: a qwen3 with rope_type 'yarn' has no definition in JAX and")
    answers = AnswersConfig(("http://localhost:8000/v1",))
    assert not list(problems(valid(**parts, data={"features": "torch", "answers": answers})))


def test_every_number_has_a_range_that_no_infinity_is_in():
    numbers = {name: field.type for name, field in field_paths().items() if field.type in NUMBERS}
    shape = {name for name, kind in numbers.items() if name.startswith("target.architecture.") and kind is int}
    assert set(numbers) == set(RANGES) | OTHER | shape
    for name in RANGES:
        values = [-1] if numbers[name] in WHOLE else [-1.0, math.nan, math.inf, -math.inf]
        for value in values:
            config = copy.deepcopy(valid())
            *groups, last = name.split(".")
            owner = functools.reduce(getattr, groups, config)
            setattr(owner, last, (value,) if typing.get_origin(numbers[name]) else value)
            assert any(problem.startswith((f"{name}=", f"{name} contains")) for problem in problems(config)), name


WHOLE = (int, tuple[int, ...])
NUMBERS = (*WHOLE, float, tuple[float, ...])


def test_json_round_trip():
    config = valid(drafter={"num_layers": 3}, eval={"prompts": ("a.jsonl", "b.jsonl")})
    assert from_json(to_json(config)) == config
    older = json.loads(to_json(config))
    del older["loss"]["extra"]
    older["target"]["architecture"]["foreign"] = older["target"]["architecture"].pop("unsupported")  # up to version 0.1
    assert from_json(json.dumps(older)) == config


def test_resolve_reads_the_target_and_refuses_a_contradiction(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(ARCH.to_hf()))
    config = valid(target={"path": str(tmp_path), "architecture": TargetArchitecture()})
    assert resolve(config).target.architecture == ARCH
    assert config.target.architecture == TargetArchitecture()
    stated = dataclasses.replace(ARCH, num_hidden_layers=9)
    with pytest.raises(InputError, match=r"num_hidden_layers=9 but .* has 6"):
        resolve(valid(target={"path": str(tmp_path), "architecture": stated}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "olmo"}, "model_type 'olmo'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"model_type": "gemma4_unified", "rope_parameters": {"full_attention": {"type": "yarn"}}}, "rope_type 'yarn'"),
        ({"hidden_size": None}, "missing hidden_size"),
        ({"hidden_size": "32", "head_dim": None}, 'hidden_size "32" is not a positive whole number'),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads 0 is not a positive whole number"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\] is not an object"),
        ({"rope_theta": "1e6"}, 'rope_theta "1e6" is not a positive number'),
        ({"model_type": "gemma4_unified", "layer_types": 3}, r"layer_types has 1 entries \['3'\] for 6 layers"),
        ({"model_type": "gemma4_unified", "per_layer_config": {"5": 1}}, "5 1 is not an object"),
    ],
)
def test_unsupported_hugging_face_configs_are_refused(change, message):
    raw = ARCH.to_hf() | change
    raw = {name: value for name, value in raw.items() if value is not None}
    with pytest.raises(InputError, match=message):
        TargetArchitecture.from_hf(raw)


def test_a_window_that_no_layer_has_is_none():
    """transformers reads use_sliding_window only where layer_types is absent."""
    whole = ["full_attention"] * ARCH.num_hidden_layers
    raw = ARCH.to_hf() | {"use_sliding_window": True, "sliding_window": 8}
    assert TargetArchitecture.from_hf(raw | {"layer_types": whole}) == ARCH
    for kinds in (None, ["sliding_attention", *whole[1:]]):
        with pytest.raises(InputError, match="use_sliding_window true|sliding_attention"):
            TargetArchitecture.from_hf(raw | {"layer_types": kinds})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"attention_bias": True}, "qwen3 with attention_bias true"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5}}, "qwen3 with rope_type 'yarn'"),
        ({"model_type": "gemma4_text", "hidden_size_per_layer_input": 256},
         "gemma4_text with hidden_size_per_layer_input 256"),
        ({"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "enable_moe_block": True},
         "gemma4_text with enable_moe_block true"),
    ],
)  # fmt: skip
def test_relatives_of_a_known_family_lend_their_features(tmp_path, change, what):
    """What `from_hf` refuses has a drafter all the same, trained on features from PyTorch; what is damaged has none."""
    raw = ARCH.to_hf() | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = TargetArchitecture.of_any_model(tmp_path)
    assert found.unsupported == what and found.model_type == "qwen3"
    theta = 5e5 if "yarn" in what else ARCH.rope_theta
    assert (found.hidden_size, found.num_hidden_layers, found.rope_theta) == (ARCH.hidden_size, 6, theta)
    config = valid(target={"path": str(tmp_path), "architecture": TargetArchitecture()}, data={"features": "torch"})
    with pytest.raises(InputError, match="data.regenerate=True: a .* with .* has no definition in JAX"):
        resolve(config)
    with pytest.raises(InputError, match="is not supported.*or train from its features with data.features=torch"):
        resolve(valid(target={"path": str(tmp_path), "architecture": TargetArchitecture()}))
    (tmp_path / "config.json").write_text(json.dumps(raw | {"hidden_size": "32"}))
    with pytest.raises(InputError, match='hidden_size "32" is not a positive whole number'):
        TargetArchitecture.of_any_model(tmp_path)


@pytest.mark.parametrize("read", [TargetArchitecture.from_hf, TargetArchitecture.of_any_model])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json: no such file|nowhere: no such file"),
        (b"[1]", "not a JSON object; download it again"),
        (b"{", r"config.json:1: not valid JSON"),
        (b'{"a": "\xe9"}', r"not valid JSON \(not UTF-8\)"),
        (b'{"model_type": "gemma4", "text_config": null}', "missing vocab_size"),
        (b'{"model_type": "gemma4", "text_config": [1]}', r"text_config \[1\] is not an object"),
    ],
)
def test_damaged_model_configs_are_one_line(tmp_path, read, content, message):
    path = tmp_path / ("nowhere" if content is None else "model")
    if content is not None:
        path.mkdir()
        (path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read(path)
    assert "\n" not in str(error.value)
