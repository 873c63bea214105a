"""Every export and what the field writes, and what each server makes of it, as one table; and how old the rules are."""

import datetime
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_jax.config import DrafterConfig, InputError, TargetArchitecture
from dspark_jax.convert import servers as rules
from dspark_jax.convert.dialect import same
from dspark_jax.convert.drafter_files import Verdict
from dspark_jax.convert.export import FORMATS, Source, content
from dspark_jax.convert.layouts import Layout, read_layout
from dspark_jax.convert.mapping import FROZEN
from dspark_jax.convert.servers import Rule, Server, replay, servers
from tests.convert.test_card import GEMMA, QWEN

DSPARK = DrafterConfig(num_layers=2, block_size=5, target_layer_ids=(0, 3), mask_token_id=60, markov_rank=8)
HEADLESS = {"markov_rank": 0, "confidence_head": False, "confidence_with_markov": False}
DFLASH = replace(DSPARK, kind="dflash", **HEADLESS)
DFLASH2 = replace(
    DSPARK, kind="dflash2", block_layout="fill_in", markov_head_type="selector", confidence_head=False,
    confidence_with_markov=False, conv_kernel_size=2, selector_top_k=5,
)  # fmt: skip
EAGLE3 = replace(DSPARK, kind="eagle3", num_layers=1, mask_token_id=0, **HEADLESS)
DRAFTERS = {
    "dspark": DSPARK,
    "dspark gated": replace(DSPARK, markov_head_type="gated"),
    "dspark rnn": replace(DSPARK, markov_head_type="rnn"),
    "dspark fill-in": replace(DSPARK, block_layout="fill_in"),
    "dflash": DFLASH,
    "dflash fill-in": replace(DFLASH, block_layout="fill_in"),
    "dflash2": DFLASH2,
    "eagle3": EAGLE3,
    "eagle3 llama": replace(EAGLE3, qk_norms=False),
}
TABLE = """
drafter                          vLLM  SGLang llama.cpp tpu-inference sglang-jax TensorRT-LLM vllm-ascend speculators
qwen3 dspark universal           yes   yes    yes       no            no         ?            yes         no
qwen3 dspark deepspec            yes   yes    yes       no            no         ?            yes         no
qwen3 dspark speculators         yes   no     yes       no            no         ?            ?           yes
qwen3 dspark gated universal     no    yes    no        no            no         ?            ?           no
qwen3 dspark gated deepspec      no    yes    no        no            no         ?            ?           no
qwen3 dspark gated speculators   no    no     no        no            no         ?            ?           yes
qwen3 dspark rnn universal       no    yes    no        no            no         ?            ?           no
qwen3 dspark rnn deepspec        no    yes    no        no            no         ?            ?           no
qwen3 dspark rnn speculators     no    no     no        no            no         ?            ?           yes
qwen3 dspark fill-in universal   yes   yes    yes       no            no         ?            yes         no
qwen3 dspark fill-in speculators yes   no     yes       no            no         ?            ?           yes
qwen3 dflash universal           yes   yes    yes       no            no         ?            yes         no
qwen3 dflash deepspec            no    no     yes       no            no         ?            ?           no
qwen3 dflash speculators         yes   no     yes       no            no         ?            ?           yes
qwen3 dflash fill-in universal   yes   yes    yes       yes           yes        yes          yes         no
qwen3 dflash fill-in speculators yes   no     no        yes           no         ?            ?           yes
qwen3 dflash2 universal          yes   yes    yes       no            no         ?            ?           no
qwen3 dflash2 speculators        yes   no     no        no            no         ?            ?           yes
qwen3 eagle3 universal           yes   no     no        no            no         no           no          no
qwen3 eagle3 deepspec            no    no     no        no            no         no           no          no
qwen3 eagle3 speculators         yes   no     no        no            no         ?            ?           yes
qwen3 eagle3 llama universal     yes   yes    no        no            no         yes          ?           no
qwen3 eagle3 llama speculators   yes   no     no        no            no         ?            ?           yes
gemma4 dspark universal          yes   no     no        no            no         ?            ?           no
gemma4 dspark deepspec           yes   no     no        no            no         ?            ?           no
gemma4 dspark gated universal    wrong no     no        no            no         ?            ?           no
gemma4 dspark gated deepspec     wrong no     no        no            no         ?            ?           no
gemma4 dspark rnn universal      wrong no     no        no            no         ?            ?           no
gemma4 dspark rnn deepspec       wrong no     no        no            no         ?            ?           no
gemma4 dspark fill-in universal  yes   no     no        no            no         ?            ?           no
gemma4 dflash universal          yes   no     no        no            no         ?            ?           no
gemma4 dflash deepspec           no    no     no        no            no         ?            ?           no
gemma4 eagle3 deepspec           no    no     no        no            no         no           no          no
LlamaForCausalLMEagle3 midlayer  yes   yes    yes       no            yes        yes          ?           no
Eagle3LlamaForCausalLM midlayer  yes   no     yes       ?             no         yes          yes         no
llama speculators midlayer       yes   no     yes       ?             no         ?            ?           yes
LlamaForCausalLMEagle3 layers.0  yes   yes    yes       no            wrong      yes          ?           no
Eagle3LlamaForCausalLM layers.0  yes   no     yes       ?             no         yes          yes         no
llama speculators layers.0       yes   no     yes       ?             no         ?            ?           yes
llama fc of 5 layers             no    no     no        no            no         no           no          no
llama with q_norm                no    no     no        no            no         wrong        no          no
llama other layers               yes   yes    yes       no            wrong      yes          ?           no
llama whole vocabulary           yes   yes    yes       no            yes        yes          ?           no
llama norm_before_residual       yes   wrong  yes       no            wrong      wrong        ?           no
llama fc_norm norm_output        yes   yes    wrong     no            wrong      yes          ?           no
llama reduced without d2t        wrong wrong  ?         no            wrong      wrong        ?           no
qwen3 eagle3 without norms       wrong no     no        no            no         no           no          no
llama without draft_vocab_size   yes   no     no        no            no         no           ?           no
specforge dspark                 no    yes    yes       no            no         ?            no          no
"""


def exports() -> Iterator[tuple[str, dict[str, Any], dict[str, tuple[int, ...]], TargetArchitecture]]:
    """Name, config, shapes and target of everything that is exported."""
    for family, arch in (("qwen3", QWEN), ("gemma4", GEMMA)):
        frozen: dict[str, np.ndarray] = {name: np.zeros((64, 32), np.float32) for name in FROZEN}
        for name, drafter in DRAFTERS.items():
            if family == "gemma4" and not drafter.qk_norms:
                continue  # no config of such a drafter is taken
            for form in FORMATS:
                source = Source(lambda: [], drafter, arch, arch.to_hf(), frozen, "org/base")
                try:
                    made = content(source, form, "bfloat16")
                except InputError:
                    continue
                yield f"{family} {name} {form}", dict(made.config), dict(made.shapes), arch


IDS = "eagle_aux_hidden_state_layer_ids"
LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "hidden_norm", "input_layernorm")


def field() -> Iterator[tuple[str, dict[str, Any], dict[str, tuple[int, ...]], TargetArchitecture]]:
    """The same of what others write: EAGLE-3 with layers of Llama, and SpecForge's DSpark."""
    layers = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 64, "hidden_size": 32}
    ids = {IDS: [2, 3, 3], "eagle_config": {IDS: [1, 2, 2]}}  # those that are usual for six layers
    plain = {"fc.weight": (32, 96), "norm.weight": (32,), "lm_head.weight": (20, 32), "d2t": (20,), "t2d": (64,)}
    for place in ("midlayer", "layers.0"):
        shapes = plain | {f"{place}.{name}.weight": (32, 64) for name in LAYER}
        for name in ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"):
            served = layers | ids | {"architectures": [name], "draft_vocab_size": 20}
            yield f"{name} {place}", served, shapes, QWEN
        made = {"speculators_model_type": "eagle3", "architectures": ["Eagle3Speculator"], "draft_vocab_size": 20}
        made |= {"transformer_layer_config": layers, IDS: [2, 3, 3]}
        yield f"llama speculators {place}", made, shapes, QWEN
    one = layers | ids | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 20}
    layer = plain | {f"midlayer.{name}.weight": (32, 64) for name in LAYER}
    yield "llama fc of 5 layers", one, layer | {"fc.weight": (32, 160)}, QWEN
    yield "llama with q_norm", one, layer | {"midlayer.self_attn.q_norm.weight": (8,)}, QWEN
    yield "llama other layers", one | {IDS: [1, 2, 3], "eagle_config": {IDS: [0, 1, 2]}}, layer, QWEN
    whole = {name: shape for name, shape in layer.items() if name not in ("d2t", "t2d")} | {"lm_head.weight": (64, 32)}
    yield "llama whole vocabulary", one | {"draft_vocab_size": 64}, whole, QWEN
    yield "llama norm_before_residual", one | {"norm_before_residual": True}, layer, QWEN
    yield "llama fc_norm norm_output", one | {"fc_norm": True, "norm_output": True}, layer, QWEN
    yield "llama reduced without d2t", one, {n: s for n, s in layer.items() if n not in ("d2t", "t2d")}, QWEN
    yield "qwen3 eagle3 without norms", one | {"architectures": ["Eagle3Qwen3ForCausalLM"]}, layer, QWEN
    untold = {name: value for name, value in one.items() if name != "draft_vocab_size"}
    yield "llama without draft_vocab_size", untold, whole, QWEN
    _, config, shapes, arch = next(exports())
    nested = {name: config[name] for name in ("target_layer_ids", "mask_token_id", "markov_rank", "markov_head_type")}
    kept = {key: value for key, value in config.items() if key not in (*nested, "dspark_config")}
    forge = kept | {"architectures": ["DSparkDraftModel"], "dflash_config": nested | {"projector_type": "dspark"}}
    yield "specforge dspark", forge, shapes, arch


def word(verdict: Verdict, stated: Layout) -> str:
    """yes: the server loads the drafter as it was trained; wrong: in another way; no: not at all; ?: not known here."""
    if verdict.refusals:
        return "no"
    if verdict.reading is None:
        return "?"
    told = stated if stated.taps else replace(stated, taps=verdict.reading.taps)  # layers may be left to the server
    return "wrong" if verdict.wrong or not same(verdict.reading, told) else "yes"


def row(name: str, entries: list[str]) -> str:
    widths = [max(len(server.name), 5) + 1 for server in servers()]
    return (f"{name:33}" + "".join(f"{one:{width}}" for one, width in zip(entries, widths, strict=True))).rstrip()


def test_every_export_and_every_server() -> None:
    lines = [row("drafter", [server.name for server in servers()])]
    for name, config, shapes, arch in (*exports(), *field()):
        stated = read_layout("config.json", json.loads(json.dumps(config)))
        lines.append(row(name, [word(verdict, stated) for verdict in replay("x", config, shapes, arch)]))
    assert lines == TABLE.strip().splitlines()


MUST_KNOW = ("vLLM", "SGLang", "llama.cpp", "tpu-inference", "sglang-jax", "TensorRT-LLM", "vllm-ascend", "speculators")


def test_rules_are_no_older_than_a_year() -> None:
    assert stale(servers(), datetime.date.today()) == []


def stale(known: tuple[Server, ...], today: datetime.date) -> list[str]:
    """What is to be read again, and what to do then."""
    return [
        f"{one.name}: its rules in dspark_jax/convert/servers.toml are of {one.version}, {one.date}. Read the files "
        f"that they name as `source` in the newest release of {one.repository}, correct what has changed there and in "
        "the table of this test, and set version and date"
        for one in known
        if today - one.date > datetime.timedelta(days=365)
    ]


def test_what_is_older_is_named() -> None:
    (one,) = stale(servers()[:1], servers()[0].date + datetime.timedelta(days=366))
    assert one.startswith("vLLM: its rules") and "github.com/vllm-project/vllm" in one and "set version and date" in one


def test_the_table_of_rules_is_whole() -> None:
    """Each rule says where it was read and asks for facts that there are; each server has a reading for every file."""
    assert tuple(server.name for server in servers()) == MUST_KNOW
    for server in servers():
        assert server.version and server.repository.startswith("https://") and server.date <= datetime.date.today()
        assert not server.reading[-1].kinds and not server.reading[-1].when
        for rule in server.rule:
            assert rule.verdict in rules.VERDICTS and rule.source and rule.say, rule
            assert set(rule.kinds) <= {"dspark", "dspark5", "dflash", "dflash2", "eagle3"}, rule
    for _, config, shapes, arch in (*exports(), *field()):
        files = rules.Files("x", config, shapes, arch, read_layout("x", config))
        for server in servers():
            read = rules.read_settings(server.reading[-1], files)
            known = rules.facts(files, read)
            for rule in server.rule:
                rule.say.format_map(known)
                rules._holds(replace(rule, kinds=()), files, known)


@pytest.mark.parametrize(
    ("when", "holds"),
    [
        ({"gemma": False}, True),
        ({"gemma": True}, False),
        ({"architecture": ["Qwen3DSparkModel", "Other"]}, True),
        ({"architecture": {"not": ["Qwen3DSparkModel", "Other"]}}, False),
        ({"architecture": {"not": "Other"}}, True),
        ({"config.markov_rank": 8}, True),
        ({"config.dflash_config.nothing": ""}, True),
        ({"config.markov_rank.inside": ""}, True),
        ({"tensor.lm_head.weight": True, "tensor.lm_head": False}, True),
        ({"tensor.layers.*": True, "tensor.midlayer.*": False}, True),
        ({"gemma": False, "config.markov_rank": 7}, False),
    ],
)
def test_conditions(when: dict[str, Any], holds: bool) -> None:
    _, config, shapes, arch = next(exports())
    files = rules.Files("x", config, shapes, arch, read_layout("x", config))
    known = rules.facts(files, rules.read_settings(servers()[0].reading[-1], files))
    assert rules._holds(Rule("note", "", "", when=when), files, known) == holds
    assert not rules._holds(Rule("note", "", "", kinds=["eagle3"], when=when), files, known)


def test_the_table_is_part_of_the_package() -> None:
    text = (Path(rules.__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert '"dspark_jax.convert" = ["*.toml"]' in text
