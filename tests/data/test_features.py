"""The feature cache: what comes out is what went in, whatever happens to writer, samples or disk in between."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.config import InputError
from dspark_jax.data import features as feature_files
from dspark_jax.data.feature_codec import Identity, code, dequantise, group_size
from dspark_jax.data.features import (
    CachedSamples,
    cut_batches,
    estimate,
    frozen_file,
    is_complete,
    read_manifest,
    write_features,
)
from dspark_jax.data.packing import empty_features, pack_batch, pad_batch, read_features
from dspark_jax.data.sources import Sample

WIDTH, TAPS = 6, (-1, 2)
IDENTITY = Identity("target", "tokenizer", "data", "jax", TAPS, WIDTH, "int8")


def make_samples(count: int = 11) -> list[Sample]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, count)
    return [
        Sample(rng.integers(0, 99, n).astype(np.int32), np.ones(n, np.uint8), "x", 7 * i) for i, n in enumerate(lengths)
    ]


def rows_of(tokens: np.ndarray) -> np.ndarray:
    """Made-up features [..., (M+1) D] of tokens and their positions."""
    columns = np.arange(WIDTH * (len(TAPS) + 1))
    return np.sin(tokens[..., None] * 0.37 + columns) * 3 ** (columns % 5) + np.arange(tokens.shape[-1])[:, None] / 7


def run(tokens, lengths):
    """A pass whose rows past the lengths are not finite: they must not get into any record."""
    rows = rows_of(tokens).astype(np.float32)
    rows[np.arange(tokens.shape[1]) >= lengths[:, None]] = np.nan
    return rows[..., :-WIDTH], rows[..., -WIDTH:]


def coding(compute, identity: Identity):
    """What computes rows as what gives them coded, when they are asked for."""

    def make():
        run = compute()
        return lambda tokens, lengths: (
            lambda: [
                code([part[row, :count] for part in parts], identity)
                for parts in [run(tokens, lengths)]
                for row, count in enumerate(lengths)
            ]
        )

    return make


def write(
    directory: Path, identity: Identity = IDENTITY, compute=lambda: run, count: int = 11, **settings
) -> list[Sample]:
    samples = make_samples(count)
    settings = {"batch_size": 3} | settings
    lengths = [len(one.tokens) for one in samples]
    with mock.patch.object(feature_files, "SHARD_BYTES", 900):
        write_features(directory, identity, samples, lengths, coding(compute, identity), **settings)
    return samples


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_records_hold_what_the_target_gave(tmp_path, dtype):
    identity = dataclasses.replace(IDENTITY, dtype=dtype)
    samples = write(tmp_path / "f", identity)
    cached = CachedSamples(samples, tmp_path / "f", identity)
    assert len(cached) == 11 and cached.lengths == [len(one.tokens) for one in samples]
    assert len(read_manifest(tmp_path / "f")["shards"]) >= 2
    for index in (10, 0, 5, 6, 1):
        sample, found = samples[index], cached[index]
        np.testing.assert_array_equal(found.tokens, sample.tokens)
        assert (found.sample_id, found.prompt_set) == (sample.sample_id, "x")
        values, scales = found.read()
        wanted, back = rows_of(sample.tokens), np.asarray(dequantise(values, scales, np.float32))
        if dtype == "bfloat16":
            np.testing.assert_array_equal(back, wanted.astype(ml_dtypes.bfloat16).astype(np.float32))
        else:
            scales = scales.astype(np.float32).repeat(group_size(WIDTH), axis=1)
            assert (np.abs(back - wanted) <= 0.5 * scales * (1 + 1e-5)).all()


def test_batches_are_cut_by_tokens():
    lengths = [3, 40, 33, 300, 5, 9, 2000, 1, 2]
    found = [(list(batch), size) for batch, size in cut_batches(lengths, 1, 3, 600)]
    assert found == [([1, 2], 64), ([3], 512), ([4, 5], 32), ([6], 2048), ([7, 8], 32)]
    assert [list(batch) for batch, _ in cut_batches(lengths, 0, 2, 10**6)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def test_a_batch_is_written_while_the_next_one_is_computed(tmp_path):
    seen, samples = [], make_samples(9)

    def start(tokens, lengths):
        number = len([event for event in seen if event[0] == "start"])
        seen.append(("start", number))

        def fetch():
            seen.append(("fetch", number))
            features, last = run(tokens, lengths)
            return [code([features[i, :n], last[i, :n]], IDENTITY) for i, n in enumerate(lengths)]

        return fetch

    lengths = [len(one.tokens) for one in samples]
    with mock.patch.object(feature_files, "SHARD_BYTES", 900):
        write_features(tmp_path / "f", IDENTITY, samples, lengths, lambda: start, batch_size=3)
    order = [("start", 0), ("start", 1), ("fetch", 0), ("start", 2), ("fetch", 1), ("fetch", 2)]
    assert seen == order and len(CachedSamples(samples, tmp_path / "f", IDENTITY)) == 9


def test_sizes(tmp_path):
    assert Identity("t", "t", "d", "jax", (1, 9, 17, 25, 33), 2560, "int8").bytes_per_token == 6 * 2560 + 6 * 20 * 2
    assert estimate(IDENTITY, 100) == ((18 + 2 * 3) * 100, 2 * 18 * 100)
    samples = write(tmp_path / "f")
    size = sum(path.stat().st_size for path in (tmp_path / "f").glob("shard-*"))
    assert size > sum(len(one.tokens) for one in samples) * IDENTITY.bytes_per_token


WRITER = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
import test_features as t
calls = 0
def dying(tokens, lengths):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return t.run(tokens, lengths)
from pathlib import Path
t.write(Path(sys.argv[1]), compute=lambda: dying, count=30)
"""


def test_a_killed_writer_goes_on(tmp_path):
    """Killed in the middle of a shard, twice; what was whole is not computed again, and the files end up the same."""
    write(tmp_path / "whole", count=30)
    for call in ("6", "3"):
        command = [sys.executable, "-c", WRITER, str(tmp_path / "f"), str(Path(__file__).parent), call]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert not is_complete(tmp_path / "f", IDENTITY)
        with pytest.raises(InputError, match="no complete feature cache"):
            CachedSamples(make_samples(30), tmp_path / "f", IDENTITY)
    before = len(read_manifest(tmp_path / "f")["shards"])
    assert before >= 2
    done, counted = [], []
    write(
        tmp_path / "f",
        compute=lambda: lambda t, n: done.append(np.count_nonzero(n)) or run(t, n),
        count=30,
        progress=counted.append,
    )
    kept = sum(len(shard["lengths"]) for shard in read_manifest(tmp_path / "f")["shards"][:before])
    assert sum(done) == 30 - kept and sum(counted) == 30
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "f" / path.name).read_bytes(), path.name
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {path.name for path in (tmp_path / "f").iterdir()}


def test_a_complete_cache_is_left_alone(tmp_path):
    write(tmp_path / "f")
    frozen_file(tmp_path / "f").touch()

    def never():
        raise AssertionError("the target was loaded")

    write(tmp_path / "f", compute=never)


@pytest.mark.parametrize(
    ("field", "value", "setting"),
    [
        ("target", "other", "target.path (weights)"),
        ("tokenizer", "other", "target.path (tokenizer)"),
        ("data", "other", "samples (data.*)"),
        ("source", "torch", "data.features"),
        ("taps", (0, 2), "drafter.target_layer_ids"),
        ("dtype", "bfloat16", "data.feature_dtype"),
        ("target_dtype", "bfloat16", "target.dtype"),
    ],
)
def test_another_identity_is_refused_and_nothing_touched(tmp_path, field, value, setting):
    samples = write(tmp_path / "f")
    other = dataclasses.replace(IDENTITY, **{field: value})
    before = {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()}
    for use in (lambda: CachedSamples(samples, tmp_path / "f", other), lambda: write(tmp_path / "f", other)):
        with pytest.raises(InputError) as error:
            use()
        message = str(error.value)
        was, now = (json.loads(json.dumps(getattr(one, field))) for one in (IDENTITY, other))
        assert f"/f: made with {setting} {was}, needed is {now}; go back to the old settings, remove this" in message
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "f").iterdir()}
    both = dataclasses.replace(other, hidden_size=12)
    with pytest.raises(InputError, match=r"made with .*; .*, needed is .*; go back"):
        write(tmp_path / "f", both)


def test_a_corrupted_record_is_named(tmp_path):
    samples = write(tmp_path / "f")
    shard = read_manifest(tmp_path / "f")["shards"][1]
    path = tmp_path / "f" / shard["file"]
    content = bytearray(path.read_bytes())
    record = CachedSamples(samples, tmp_path / "f", IDENTITY)[
        len(read_manifest(tmp_path / "f")["shards"][0]["lengths"])
    ]
    at = bytes(content).index(record.read()[0].tobytes())
    content[at + 5] ^= 4
    path.write_bytes(content)
    cached = CachedSamples(samples, tmp_path / "f", IDENTITY)
    cached[0].read()
    first = len(read_manifest(tmp_path / "f")["shards"][0]["lengths"])
    with pytest.raises(InputError, match=r"shard-00001.array_record: record 0 is damaged"):
        cached[first].read()
    cached[first + 1].read()
    path.write_bytes(content[:-10])
    with pytest.raises(InputError, match="shard-00001.array_record: missing or not of"):
        CachedSamples(samples, tmp_path / "f", IDENTITY)


def test_damaged_frozen_matrices_are_named(tmp_path):
    """It has no hashes in itself, and a wrong embedding would train without a word."""
    frozen = frozen_file(tmp_path / "f")

    def compute():
        frozen.write_bytes(bytes(range(200)))
        return run

    samples = write(tmp_path / "f", compute=compute)
    CachedSamples(samples, tmp_path / "f", IDENTITY)
    frozen.write_bytes(bytes(reversed(range(200))))
    write(tmp_path / "f", compute=lambda: pytest.fail("nothing is missing"))  # does not take it for what was written
    with pytest.raises(
        InputError, match="frozen.safetensors: damaged .*; remove it and run python -m dspark_jax.prepare again"
    ):
        CachedSamples(samples, tmp_path / "f", IDENTITY)
    frozen.unlink()
    write(tmp_path / "f", compute=compute)
    CachedSamples(samples, tmp_path / "f", IDENTITY)


def test_frozen_matrices_of_an_earlier_version_are_read_and_checked(tmp_path):
    """It named the file, and its digest in the manifest, otherwise."""
    directory = tmp_path / "f"

    def compute():
        frozen_file(directory).write_bytes(bytes(range(200)))
        return run

    samples = write(directory, compute=compute)
    earlier = frozen_file(directory).rename(directory / "lender.safetensors")
    manifest = directory / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"frozen"', '"lender"'))
    write(directory, compute=lambda: pytest.fail("nothing is missing"))
    CachedSamples(samples, directory, IDENTITY)
    manifest.write_text(manifest.read_text().replace('"frozen"', '"lender"'))
    earlier.write_bytes(bytes(200))
    with pytest.raises(InputError, match="lender.safetensors: damaged"):
        CachedSamples(samples, directory, IDENTITY)


def test_other_samples_are_noticed(tmp_path):
    samples = write(tmp_path / "f")
    changed = list(samples)
    changed[4] = dataclasses.replace(samples[4], tokens=samples[4].tokens + 1)
    with pytest.raises(InputError, match="record .* is not of sample 28, the samples have changed"):
        CachedSamples(changed, tmp_path / "f", IDENTITY)[4].read()
    with pytest.raises(InputError, match="11 records for 10 samples"):
        CachedSamples(samples[:10], tmp_path / "f", IDENTITY)


def test_a_full_disk_is_refused_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 1000))
    with pytest.raises(InputError, match=r"take 0.00 GB, 0.00 GB are free; make room"):
        write(tmp_path / "f")


def test_a_disk_that_fills_up_is_one_line(tmp_path):
    """A limit on the size of files fails as a full disk does; what was whole before is gone on with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    whole = write(tmp_path / "whole")
    sizes = [shard["bytes"] for shard in read_manifest(tmp_path / "whole")["shards"]]

    def filling(tokens, lengths):
        if tokens.shape == (2, 32):  # the last batch: eleven samples, three at a time
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] // 2, hard))
        return run(tokens, lengths)

    try:
        with pytest.raises(InputError, match=r"shard-0000\d.array_record: the disk is full; the shards before it"):
            write(tmp_path / "f", compute=lambda: filling)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(read_manifest(tmp_path / "f")["shards"]) == len(sizes) - 1
    assert len(list((tmp_path / "f").glob("shard-*"))) == len(sizes) - 1
    write(tmp_path / "f")
    assert len(CachedSamples(whole, tmp_path / "f", IDENTITY)) == 11


@pytest.mark.parametrize("change", [lambda m: [], lambda m: {"complete": True}, lambda m: m | {"identity": []},
    lambda m: {k: v for k, v in m.items() if k != "shards"}, lambda m: m | {"shards": [{"file": "../x"}]}])  # fmt: skip
def test_a_damaged_manifest_is_one_line(tmp_path, change):
    samples = write(tmp_path / "f")
    path = tmp_path / "f" / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    for use in (
        lambda: CachedSamples(samples, tmp_path / "f", IDENTITY),
        lambda: is_complete(tmp_path / "f", IDENTITY),
    ):
        with pytest.raises(InputError, match=r"manifest.json: (damaged|not a JSON object).*; remove it and run python"):
            use()


def test_a_cache_is_complete_with_all_of_its_files(tmp_path):
    samples = write(tmp_path / "f")
    assert not is_complete(tmp_path / "f", IDENTITY)
    frozen_file(tmp_path / "f").touch()
    assert is_complete(tmp_path / "f", IDENTITY)
    shard = tmp_path / "f" / "shard-00001.array_record"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert not is_complete(tmp_path / "f", IDENTITY)
    shard.unlink()
    assert not is_complete(tmp_path / "f", IDENTITY)
    with pytest.raises(InputError, match=r"missing or not of \d+ bytes; run python -m dspark_jax.prepare again"):
        CachedSamples(samples, tmp_path / "f", IDENTITY)
    write(tmp_path / "f")
    assert is_complete(tmp_path / "f", IDENTITY)


def test_caches_of_older_versions_are_of_the_default_type(tmp_path):
    samples = write(tmp_path / "f")
    path = tmp_path / "f" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["identity"]["target_dtype"]
    path.write_text(json.dumps(manifest))
    CachedSamples(samples, tmp_path / "f", IDENTITY)
    with pytest.raises(InputError, match=r"made with target\.dtype auto, needed is float32"):
        CachedSamples(samples, tmp_path / "f", dataclasses.replace(IDENTITY, target_dtype="float32"))


def test_features_that_are_not_finite_are_refused(tmp_path):
    def broken(tokens, lengths):
        features, last = run(tokens, lengths)
        features[1, 0, 0] = np.inf
        return features, last

    with pytest.raises(InputError, match="sample 7: its features are not finite"):
        write(tmp_path / "f", compute=lambda: broken)


def test_batches_bring_samples_whose_features_are_read_into_rows(tmp_path):
    samples = write(tmp_path / "f")
    cached = CachedSamples(samples, tmp_path / "f", IDENTITY)
    sequences = [*pad_batch([cached[3], cached[4]], 48)["unread"], *pack_batch([[cached[5], cached[1]]], 48)["unread"]]
    arrays = empty_features(3, 48, IDENTITY)
    assert arrays["feature_values"].shape == (3, 48, 18) and arrays["feature_scales"].shape == (3, 48, 3)
    for row, members in enumerate(sequences):
        read_features(arrays, row, members)
    for name, each in {"feature_values": 0, "feature_scales": 1}.items():
        stored = [cached[index].read()[each] for index in (3, 4, 5, 1)]
        wanted = [stored[0], stored[1], np.concatenate(stored[2:])]
        for row, rows in enumerate(wanted):
            np.testing.assert_array_equal(arrays[name][row, : len(rows)], rows)
            assert not arrays[name][row, len(rows) :].any()


def test_golden_cache(golden, tmp_path):
    """Our target's features of the samples of a cache that the reference wrote are its features, up to bfloat16."""
    import jax.numpy as jnp

    from dspark_jax.config import MeshConfig, TargetArchitecture, TargetConfig
    from dspark_jax.sharding import make_mesh
    from dspark_jax.target.loading import load_target

    expected = load_file(golden / "target_cache_expected.safetensors")
    manifest = json.loads((golden / "target_cache" / "manifest.json").read_text())
    path = golden / "targets" / Path(manifest["target_model_name_or_path"]).name
    target = load_target(
        TargetConfig(str(path), "float32", TargetArchitecture.from_hf(path)),
        make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]),
    )
    taps = tuple(manifest["target_layer_ids"])

    @jax.jit
    def forward(target, tokens):
        out = target.forward(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape), taps=taps)
        return out.features, out.last_hidden

    samples = [
        Sample(expected[f"sample{i}.input_ids"], expected[f"sample{i}.loss_mask"], "golden", i)
        for i in range(manifest["num_samples"])
    ]
    identity = Identity("t", "t", "d", "jax", taps, manifest["hidden_size"], "bfloat16")
    lengths = [len(one.tokens) for one in samples]
    compute = coding(lambda: lambda t, n: jax.device_get(forward(target, jnp.asarray(t))), identity)
    write_features(tmp_path / "f", identity, samples, lengths, compute, batch_size=5)
    cached = CachedSamples(samples, tmp_path / "f", identity)
    for i in range(len(samples)):
        parts = [expected[f"sample{i}.{name}"] for name in ("target_hidden_states", "target_last_hidden_states")]
        theirs = np.concatenate(parts, axis=-1).astype(np.float32)
        ours = cached[i].read()[0].astype(np.float32)
        assert (np.abs(ours - theirs) <= 2**-7 * np.abs(theirs) + 2e-4).all()  # one step of bfloat16
        assert (ours == theirs).mean() > 0.99
