"""Windows and scaled RoPE in exports and imports: nothing is lost, and transformers' own classes read them alike."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax import rope_scaling
from dspark_jax.config import InputError
from dspark_jax.convert.export import write_export
from dspark_jax.convert.hf import import_drafter, read_drafter_config
from dspark_jax.convert.layouts import unsupported_parts
from tests.convert.test_export import DFLASH2, DSPARK, FILL_IN, Z_LAB, edit, make_source, mesh

YARN = {"factor": 4.0, "original_max_position_embeddings": 64.0, "beta_fast": 16.0, "truncate": 0.0}
LONG: dict[str, Any] = {
    "layer_types": ("sliding_attention", "full_attention"), "sliding_window": 48, "rope_type": "yarn",
    "rope_scaling": YARN,
}  # fmt: skip


@pytest.mark.parametrize("form", ["universal", "speculators"])
@pytest.mark.parametrize("base", [DSPARK, Z_LAB, DFLASH2], ids=["dspark", "z-lab", "dflash2"])
def test_what_comes_back_is_what_was_written(tiny_target: Path, tmp_path: Path, base: Any, form: str) -> None:
    config = replace(base, **LONG)
    source, _ = make_source(tiny_target, config)
    directory = write_export(tmp_path / "drafter", source, form=form, dtype="float32")
    assert read_drafter_config(directory)[1] == config
    raw = json.loads((directory / "config.json").read_text())
    assert unsupported_parts(raw) == []
    alike = replace(config, layer_types=(), rope_type="linear", rope_scaling={"factor": 2.0})
    again = write_export(tmp_path / "alike", replace(source, config=alike), form=form, dtype="float32")
    assert read_drafter_config(again)[1] == alike
    plain = write_export(tmp_path / "plain", replace(source, config=base), form=form, dtype="float32")
    assert read_drafter_config(plain)[1] == base


def test_transformers_reads_windows_and_rotations(tiny_target: Path, tmp_path: Path) -> None:
    qwen = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    source, _ = make_source(tiny_target, replace(Z_LAB, **LONG))
    for form in ("universal", "speculators"):
        directory = write_export(tmp_path / form, source, form=form)
        raw = json.loads((directory / "config.json").read_text())
        raw = raw.get("transformer_layer_config", raw)
        theirs = qwen.Qwen3Config(**{name: value for name, value in raw.items() if name != "model_type"})
        assert (theirs.sliding_window, theirs.layer_types) == (48, list(LONG["layer_types"]))
        rotary = qwen.Qwen3RotaryEmbedding(theirs)
        width = source.arch.head_dim
        turns, factor = rope_scaling.scaled("yarn", YARN, width, source.arch.rope_theta)
        usual = source.arch.rope_theta ** (-np.arange(0, width, 2) / width)
        np.testing.assert_allclose(rotary.inv_freq.numpy(), usual * turns, rtol=1e-5)
        np.testing.assert_allclose(rotary.attention_scaling**2, factor**2, rtol=1e-6)
        assert 0.2 < min(turns) < max(turns)


def test_the_drafter_that_comes_back_has_its_window(tiny_target: Path, tmp_path: Path) -> None:
    source, made = make_source(tiny_target, replace(FILL_IN, **LONG))
    directory = write_export(tmp_path / "drafter", source)
    drafter: Any = made
    back: Any = import_drafter(directory, mesh())[1]
    shapes = [x.backbone.layers.attention.shape for x in (drafter, back)]
    assert shapes[0] == shapes[1] and shapes[0].turns and back.backbone.kinds == LONG["layer_types"]
    assert back.backbone.window == 48


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"dflash_config": {"use_swa": True, "swa_window_size": 30}, "layer_types": ["full_attention"] * 2}, (30, ())),
        ({"layer_types": None, "use_sliding_window": True, "sliding_window": 40, "max_window_layers": 1},
         (40, ("full_attention", "sliding_attention"))),
        ({"layer_types": None, "use_sliding_window": True, "sliding_window": 40}, (0, ())),
        ({"use_sliding_window": False, "sliding_window": 40}, (0, ())),
    ],
    ids=["use_swa", "from a layer on", "behind all layers", "switched off"],
)  # fmt: skip
def test_windows_of_other_writers(tiny_target: Path, tmp_path: Path, changes: Any, found: Any) -> None:
    source, _ = make_source(tiny_target, Z_LAB)
    directory = write_export(tmp_path / "drafter", source)
    own = changes.pop("dflash_config", {})

    def change(raw: dict[str, Any]) -> None:
        raw["dflash_config"] |= own
        raw.update(changes)

    edit(directory, change)
    config = read_drafter_config(directory)[1]
    assert (config.sliding_window, config.layer_types) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_causal": None, "dflash_config": None}, "attended causally, as those of layers with a window are"),
        ({"use_sliding_window": False}, "sliding_window is 48, which use_sliding_window false switches off; state"),
        ({"layer_types": ["sliding_attention"]}, "for each of the 2 layers"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "its RoPE has no 'low_freq_factor'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor '2' of rope_type 'linear' is no number"),
    ],
)
def test_what_is_not_done_is_one_line(tiny_target: Path, tmp_path: Path, changes: Any, message: str) -> None:
    source, _ = make_source(tiny_target, replace(DSPARK, **LONG))
    directory = write_export(tmp_path / "drafter", source)
    edit(directory, lambda raw: raw.update(changes))
    with pytest.raises(InputError, match=message):
        read_drafter_config(directory)
    with pytest.raises(InputError, match="^--format deepspec: no layer of the reference has a window"):
        write_export(tmp_path / "other", source, form="deepspec")
