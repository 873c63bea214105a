import json
import weakref
from collections import Counter
from typing import Any

import numpy as np
import pytest

from dspark_jax.config import InputError
from dspark_jax.data import pipeline
from dspark_jax.data.feature_codec import FeatureSample, Identity
from dspark_jax.data.pipeline import ON_HOST, MicroBatches, batches
from dspark_jax.data.sources import Sample

LENGTH = 12


def samples(count: int) -> list[Sample]:
    out = []
    for i in range(count):
        length = 1 + i % LENGTH
        tokens = np.arange(length, dtype=np.int32) + 100 * i + 1
        out.append(Sample(tokens, (tokens % 2).astype(np.uint8), "set", 1000 + i))
    return out


def ids(iterator: Any, count: int) -> list[list[int]]:
    return [next(iterator)["sample_id"].tolist() for _ in range(count)]


@pytest.mark.parametrize("count", [1, 5, 24, 31])
def test_every_epoch_holds_every_sample_once_in_a_new_order(count: int) -> None:
    sequence = sum(ids(batches(samples(count), batch_size=4, max_length=LENGTH, seed=3), count), [])
    epochs = [tuple(sequence[i * count : (i + 1) * count]) for i in range(4)]
    for epoch in epochs:
        assert Counter(epoch) == Counter(range(1000, 1000 + count))
    assert len(set(epochs)) == (1 if count == 1 else 4)


def test_the_order_is_a_function_of_the_seed() -> None:
    def order(seed: int, threads: int = 1) -> list[list[int]]:
        return ids(batches(samples(40), batch_size=8, max_length=LENGTH, seed=seed, threads=threads), 12)

    assert order(1) == order(1) == order(1, threads=3)
    assert order(1) != order(2)


@pytest.mark.parametrize(("size", "processes"), [(1, 1), (2, 2)])
def test_one_sequence_per_process(size: int, processes: int) -> None:
    """The smallest batch there is: an order without an end had more of them than grain can count."""
    data = samples(3)
    for i in range(processes):
        part = batches(data, batch_size=size, max_length=LENGTH, seed=5, process_index=i, process_count=processes)
        assert [len(one) for one in ids(part, 4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("processes", [2, 4])
def test_global_batches_are_the_same_for_any_number_of_processes(processes: int) -> None:
    data = samples(29)
    whole = batches(data, batch_size=8, max_length=LENGTH, seed=5)
    parts = [
        batches(data, batch_size=8, max_length=LENGTH, seed=5, process_index=i, process_count=processes)
        for i in range(processes)
    ]
    for _ in range(9):
        expected, found = next(whole), [next(part) for part in parts]
        for name, array in expected.items():
            assert np.array_equal(np.concatenate([part[name] for part in found]), array), name


def test_an_iterator_continues_from_its_state_also_on_other_processes() -> None:
    data = samples(29)
    first = batches(data, batch_size=8, max_length=LENGTH, seed=5)
    ids(first, 5)
    state = json.loads(json.dumps(first.get_state()))
    expected = ids(first, 7)
    again = batches(data, batch_size=8, max_length=LENGTH, seed=5)
    ids(again, 2)
    again.set_state(state)
    assert ids(again, 7) == expected
    halves = [
        batches(data, batch_size=8, max_length=LENGTH, seed=5, process_index=i, process_count=2) for i in range(2)
    ]
    for half in halves:
        half.set_state(state)
    assert [a + b for a, b in zip(ids(halves[0], 7), ids(halves[1], 7), strict=True)] == expected


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="no samples to train on"):
        batches([], batch_size=4, max_length=LENGTH, seed=0)
    with pytest.raises(InputError, match=r"train\.batch_size=6 is not divisible by the 4 processes"):
        batches(samples(9), batch_size=6, max_length=LENGTH, seed=0, process_count=4)
    with pytest.raises(InputError, match=r"sample 1011 has 12 tokens, data\.max_length=11"):
        next(batches(samples(12), batch_size=12, max_length=11, seed=0))


def with_features(plain: list[Sample]) -> list[Sample]:
    """Every row of features says which token it is of."""

    def read(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (tokens[:, None] % 100 + np.arange(8)).astype(np.int8), tokens[:, None].astype(np.float32)

    identity = Identity("t", "t", "d", "jax", (0,), 4, "int8")  # two layers of four, a scale for each
    return [FeatureSample(**vars(one), identity=identity, read=lambda t=one.tokens: read(t)) for one in plain]


@pytest.mark.parametrize("pack", [False, True])
def test_micro_batches_are_the_batch_with_its_features_and_few_are_held(pack: bool, monkeypatch) -> None:
    plain, alive, most, real = samples(29), weakref.WeakSet(), 0, pipeline.empty_features

    class Counted(np.ndarray):
        """As NumPy's, and may be counted."""

    def counted(*arguments: Any) -> dict[str, np.ndarray]:
        arrays = {name: rows.view(Counted) for name, rows in real(*arguments).items()}
        alive.add(arrays["feature_values"])
        return arrays

    def start(data: list[Sample]) -> Any:
        return batches(data, batch_size=8, max_length=LENGTH, seed=5, pack=pack)

    monkeypatch.setattr(Counted, "__hash__", object.__hash__)
    monkeypatch.setattr(Counted, "__eq__", object.__eq__)
    monkeypatch.setattr(pipeline, "empty_features", counted)
    whole, stored = start(plain), MicroBatches(start(with_features(plain)), 4, threads=2)
    states = []
    for _ in range(3):
        expected, pieces = next(whole), []
        for piece in next(stored):
            most = max(most, len(alive))
            values = piece.pop("feature_values")
            wanted = expected["tokens"][2 * len(pieces) : 2 * len(pieces) + 2, :, None]
            inside = np.arange(LENGTH)[:, None] < piece["lengths"][:, None, None]
            assert np.array_equal(values, np.where(inside, wanted % 100 + np.arange(8), 0))
            assert np.array_equal(
                piece.pop("feature_scales"), np.where(inside, wanted, 0).repeat(2, -1).astype("bfloat16")
            )
            pieces.append(piece)
            del values
        assert set(pieces[0]) == set(expected)
        for name, rows in expected.items():
            assert np.array_equal(np.concatenate([piece[name] for piece in pieces]), rows), name
        states.append((whole.get_state(), stored.get_state()))
        assert states[-1][0] == states[-1][1]
    assert 2 <= most <= ON_HOST
    again = MicroBatches(start(with_features(plain)), 2)
    again.set_state(states[0][1])
    resumed = np.concatenate([piece["sample_id"] for piece in next(again)])
    whole.set_state(states[0][0])
    assert np.array_equal(resumed, next(whole)["sample_id"])


def test_a_damaged_record_is_told_when_its_micro_batch_is_asked_for() -> None:
    def damaged() -> Any:
        raise InputError("record 3 is damaged")

    (first, *others) = with_features(samples(8))
    data = [FeatureSample(**(vars(first) | {"read": damaged})), *others]
    with pytest.raises(InputError, match="record 3 is damaged"):
        list(next(MicroBatches(batches(data, batch_size=8, max_length=LENGTH, seed=5), 2)))
