"""Real llama.cpp: its converter takes the exports, its server gives the target's answers, in as many rounds as ours."""

import itertools
import subprocess
from pathlib import Path

import pytest

from tests.servers.conftest import TARGET, TOKENS, serve

pytestmark = pytest.mark.servers

METHODS = {"fill_in": "dflash", "dflash2": "dflash", "eagle3_llama": "eagle3"}
"""Kinds that are not drafted for as DSpark is."""


def ask(given, gguf, prompts, *, kind="dspark", size=0, drafter: Path | None = None, temperature: float = 0.0) -> dict:
    return serve(
        given("--llama-python"),
        "serve_llama_cpp.py",
        {
            "target": str(gguf(TARGET)),
            "drafter": str(gguf(drafter, TARGET)) if drafter else None,
            "kind": kind,
            "size": size,
            "prompts": prompts,
            "tokens": TOKENS,
            "temperature": temperature,
        },
    )


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *itertools.product(["dspark", "dflash"], ["universal", "deepspec", "speculators"]),
        ("fill_in", "universal"),
        ("dflash2", "universal"),
        ("eagle3_llama", "universal"),
        ("eagle3_llama", "speculators"),
    ],
)
def test_answers_are_the_targets_and_rounds_are_ours(given, gguf, exported, ours, kind, form):
    """An export of DFlash in the reference's own format has no Markov head; llama.cpp takes it as it is."""
    wanted = ours(kind)
    plain = ask(given, gguf, wanted.prompts)["answers"]
    found = ask(given, gguf, wanted.prompts, kind=METHODS.get(kind, "dspark"), size=7, drafter=exported(kind, form))
    assert [one["text"] for one in found["answers"]] == [one["text"] for one in plain]
    from transformers import AutoTokenizer

    texts = [AutoTokenizer.from_pretrained(TARGET).decode(tokens) for tokens in wanted.tokens]
    same = sum(one["text"] == text for one, text in zip(found["answers"], texts, strict=True))
    assert same >= len(texts) - 1, "another program's arithmetic may break a tie in one answer, not in more"
    rounds = sum(one["tokens"] - 1 - one["accepted"] for one in found["answers"])  # the first token has no round
    expected = sum(wanted.rounds)
    print(f"llama.cpp {found['version']} {kind} {form}: {same} of {len(texts)}, {rounds} rounds, ours {expected}")
    assert rounds == pytest.approx(expected, rel=0.03)


def test_qwen_eagle3_is_refused_as_check_says(given, converter, exported, gguf):
    with pytest.raises(AssertionError, match="Eagle3Qwen3ForCausalLM is not supported"):
        gguf(exported("eagle3"), TARGET)


def test_fill_in_speculators_are_refused_as_check_says(given, converter, exported, gguf):
    with pytest.raises(AssertionError, match="DFlashSpeculator is not supported"):
        gguf(exported("fill_in", "speculators"), TARGET)


def test_the_embedded_tokenizer_is_not_known_to_it(given, tmp_path):
    """Why the card has a command that tells the converter."""
    done = subprocess.run(
        [given("--llama-python"), given("--llama-source") / "convert_hf_to_gguf.py", TARGET, f"--outfile={tmp_path}/x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode and "BPE pre-tokenizer was not recognized" in done.stderr
