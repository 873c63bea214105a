"""Real vLLM on a CPU: exports load, answers are the target's, and rounds are ours."""

import json

import pytest

from tests.servers.conftest import TARGET, TOKENS, serve, without_end

pytestmark = pytest.mark.servers

FILL_IN = ("fill_in", "dflash2")
"""Kinds whose anchor's row predicts nothing, as z-lab has it: the method `dflash` of servers."""
SETTINGS = {"num_speculative_tokens": 7, "draft_tensor_parallel_size": 1}


def ask(given, prompts, speculative: dict | None, *, interpret: bool = False) -> dict:
    asked = {"target": str(TARGET), "speculative": speculative, "prompts": prompts, "tokens": TOKENS}
    return serve(given("--vllm-python"), "serve_vllm.py", asked | {"interpret": interpret})


def compare(found: dict, wanted, what: str) -> None:
    """Answers are equal but for a tie that another program's arithmetic may break; so are rounds, then."""
    stop = json.loads((TARGET / "generation_config.json").read_text())["eos_token_id"]
    answers = [without_end(tokens, [stop]) for tokens in found["answers"]]
    same = sum(one == other for one, other in zip(answers, wanted.tokens, strict=True))
    ours = sum(wanted.rounds)
    print(f"vLLM {found['version']} {what}: {same} of {len(answers)}, {found['rounds']} rounds, ours {ours}")
    assert same >= len(answers) - 1
    assert found["rounds"] == pytest.approx(ours, rel=0.03)


@pytest.mark.parametrize("form", ["universal", "speculators"])
@pytest.mark.parametrize("kind", ["eagle3", "eagle3_llama"])
def test_eagle3_runs_in_stock_vllm_cpu(given, exported, ours, kind, form):
    wanted = ours(kind).every(4)
    speculative = SETTINGS | {"method": "eagle3", "model": str(exported(kind, form))}
    compare(ask(given, wanted.prompts, speculative), wanted, f"{kind} {form}")


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("dspark", "universal"),
        ("dspark", "deepspec"),
        ("dspark", "speculators"),
        ("dflash", "universal"),
        ("fill_in", "universal"),
        ("fill_in", "speculators"),
        ("dflash2", "universal"),
        ("dflash2", "speculators"),
    ],
)
def test_blocks_run_in_model_runner_v2(given, exported, ours, kind, form):
    """Under Triton's interpreter, so on one prompt of each set. DFlash goes as DSpark with a Markov head of zeros, but
    for z-lab's."""
    wanted = ours(kind).every(4)
    method = "dflash" if kind in FILL_IN else "dspark"
    speculative = SETTINGS | {"method": method, "model": str(exported(kind, form))}
    compare(ask(given, wanted.prompts, speculative, interpret=True), wanted, f"{kind} {form}")
