import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from dspark_jax.config import InputError
from dspark_jax.data.pipeline import batches
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
