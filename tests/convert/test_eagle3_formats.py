"""EAGLE-3 with a layer of Llama and with a vocabulary of its own: SpecForge's layout and speculators', both ways."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.config import InputError
from dspark_jax.convert.export import write_export
from dspark_jax.convert.hf import import_drafter, read_drafter_config, stored_tensors
from dspark_jax.convert.servers import replay
from dspark_jax.vocabulary import encode_vocabulary, from_maps, to_maps
from tests.convert.test_export import EAGLE3, make_source, mesh

VOCABULARY = 320
IDS = np.r_[0:40, 100:163, 319]
OWN = {"draft_vocab_size": len(IDS), "draft_vocabulary": encode_vocabulary(IDS, VOCABULARY)}
LLAMA = replace(EAGLE3, qk_norms=False, **OWN)
DRAFTERS = {
    "llama": LLAMA,
    "llama with norms": replace(LLAMA, eagle3_norms=("norm_before_residual", "fc_norm", "norm_output")),
    "norm before fc": replace(LLAMA, eagle3_norms=("norm_before_fc",)),
    "llama, every token": replace(LLAMA, draft_vocab_size=VOCABULARY, draft_vocabulary=""),
    "qwen3": replace(EAGLE3, **OWN),
}


@pytest.mark.parametrize("form", ["universal", "speculators"])
@pytest.mark.parametrize("name", DRAFTERS)
def test_what_is_written_is_what_was_there(tiny_target: Path, tmp_path: Path, name: str, form: str) -> None:
    config = DRAFTERS[name]
    source, drafter = make_source(tiny_target, config)
    directory = write_export(tmp_path / "x", source, form=form, dtype="float32")
    read, found = import_drafter(directory, mesh())
    assert read == config
    want = dict(stored_tensors(drafter, config))
    for tensor, value in stored_tensors(found, read):
        np.testing.assert_array_equal(value, want.pop(tensor), tensor)
    assert not want


def test_specforges_layout(tiny_target: Path, tmp_path: Path) -> None:
    """Names and offsets as SGLang reads them; ids of layers count outputs for it and inputs for vLLM."""
    source, _ = make_source(tiny_target, LLAMA)
    directory = write_export(tmp_path / "x", source)
    raw, tensors = json.loads((directory / "config.json").read_text()), load_file(directory / "model.safetensors")
    assert raw["architectures"] == ["LlamaForCausalLMEagle3"] and raw["model_type"] == "llama"
    assert raw["draft_vocab_size"] == len(IDS) and raw["vocab_size"] == VOCABULARY
    assert raw["eagle_aux_hidden_state_layer_ids"] == [0, 1]
    assert raw["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [-1, 0]
    assert raw["head_dim"] and raw["attention_bias"] is False and raw["tie_word_embeddings"] is False
    np.testing.assert_array_equal(tensors["d2t"] + np.arange(len(IDS)), IDS)
    np.testing.assert_array_equal(np.flatnonzero(tensors["t2d"]), IDS)
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype) == (np.int64, np.bool_)
    assert tensors["lm_head.weight"].shape == (len(IDS), raw["hidden_size"])
    assert "midlayer.hidden_norm.weight" in tensors and not any("q_norm" in name for name in tensors)
    assert {"fc.weight", "norm.weight", "embed_tokens.weight"} <= set(tensors)


@pytest.mark.parametrize("layers", [(1, 2, 3), (0, 1, 2, 3)])
def test_the_speculators_format_says_how_many_layers_vllm_has_to_expect(
    tiny_target: Path, tmp_path: Path, layers: tuple[int, ...]
) -> None:
    """Without it vLLM 0.32.0 makes room for three, and does not load the drafter."""
    source, _ = make_source(tiny_target, replace(LLAMA, target_layer_ids=layers))
    directory = write_export(tmp_path / "x", source, form="speculators", dtype="float32")
    raw = json.loads((directory / "config.json").read_text())
    assert raw["transformer_layer_config"].get("num_aux_hidden_states", 3) == len(layers)
    shapes = {name: value.shape for name, value in load_file(directory / "model.safetensors").items()}

    def refusals() -> tuple[str, ...]:
        (vllm,) = (one for one in replay("x", raw, shapes, source.arch) if one.server == "vLLM")
        return tuple(vllm.refusals)

    assert not refusals()
    raw["transformer_layer_config"]["num_aux_hidden_states"] = 2
    assert f"it takes 2 layers of width {raw['target_hidden_size']}" in " ".join(refusals())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_wrong_field_is_named_with_its_file(tiny_target: Path, tmp_path: Path, name: str) -> None:
    source, _ = make_source(tiny_target, DRAFTERS[name])
    file = write_export(tmp_path / "x", source, form="speculators", dtype="float32") / "config.json"
    raw = json.loads(file.read_text())
    raw["transformer_layer_config"]["rope_parameters"] = 7
    file.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=f"^{file}: rope_parameters 7 is not an object"):
        import_drafter(file.parent, mesh())


def test_every_token_needs_no_map(tiny_target: Path, tmp_path: Path) -> None:
    """vLLM knows no d2t beside a whole vocabulary, and the head of one that has none of its own is the target's."""
    for number, config in enumerate((DRAFTERS["llama, every token"], replace(EAGLE3, qk_norms=False))):
        source, _ = make_source(tiny_target, config)
        directory = write_export(tmp_path / f"x{number}", source, dtype="float32")
        tensors = load_file(directory / "model.safetensors")
        assert not {"d2t", "t2d"} & set(tensors) and len(tensors["lm_head.weight"]) == VOCABULARY
    np.testing.assert_array_equal(tensors["lm_head.weight"], np.asarray(source.frozen["lm_head.weight"], np.float32))
    assert read_drafter_config(directory)[1].draft_vocab_size == VOCABULARY  # it may be trained from now on
    with pytest.raises(InputError, match="--slim leaves out embedding and LM head, but EAGLE-3's class for Llama's"):
        write_export(tmp_path / "y", replace(source, frozen={}))


def test_the_own_head_stays_where_the_targets_tensors_are_left_out(tiny_target: Path, tmp_path: Path) -> None:
    source, _ = make_source(tiny_target, LLAMA)
    directory = write_export(tmp_path / "x", replace(source, frozen={}), dtype="float32")
    assert "embed_tokens.weight" not in load_file(directory / "model.safetensors")
    assert import_drafter(directory, mesh())[0] == LLAMA


@pytest.mark.parametrize("name", ["llama", "llama with norms", "qwen3"])
def test_the_reference_has_no_such_drafter(tiny_target: Path, tmp_path: Path, name: str) -> None:
    source, _ = make_source(tiny_target, DRAFTERS[name])
    with pytest.raises(InputError, match="--format deepspec: the reference's EAGLE-3 has Qwen3's layers and"):
        write_export(tmp_path / "x", source, form="deepspec")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def specforge(tiny_target: Path, tmp_path: Path) -> Path:
    """A file as SpecForge writes it: layers are not named, embeddings left out, fields as in its configs."""
    source, _ = make_source(tiny_target, replace(LLAMA, target_layer_ids=(1, 2, 3)))
    directory = write_export(tmp_path / "x", replace(source, frozen={}), dtype="float32")
    raw = json.loads((directory / "config.json").read_text())
    own = ("eagle_config", "eagle_aux_hidden_state_layer_ids", "norm_before_residual", "ttt_length", "rope_parameters")
    kept = {name: value for name, value in raw.items() if name not in own}
    more = {"torch_dtype": "bfloat16", "pretraining_tp": 1, "max_window_layers": 36, "sliding_window": None}
    (directory / "config.json").write_text(json.dumps(kept | more | {"use_sliding_window": False, "use_cache": True}))
    return directory


def test_a_file_of_specforge(specforge: Path) -> None:
    """Tapped layers follow from the target's depth, as servers take them; seven steps are its default."""
    config, _ = import_drafter(specforge, mesh(), target_layers=8)
    assert (config.target_layer_ids, config.block_size) == ((1, 3, 4), 7)
    assert replace(config, target_layer_ids=(), block_size=5) == replace(LLAMA, target_layer_ids=())
    with pytest.raises(InputError, match="names no tapped layers, they follow from the target"):
        read_drafter_config(specforge)


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def run(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("d2t"), "tensor d2t, which says what tokens it drafts, is missing"),
        (lambda t: t.update(d2t=IDS.astype(np.int64)), "tensor d2t holds tokens, all servers read offsets"),
        (lambda t: t.update(t2d=~t["t2d"]), "tensors d2t and t2d name other tokens"),
        (lambda t: t.update(d2t=t["d2t"][::-1].copy()), "are not ascending in 0..319; it is damaged"),
        (
            lambda t: t.update(d2t=t["d2t"][:-1], t2d=t["t2d"] & (np.arange(320) < 319)),
            "d2t has 103 tokens, config.json",
        ),
        (lambda t: t.update({"midlayer.self_attn.q_norm.weight": np.ones(8, np.float32)}), "k_norm.weight is missing"),
        (lambda t: t.update({"aux_norm_low.weight": np.ones(8, np.float32)}), "aux_norm_low.weight is unknown"),
    ],
)
def test_maps_and_tensors_that_contradict(specforge: Path, change: Any, message: str) -> None:
    edit(change)(specforge)
    with pytest.raises(InputError, match=message):
        import_drafter(specforge, mesh(), target_layers=8)


def test_maps_without_t2d(specforge: Path) -> None:
    edit(lambda tensors: tensors.pop("t2d"))(specforge)
    assert import_drafter(specforge, mesh(), target_layers=8)[0].draft_vocabulary == OWN["draft_vocabulary"]
    np.testing.assert_array_equal(from_maps(to_maps(IDS, VOCABULARY)["d2t"], None, VOCABULARY), IDS)


def test_which_servers_take_it(tiny_target: Path, tmp_path: Path) -> None:
    """Those with a class for Llama's layers read our file as it was trained, each by its own field of layer ids."""
    source, _ = make_source(tiny_target, replace(LLAMA, target_layer_ids=(-1, 0, 1)))
    directory = write_export(tmp_path / "x", source)
    raw = json.loads((directory / "config.json").read_text())
    shapes = {name: value.shape for name, value in load_file(directory / "model.safetensors").items()}
    found = {one.server: one for one in replay("x", raw, shapes, source.arch)}
    assert found["sglang-jax"].reading is None or found["sglang-jax"].wrong  # it taps layers of its own choice
    for server in ("vLLM", "SGLang", "llama.cpp"):
        assert found[server].reading is not None and found[server].reading.taps == (-1, 0, 1), found[server]
        assert not found[server].wrong
