"""Every recorded decoding trace of the PyTorch reference, round by round (golden cases 1 to 5)."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert.hf import import_drafter
from dspark_jax.drafter.interface import is_confident
from dspark_jax.engine import Uniforms, decode_round, generate, prefill
from dspark_jax.engine.draft import draft
from dspark_jax.engine.schedule import Scheduler
from dspark_jax.ops.sampling import Sampling, words
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target

CASES = (
    "case1_qwen3_dspark_vanilla",
    "case2_qwen3_dspark_gated",
    "case3_qwen3_dspark_rnn",
    "case4_qwen3_dflash",
    "case5_qwen3_eagle3",
    "case6_gemma4_dspark_vanilla",
    "case7_gemma4_eagle3",
)


@functools.cache
def load(golden: Path, case: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Target, drafter and recorded runs of a case."""
    folder = golden / "cases" / case
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    name = json.loads((folder / "case.json").read_text())["target"]
    path = golden / "targets" / Path(name).name
    arch = TargetArchitecture.from_hf(path)
    target = load_target(TargetConfig(path=str(path), dtype="float32", architecture=arch), mesh)
    _, drafter = import_drafter(folder / "draft", mesh)
    return target, drafter, json.loads((folder / "decode.json").read_text())["runs"]


@functools.partial(jax.jit, static_argnames=("capacity",))
def jitted_prefill(*args: Any, capacity: int) -> Any:
    return prefill(*args, capacity=capacity)


jitted_draft = jax.jit(draft)
jitted_round = jax.jit(decode_round)


def within_budget(run: dict[str, Any]) -> int:
    """Rounds that start below the token budget; the reference may run one more and throw it away (golden.md D.1)."""
    total, count = 1, 0
    for length in run["acceptance_lengths"]:
        if total >= run["max_new_tokens"]:
            break
        total, count = total + length, count + 1
    return count


def uniforms_of(run: dict[str, Any], index: int, block_size: int) -> Uniforms:
    """The recorded uniforms of a round; halves where the run is greedy and none were drawn."""
    if "uniforms" not in run:
        half = words(jnp.full((1, block_size), 0.5))
        return Uniforms(half, half, half[:, 0])
    drawn = run["uniforms"]["rounds"][index]
    return Uniforms(*(words(jnp.asarray([drawn[name]], jnp.float32)) for name in ("u_draft", "u_accept", "u_next")))


@pytest.mark.parametrize("case", CASES)
def test_every_trace_round_by_round(golden: Path, case: str) -> None:
    target, drafter, runs = load(golden, case)
    assert len(runs) >= 16
    for run in runs:
        size, budget = len(run["prompt_ids"]), run["max_new_tokens"]
        # Padded to one width, so that one executable serves all runs; what stands in the padding must not matter.
        prompt = jnp.asarray([run["prompt_ids"] + [7] * (24 - size)], jnp.int32)
        sampling = Sampling.constant(run["temperature"], 1)
        stops = jnp.asarray((run["stop_token_ids"] or []) + [-1, -1], jnp.int32)[:2]
        first = words(jnp.asarray([run["uniforms"]["u_init"] if "uniforms" in run else 0.5], jnp.float32))
        length = jnp.full(1, size)
        keys = jax.random.split(jax.random.key(0), 1)
        state = jitted_prefill(
            target, drafter, prompt, length, length + budget, keys, first, sampling, stops, capacity=96
        )
        emitted, proposed = [], []
        cut = run["confidence_threshold"]
        # A threshold of 0 keeps everything, by the executable of the others.
        scheduler = Scheduler.threshold(cut) if is_confident(drafter) else Scheduler.fixed()
        for index, expected in enumerate(run["rounds"][: within_budget(run)]):
            where = f"{run['id']} round {index}"
            assert not state.finished[0], where
            assert int(state.lengths[0]) - 1 == expected["start"], where
            uniforms = uniforms_of(run, index, drafter.block_size)
            state, entry = jitted_round(target, drafter, state, uniforms, sampling, stops, scheduler=scheduler)
            entry = jax.device_get(entry)
            # EAGLE-3 stops drafting at a stop token: what we draft behind it does not count.
            drafts = expected.get("sampled_block", expected["verify_input_ids"][1:])
            np.testing.assert_array_equal(entry.drafted[0, : len(drafts)], drafts, where)
            assert int(entry.accepted[0]) == expected["accepted_draft_tokens"], where
            if not expected["terminated_by_stop_token"]:  # else drawn from another row, and dropped by both
                assert int(entry.next_token[0]) == expected["next_token"], where
            if "confidence_logits_full_block" in expected:
                np.testing.assert_allclose(
                    entry.confidence[0], expected["confidence_logits_full_block"], atol=2e-4, err_msg=where
                )
            emitted.append(int(entry.emitted[0]))
            proposed.append(int(entry.proposed[0]))
        assert state.finished[0], run["id"]
        assert emitted == run["acceptance_lengths"][: len(emitted)], run["id"]
        assert proposed == run["proposal_lengths"][: len(proposed)], run["id"]
        np.testing.assert_array_equal(state.tokens[0, : int(state.lengths[0])], run["output_ids"], run["id"])
        assert bool(state.stopped[0]) == (run["stop_token_ids"] is not None), run["id"]


@pytest.mark.parametrize("case", CASES[:-1])
def test_generate_repeats_the_greedy_traces(golden: Path, case: str) -> None:
    """The same runs through the front door, several prompts at a time."""
    target, drafter, runs = load(golden, case)
    greedy = [run for run in runs if run["id"] in {f"greedy_p{i}" for i in range(4)}]
    assert len(greedy) == 4
    result = generate(target, drafter, [run["prompt_ids"] for run in greedy], max_new_tokens=64)
    for i, run in enumerate(greedy):
        count = within_budget(run)
        np.testing.assert_array_equal(result.tokens[i], run["output_ids"][run["num_input_tokens"] :])
        assert result.acceptance_lengths[i].tolist() == run["acceptance_lengths"][:count]
        assert result.proposal_lengths[i].tolist() == run["proposal_lengths"][:count]
        assert result.accepted_lengths[i].tolist() == run["accepted_draft_lengths"][:count]
