"""Model cards: what the file is, and a command for those servers alone that load it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

from dspark_jax import quickstart
from dspark_jax.config import DrafterConfig, InputError, TargetArchitecture
from dspark_jax.convert import llama_tokenizer
from dspark_jax.convert.card import model_card
from dspark_jax.convert.export import Source, content
from dspark_jax.convert.llama_tokenizer import split_to_tell
from dspark_jax.convert.mapping import FROZEN
from dspark_jax.convert.servers import replay
from tests.quickstart.builder.tokenizer import SPLIT

QWEN = TargetArchitecture("qwen3", 64, 32, 6, 4, 2, 16, 48, max_position_embeddings=64)
GEMMA = replace(
    QWEN, model_type="gemma4", layer_types=("sliding_attention",) * 5 + ("full_attention",), sliding_window=8,
    sliding_rope_theta=1e4, global_head_dim=32, num_global_key_value_heads=1, attention_k_eq_v=True,
    partial_rotary_factor=0.25, final_logit_softcapping=30.0,
)  # fmt: skip
DSPARK = DrafterConfig(num_layers=2, block_size=5, target_layer_ids=(0, 3), mask_token_id=60, markov_rank=8)
HEADLESS = {"markov_rank": 0, "confidence_head": False, "confidence_with_markov": False}
DFLASH = replace(DSPARK, kind="dflash", **HEADLESS)
EAGLE3 = replace(DSPARK, kind="eagle3", num_layers=1, mask_token_id=0, **HEADLESS)
COMMANDS = {"vLLM": "vllm serve", "SGLang": "sglang.launch_server", "llama.cpp": "llama-server"}


def card_of(
    arch, drafter, form, *, target="org/base", slim=False, side=("calibration.json", "cost_table.json"), split=""
):
    frozen = {} if slim else dict.fromkeys(FROZEN, np.zeros((64, 32), np.float32))
    source = Source(lambda: [], drafter, arch, arch.to_hf(), frozen, target, split=split)
    made = content(source, form, "bfloat16")
    return model_card("mine", source, made, replay("mine", made.config, made.shapes, arch, split), side_files=side)


@pytest.mark.parametrize(
    ("arch", "drafter", "form", "serving"),
    [
        (QWEN, DSPARK, "universal", {"vLLM", "SGLang", "llama.cpp"}),
        (QWEN, DSPARK, "speculators", {"vLLM", "llama.cpp"}),
        (QWEN, DFLASH, "universal", {"vLLM", "SGLang", "llama.cpp"}),
        (QWEN, DFLASH, "deepspec", {"llama.cpp"}),
        (QWEN, replace(DSPARK, markov_head_type="gated"), "universal", {"SGLang"}),
        (QWEN, replace(DSPARK, block_layout="fill_in"), "universal", {"vLLM", "SGLang", "llama.cpp"}),
        (QWEN, EAGLE3, "universal", {"vLLM"}),
        (QWEN, EAGLE3, "deepspec", set()),
        (GEMMA, DSPARK, "universal", {"vLLM"}),
        (GEMMA, EAGLE3, "deepspec", set()),
    ],
)
def test_commands_are_those_of_servers_that_load_it(arch, drafter, form, serving):
    card = card_of(arch, drafter, form)
    for server, command in COMMANDS.items():
        assert (command in card) == (server in serving), card
        assert (f"{server} cannot serve it: " in card) == (server not in serving), card
    block, fill_in = drafter.kind != "eagle3", drafter.block_layout == "fill_in"
    assert ("mask token 60" in card) == block
    assert "sample_from_anchor: true" in card if block and not fill_in else "sample_from_anchor: true" not in card
    assert ("anchor predicts nothing (`sample_from_anchor: false`)" in card) == fill_in
    assert ("num_speculative_tokens to 5" in card) == fill_in  # the default is the 6 rows of the block
    assert "mask token 0" not in card
    assert ('"method": "eagle3"' in card) == (drafter.kind == "eagle3" and "vLLM" in serving)


def test_z_labs_dflash_has_a_command_for_each_server():
    """Servers name rows or drafts: a block of six rows has five drafts."""
    card = card_of(QWEN, replace(DFLASH, block_layout="fill_in"), "universal")
    assert "cannot serve it" not in card and "besides" not in card and "SPS" not in card
    method = '{"method": "dflash", "model": "DIR", "num_speculative_tokens": 5'
    sampled = f"""--speculative-config '{method}, "draft_sample_method": "probabilistic"}}'"""
    assert sampled in card and f"--speculative-config '{method}}}'" in card  # the latter for tpu-inference
    sglang = "--speculative-algorithm DFLASH --speculative-draft-model-path DIR --speculative-num-draft-tokens 6"
    assert f"sglang.launch_server --model-path org/base {sglang}\n" in card
    assert f"sgl_jax.launch_server --model-path org/base {sglang} --speculative-num-steps 1" in card
    assert "--spec-type draft-dflash --spec-draft-n-max 5" in card
    card = card_of(QWEN, replace(DFLASH, block_layout="fill_in"), "speculators")
    assert "SGLang cannot serve it" in card and "llama.cpp cannot serve it: its converter does not know DFlash" in card
    with pytest.raises(InputError, match="no server has a fill-in DFlash for Gemma 4; train with drafter.block_layout"):
        card_of(GEMMA, replace(DFLASH, block_layout="fill_in"), "universal")


def test_dflash2_has_a_command_where_it_is_known():
    config = replace(
        DSPARK, kind="dflash2", block_layout="fill_in", markov_head_type="selector", confidence_head=False,
        confidence_with_markov=False, conv_kernel_size=2, selector_top_k=5,
    )  # fmt: skip
    card = card_of(QWEN, config, "universal")
    for server in ("tpu-inference", "sglang-jax"):
        assert f"{server} cannot serve it: it has no DFlash 2." in card
    assert card.count("cannot serve it") == 2 and "candidate selector of rank 8" in card and "besides" not in card
    assert '{"method": "dflash", "model": "DIR", "num_speculative_tokens": 5' in card
    assert "--spec-type draft-dflash" in card and "--speculative-num-draft-tokens 6" in card
    assert "vllm serve DIR" in card_of(QWEN, config, "speculators")
    wide = card_of(QWEN, replace(config, selector_top_k=16), "universal")
    assert "llama.cpp cannot serve it: its selector hands on 272 numbers" in wide
    for change, message in (
        ({"confidence_head": True}, "without a confidence head only"),
        ({"conv_kernel_size": 0}, "this drafter has conv_kernel_size=0"),
        ({"kind": "dspark"}, "no server has a dspark with a selector; train with drafter.kind='dflash2'"),
        ({"kind": "dspark", "markov_head_type": "vanilla"}, "no server has a dspark with convolutions"),
        ({"block_layout": "anchor_first"}, "no format that a server loads; .*fill_in"),
    ):
        with pytest.raises(InputError, match=message):
            card_of(QWEN, replace(config, **change), "universal")


def test_what_is_not_known_of_a_server_is_said():
    card = card_of(QWEN, DSPARK, "universal")
    assert "Whether TensorRT-LLM can serve it is not known: its DSpark is for drafters of DeepSeek-V4" in card
    assert "TensorRT-LLM cannot serve it" not in card
    ascend = '{"method": "dspark", "model": "DIR", "num_speculative_tokens": 5, "enforce_eager": true}'
    assert f"vllm serve org/base --speculative-config '{ascend}'" in card
    card = card_of(QWEN, replace(DFLASH, block_layout="fill_in"), "universal")
    assert 'DFlashDecodingConfig(max_draft_len=5, speculative_model="DIR")' in card and "not known" not in card
    llama = DrafterConfig(
        kind="eagle3", num_layers=1, block_size=5, target_layer_ids=(0, 1, 2), markov_rank=0, confidence_head=False,
        confidence_with_markov=False, qk_norms=False,
    )  # fmt: skip
    assert 'Eagle3DecodingConfig(max_draft_len=5, speculative_model="DIR")' in card_of(QWEN, llama, "universal")


def test_costs_of_this_engine_are_not_given_to_another():
    """A table of another engine's steps, or another machine's, makes SGLang verify too much or too little."""
    card = card_of(QWEN, DSPARK, "universal")
    command = next(line for line in card.splitlines() if "sglang.launch_server" in line)
    assert "--speculative-dspark-confidence-sts-path DIR/calibration.json" in command and "sps-table" not in command
    assert "SGLANG_DSPARK_ENABLE_SPS_RECORD=1" in card and "the rounds per second of dspark_jax" in card
    assert "rounds per second" not in card_of(QWEN, DSPARK, "universal", side=("calibration.json",))
    assert "SGLANG_DSPARK_ENABLE_SPS_RECORD" not in card_of(GEMMA, DSPARK, "universal")


def test_llama_cpp_gets_a_directory(tmp_path):
    card = card_of(QWEN, DSPARK, "universal")
    assert "hf download org/base --local-dir target\npython convert_hf_to_gguf.py target --outtype" in card
    assert "convert_hf_to_gguf.py DIR --target-model-dir target --outtype" in card and "-fa on --jinja\n" in card
    card = card_of(QWEN, DSPARK, "universal", target=str(tmp_path))
    assert f"--target-model-dir {tmp_path} --outtype" in card and "hf download" not in card


def test_what_servers_do_with_it_is_said():
    """llama.cpp drafts greedily, so accepted lengths of an evaluation are not its own; vLLM needs its newer runner."""
    card = card_of(QWEN, DSPARK, "universal")
    assert "llama.cpp (its drafts are greedy: at temperature 1 fewer are accepted" in card
    assert "DSpark needs its model runner V2" in card and "model runner V2" not in card_of(QWEN, EAGLE3, "universal")
    for form, drafter in (("universal", DSPARK), ("deepspec", DSPARK), ("universal", EAGLE3)):
        for server in ("tpu-inference", "sglang-jax"):
            assert f"{server} cannot serve it: " in card_of(QWEN, drafter, form)


def test_llama_cpp_is_told_of_a_tokenizer_that_it_does_not_know():
    """It refuses a vocabulary that it has not seen, such as the embedded target's, even if it splits text as Qwen's."""
    target = Path(quickstart.__file__).parent / "target"
    assert split_to_tell(target) == "qwen2"
    card = card_of(QWEN, DSPARK, "universal", split="qwen2")
    tell = "sed -i '/def get_vocab_base_pre/a\\        return \"qwen2\"' conversion/base.py\npython convert_hf"
    assert tell in card and "its converter has to be told" in card
    assert "get_vocab_base_pre" not in card_of(QWEN, DSPARK, "universal")


def test_which_tokenizers_llama_cpp_knows(tmp_path, monkeypatch):
    """Those of Qwen by their ids; of others nothing is known here. Both spellings of the split give the same pieces."""
    target = Path(quickstart.__file__).parent / "target"
    ids = Tokenizer.from_file(str(target / "tokenizer.json")).encode(llama_tokenizer.SENTENCE).ids
    monkeypatch.setattr(llama_tokenizer, "KNOWN", (hashlib.sha256(str(ids).encode()).hexdigest(),))
    assert split_to_tell(target) == ""
    monkeypatch.undo()
    raw = json.loads((target / "tokenizer.json").read_text())
    for split, said in ((llama_tokenizer.QWEN2_SPLIT, "qwen2"), (r"\\w+", "")):
        raw["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": split}
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        assert split_to_tell(tmp_path) == said
    (tmp_path / "tokenizer.json").unlink()
    assert split_to_tell(tmp_path) == ""
    first, second = (pre_tokenizers.Split(Regex(one), "isolated") for one in (SPLIT, llama_tokenizer.QWEN2_SPLIT))
    texts = [line for file in target.parent.glob("prompts/*.heldout.jsonl") for line in file.open(encoding="utf-8")]
    for text in [llama_tokenizer.SENTENCE, *texts]:
        assert first.pre_tokenize_str(text) == second.pre_tokenize_str(text)


def test_heads_that_only_servers_want_are_named():
    added = "the file has an all-zero Markov head of rank 16 and a confidence head that is always certain besides"
    assert added in card_of(QWEN, DFLASH, "universal") and "layers, no heads;" in card_of(QWEN, DFLASH, "universal")
    assert "besides" not in card_of(QWEN, DFLASH, "deepspec") + card_of(QWEN, DSPARK, "universal")
    plain = replace(DSPARK, confidence_head=False, confidence_with_markov=False)
    assert "the file has a confidence head that is always certain besides" in card_of(QWEN, plain, "universal")


def test_what_is_not_in_the_file_or_not_on_the_hub_is_not_claimed(tmp_path, monkeypatch):
    assert "the copies of them in the weights are frozen" in card_of(QWEN, DSPARK, "universal")
    assert "they are not in the weights" in card_of(QWEN, DSPARK, "universal", slim=True)
    monkeypatch.chdir(tmp_path)
    assert "base_model: models/base" in card_of(QWEN, DSPARK, "universal", target="models/base")
    (tmp_path / "models" / "base").mkdir(parents=True)
    assert "base_model" not in card_of(QWEN, DSPARK, "universal", target="models/base")


def test_a_drafter_for_gemma_keeps_its_embedding():
    """No server would load it: vLLM wants embedding and LM head of Gemma 4 in the file."""
    with pytest.raises(InputError, match="^--slim leaves out embedding and LM head, but vLLM.*; export without --slim"):
        card_of(GEMMA, DSPARK, "universal", slim=True)
    assert "they are not in the weights" in card_of(GEMMA, DSPARK, "deepspec", slim=True)
