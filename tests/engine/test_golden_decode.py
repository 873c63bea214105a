"""Every recorded decoding trace of the PyTorch reference, round by round."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import MeshConfig, TargetArchitecture, TargetConfig
from dspark_jax.convert.hf import import_drafter
from dspark_jax.drafter.interface import is_confident
from dspark_jax.engine import Models, Prompts, Requests, Uniforms, decode_round, generate, prefill, schedulers
from dspark_jax.engine.draft import draft
from dspark_jax.ops.sampling import Sampling, words
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target


@functools.cache
def load(case: Any) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Target, drafter and recorded runs of a case."""
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    arch = TargetArchitecture.from_hf(case.target)
    target = load_target(TargetConfig(path=str(case.target), dtype="float32", architecture=arch), mesh)
    _, drafter = import_drafter(case.folder / "draft", mesh)
    return target, drafter, case.read("decode.json")["runs"]


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


def test_traces_of_the_vanilla_head_round_by_round(golden_vanilla_case: Any) -> None:
    follow(golden_vanilla_case)


@pytest.mark.slow
def test_every_trace_round_by_round(golden_case: Any) -> None:
    follow(golden_case)


def follow(golden_case: Any) -> None:
    """Every recorded round: drafts, what is accepted, the token that follows, the answer."""
    target, drafter, runs = load(golden_case)
    models = Models(target, drafter)
    assert runs
    longest = max(len(run["prompt_ids"]) for run in runs)
    capacity = max(len(run["prompt_ids"]) + run["max_new_tokens"] for run in runs) + drafter.block_size + 1
    stopping = max(len(run["stop_token_ids"] or ()) for run in runs)
    for run in runs:
        size, budget = len(run["prompt_ids"]), run["max_new_tokens"]
        # Padded to one width, so that one executable serves all runs; what is in the padding must not matter.
        prompt = jnp.asarray([run["prompt_ids"] + [7] * (longest - size)], jnp.int32)
        sampling = Sampling.constant(run["temperature"], 1)
        stops = jnp.asarray(((run["stop_token_ids"] or []) + [-1] * stopping)[:stopping], jnp.int32)
        first = words(jnp.asarray([run["uniforms"]["u_init"] if "uniforms" in run else 0.5], jnp.float32))
        length = jnp.full(1, size)
        keys = jax.random.split(jax.random.key(0), 1)
        none = Uniforms(first[:, None][:, :0], first[:, None][:, :0], first)
        prompts, begins = Prompts(prompt, length, length + budget, keys), Requests(none, sampling, stops)
        state = jitted_prefill(models, prompts, begins, capacity=capacity)
        emitted, proposed = [], []
        cut = run["confidence_threshold"]
        # A threshold of 0 keeps everything, by the executable of the others.
        scheduler = schedulers.threshold(cut) if is_confident(drafter) else schedulers.fixed()
        for index, expected in enumerate(run["rounds"][: within_budget(run)]):
            where = f"{run['id']} round {index}"
            assert not state.finished[0], where
            assert int(state.lengths[0]) - 1 == expected["start"], where
            requests = Requests(uniforms_of(run, index, drafter.block_size), sampling, stops)
            state, entry = jitted_round(models, state, requests, scheduler=scheduler)
            entry = jax.device_get(entry)
            # EAGLE-3 stops drafting at a stop token: what we draft after it does not count.
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


def test_generate_repeats_the_greedy_traces(golden_case: Any) -> None:
    """The same runs through the front door, several prompts at a time."""
    target, drafter, runs = load(golden_case)
    greedy = [run for run in runs if re.fullmatch(r"greedy_p\d+", run["id"])]
    (budget,) = {run["max_new_tokens"] for run in greedy}
    result = generate(Models(target, drafter), [run["prompt_ids"] for run in greedy], max_new_tokens=budget)
    for i, run in enumerate(greedy):
        count = within_budget(run)
        np.testing.assert_array_equal(result.tokens[i], run["output_ids"][run["num_input_tokens"] :])
        assert result.acceptance_lengths[i].tolist() == run["acceptance_lengths"][:count]
        assert result.proposal_lengths[i].tolist() == run["proposal_lengths"][:count]
        assert result.accepted_lengths[i].tolist() == run["accepted_draft_lengths"][:count]
