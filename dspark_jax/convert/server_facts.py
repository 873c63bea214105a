"""What the rules of servers ask about a drafter directory: facts by name, for `convert/servers.toml`.

Names with a dot are looked up: `config.A.B` in config.json, `tensor.NAME` among the tensors (`tensor.PREFIX.*`: any of
them). What is not there is the empty text.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dspark_jax.convert.drafter_files import GREEDY, Files, path_word
from dspark_jax.convert.layouts import DFLASH2, Z_LAB, default_taps, has_stages, layers_config

IDS = "eagle_aux_hidden_state_layer_ids"


def kind(files: Files) -> str:
    """Which class of drafter a server looks for: dspark, dspark5, dflash (z-lab's), dflash2 or eagle3."""
    if files.stated.family == "eagle3":
        return "eagle3"
    if has_stages(files.config):
        return "dspark5"
    named = files.config.get("speculators_model_type")
    if files.architecture == DFLASH2 or named == "dflash2":
        return "dflash2"
    return "dflash" if files.architecture in Z_LAB or named == "dflash" else "dspark"


def lookup(files: Files, path: str) -> Any:
    """A value of config.json by its dotted path; None where it is not there, or null."""
    value: Any = files.config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def facts(files: Files, read: Mapping[str, Any]) -> dict[str, Any]:
    """All facts, and those of how a server reads the file.

    Args:
      files: the directory.
      read: by name what the server finds in config.json (`servers.read_settings`).
    """
    config, stated = files.config, files.stated
    found = {
        "architecture": "" if files.speculators else files.architecture,
        "speculators": files.speculators,
        "target": files.target.unsupported or files.target.model_type,
        "gemma": files.gemma,
        "llama": files.llama,
        "norms": any(name.endswith(("q_norm.weight", "k_norm.weight")) for name in files.shapes),
        "switched_norms": ", ".join(stated.eagle3_norms),
        "path_word": path_word(files.path),
        "softcap": bool(config.get("final_logit_softcapping")),
        "split": files.split,
        "greedy": GREEDY,
        "anchor_first": stated.anchor_first,
        "drafts": stated.drafts,
        "num_layers": stated.num_layers,
        "causal": _causal(files),
        "mixed_layers": len(set(layers_config(config).get("layer_types") or [])) > 1,
    }
    return found | _heads(files) | _vocabulary(files) | _gemma(files) | _taps(files) | _read(files, read)


def _heads(files: Files) -> dict[str, Any]:
    """Markov and confidence head."""
    tensors = files.head_tensors()
    named = str(files.config.get("markov_head_type") or "vanilla") if kind(files) == "dspark" else "vanilla"
    parts = [part for part in ("gate_proj", "joint_proj") if part in tensors]
    by_tensor = {"gate_proj": "gated", "joint_proj": "rnn"}
    stated = files.stated.markov_head_type
    width, candidates = files.target.hidden_size, files.stated.selector_top_k
    lattice = candidates * (candidates + 1)  # the candidates and, for each, scores of all that may follow
    rank = next((shape[1] for name, shape in files.shapes.items() if name.endswith("markov_w1.weight")), None)
    score = next((shape for name, shape in files.shapes.items() if name.endswith("confidence_head.proj.weight")), None)
    wanted = None if rank is None else (1, width + rank)
    return {
        "head": named,
        "head_part": next(iter(parts), "" if named == "vanilla" else named),
        "gguf_head": by_tensor[parts[0]] if parts and stated == "vanilla" else stated,
        "hidden_size": width,
        "selector_lattice": lattice,
        "selector_fits": lattice <= width,
        "confidence": "confidence" in tensors,
        "plain_confidence": all(f"confidence_head.proj.{part}" in files.shapes for part in ("weight", "bias")),
        "confidence_shape": list(score or ()),
        "confidence_wanted": list(wanted or ()),
        "confidence_fits": None if None in (score, wanted) else score == wanted,
    }


def _vocabulary(files: Files) -> dict[str, Any]:
    whole = files.target.vocab_size
    return {
        "d2t": files.has_vocabulary_map,
        "reduced": (files.config.get("draft_vocab_size") or whole) < whole,
        "one_layer_with_draft_vocabulary": "draft_vocab_size" in files.config and files.stated.num_layers == 1,
    }


def _gemma(files: Files) -> dict[str, Any]:
    """What the Gemma 4 class of vLLM insists on."""
    own, layers = files.config.get("per_layer_config") or {}, files.stated.num_layers
    beyond = [str(key) for key in own if not (str(key).isdigit() and int(key) < layers)]
    norm = files.shapes.get("layers.0.self_attn.k_norm.weight")
    width = files.config.get("global_head_dim") or files.config.get("head_dim")
    return {
        "layers_beyond": ", ".join(beyond),
        "head_width": norm[0] if norm else "",
        "head_width_fits": None if norm is None else norm == (width,),
    }


def _taps(files: Files) -> dict[str, Any]:
    """Tapped layers of an EAGLE-3 drafter, and the width of its `fc`."""
    usual, raw = default_taps(files.target.num_hidden_layers), files.config.get(IDS)
    inputs = [i + 1 for i in usual]
    width = files.config.get("target_hidden_size") or files.target.hidden_size
    named = len(files.nested("eagle_config").get(IDS) or ()) or 3
    counted = layers_config(files.config).get("num_aux_hidden_states") or named
    stated = len(files.stated.taps) or 3
    shape = _fc(files)
    return {
        "names_inputs": bool(raw),
        "input_count": len(raw or inputs),
        "usual_inputs": inputs,
        "usual_outputs": list(usual),
        "other_inputs": bool(raw) and list(raw) != inputs,
        "other_outputs": bool(files.stated.taps) and files.stated.taps != usual,
        "width": width,
        "fc_width": shape[1] if shape else "",
        "width_3": 3 * width,
        "fc_fits_3": None if shape is None else shape[1] == 3 * width,
        "named_layers": named,
        "named_width": named * width,
        "counted_layers": counted,
        "counted_width": counted * width,
        "stated_taps": list(files.stated.taps or usual),
        "stated_layers": stated,
        "stated_width": stated * width,
        "fc_fits_stated": None if shape is None else shape[1] == stated * width,
        "fc_fits_named": None if shape is None else shape[1] == named * width,
        "fc_fits_counted": None if shape is None else shape[1] == counted * width,
    }


def _read(files: Files, read: Mapping[str, Any]) -> dict[str, Any]:
    """What follows from how the server reads the file."""
    needed = {"block_size": "block_size", "mask_token_id": "mask_token_id", "target_layer_ids": "taps"}
    missing = [name for name, key in needed.items() if read[key] is None]
    taps, mask, last = read["taps"] or (), read["mask_token_id"], files.target.num_hidden_layers - 1
    shape, width = _fc(files), files.target.hidden_size
    return {
        **{f"read_{name}": value for name, value in read.items()},
        "read_taps": list(taps),
        "read_missing": ", ".join(missing),
        "read_outside": any(not 0 <= i <= last for i in taps),
        "read_last": last in taps,
        "read_ascending": list(taps) == sorted(taps),
        "read_mask_outside": mask is not None and not 0 <= mask < files.target.vocab_size,
        "last_layer": last,
        "read_layers": len(taps),
        "one_stage_per_tap": len(taps) == files.stated.num_layers,
        "target_width": width,
        "read_width": len(taps) * width,
        "fc_fits_read": None if shape is None else shape[1] == len(taps) * width,
    }


def _fc(files: Files) -> Sequence[int] | None:
    """Shape of the projection of the tapped layers."""
    return next((shape for name, shape in files.shapes.items() if name.endswith("fc.weight")), None)


def _causal(files: Files) -> str:
    """Why vLLM attends blocks causally; empty where it does not."""
    stated = files.config.get("is_causal", files.nested("dflash_config").get("causal"))
    if stated:
        return "stated"
    sliding = "sliding_attention" in (layers_config(files.config).get("layer_types") or [])
    return "sliding" if stated is None and sliding else ""
