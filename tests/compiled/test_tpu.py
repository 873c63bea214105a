"""Kernels compiled for TPUs on a machine that has none: that they compile at real shapes, and what they keep.

Skipped where libtpu is missing. That a kernel compiles says nothing of what it computes: `tests/ops` interprets them.
"""

import pytest

from tests.compiled.tpus import TOPOLOGIES, compiled_apart

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_attention(topology: str) -> None:
    """Rows of a train step, windows, documents, chunks of prompts, sinks: one kernel, and no array of scores, which are
    2.1 GB per layer and sequence of Qwen3-4B. (What there is are queries, keys and values in the kernel's order.)"""
    for name, found in compiled_apart("attention", topology).items():
        assert found["kernels"] == 1, name
        assert found["temporary_bytes"] < 360 << 20, name


def test_attention_on_a_mesh() -> None:
    """Sequences over fsdp, heads over tensor: no device waits for another."""
    found = compiled_apart("attention on a mesh", "v5e:2x2")
    assert found["kernels"] == 1 and found["collectives"] == 0


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_block_attention(topology: str) -> None:
    """Forward and backward at the released training shape: three kernels, and no array of scores (235 MB a head)."""
    found = compiled_apart("block_attention", topology)
    assert found["kernels"] == 3
    assert found["temporary_bytes"] < 120 << 20


def test_block_attention_on_a_mesh() -> None:
    """Sequences over fsdp, heads over tensor: no device waits for another."""
    found = compiled_apart("block_attention on a mesh", "v5e:2x2")
    assert found["kernels"] == 3 and found["collectives"] == 0


@pytest.mark.parametrize("name", ["5 query heads per key head", "wide"])
def test_block_attention_of_other_models(name: str) -> None:
    """Rows that fill no whole registers and blocks of 16, and wide heads in float32, on the smallest chip."""
    assert compiled_apart(f"block_attention, {name}", "v5e:2x2")["kernels"] == 3


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_cached_attention(topology: str) -> None:
    """Rounds, plain steps, drafts, windows and rings over a stack of layers' caches, which are read where they are."""
    for name, found in compiled_apart("cached_attention", topology).items():
        assert found["kernels"] == 1, name
        assert found["temporary_bytes"] < 8 << 20, name  # a layer's keys of 32 x 1024 are 67 MB


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_cache_write(topology: str) -> None:
    """Both caches of a layer in one kernel, in place: a copy of the smallest of them would take 2 MB."""
    for name, found in compiled_apart("cache_write", topology).items():
        assert found["kernels"] == 1, name
        assert found["temporary_bytes"] < 2 << 20, name


def test_cache_write_on_a_mesh() -> None:
    """Requests over fsdp, heads over tensor: no device waits for another."""
    found = compiled_apart("cache_write on a mesh", "v5e:2x2")
    assert found["kernels"] == 1 and found["collectives"] == 0


def test_cached_attention_on_a_mesh() -> None:
    """Requests over fsdp, heads over tensor: no device waits for another."""
    found = compiled_apart("cached_attention on a mesh", "v5e:2x2")
    assert found["kernels"] == 1 and found["collectives"] == 0


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_speculative_verify(topology: str) -> None:
    """Stats of the target and of the drafter, sums and slices; no copy of the logits, which are 155 MB and 136 MB."""
    for name, found in compiled_apart("speculative_verify", topology).items():
        assert found["kernels"] == (1 if name == "greedy" else 4), name
        assert found["temporary_bytes"] < 12 << 20, name


def test_speculative_verify_on_a_mesh() -> None:
    """Requests over data and fsdp: no device waits for another."""
    found = compiled_apart("speculative_verify on a mesh", "v5e:2x2")
    assert found["kernels"] == 4 and found["collectives"] == 0


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_markov_sample(topology: str) -> None:
    """One kernel for all drafts; no copy of W2 (78 MB) or of the logits (136 MB for 32 requests), but those of five
    requests, 34 MB, which XLA lays out in another order."""
    for name, found in compiled_apart("markov_sample", topology).items():
        assert found["kernels"] == 1, name
        assert found["temporary_bytes"] < 40 << 20, name


def test_markov_sample_on_a_mesh() -> None:
    """Requests over data and fsdp: no device waits for another. XLA does it where tensor splits the vocabulary."""
    found = compiled_apart("markov_sample on a mesh", "v5e:2x2")
    assert found["kernels"] == 1 and found["collectives"] == 0
    assert compiled_apart("markov_sample, split vocabulary", "v5e:2x2")["kernels"] == 0


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_vocab_loss(topology: str) -> None:
    """Two arrays of logits in float32 (547 MB each), one of slopes (273 MB), and W2's gradient (156 MB), twice."""
    found = compiled_apart("vocab_loss", topology)
    assert found["kernels"] == 1 and found["temporary_bytes"] < 1800 << 20


@pytest.mark.parametrize(("job", "kernels"), [("vocab_loss on a mesh", 1), ("vocab_loss, split vocabulary", 0)])
def test_vocab_loss_on_a_mesh(job: str, kernels: int) -> None:
    """Sequences over data and fsdp. XLA does it where tensor splits the vocabulary."""
    assert compiled_apart(job, "v5e:2x2")["kernels"] == kernels


def test_vocab_loss_of_gemma() -> None:
    """The widest vocabulary that we have, and three arrays of logits: eight rows of them fit on a v5e."""
    assert compiled_apart("vocab_loss, Gemma's vocabulary and cap", "v5e:2x2")["kernels"] == 1


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_expert_mlp(topology: str) -> None:
    """Real shapes of mixtures: one kernel, which reads a layer in its stack. (A prompt's rows take more than that.)"""
    for name, found in compiled_apart("expert_mlp", topology).items():
        assert found["kernels"] == 1, name
        assert "prompt" in name or found["temporary_bytes"] < found["layer_bytes"] // 4, name
