"""The rules by which servers load a drafter, replayed on config.json and shapes: what refuses, what reads it how."""

import json

import pytest
from safetensors.numpy import load_file

from dspark_jax.config import InputError, TargetArchitecture
from dspark_jax.convert.__main__ import main
from dspark_jax.convert.check import Report
from dspark_jax.convert.layouts import read_layout, unsupported_parts
from dspark_jax.convert.servers import replay

ARCH = TargetArchitecture("qwen3", 48, 32, 4, 2, 1, 16, 64)


def files(untrained) -> tuple[dict, dict]:
    _, drafter = untrained
    raw = json.loads((drafter / "config.json").read_text())
    shapes = {name: value.shape for name, value in load_file(drafter / "model.safetensors").items()}
    return raw, shapes


def refusals(raw, shapes, path="drafter", target=ARCH) -> dict[str, tuple[str, ...]]:
    return {verdict.server: verdict.refusals for verdict in replay(path, raw, shapes, target)}


def without(values: dict, *names: str) -> dict:
    return {name: value for name, value in values.items() if not any(part in name for part in names)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_layer_ids": 3}, "target_layer_ids 3 is not a list of layer ids"),
        ({"target_layer_ids": "1,2"}, 'target_layer_ids "1,2" is not a list of layer ids'),
        ({"target_layer_ids": []}, r"target_layer_ids \[\] is not a list of layer ids"),
        ({"dspark_target_layer_ids": ["1"]}, r'dspark_target_layer_ids \["1"\] is not a list'),
        ({"block_size": "seven"}, 'block_size "seven" is not a whole number'),
        ({"mask_token_id": True}, "mask_token_id true is not a whole number"),
        ({"dflash_config": [1]}, r"dflash_config \[1\] is not an object"),
        ({"dspark_config": {"block_size": "7"}}, 'block_size "7" is not a whole number'),
        ({"speculators_model_type": "dspark", "transformer_layer_config": "x"}, 'config "x" is not an object'),
        ({"architectures": 5}, "architectures 5 is not one of"),
    ],
)
def test_values_of_another_type_are_one_line(untrained, change, message):
    raw, shapes = files(untrained)
    with pytest.raises(InputError, match=message):
        replay("x", raw | change, shapes, ARCH)


def test_null_is_absent(untrained):
    raw, shapes = files(untrained)
    nothing = {"draft_vocab_size": None, "dspark_config": None, "eagle_aux_hidden_state_layer_ids": None}
    assert refusals(raw | nothing, shapes)["vLLM"] == ()
    layers = {"speculators_model_type": "eagle3", "transformer_layer_config": {}, "speculators_config": None}
    assert read_layout("x", layers | {"eagle_aux_hidden_state_layer_ids": [1]}).block_size == 0


def test_gated_heads_are_refused_where_they_are(untrained):
    raw, shapes = files(untrained)
    found = refusals(raw | {"markov_head_type": "gated"}, shapes | {"markov_head.gate_proj.weight": (8, 40)})
    assert found["vLLM"] == ("only the vanilla Markov head is loaded, this is gated (gate_proj)",)
    assert found["llama.cpp"] == ("only the vanilla Markov head is converted, this is gated",)
    assert found["SGLang"] == ()


def test_gemma_is_for_vllm_only(untrained):
    raw, shapes = files(untrained)
    raw |= {"architectures": ["Gemma4DSparkModel"], "model_type": "gemma4_text", "attention_k_eq_v": True}
    found = refusals(raw, shapes)
    assert found["vLLM"] == ()
    assert found["SGLang"] == ("there is no Gemma4DSparkModel in it: serve Gemma 4 with vLLM",)
    assert found["llama.cpp"] == ()
    assert "cap no logits" in refusals(raw | {"final_logit_softcapping": 30.0}, shapes)["llama.cpp"][0]
    assert "must be in the file" in refusals(raw, without(shapes, "lm_head"))["vLLM"][0]
    assert "attention_k_eq_v" in refusals(raw | {"attention_k_eq_v": False}, shapes)["vLLM"][0]
    wide = refusals(raw, shapes | {"layers.0.self_attn.k_norm.weight": (32,)})
    assert wide["vLLM"] == ("global_head_dim must be in config.json and 32, as heads are wide; export again",)
    targets = {"0": {"head_dim": 16}, "5": {"head_dim": 16}, "11": {"head_dim": 16}}
    assert (
        "per_layer_config is of layers 5, 11, the drafter has 1"
        in refusals(raw | {"per_layer_config": targets}, shapes)["vLLM"][0]
    )
    gated = replay("x", raw | {"markov_head_type": "rnn"}, shapes | {"markov_head.joint_proj.weight": (1, 1)}, ARCH)
    assert gated[0].refusals == () and "ignores tensors it does not know: joint_proj" in gated[0].wrong[0]


def test_dflash_needs_a_zero_markov_head(untrained):
    raw, shapes = files(untrained)
    raw |= {"markov_rank": 0, "enable_confidence_head": False, "dflash_config": {}, "dspark_config": {}}
    found = refusals(raw, without(shapes, "markov", "confidence"))
    assert "all-zero Markov head" in found["vLLM"][0] and "all-zero Markov head" in found["SGLang"][0]
    assert any("SGLANG_RAGGED_VERIFY_MODE=static" in text for text in found["SGLang"])


@pytest.mark.parametrize(
    ("change", "server", "message"),
    [
        ({"markov_rank": None}, "vLLM", "markov_rank is not at the top level"),
        ({"dflash_config": {"sample_from_anchor": True}}, "vLLM", "sample_from_anchor true inside dflash_config"),
        ({"architectures": ["DSparkDraftModel"], "model_type": "llama"}, "vLLM", "taken for DeepSeek-V4"),
        ({"architectures": ["Qwen3Eagle3Model"]}, "vLLM", "Qwen3Eagle3Model is not registered"),
        ({"architectures": ["Qwen3Eagle3Model"]}, "SGLang", "no query and key norms"),
        ({"architectures": ["Qwen3Eagle3Model"]}, "llama.cpp", "no query and key norms"),
        ({"draft_vocab_size": 20}, "vLLM", "d2t is required"),
        ({"dspark_target_layer_ids": [-1, 0]}, "SGLang", "-1, the embeddings, is not known to it"),
        ({"dspark_target_layer_ids": [0]}, "SGLang", "fc.weight reads 64 features, 1 layers of width 32 give 32"),
        ({"dspark_mask_token_id": 48}, "SGLang", "mask_token_id 48 is outside"),
    ],
)
def test_server_rules(untrained, change, server, message):
    raw, shapes = files(untrained)
    assert any(message in text for text in refusals(raw | change, shapes)[server])


def test_shapes_that_llama_cpp_refuses(untrained):
    raw, shapes = files(untrained)
    found = refusals(raw, shapes | {"confidence_head.proj.weight": (1, 32)})
    assert "is [1, 32], beside a Markov head it must be [1, 40]" in found["llama.cpp"][0]
    assert "d2t" in refusals(raw, shapes | {"d2t": (20,)})["SGLang"][0]


def test_precedence_of_layer_ids(untrained):
    """vLLM uses eagle_aux ids as they are, before all others; SGLang goes by dspark_ prefixes and nested dicts."""
    raw, shapes = files(untrained)
    raw |= {"eagle_aux_hidden_state_layer_ids": [3, 4], "dspark_target_layer_ids": [1, 2]}
    found = {verdict.server: verdict.reading for verdict in replay("x", raw, shapes, ARCH)}
    assert found["vLLM"].taps == (2, 3)
    assert found["SGLang"].taps == (1, 2)
    assert found["llama.cpp"].taps == (0, 1)
    del raw["eagle_aux_hidden_state_layer_ids"]
    assert raw["dflash_config"]["target_layer_ids"] == [0, 1]  # nested ones, before prefixed and top-level ones
    other = raw | {"target_layer_ids": [2, 3]}
    assert replay("x", other, shapes, ARCH)[0].reading.taps == (0, 1)
    raw["dflash_config"] = {"mask_token_id": 7}
    found = {verdict.server: verdict.reading for verdict in replay("x", raw, shapes, ARCH)}
    assert (found["vLLM"].taps, found["vLLM"].mask_token_id) == ((1, 2), 7)
    assert found["SGLang"].mask_token_id == 45


def test_masks_under_the_name_of_noise(untrained):
    """SpecForge may have the mask in `dspark_config` only, where vLLM does not look."""
    raw, shapes = files(untrained)
    raw = without(raw, "dflash_config", "mask_token_id") | {"architectures": ["DSparkDraftModel"]}
    for noise, mask in (({"dspark_noise_token_id": 7}, 7), ({}, -1)):
        assert replay("x", raw | noise, shapes, ARCH)[0].reading.mask_token_id == mask
    assert (
        replay("x", raw | {"dspark_noise_token_id": 7, "mask_token_id": 9}, shapes, ARCH)[0].reading.mask_token_id == 9
    )


SLIDING = {"layer_types": ["sliding_attention"]}


@pytest.mark.parametrize(
    ("change", "server", "message"),
    [
        ({}, "vLLM", ""),
        ({"is_causal": True}, "vLLM", "blocks are attended causally"),
        ({"dflash_config": {"causal": True}}, "vLLM", "blocks are attended causally"),
        (SLIDING, "vLLM", "blocks are attended causally"),
        ({"is_causal": False, "dflash_config": {"causal": True}}, "vLLM", ""),
        (SLIDING | {"dflash_config": {"causal": False}}, "vLLM", ""),
        ({}, "SGLang", ""),
        ({"dspark_target_layer_ids": [0, 3]}, "SGLang", "layer 3, the last one, is never captured"),
    ],
)
def test_what_is_computed_differently_is_said(untrained, change, server, message):
    raw, shapes = files(untrained)
    found = {verdict.server: verdict for verdict in replay("x", without(raw, "norm_before") | change, shapes, ARCH)}
    assert found[server].refusals == ()
    said = [text for text in (*found[server].wrong, *found[server].notes) if "causally" in text or "captured" in text]
    assert len(said) == bool(message) and message in "".join(said)


def test_layers_with_and_without_a_window_need_a_newer_runner_of_vllm(untrained):
    raw, shapes = files(untrained)
    raw |= {"architectures": ["DFlashDraftModel"], "num_hidden_layers": 2, "is_causal": False}
    for types, told in ((["sliding_attention", "full_attention"], 1), (["sliding_attention"] * 2, 0)):
        verdict = replay("x", raw | {"layer_types": types}, shapes, ARCH)[0]
        assert len([note for note in verdict.notes if "VLLM_USE_V2_MODEL_RUNNER=1" in note]) == told


def test_speculators_files_without_a_layout_are_fill_in_for_vllm(untrained, tmp_path):
    target, drafter = untrained
    source = [f"--drafter={drafter}", f"--target={target}"]
    main(["export", *source, f"--output={tmp_path / 's'}", "--format=speculators", "--dtype=float32"])
    raw = json.loads((tmp_path / "s" / "config.json").read_text())
    _, shapes = files(untrained)
    found = {verdict.server: verdict for verdict in replay("x", raw, shapes, ARCH)}
    assert found["vLLM"].reading.anchor_first and found["vLLM"].reading.taps == (0, 1)
    assert found["SGLang"].refusals
    del raw["sample_from_anchor"]
    found = {verdict.server: verdict for verdict in replay("x", raw, shapes, ARCH)}
    assert not found["vLLM"].reading.anchor_first and not found["llama.cpp"].reading.anchor_first
    assert found["speculators"].reading.anchor_first


def test_a_package_that_serves_nothing_makes_no_file_good(untrained):
    """A gated head in the speculators format: its package reads it, every server refuses."""
    raw, shapes = files(untrained)
    raw = {name: raw[name] for name in ("block_size", "mask_token_id", "markov_rank")} | {
        "speculators_model_type": "dspark", "transformer_layer_config": {"num_hidden_layers": 1},
        "aux_hidden_state_layer_ids": [1, 2], "sample_from_anchor": True, "markov_head_type": "gated",
    }  # fmt: skip
    for head, serving in (("gated", ["speculators"]), ("vanilla", ["vLLM", "llama.cpp", "speculators"])):
        config = raw | {"markov_head_type": head}
        found = Report(read_layout("x", config), (), (), None, tuple(replay("x", config, shapes, ARCH)))
        assert [verdict.server for verdict in found.verdicts if found.served(verdict)[0] == "loads"] == serving
        assert found.verdict == ("wrong" if head == "gated" else "not known here")


def test_paths_mislead_vllm(untrained):
    raw, shapes = files(untrained)
    notes = replay("models/my-dflash-drafter", raw, shapes, ARCH)[0].notes
    assert notes[:1] == ('the path has \'dflash\' in it: state "method": "dspark" in --speculative-config',)
    eagle = raw | {"architectures": ["Eagle3Qwen3ForCausalLM"], "eagle_aux_hidden_state_layer_ids": [1, 2]}
    notes = [replay(path, eagle, shapes, ARCH)[0].notes for path in ("dflash-and-eagle3", "x", "my-dflash-runs/e3")]
    assert [note[:-1] for note in notes[:2]] == [(), ()]
    assert notes[2][:-1] == ('the path has \'dflash\' in it: state "method": "eagle3" in --speculative-config',)


IDS = "eagle_aux_hidden_state_layer_ids"
LLAMA = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 48, "hidden_size": 32, "draft_vocab_size": 20}
LLAMA_SHAPES = {"fc.weight": (32, 96), "midlayer.self_attn.q_proj.weight": (32, 64), "d2t": (20,), "t2d": (48,)}


@pytest.mark.parametrize(
    ("name", "settings", "loading"),
    [
        (
            "LlamaForCausalLMEagle3",
            {},
            dict.fromkeys(["vLLM", "SGLang", "llama.cpp", "sglang-jax", "TensorRT-LLM"], (1, 1, 0)),
        ),
        (
            "LlamaForCausalLMEagle3",
            {IDS: [1, 2, 3]},
            dict.fromkeys(["vLLM", "llama.cpp", "TensorRT-LLM"], (0, 1, 2))
            | dict.fromkeys(["SGLang", "sglang-jax"], (1, 1, 0)),
        ),
        (
            "LlamaForCausalLMEagle3",
            {"eagle_config": {IDS: [0, 1, 2]}},
            dict.fromkeys(["vLLM", "llama.cpp", "sglang-jax"], (1, 1, 0))
            | dict.fromkeys(["SGLang", "TensorRT-LLM"], (0, 1, 2)),
        ),
        (
            "Eagle3LlamaForCausalLM",
            {},
            dict.fromkeys(["vLLM", "llama.cpp", "TensorRT-LLM", "vllm-ascend"], (1, 1, 0)),
        ),
        (
            "speculators",
            {IDS: [1, 2, 3]},
            {"vLLM": (0, 1, 2), "llama.cpp": (0, 1, 2), "speculators": (0, 1, 2)},
        ),
    ],
)
def test_llama_layers_are_what_the_field_trains_eagle3_with(name, settings, loading):
    """No server refuses them for norms that they do not have; each looks for layer ids in its own place."""
    raw = LLAMA | {"architectures": [name]} | settings
    if name == "speculators":
        raw = {"speculators_model_type": "eagle3", "transformer_layer_config": LLAMA, "draft_vocab_size": 20} | settings
    found = replay("x", raw, LLAMA_SHAPES, ARCH)
    assert {verdict.server: verdict.reading.taps for verdict in found if verdict.reading} == loading
    assert "norms" not in str([verdict.refusals for verdict in found])
    qwen = LLAMA_SHAPES | {"midlayer.self_attn.q_norm.weight": (16,)}
    refused = {verdict.server: " ".join(verdict.refusals) for verdict in replay("x", raw, qwen, ARCH)}
    assert "no query and key norms" in refused["SGLang"] and "no query and key norms" in refused["llama.cpp"]


def test_llama_eagle3_of_another_width_is_refused():
    found = refusals(LLAMA | {"architectures": ["LlamaForCausalLMEagle3"]}, LLAMA_SHAPES | {"fc.weight": (32, 160)})
    for server in ("vLLM", "SGLang", "llama.cpp"):
        assert found[server] == ("fc.weight reads 160 features, it takes 3 layers of width 32: 96",)
    five = LLAMA | {"architectures": ["LlamaForCausalLMEagle3"], IDS: [0, 1, 2, 3, 4]}
    assert "exactly three layers" in refusals(five, LLAMA_SHAPES)["llama.cpp"][0]


@pytest.mark.parametrize(
    ("change", "taps"),
    [({}, None), ({"dflash_config": {"target_layer_ids": [1, 2]}}, (1, 2))],
)
def test_tpu_inference_takes_fill_in_dflash(untrained, change, taps):
    """With its settings in `dflash_config` only; where the mask is missing there, it is token 0."""
    raw, shapes = files(untrained)
    raw = without(raw, "sample_from_anchor", "dflash_config", "dspark_config") | {"architectures": ["DFlashDraftModel"]}
    verdict = next(one for one in replay("x", raw | change, shapes, ARCH) if one.server == "tpu-inference")
    assert (verdict.reading and verdict.reading.taps) == taps
    assert not taps or (verdict.reading.mask_token_id, verdict.reading.anchor_first) == (0, False)
    anchors = next(one for one in replay("x", files(untrained)[0], shapes, ARCH) if one.server == "tpu-inference")
    assert anchors.refusals == ("it takes the method dspark for EAGLE-3: of blocks it knows fill-in DFlash only",)
    assert "pull request 1632" in refusals(files(untrained)[0], shapes)["sglang-jax"][0]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({}, None),
        ({"is_causal": True}, "blocks that are attended causally"),
        ({"dflash_config": {"causal": True}}, "blocks that are attended causally"),
        ({"is_causal": False, "dflash_config": {"causal": True}}, None),
        (SLIDING, "blocks that are attended causally, as those of layers with a window"),
        (SLIDING | {"is_causal": False}, None),
        ({"dflash_config": {"projector_type": "domino"}}, "projector_type domino"),
        ({"draft_vocab_size": 20}, "a reduced draft vocabulary"),
        ({"model_type": "llama"}, "layers of a llama"),
        ({"architectures": ["Eagle3Qwen3ForCausalLM"]}, None),
        ({"architectures": ["Eagle3Qwen3ForCausalLM"], "norm_before_residual": True}, None),
        ({"architectures": ["Eagle3Qwen3ForCausalLM"], "draft_vocab_size": 20, "fc_norm": True}, None),
        ({"architectures": ["Eagle3Qwen3ForCausalLM"], "target_hidden_size": 64}, "target_hidden_size 64 of a drafter"),
        ({"architectures": ["Eagle3Qwen3ForCausalLM"], "num_hidden_layers": 2}, "an EAGLE-3 of 2 layers"),
        ({"fc_norm": True}, "fc_norm True"),
    ],
)
def test_parts_without_an_implementation_here(untrained, change, part):
    """They were run as if they were not there; servers may know them."""
    raw, _ = files(untrained)
    found = unsupported_parts(raw | change)
    assert (part in found[0] and len(found) == 1) if part else found == []


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({}, None),
        ({"pretraining_tp": 1, "torch_dtype": "float16", "norm_output": True}, None),
        ({"attn_output_gate": True}, "config field attn_output_gate"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1], "parallel": 2}},
            "config field eagle_config.parallel",
        ),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "eagle_config.use_aux_hidden_state false"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"use_aux_norm": True}, "use_aux_norm True"),
        ({"target_hidden_size": 64}, "target_hidden_size 64 of a drafter that is 32 wide"),
    ],
)
def test_every_field_of_a_llama_eagle3_is_read_or_refused_by_name(change, part):
    found = unsupported_parts(LLAMA | {"architectures": ["LlamaForCausalLMEagle3"]} | change)
    assert found == ([part] if part else [])
    nested = {"speculators_model_type": "eagle3", "transformer_layer_config": LLAMA | change, "draft_vocab_size": 20}
    if not {"eagle_config", "target_hidden_size", "use_aux_norm"} & change.keys():
        assert unsupported_parts(nested) == ([part] if part else [])


def test_norms_that_a_server_does_not_read():
    """It loads the file all the same, or ignores their tensors, and drafts something else."""
    norms = {"norm_before_residual": True, "norm_output": True}
    found = replay("x", LLAMA | {"architectures": ["LlamaForCausalLMEagle3"], **norms}, LLAMA_SHAPES, ARCH)
    assert {one.server: one.wrong for one in found if one.reading} == {
        "vLLM": (),
        "SGLang": ("it does not read norm_before_residual and computes without it",),
        "sglang-jax": ("it does not read norm_before_residual, norm_output and computes without it",),
        "llama.cpp": ("it does not read norm_output and computes without it",),
        "TensorRT-LLM": ("it does not read norm_before_residual and computes without it",),
    }


def test_servers_that_ran_are_told_from_those_whose_rules_were_read(untrained):
    raw, shapes = files(untrained)
    eagle = raw | {"architectures": ["Eagle3Qwen3ForCausalLM"], IDS: [1, 2]}
    llama = LLAMA | {"architectures": ["LlamaForCausalLMEagle3"]}
    ran = {}
    for name, config, of in (("block", raw, shapes), ("eagle3", eagle, shapes), ("llama", llama, LLAMA_SHAPES)):
        found = [verdict for verdict in replay("x", config, of, ARCH) if verdict.reading]
        ran[name] = {verdict.server for verdict in found if verdict.notes[-1:] and "served DSpark" in verdict.notes[-1]}
        assert all("known from its code" in one.notes[-1] for one in found if one.server not in ran[name])
    assert ran == {"block": {"vLLM", "llama.cpp"}, "eagle3": set(), "llama": set()}
