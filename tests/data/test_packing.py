import numpy as np
import pytest

from dspark_jax.config import InputError
from dspark_jax.data.packing import PackedSamples, pack_batch, pad_batch, plan_sequences
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


def test_a_batch_is_padded_with_zeros_behind_each_sample() -> None:
    chosen = samples(30)[3:30:9]
    batch = pad_batch(chosen, LENGTH)
    assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
        "tokens": ((3, LENGTH), "int32"),
        "loss_mask": ((3, LENGTH), "uint8"),
        "lengths": ((3,), "int32"),
        "sample_id": ((3,), "int32"),
    }
    for row, sample in enumerate(chosen):
        for s in range(LENGTH):
            inside = s < len(sample.tokens)
            assert batch["tokens"][row, s] == (sample.tokens[s] if inside else 0)
            assert batch["loss_mask"][row, s] == (sample.loss_mask[s] if inside else 0)
        assert batch["lengths"][row] == len(sample.tokens) and batch["sample_id"][row] == sample.sample_id


def test_best_fit_takes_the_fullest_sequence_with_room() -> None:
    # 7 opens, 5 fills it; 6 opens, 4 goes there (2 left); 3 opens; 2 fills the second; 1 goes to the third.
    assert plan_sequences([1, 2, 3, 4, 5, 6, 7], 12) == [[6, 4], [5, 3, 1], [2, 0]]


@pytest.mark.parametrize("seed", range(3))
def test_every_sample_has_one_place_and_none_is_cut(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 65, 500).tolist()
    plan = plan_sequences(lengths, 64)
    assert sorted(index for sequence in plan for index in sequence) == list(range(500))
    filled = [sum(lengths[index] for index in sequence) for sequence in plan]
    assert max(filled) <= 64
    # Two sequences that fit into one would have been one: at most one is half empty.
    assert sum(2 * tokens <= 64 for tokens in filled) <= 1


def test_a_packed_sequence_has_its_documents_one_after_another() -> None:
    chosen = samples(12)
    batch = pack_batch([[chosen[4], chosen[2], chosen[1]], [chosen[11]]], LENGTH)
    assert batch["tokens"][0].tolist() == [*range(401, 406), *range(201, 204), *range(101, 103), 0, 0]
    # Odd tokens are supervised, but for the first of each document.
    assert batch["loss_mask"][0].tolist() == [0, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0]
    assert batch["starts"].tolist() == [[0] * 5 + [5] * 3 + [8] * 2 + [10] * 2, [0] * 12]
    assert batch["lengths"].tolist() == [10, 12] and batch["sample_id"].tolist() == [1004, 1011]
    assert batch["starts"].dtype == np.int32


def test_packed_batches_hold_every_sample_once_an_epoch() -> None:
    data = samples(29)
    count = len(PackedSamples(data, LENGTH))
    assert count == -(-sum(len(sample.tokens) for sample in data) // LENGTH)  # the lengths 1..12 leave no gap
    iterator = batches(data, batch_size=count, max_length=LENGTH, seed=5, pack=True)
    for _ in range(2):
        batch = next(iterator)
        found = np.sort(batch["tokens"][batch["tokens"] > 0])
        assert np.array_equal(found, np.sort(np.concatenate([sample.tokens for sample in data])))
    halves = [
        batches(data, batch_size=4, max_length=LENGTH, seed=5, pack=True, process_index=i, process_count=2)
        for i in range(2)
    ]
    parts = [next(half) for half in halves]
    for name, array in next(batches(data, batch_size=4, max_length=LENGTH, seed=5, pack=True)).items():
        assert np.array_equal(np.concatenate([part[name] for part in parts]), array), name


def test_a_sample_longer_than_a_sequence_is_refused() -> None:
    with pytest.raises(InputError, match=r"sample 1011 has 12 tokens, data\.max_length=11"):
        PackedSamples(samples(12), 11)
