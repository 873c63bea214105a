"""`plan`: what is counted, what is said, and, where the TPU compiler is installed, a whole small plan."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from dspark_jax import jobs, plan
from dspark_jax.config import InputError, MeshConfig, TargetArchitecture, resolve, to_json
from dspark_jax.ops.dispatch import Operation, Unsupported
from dspark_jax.planning import compile_job
from dspark_jax.planning.estimate import _times, compile_and_estimate
from dspark_jax.planning.flops import matmul_flops
from dspark_jax.planning.hlo import Kernel, Traffic, program_cost, total_cost
from dspark_jax.planning.programs import Program, decode_program, train_program, with_dtypes
from dspark_jax.planning.topology import CHIPS, GIB, devices_of, listing
from dspark_jax.sharding import bytes_per_device, make_mesh, sharding

ROOT = Path(__file__).resolve().parents[1]
TINY = TargetArchitecture("qwen3", 256, 128, 3, 4, 2, 32, 256, 1e-6, 1e4, True, 256)


@pytest.fixture
def config():
    """The Qwen3-4B config at a hundredth of every size."""
    spec = importlib.util.spec_from_file_location("c", ROOT / "configs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.get_config()
    found.target = dataclasses.replace(found.target, path="", architecture=TINY)
    found.drafter = dataclasses.replace(
        found.drafter, target_layer_ids=(0, 1), num_layers=1, mask_token_id=255, markov_rank=8, block_size=4
    )
    found.data = dataclasses.replace(found.data, max_length=64, max_prompt_length=32)
    found.train = dataclasses.replace(found.train, batch_size=16, accumulate=2, num_anchors=8, vocab_chunk=32, steps=90)
    found.optim = dataclasses.replace(found.optim, kind="adamw", learning_rate=1e-3)
    found.eval = dataclasses.replace(found.eval, batch_size=8, max_new_tokens=16)
    return with_dtypes(resolve(found))


def test_products_are_counted_as_often_as_their_loops_turn():
    x, w = jnp.zeros((3, 5)), jnp.zeros((5, 5))

    def nested(x):
        x = jax.lax.fori_loop(0, 4, lambda _, y: y @ w, x)  # 4 x 150
        return jax.lax.map(lambda row: jax.checkpoint(lambda r: w @ r)(row), x)  # 3 x 50

    assert matmul_flops(jax.make_jaxpr(nested)(x)) == 4 * 150 + 3 * 50
    batched = jax.make_jaxpr(lambda a, b: jnp.einsum("bij,bjk->bik", a, b))(jnp.zeros((2, 3, 4)), jnp.zeros((2, 4, 5)))
    assert matmul_flops(batched) == 2 * 2 * 3 * 4 * 5
    branches = jax.make_jaxpr(lambda p, x: jax.lax.cond(p, lambda x: x @ w @ w, lambda x: x @ w, x))(True, x)
    assert matmul_flops(branches) == 300
    gradient = jax.make_jaxpr(jax.grad(lambda w: jnp.sum(jnp.square(x @ w))))(w)
    assert matmul_flops(gradient) == 2 * 150


HLO = """HloModule jit_step, is_scheduled=true

%inner (param_0: s32[], param_1: f32[8,100]) -> f32[1,100] {
  %param_0 = s32[]{:T(128)S(6)} parameter(0)
  %param_1 = f32[8,100]{1,0:T(8,128)} parameter(1)
  ROOT %slice = f32[1,100]{1,0} dynamic-slice(%param_1, %param_0, %param_0), dynamic_slice_sizes={1,100}
}

%fused (param_0: f32[8,100], param_1: s32[]) -> f32[100] {
  %param_0 = f32[8,100]{1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)S(6)} parameter(1)
  %part = f32[1,100]{1,0} fusion(%param_1, %param_0), kind=kLoop, calls=%inner
  ROOT %row = f32[100]{0} bitcast(%part)
}

%body (arg: (s32[], f32[8,100], f32[100])) -> (s32[], f32[8,100], f32[100]) {
  %arg = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}, f32[100]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %stack = f32[8,100]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %row.1 = f32[100]{0} fusion(%stack, %i), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"70"}
  %all = f32[400]{0} all-gather(%row.1), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %kept = f32[100]{0:T(128)S(1)} copy(%row.1), backend_config={"estimated_cycles":"5"}
  ROOT %out = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}, f32[100]{0}) tuple(%i, %stack, %row.1)
}

%condition (arg.1: (s32[], f32[8,100], f32[100])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}, f32[100]{0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %bound = s32[]{:T(128)} constant(8)
  ROOT %less = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
}

ENTRY %main (p: f32[8,100], q: f32[100]) -> f32[100] {
  %p = f32[8,100]{1,0:T(8,128)} parameter(0)
  %q = f32[100]{0} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %start = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}, /*index=2*/f32[100]{0}) tuple(%zero, %p, %q)
  %loop = (s32[]{:T(128)}, f32[8,100]{1,0:T(8,128)}, f32[100]{0}) while(%start), condition=%condition, body=%body
  %last = f32[100]{0} get-tuple-element(%loop), index=2
  ROOT %sum = f32[100]{0} all-reduce(%last), channel_id=2, replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_a_compiled_program_is_added_up_over_its_loops():
    """Eight turns: of a stack only the row is read, what stays on the chip (S(1)) is no traffic."""
    cost = program_cost(HLO)
    assert cost.cycles == 8 * 75
    assert cost.collectives == {"all-gather": Traffic(8, 8 * 1600.0), "all-reduce": Traffic(1, 400.0)}
    assert cost.sent_bytes == 8 * 1600 + 2 * 400
    per_turn = (400 + 400) + (400 + 1600) + 400  # fusion, all-gather, copy to the chip
    index = 4  # the loop's counter, which the copy in the entry's layout keeps in memory
    assert cost.hbm_bytes in (8 * per_turn + 800, 8 * (per_turn + index) + 800)
    assert cost.unknown_loops == 0
    assert program_cost(HLO.replace("constant(8)", "parameter(1)")).unknown_loops == 1


SLICED = """HloModule jit_step, is_scheduled=true

%view (param_0: f32[8,100]) -> f32[8,100,1] {
  %param_0 = f32[8,100]{1,0:T(8,128)} parameter(0)
  ROOT %shape = f32[8,100,1]{1,0,2:T(8,128)} bitcast(%param_0)
}

%fused (param_0: f32[8,100], param_1: f32[8,100]) -> f32[100] {
  %param_0 = f32[8,100]{1,0:T(8,128)} parameter(0)
  %whole = f32[8,100,1]{1,0,2:T(8,128)} fusion(%param_0), kind=kLoop, calls=%view
  %param_1 = f32[8,100]{1,0:T(8,128)} parameter(1)
  %row = f32[1,100]{1,0:T(8,128)} slice(%param_1), slice={[3:4], [0:100]}
  ROOT %product = f32[100]{0} convolution(%whole, %row)
}

ENTRY %main (p: f32[8,100], q: f32[8,100]) -> f32[100] {
  %p = f32[8,100]{1,0:T(8,128)} parameter(0)
  %q = f32[8,100]{1,0:T(8,128)} parameter(1)
  ROOT %out = f32[100]{0} fusion(%p, %q), kind=kOutput, calls=%fused
}
"""


def test_a_fusion_reads_what_it_uses():
    """A matrix that it only gives another shape first, whole; of a stack from which it takes a layer, the layer."""
    assert program_cost(SLICED).hbm_bytes == 8 * 100 * 4 + 400 + 400


def test_a_slice_of_what_is_converted_reads_the_slice():
    """Of a stack of float32 that is used in bfloat16, a layer's float32."""
    text = SLICED.replace(
        "  %row = f32[1,100]{1,0:T(8,128)} slice(%param_1)",
        "  %narrow = bf16[8,100]{1,0} convert(%param_1)\n  %row = bf16[1,100]{1,0} slice(%narrow)",
    )
    assert text != SLICED and program_cost(text).hbm_bytes == program_cost(SLICED).hbm_bytes


def test_what_is_fetched_ahead_counts_once():
    """A part of an array that is brought onto the chip is read; an array that is put back is written."""
    text = SLICED.replace(
        "  ROOT %out",
        """  %part = ((f32[8,100]{1,0}), f32[2,100]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:2], [0:100]}
  %there = f32[2,100]{1,0:S(1)} slice-done(%part)
  %moved = (f32[2,100]{1,0}, f32[2,100]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%there)
  %back = f32[2,100]{1,0} copy-done(%moved)
  ROOT %out""",
    )
    assert program_cost(text).hbm_bytes == program_cost(SLICED).hbm_bytes + 2 * 800


def test_kernels_cost_what_they_state():
    """The compiler gives no cycles for a Pallas kernel; nor does one that takes a stack of layers read all of it."""
    stated = '{"custom_call_config":{"cost_estimate":{"flops":"394000000000","bytes_accessed":"9"}}}'
    kernel = f'%k = f32[100]{{0}} custom-call(%stack), custom_call_target="tpu_custom_call", backend_config={stated}'
    text = HLO.replace("  %row.1 = ", f"  {kernel}\n  %row.1 = ")
    plain, cost = program_cost(HLO), program_cost(text)
    assert cost.kernels == (Kernel(8, 394e9, 9.0),) and cost.cycles == plain.cycles and plain.kernels == ()
    assert cost.hbm_bytes == plain.hbm_bytes + 8 * 9
    found = [_times(0.0, {}, each, CHIPS["v5e"])["compiler_seconds"] for each in (plain, cost)]
    assert found[1] - found[0] == pytest.approx(8 * 2e-3)
    assert total_cost([(cost, 3)]).kernels == (Kernel(24, 394e9, 9.0),)
    moving = program_cost(text.replace('"bytes_accessed":"9"', '"bytes_accessed":"3276000000"'))
    assert _times(0.0, {}, moving, CHIPS["v5e"])["compiler_seconds"] - found[0] == pytest.approx(8 * 4e-3)


def test_the_programs_are_traced_without_weights(config):
    """Operations of the train step as they follow from the shapes; bytes of the state as it is split."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    program = train_program(config, mesh)
    d, f, v, q, kv, g, r = 128, 256, 256, 128, 64, 4, 8
    rows, blocks = 16 * 64, 16 * 8 * g
    layer = d * (q + 2 * kv) + q * d + 3 * d * f
    target = 2 * rows * 3 * (layer + 2 * 64 * q)
    # Drafter: forward and two products backward, some recomputed; the context's fc and keys over all rows.
    least = target + 2 * 3 * (rows * (2 * d * d + 2 * d * kv) + blocks * layer) + 2 * blocks * v * (3 * d + 3 * r)
    assert least < matmul_flops(program.traced.jaxpr) < 1.6 * least
    assert bytes_per_device(program.parts["optimizer"]) == pytest.approx(
        2 * bytes_per_device(program.parts["drafter_parameters"]), rel=0.01
    )
    whole = sum(leaf.size * 2 for leaf in jax.tree.leaves(program.parts["target_parameters"]))
    assert whole / 4 <= bytes_per_device(program.parts["target_parameters"]) < 0.3 * whole
    spread = jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=sharding(("batch", None), (8, 6), mesh))
    assert bytes_per_device(spread) == 8 * 6 * 2 / 4
    decode = decode_program(config, mesh)
    assert matmul_flops(decode.traced.jaxpr) > 2 * 8 * (g + 1) * (3 * layer + d * v)


@pytest.mark.parametrize(("features", "unsupported"), [("cache", ""), ("torch", "olmo")])
def test_with_features_from_disk_the_step_has_no_target(config, tmp_path, monkeypatch, features, unsupported):
    """As in `train`: embedding and LM head are given, and the features are part of the batch."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arch = dataclasses.replace(TINY, unsupported=unsupported)
    target = dataclasses.replace(config.target, architecture=arch)
    data = dataclasses.replace(config.data, features=features, regenerate=False)
    config = dataclasses.replace(config, data=data, target=target)
    program = train_program(config, mesh)
    assert bytes_per_device(program.parts["target_parameters"]) == 2 * 256 * 128 * 2
    # Of eight sequences: features, tokens, starts and mask of the rows; numbers and lengths.
    micro = 8 * 64 * (3 * (128 + 2) + 4 + 4 + 1) + 2 * 8 * 4
    assert bytes_per_device(program.parts["batch"]) == 2 * micro + 4  # one is computed with while the next one arrives
    assert bytes_per_device(program.beside) == micro and program.calls == 2
    given = sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in program.traced.jaxpr.in_avals)
    assert given == sum(bytes_per_device(part) for part in program.parts.values()) - micro
    assert [aval.shape for aval in program.last.jaxpr.out_avals].count((256, 128)) == 3  # a weight and its moments
    done = found(1.0, True) | {"flops": 1e12, "flops_per_chip": 1e12}
    monkeypatch.setattr(plan, "estimate_in_process", lambda *_, **__: dict(done))
    monkeypatch.setattr(plan, "devices_of", lambda _: (CHIPS["v5e"], jax.devices()))
    report = plan.plan(config, tmp_path, topology="v5e:2x4")
    assert report["train"]["verdict"].startswith("fits")
    assert report["prepare"]["verdict"] == "not planned: data.regenerate=False trains on given answers"
    if unsupported:
        assert report["decode"]["verdict"] == "not planned: a olmo has no definition here and cannot run"
    else:
        assert report["decode"]["verdict"].startswith("fits")


def test_a_batch_that_the_mesh_cannot_divide_is_refused(config):
    config.train = dataclasses.replace(config.train, batch_size=6)
    with pytest.raises(InputError, match=r"batch_size=6 is not divisible by train.accumulate=2 x 8 ways"):
        train_program(config, make_mesh(MeshConfig(2, 4, 1)))


class Compiled:
    """A program of matrices [8, 100] f32, compiled: to HLO, and to this much memory, or not at all."""

    def __init__(self, message="", text=HLO):
        self.message, self.text = message, text

    def lower(self):
        return self

    def compile(self, **options):
        if self.message:
            raise jax.errors.JaxRuntimeError(self.message)
        return self

    def as_text(self):
        if not self.text:
            raise jax.errors.JaxRuntimeError(
                "INTERNAL: RET_CHECK failure async-update instruction should have 1 operands"
            )
        return self.text

    def memory_analysis(self):
        return SimpleNamespace(
            argument_size_in_bytes=5000, temp_size_in_bytes=700, output_size_in_bytes=3000, alias_size_in_bytes=2600,
            generated_code_size_in_bytes=30,
        )  # fmt: skip


def estimated(compiled, beside=0, **more):
    """Two matrices as parameters on one chip; the program's operations are those of x @ x, [100, 100]."""
    jaxpr = jax.make_jaxpr(lambda x: x @ x)(jnp.zeros((100, 100)))
    compiled.jaxpr = jaxpr
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    spread = jax.ShapeDtypeStruct((8, 100), jnp.float32, sharding=sharding((None, None), (8, 100), mesh))
    parts = {"weights": {"a": spread}, "optimizer": [spread]}
    program = Program("a matrix", compiled, parts, **{"beside": [spread] * beside, **more})
    return compile_and_estimate(program, CHIPS["v5e"], mesh)


def test_what_the_compiler_says_of_a_program_becomes_figures():
    report, chip = estimated(Compiled()), CHIPS["v5e"]
    memory = {"weights_bytes": 3200, "optimizer_bytes": 3200, "activations_bytes": 700}
    assert report["memory"] == memory | {"rest_bytes": 5000 + 400 + 30 - 6400}
    assert report["hbm_per_chip_bytes"] == 5000 + 700 + 400 + 30 == sum(report["memory"].values()) and report["fits"]
    cost = program_cost(HLO)
    collectives = cost.sent_bytes / chip.ici_bandwidth
    assert report["roofline"] == {
        "flops": 2e6 / chip.flops, "hbm": cost.hbm_bytes / chip.hbm_bandwidth, "collectives": collectives,
    }  # fmt: skip
    assert report["roofline_seconds"] == max(report["roofline"].values())
    assert report["compiler_seconds"] == 600 / chip.clock + collectives
    assert report["estimated_seconds"] == max(report["compiler_seconds"], report["roofline_seconds"])


def test_a_step_of_several_calls_is_added_up():
    """Three calls and a last one; what is beside their arguments takes memory as well."""
    once, last = estimated(Compiled()), Compiled()
    last.jaxpr = jax.make_jaxpr(lambda x: x @ x @ x)(jnp.zeros((100, 100)))
    step = estimated(Compiled(), calls=3, last=last, beside=2)
    assert step["flops"] == 3 * 2e6 + 4e6
    assert step["hbm_per_chip_bytes"] == once["hbm_per_chip_bytes"] + 2 * 3200 == sum(step["memory"].values())
    for name in ("hbm", "collectives"):
        assert step["roofline"][name] == pytest.approx(4 * once["roofline"][name])
    assert step["compiler_seconds"] == pytest.approx(4 * once["compiler_seconds"])
    assert step["collectives"]["all-gather"] == {"count": 32, "bytes": 4 * once["collectives"]["all-gather"]["bytes"]}


def test_of_a_program_that_cannot_be_printed_only_the_operations_are_known(config):
    """As libtpu's for v5p and v6e often cannot: the time is said to be far too short."""
    report = estimated(Compiled(text=""))
    assert report["roofline_seconds"] == report["estimated_seconds"] == 2e6 / CHIPS["v5e"].flops
    said = "\n".join(plan.describe("train step", plan._of_training(report | {"verdict": "fits"}, config, 4)))
    assert "far too short        memory traffic and collectives are not known" in said and "pip install" in said
    assert said.endswith("tokens/s at the best")
    whole = "\n".join(
        plan.describe("train step", plan._of_training(estimated(Compiled()) | {"verdict": ""}, config, 4))
    )
    assert "far too short" not in whole and "at the best" not in whole


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (96.00G) exceeds available HBM (15.75G). HLO module: jit__lambda.\nSee ...",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 96.00G of 15.75G hbm. Exceeded it.",
    ],
)
def test_a_program_that_does_not_fit_is_told_by_its_size(message):
    report = estimated(Compiled(message))
    assert report["fits"] is False and report["hbm_per_chip_bytes"] == 96 * GIB
    assert report["memory"]["activations_bytes"] == 96 * GIB - 6400 and "roofline_seconds" not in report
    for other in ("INTERNAL: Used 96.00G of 15.75G hbm", "RESOURCE_EXHAUSTED: out of registers"):
        with pytest.raises(jax.errors.JaxRuntimeError):
            estimated(Compiled(other))


def found(activations, fits, held=4.0):
    memory = {"optimizer_bytes": held * GIB, "activations_bytes": activations * GIB, "rest_bytes": 0.0}
    total = (held + activations) * GIB
    return {"memory": memory, "hbm_per_chip_bytes": total, "hbm_available_bytes": 15.75 * GIB, "fits": fits}


def test_the_verdict_says_what_to_change(config):
    mesh = make_mesh(MeshConfig(1, 2, 1), jax.devices()[:2])  # 16 / (2 x 2) = 4 sequences per chip at a time
    assert plan.verdict(found(6.0, True), config, mesh, "train") == "fits: 10.00 of 15.75 GiB per chip"
    assert "set train.accumulate=4" in plan.verdict(found(20.0, False), config, mesh, "train")
    assert "set train.accumulate=8" in plan.verdict(found(40.0, False), config, mesh, "train")
    left = plan.verdict(found(90.0, False), config, mesh, "train")
    assert "even with one sequence per chip" in left and "lower train.num_anchors, train.vocab_chunk or" in left
    assert "use a larger slice" in plan.verdict(found(1.0, False, held=15.0), config, mesh, "train")
    assert "lower eval.batch_size" in plan.verdict(found(20.0, False), config, mesh, "decode")


def test_answers_are_estimated_as_prepare_gives_them(config):
    """Plainly: 600 rounds of 32 slots, and two chunks of the prompt, of which 16 copies read one each at a time."""
    config.data.decode_batch_size = 32
    done = found(1.0, True) | {"flops": 1e12, "flops_per_chip": 1e12, "estimated_seconds": 0.02}
    done |= {"roofline": {"hbm": 0.02}, "roofline_seconds": 0.02, "chunk_seconds": 0.04, "copies": 16}
    done |= {"slots_that_fit": 500, "placement": "decoding on 16 devices"}
    report = plan._of_answers(done, config, 16, plan.Questions(1_000_000, tokens=600, prompt=300, chunk=256))
    each = 600 * 0.02 / 32 + 2 * 0.04 / 16
    assert report["hours"] == pytest.approx(1e6 * each / 3600)
    assert report["chip_hours"] == 16 * report["hours"] and report["tokens_per_second"] == pytest.approx(600 / each)
    said = "\n".join(plan.describe("answers", report | {"verdict": "fits"}))
    assert "decoding on 16 devices" in said and "1,000,000 answers" in said and "one token per round" in said
    assert "decode_batch_size could be 500" in said
    held = plan.verdict(found(20.0, False), config, None, "prepare")
    assert held.endswith("lower data.decode_batch_size")
    config.data.answers.endpoints = ("http://a/v1",)
    assert "servers give the answers" in plan._skipped(config, "prepare")
    with pytest.raises(InputError, match="--answer_tokens=0 --prompt_tokens=200: each must be 1 or more"):
        plan.plan(config, Path(), topology="v5e:2x2", answer_tokens=0)


def test_topologies_are_listed_and_others_refused():
    text = listing()
    assert all(f"{chip.name}:{shape}" in text for chip in CHIPS.values() for shape in chip.shapes)
    for name in ("v5e", "v9:2x2", "v5e:four"):
        with pytest.raises(InputError, match="list"):
            devices_of(name)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [sys.executable, "-m", "dspark_jax.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, env=everything, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is installed")
def test_without_the_compiler_one_line_says_what_to_install(tmp_path):
    done = run("--config", "configs/dspark_qwen3_4b.py", "--topology", "v5e:4x4", "--workdir", str(tmp_path))
    assert done.returncode == 2
    assert "pip install 'dspark-jax[tpu]'" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("crashed", (("train",), ("train", "decode")))
def test_a_crash_of_the_compiler_costs_one_program_only(config, tmp_path, monkeypatch, capsys, crashed):
    """The process that compiles is ended by a signal, as a failed check of libtpu ends it."""
    program = "import os, sys; print('F0 x.cc:1] Check failed: pad', file=sys.stderr); os.abort()"

    def run(arguments, environment):
        job = json.loads(Path(arguments[-1]).read_text())
        if job["part"] in crashed:
            return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        Path(job["out"]).write_text(json.dumps(result))
        return subprocess.CompletedProcess(arguments, 0, "", "")

    result = found(1.0, True) | {"flops": 1e12, "flops_per_chip": 1e12}
    monkeypatch.setattr(jobs, "run_quietly", run)
    monkeypatch.setattr(plan, "devices_of", lambda topology: (CHIPS["v5e"], jax.devices()))
    plan.plan(config, tmp_path, topology="v5e:2x4")
    report, said = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    for part in plan.PARTS:
        assert ("crashed" in report[part]) == (part in crashed)
        assert ("the TPU compiler crashed (signal 6: F0 x.cc:1] Check failed: pad)" in report[part]["verdict"]) == (
            part in crashed
        )
    assert "train step: not known" in said and ("decoding round: fits" in said) == ("decode" not in crashed)


def test_what_kernels_leave_to_xla_is_said(config, monkeypatch):
    """Once for each reason, however often it was traced; what a kernel takes needs no line."""
    operation = Operation("toy", {"cpu": []})
    operation.register("xla", lambda size: size, ["cpu"])

    def kernel(size):
        if size > 2:
            raise Unsupported("too many tiles")

    operation.register("pallas", kernel, ["cpu"])
    program = lambda *_: estimated(Compiled()) | {"devices": [operation(None, size) for size in (1, 5, 6)]}  # noqa: E731
    monkeypatch.setitem(compile_job.PROGRAMS, "train", program)
    monkeypatch.setattr(compile_job, "devices_of", lambda topology: (CHIPS["v5e"], jax.devices()))
    found = compile_job.work({"config": to_json(config), "topology": "v5e:2x4", "part": "train"})
    found = json.loads(json.dumps(found))
    refused = {"operation": "toy", "implementation": "xla", "refusals": ["pallas: too many tiles"], "traced": 2}
    assert found["operations"] == [{**refused, "implementation": "pallas", "refusals": [], "traced": 1}, refused]
    said = [line for line in plan.describe("train step", found | {"verdict": ""}) if "left to" in line]
    assert said == ["  left to xla          toy (pallas: too many tiles)"]


def test_bad_input_of_the_compiling_process_is_told_as_such(config, tmp_path, monkeypatch):
    config.train = dataclasses.replace(config.train, batch_size=6)
    monkeypatch.setattr(compile_job, "devices_of", lambda topology: (CHIPS["v5e"], jax.devices()))
    (tmp_path / "job.json").write_text(json.dumps({"config": to_json(config), "topology": "v5e:2x4", "part": "train"}))
    with pytest.raises(SystemExit, match="2"):
        jobs.do(compile_job.work, tmp_path / "job.json")
    done = subprocess.CompletedProcess([], 2, "", "a warning\nerror: train.batch_size=6 is wrong\n")
    monkeypatch.setattr(jobs, "run_quietly", lambda *arguments: done)
    with pytest.raises(InputError, match="^train.batch_size=6 is wrong$"):
        compile_job.estimate_in_process(config, "v5e:2x4", "train")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_small_plan(config, tmp_path):
    (tmp_path / "c.json").write_text(to_json(config))
    (tmp_path / "c.py").write_text(
        "from pathlib import Path\nfrom dspark_jax.config import from_json\n\n\n"
        "def get_config():\n    return from_json((Path(__file__).parent / 'c.json').read_text())\n"
    )
    done = run("--config", str(tmp_path / "c.py"), "--topology", "v5e:2x2", "--workdir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "plan.json").read_text())
    train, decode = report["train"], report["decode"]
    assert report["chips"] == 4 and train["fits"] and decode["fits"]
    assert train["hbm_per_chip_bytes"] == pytest.approx(sum(train["memory"].values()))
    assert train["estimated_step_seconds"] >= train["roofline_seconds"] > 0
    assert train["hours"] == pytest.approx(90 * train["estimated_step_seconds"] / 3600)
    assert train["collectives"]["all-gather"]["count"] > 3 and train["flops_per_step"] > 0
    assert decode["estimated_round_seconds"] > 0
    assert "train step: fits" in done.stdout and "decoding round: fits" in done.stdout
    answers = report["prepare"]
    assert answers["hours"] > 0 and answers["copies"] == 4 and "every device has a copy" in answers["placement"]
    weights = sum(decode["memory"][f"{name}_parameters_bytes"] for name in ("target", "drafter"))
    assert sum(traffic["bytes"] for traffic in decode["collectives"].values()) < 0.02 * weights
