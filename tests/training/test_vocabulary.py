"""A reduced draft vocabulary: which tokens, what of the data and of the target it covers, and a whole run with one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import start, train
from dspark_jax.config import InputError, MeshConfig, resolve
from dspark_jax.convert.__main__ import export_run
from dspark_jax.data.sources import Sample
from dspark_jax.evaluation.setup import open_drafter
from dspark_jax.kinds import as_kind
from dspark_jax.run import Run
from dspark_jax.target.loading import load_target
from dspark_jax.training.checkpoint import load_drafter, saved_config
from dspark_jax.training.vocabulary import fill_vocabulary, inside_vocabulary, known_vocabulary
from dspark_jax.vocabulary import count_tokens, decode_vocabulary, encode_vocabulary, most_frequent
from tests.training.tiny_run import fake_prepare

SIZE = 20


@pytest.fixture
def eagle(config: Any) -> Any:
    """The tiny run with such a drafter."""
    config = as_kind(config, "eagle3_llama")
    config.drafter.draft_vocab_size = SIZE
    return resolve(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3), mesh=MeshConfig()))


def test_the_most_frequent_tokens() -> None:
    """Of what is supervised; of equally frequent ones those with lower ids, and ids fill up what never occurs."""
    pairs = [(np.array([5, 5, 1, 9, 9]), np.array([0, 1, 1, 1, 1])), (np.array([3, 1, 6]), np.array([1, 1, 0]))]
    counts = count_tokens(pairs, 12)
    assert counts.tolist() == [0, 2, 0, 1, 0, 1, 0, 0, 0, 2, 0, 0]
    assert most_frequent(counts, 3).tolist() == [1, 3, 9] and most_frequent(counts, 6).tolist() == [0, 1, 2, 3, 5, 9]


@pytest.mark.parametrize("whole", [1, 8, 67, 152_064])
def test_text_keeps_the_ids(whole: int) -> None:
    ids = np.flatnonzero(np.random.default_rng(whole).random(whole) < 0.4) if whole > 1 else np.array([0])
    text = encode_vocabulary(ids, whole)
    np.testing.assert_array_equal(decode_vocabulary(text, len(ids), whole), ids)
    with pytest.raises(ValueError, match=f"it has {len(ids)} tokens of a vocabulary of"):
        decode_vocabulary(text, len(ids) + 1, whole)


def test_coverage_is_written_and_said(eagle: Any, tmp_path: Path) -> None:
    tokens = np.r_[np.arange(30), np.repeat(np.arange(25), 3)].astype(np.int32)
    sample = Sample(tokens, (np.arange(len(tokens)) >= 2).astype(np.uint8), "set", 0)
    config, said = fill_vocabulary(eagle, [sample, sample], tmp_path)
    assert decode_vocabulary(config.drafter.draft_vocabulary, SIZE, 67).tolist() == list(range(2, 22))
    found = json.loads((tmp_path / "draft_vocabulary.json").read_text())
    assert found.pop("coverage") == pytest.approx(80 / 103)
    assert found == {"draft_vocab_size": SIZE, "vocab_size": 67, "distinct_tokens": 30, "tokens": 206}
    assert said == (
        "draft vocabulary: 20 of 67 tokens cover 77.67 % of the 206 supervised tokens of the training data, which has "
        "30 different ones"
    )
    again, _ = fill_vocabulary(config, [dataclasses.replace(sample, tokens=tokens[::-1].copy())], tmp_path)
    assert again.drafter.draft_vocabulary == config.drafter.draft_vocabulary  # one that is there stays
    nothing = dataclasses.replace(sample, loss_mask=np.zeros_like(sample.loss_mask))
    with pytest.raises(InputError, match="has no answers to count tokens in"):
        fill_vocabulary(eagle, [nothing], tmp_path)


def test_the_tokens_of_the_drafter_that_is_there(eagle: Any) -> None:
    """Its head is for these: they are taken over, and others of the same number are refused."""
    drafter = dataclasses.replace(eagle.drafter, draft_vocabulary=encode_vocabulary(np.arange(5, 5 + SIZE), 67))
    saved = dataclasses.replace(eagle, drafter=drafter)
    assert known_vocabulary(eagle, saved).drafter == drafter and known_vocabulary(eagle, None) is eagle
    other = dataclasses.replace(drafter, draft_vocabulary=encode_vocabulary(np.arange(SIZE), 67))
    with pytest.raises(InputError, match="drafter.draft_vocabulary names other tokens than the drafter that is there"):
        known_vocabulary(dataclasses.replace(eagle, drafter=other), saved)


@pytest.mark.parametrize("name", ["one", "cube"])
def test_what_of_the_target_is_inside(meshes: Any, name: str) -> None:
    """Its likeliest token, and the probability of all that can be drafted; in chunks with a rest, on any mesh."""
    rng, ids = np.random.default_rng(0), np.arange(0, 67, 3)
    head, states = rng.normal(size=(67, 8)).astype(np.float32), rng.normal(size=(4, 11, 8)).astype(np.float32)

    class Part:
        inside = np.isin(np.arange(67), ids)

    class Target:
        def unembed(self, hidden: jax.Array) -> jax.Array:
            return hidden @ jnp.asarray(head).T

    with jax.set_mesh(meshes[name]):
        found = jax.jit(lambda x: inside_vocabulary(Part(), Target(), x, 12))(states)  # pyright: ignore[reportArgumentType]
    logits = (states @ head.T).astype(np.float64)
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found.mass, share[..., ids].sum(-1), rtol=1e-5)
    np.testing.assert_array_equal(found.supervised, np.isin(logits.argmax(-1), ids))


@pytest.mark.slow
def test_a_run_with_one(eagle: Any, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    """Its head begins as the target's rows; it goes on, starts another run, and is exported with its coverage."""
    monkeypatch.setattr(train, "prepare_run", fake_prepare)
    begin, begun = train.begin_head, list[np.ndarray]()

    def keeping(*given: Any) -> Any:
        state = begin(*given)
        begun.append(np.array(state.params["vocabulary.head"]))
        return state

    monkeypatch.setattr(train, "begin_head", keeping)
    train.train(eagle, tmp_path / "run")
    assert "draft vocabulary: 20 of 67 tokens cover" in capfd.readouterr().err
    saved = saved_config(tmp_path / "run")
    ids = decode_vocabulary(saved.drafter.draft_vocabulary, SIZE, 67)
    target = load_target(eagle.target, Run(eagle, tmp_path).mesh)
    np.testing.assert_array_equal(begun[0], np.asarray(target.head)[ids])
    _, drafter = load_drafter(tmp_path / "run", Run(eagle, tmp_path).mesh)
    assert not np.array_equal(drafter.vocabulary.head[...], begun[0])  # it has learned

    longer = dataclasses.replace(eagle, train=dataclasses.replace(eagle.train, steps=4))
    train.train(longer, tmp_path / "run")  # the same command, in which no tokens are named
    assert saved_config(tmp_path / "run").drafter == saved.drafter
    assert open_drafter(Run(longer, tmp_path / "run"))[0] == 4
    other = dataclasses.replace(eagle, drafter=dataclasses.replace(eagle.drafter, draft_vocab_size=SIZE + 1))
    with pytest.raises(InputError, match="drafter.draft_vocab_size was 20, now 21; resume with the old value"):
        train.train(other, tmp_path / "run")

    exported = export_run(tmp_path / "run", tmp_path / "x", target_name="org/target", dtype="float32")
    card = (exported / "README.md").read_text()
    assert "drafts from 20 of the target's 67 tokens, with an LM head of its own; they are " in card
    assert "python -m sglang.launch_server --model-path org/target --speculative-algorithm EAGLE3" in card
    warm = dataclasses.replace(eagle.train, init_from=str(exported), seed=3)
    run = dataclasses.replace(eagle, train=warm)
    assert start.check_start(run).drafter.draft_vocabulary == saved.drafter.draft_vocabulary
