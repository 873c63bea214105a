"""Exports: what is written is what was there, in every format; whole or not at all."""

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from dspark_jax.config import DrafterConfig, InputError, MeshConfig, TargetArchitecture
from dspark_jax.convert.export import FORMATS, Source, frozen_tensors, write_export
from dspark_jax.convert.hf import (
    abstract_drafter,
    drafter_tensors,
    import_drafter,
    stored_tensors,
)
from dspark_jax.convert.mapping import FROZEN
from dspark_jax.convert.output import built_beside, check_repository
from dspark_jax.drafter.blocks import Anchors
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import parameter_paths

ROOT = Path(__file__).resolve().parents[2]
DSPARK = DrafterConfig(num_layers=2, block_size=5, target_layer_ids=(-1, 0), mask_token_id=319, markov_rank=8)
VARIANTS = {
    "dspark": DSPARK,
    "plain confidence": replace(DSPARK, confidence_with_markov=False),
    "gated": replace(DSPARK, markov_head_type="gated"),
    "rnn": replace(DSPARK, markov_head_type="rnn"),
    "no confidence": replace(DSPARK, confidence_head=False, confidence_with_markov=False),
    "dflash": replace(DSPARK, kind="dflash", markov_rank=0, confidence_head=False, confidence_with_markov=False),
}
FILL_IN = replace(DSPARK, block_layout="fill_in")
Z_LAB = replace(VARIANTS["dflash"], block_layout="fill_in")
DFLASH2 = replace(
    FILL_IN, kind="dflash2", markov_head_type="selector", confidence_head=False, confidence_with_markov=False,
    conv_kernel_size=2, conv_group_size=8, selector_top_k=7,
)  # fmt: skip

EAGLE3 = replace(DSPARK, kind="eagle3", num_layers=1, mask_token_id=0, markov_rank=0, confidence_head=False)
EAGLE3 = replace(EAGLE3, confidence_with_markov=False)


def mesh():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def make_source(target: Path, config: DrafterConfig) -> tuple[Source, nnx.Module]:
    arch = TargetArchitecture.from_hf(target)
    drafter, rng = abstract_drafter(arch, config), np.random.default_rng(0)
    for variable in parameter_paths(drafter).values():  # random also where parameters start as ones and zeros
        variable.set_value(jnp.asarray(rng.normal(size=variable.get_value().shape), jnp.float32))
    raw = json.loads((target / "config.json").read_text())
    tensors = dict(stored_tensors(drafter, config))
    return Source(lambda: tensors.items(), config, arch, raw, frozen_tensors(target), "org/target"), drafter


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # it runs only twice
def draft(drafter, embedding):
    """Logits with Markov bias, and confidences, of a drafter on some features."""

    class FrozenMatrices:
        def embed(self, tokens):
            return embedding[tokens]

    vocabulary, width = embedding.shape
    features = jax.random.normal(jax.random.key(5), (1, 12, 2 * width))
    tokens = jax.random.randint(jax.random.key(6), (1, 12), 0, vocabulary)
    anchors = Anchors(jnp.asarray([[2, 4]]), jnp.ones((1, 2), bool))
    out = drafter(FrozenMatrices(), features, tokens, jnp.ones_like(tokens), anchors)
    logits = out.hidden @ embedding.T
    previous = None
    if drafter.markov is not None:
        previous = drafter.markov.embed(out.prev_tokens)
        logits = logits + drafter.markov.bias(drafter.markov.latent(out.hidden, previous))
    return logits, None if drafter.confidence is None else drafter.confidence(out.hidden, previous)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", FORMATS)
def test_what_comes_back_drafts_the_same(tiny_target, tmp_path, form, variant):
    source, drafter = make_source(tiny_target, VARIANTS[variant])
    directory = write_export(tmp_path / "drafter", source, form=form, dtype="float32")
    config, back = import_drafter(directory, mesh())
    assert (config.block_size, config.target_layer_ids, config.mask_token_id) == (5, (-1, 0), 319)
    assert config.block_layout == "anchor_first"
    embedding = jnp.asarray(source.frozen[FROZEN[0]])
    back = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), back)  # where the first one lies: compiled once
    (logits, confidence), (logits_back, confidence_back) = draft(drafter, embedding), draft(back, embedding)
    np.testing.assert_array_equal(logits_back, logits)
    if confidence is not None:
        np.testing.assert_allclose(confidence_back, confidence, atol=1e-5)
    elif form != "deepspec":
        np.testing.assert_array_equal(confidence_back, np.full(confidence_back.shape, 20.0))
    if form == "deepspec" or variant == "dspark":
        assert config == VARIANTS[variant]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "wanted", [DSPARK, EAGLE3, FILL_IN, Z_LAB, DFLASH2], ids=["dspark", "eagle3", "fill-in", "z-lab", "dflash2"]
)
def test_round_trips_are_bit_exact(tiny_target, tmp_path, form, dtype, wanted):
    source, drafter = make_source(tiny_target, wanted)
    if form == "deepspec" and wanted.block_layout == "fill_in":
        with pytest.raises(InputError, match="^--format deepspec: the reference's blocks are anchor-first"):
            write_export(tmp_path / "first", source, form=form)
        return
    first = write_export(tmp_path / "first", source, form=form, dtype=dtype)
    config, back = import_drafter(first, mesh())
    assert config == wanted
    again = replace(source, tensors=lambda: stored_tensors(back, config), config=config)
    second = write_export(tmp_path / "second", again, form=form, dtype=dtype)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "config.json").read_bytes() == (second / "config.json").read_bytes()
    numpy_type = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]
    stored = load_file(first / "model.safetensors")
    ours = drafter_tensors(drafter, wanted)
    assert set(stored) == set(ours) | set(FROZEN)
    for name, value in ours.items():
        assert stored[name].dtype == numpy_type
        np.testing.assert_array_equal(stored[name], value.astype(numpy_type), err_msg=name)


def test_golden_directory_comes_back_as_the_reference_wrote_it(golden_case, tmp_path):
    """Import and deepspec export of every golden drafter: the same tensors, and the same value of every key."""
    folder, target = golden_case.folder, golden_case.target
    config, drafter = import_drafter(folder / "draft", mesh())
    arch, raw = TargetArchitecture.from_hf(target), json.loads((target / "config.json").read_text())
    tensors = functools.partial(stored_tensors, drafter, config)
    stated = json.loads((folder / "draft" / "config.json").read_text())
    anchors = stated.get("num_anchors", 0)
    source = Source(tensors, config, arch, raw, frozen_tensors(target), f"golden/{target.name}", num_anchors=anchors)
    out = write_export(tmp_path / "drafter", source, form="deepspec", dtype="float32")
    theirs, ours = load_file(folder / "draft" / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(theirs) == set(ours)
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    stated.pop("transformers_version")
    if golden_case.about["family"] == "gemma4":
        # Two keys that mean nothing, and that other readers have to clear away (trap 23).
        assert stated["rope_parameters"].pop("rope_theta") is None
        assert stated["rope_parameters"].pop("rope_type") == "default"
    assert json.loads((out / "config.json").read_text()) == stated


def test_what_has_no_format_is_said(golden_gemma4_eagle3_case, tiny_target, tmp_path):
    folder = golden_gemma4_eagle3_case.folder
    config, drafter = import_drafter(folder / "draft", mesh())
    raw = json.loads((folder / "draft" / "config.json").read_text())
    arch = TargetArchitecture.from_hf(folder / "draft")
    source = Source(functools.partial(stored_tensors, drafter, config), config, arch, raw, {}, "org/gemma")
    with pytest.raises(InputError, match="no server has an EAGLE-3 for Gemma 4; use --format deepspec"):
        write_export(tmp_path / "a", source)
    with pytest.raises(InputError, match="speculators scales no embeddings and caps no logits"):
        write_export(tmp_path / "a", source, form="speculators")
    source, _ = make_source(tiny_target, DSPARK)
    with pytest.raises(
        InputError, match="kind 'mtp' has no format .*; only dspark, dflash, dspark5 or eagle3 is exported"
    ):
        write_export(tmp_path / "a", replace(source, config=replace(EAGLE3, kind="mtp")))
    with pytest.raises(InputError, match="no server has the head 'mine'; only vanilla, gated, rnn or selector is"):
        write_export(tmp_path / "a", replace(source, config=replace(source.config, markov_head_type="mine")))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", ["dspark", "dflash"])
def test_the_block_layout_is_stated_where_no_server_refuses_it(tiny_target, tmp_path, variant):
    """vLLM 0.32.0 does not start where `dflash_config` has it; it and SGLang 0.5.23 read it at the top level."""
    source, _ = make_source(tiny_target, VARIANTS[variant])
    raw = json.loads((write_export(tmp_path / "drafter", source) / "config.json").read_text())
    assert raw["sample_from_anchor"] is True and "sample_from_anchor" not in raw["dflash_config"]


def test_eagle3_for_vllm_counts_layer_inputs(tiny_target, tmp_path):
    source, _ = make_source(tiny_target, EAGLE3)
    raw = json.loads((write_export(tmp_path / "ours-eagle3", source) / "config.json").read_text())
    assert raw["architectures"] == ["Eagle3Qwen3ForCausalLM"] and raw["eagle_aux_hidden_state_layer_ids"] == [0, 1]
    assert (raw["norm_before_residual"], raw["draft_vocab_size"], raw["ttt_length"]) == (False, 320, 5)


def test_transformers_reads_the_file(tiny_target, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from transformers import AutoConfig

    source, drafter = make_source(tiny_target, DSPARK)
    directory = write_export(tmp_path / "drafter", source)
    assert AutoConfig.from_pretrained(directory).block_size == 5
    stored, ours = load_torch(directory / "model.safetensors"), drafter_tensors(drafter, DSPARK)
    for name, value in ours.items():
        assert torch.equal(stored[name], torch.tensor(value).bfloat16()), name


def test_slim_leaves_the_frozen_copies_out(tiny_target, tmp_path):
    source, drafter = make_source(tiny_target, DSPARK)
    directory = write_export(tmp_path / "drafter", replace(source, frozen={}))
    assert set(load_file(directory / "model.safetensors")) == set(drafter_tensors(drafter, DSPARK))
    import_drafter(directory, mesh())


def test_transformers_reads_a_drafter_for_a_gemma_that_it_saved_itself(tmp_path):
    """Its newer configs state the full layers' heads layer by layer, by numbers that a drafter of two does not have."""
    pytest.importorskip("torch")
    from transformers import AutoConfig, Gemma4TextConfig

    shape = {"head_dim": 16, "global_head_dim": 32, "num_key_value_heads": 2, "num_global_key_value_heads": 1}
    saved = Gemma4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        attention_k_eq_v=True, sliding_window=8, max_position_embeddings=128, final_logit_softcapping=30.0,
        hidden_size_per_layer_input=0, num_kv_shared_layers=0, **shape,
    )  # fmt: skip
    saved.save_pretrained(tmp_path / "target")
    raw = json.loads((tmp_path / "target" / "config.json").read_text())
    assert "per_layer_config" in raw and "global_head_dim" not in raw  # or this test shows nothing
    arch, config = TargetArchitecture.from_hf(raw), replace(DSPARK, target_layer_ids=(0, 4), mask_token_id=4)
    drafter = abstract_drafter(arch, config)
    for variable in parameter_paths(drafter).values():
        variable.set_value(jnp.ones(variable.get_value().shape))
    frozen = dict.fromkeys(FROZEN, np.ones((64, 32), np.float32))
    source = Source(functools.partial(stored_tensors, drafter, config), config, arch, raw, frozen, "org/gemma")
    directory = write_export(tmp_path / "drafter", source)
    read = AutoConfig.from_pretrained(directory)
    layers = [read.per_layer_config[i] for i in range(read.num_hidden_layers)]
    assert [(layer.head_dim, layer.num_key_value_heads) for layer in layers] == [(32, 1)] * 2
    written = json.loads((directory / "config.json").read_text())
    assert {name: written[name] for name in shape} == shape and written["attention_k_eq_v"]
    for reading in (arch, TargetArchitecture.from_hf(directory)):
        assert (reading.rope_theta, reading.partial_rotary_factor, reading.final_logit_softcapping) == (1e6, 0.25, 30.0)
    assert import_drafter(directory, mesh())[0] == config


def test_an_interrupted_export_leaves_nothing(tiny_target, tmp_path):
    source, _ = make_source(tiny_target, DSPARK)

    def failing():
        yield from list(source.tensors())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_export(tmp_path / "drafter", replace(source, tensors=failing))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_export(tiny_target, tmp_path):
    source, _ = make_source(tiny_target, DSPARK)

    def full():
        yield from list(source.tensors())[:3]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError) as found:
        write_export(tmp_path / "drafter", replace(source, tensors=full))
    assert found.value.filename == str(tmp_path / "drafter") and list(tmp_path.iterdir()) == []


KILLED = """
import os, sys
from pathlib import Path
from dspark_jax.convert.output import built_beside
moved = Path.rename
Path.rename = lambda path, to: os.kill(os.getpid(), 9) if path.name == "new" else moved(path, to)
with built_beside(Path(sys.argv[1])):
    pass
"""  # between the two renamings: of what was there, and of what takes its place


def test_a_killed_export_leaves_nothing_for_ever(tiny_target, tmp_path):
    """What it leaves is removed by the next one, which first puts back what was just being replaced."""
    source, _ = make_source(tiny_target, DSPARK)
    directory, left = tmp_path / "drafter", tmp_path / ".drafter.partial"
    write_export(directory, source, files={"README.md": "first"})
    done = subprocess.run([sys.executable, "-c", KILLED, directory], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -9
    assert {path.name for path in tmp_path.iterdir()} == {".drafter.partial"}
    assert {path.name for path in left.iterdir()} == {"new", "old", "lock.json"}

    def failing():
        yield from list(source.tensors())[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_export(directory, replace(source, tensors=failing))
    assert (directory / "README.md").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]


def test_two_exports_to_one_place(tiny_target, tmp_path):
    source, _ = make_source(tiny_target, DSPARK)
    with (
        built_beside(tmp_path / "drafter"),
        pytest.raises(InputError, match=r"\.drafter\.partial: in use by convert exp"),
    ):
        write_export(tmp_path / "drafter", source)


def test_an_export_is_replaced_only_on_request(tiny_target, tmp_path):
    source, _ = make_source(tiny_target, DSPARK)
    directory = write_export(tmp_path / "drafter", source, files={"README.md": "first"})
    with pytest.raises(InputError, match="exists; choose another place, or --overwrite"):
        write_export(directory, source, files={"README.md": "second"})
    assert (directory / "README.md").read_text() == "first"
    write_export(directory, source, files={"README.md": "second"}, overwrite=True)
    assert (directory / "README.md").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["drafter"]


@pytest.mark.parametrize("what", ["empty", "run", "target", "more than an export", "not the weights", "file"])
def test_overwrite_deletes_exports_only(tiny_target, tmp_path, what):
    source, _ = make_source(tiny_target, DSPARK)
    place = tmp_path / "mine"
    if what == "file":
        place.write_text("mine")
    elif what == "target":
        shutil.copytree(tiny_target, place)
    elif what in ("empty", "run"):
        (place / "checkpoints").mkdir(parents=True) if what == "run" else place.mkdir()
        (place / "config.json").write_text("{}")
    else:
        write_export(place, source)
        (place / "notes.txt").write_text("mine") if what.startswith("more") else (place / "model.safetensors").unlink()
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(InputError, match="so it is not overwritten; choose another place"):
        write_export(place, source, overwrite=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_overwriting_a_link_replaces_what_it_points_to(tiny_target, tmp_path):
    source, _ = make_source(tiny_target, DSPARK)
    directory = write_export(tmp_path / "drafter", source)
    (tmp_path / "link").symlink_to("drafter")
    write_export(tmp_path / "link", source, files={"README.md": "second"}, overwrite=True)
    assert (directory / "README.md").read_text() == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["drafter", "link"]
    assert (tmp_path / "link").is_symlink()


def test_names_that_mislead_vllm_are_refused(tiny_target, tmp_path):
    source, _ = make_source(tiny_target, VARIANTS["dflash"])
    for name in ("my_DFlash", "eagle3-ours"):
        with pytest.raises(InputError, match="vLLM guesses the method from the path"):
            write_export(tmp_path / name, source)
    check_repository("me/my-eagle3", EAGLE3)
    with pytest.raises(
        InputError, match="--push me/my-eagle3-dflash: .* 'dflash' in it is not how this eagle3 drafter"
    ):
        check_repository("me/my-eagle3-dflash", EAGLE3)


def edit(directory: Path, change) -> Path:
    path = directory / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return directory


def test_dialects_are_read_by_their_own_rules(tiny_target, tmp_path):
    """Layer ids of speculators count inputs; the rows of a block that is filled in are one more than its drafts."""
    source, _ = make_source(tiny_target, DSPARK)
    speculators = write_export(tmp_path / "s", source, form="speculators")
    assert json.loads((speculators / "config.json").read_text())["aux_hidden_state_layer_ids"] == [0, 1]
    assert import_drafter(speculators, mesh())[0].target_layer_ids == (-1, 0)
    edit(speculators, lambda raw: raw.update(sample_from_anchor=False))
    assert import_drafter(speculators, mesh())[0] == replace(FILL_IN, block_size=4)
    edit(speculators, lambda raw: raw.update(block_size=1))
    with pytest.raises(InputError, match="config.json: block_size=1 of a fill-in block, .* leaves no drafts"):
        import_drafter(speculators, mesh())

    def specforge(raw):
        raw["architectures"] = ["DSparkDraftModel"]
        for key in ("target_layer_ids", "mask_token_id", "markov_rank", "dspark_config", "sample_from_anchor"):
            del raw[key]

    nested = edit(write_export(tmp_path / "n", source), specforge)
    assert import_drafter(nested, mesh())[0] == DSPARK
    flash = edit(write_export(tmp_path / "f", source), lambda raw: raw.update(architectures=["DFlashDraftModel"]))
    edit(flash, lambda raw: raw.pop("sample_from_anchor"))
    assert import_drafter(flash, mesh())[0] == replace(FILL_IN, block_size=4)


def test_a_half_exported_directory_is_not_mistaken_for_one(tiny_target, tmp_path):
    source, _ = make_source(tiny_target, DSPARK)
    directory = write_export(tmp_path / "drafter", source)
    shutil.copytree(directory, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        import_drafter(tmp_path / "cut", mesh())
