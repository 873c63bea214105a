import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorflow_datasets.core import shuffle

from dspark_jax.config import InputError
from dspark_jax.data.sources import DsparkSamples, Sample, SampleReader, write_samples


def sample(sample_id: int, length: int, name: str = "math") -> Sample:
    rng = np.random.default_rng(sample_id)
    tokens = rng.integers(0, 2**31 - 1, length).astype(np.int32)
    return Sample(tokens, rng.integers(0, 2, length).astype(np.uint8), name, sample_id)


def test_samples_come_back_in_their_order_with_their_types(tmp_path: Path) -> None:
    written = [sample(3 * i + 2, 1 + i * 37, f"séts-{i % 3}") for i in range(25)]
    assert write_samples(tmp_path / "data", iter(written)) == 25
    reader = SampleReader(tmp_path / "data")
    assert len(reader) == 25
    for i in (24, 0, 7, *range(25)):
        assert np.array_equal(reader[i].tokens, written[i].tokens) and reader[i].tokens.dtype == np.int32
        assert np.array_equal(reader[i].loss_mask, written[i].loss_mask) and reader[i].loss_mask.dtype == np.uint8
        assert (reader[i].prompt_set, reader[i].sample_id) == (written[i].prompt_set, written[i].sample_id)


def test_records_have_their_fields_in_one_order(tmp_path: Path) -> None:
    """Whatever process writes them: workers of Beam are others."""
    write_samples(tmp_path, [sample(i, 5) for i in range(3)])
    records = SampleReader(tmp_path)._records.data_source.__getitems__([0, 1, 2])
    names = [b"loss_mask", b"prompt_set", b"sample_id", b"tokens"]
    assert all(sorted(names, key=record.index) == names for record in records)


def test_more_samples_than_tfds_keeps_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 1 GB of them it would go to disk, with TensorFlow, which is not there."""
    monkeypatch.setattr(shuffle, "MAX_MEM_BUFFER_SIZE", 1000)
    write_samples(tmp_path, (sample(2 * i, 50) for i in range(20)))
    reader = SampleReader(tmp_path)
    assert [reader[i].sample_id for i in range(20)] == list(range(0, 40, 2))


def test_writing_again_replaces_the_samples_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_samples(tmp_path, [sample(i, 5) for i in range(9)])
    write_samples(tmp_path, [sample(i, 5) for i in range(4)])
    assert len(SampleReader(tmp_path)) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["dspark_samples"]


def test_an_interrupted_writer_leaves_nothing_that_can_be_opened(tmp_path: Path) -> None:
    def failing():
        yield sample(0, 5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_samples(tmp_path, failing())
    with pytest.raises(InputError, match="no prepared samples; run python -m dspark_jax.prepare"):
        SampleReader(tmp_path)
    write_samples(tmp_path, [sample(0, 5)])
    assert len(SampleReader(tmp_path)) == 1


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no sample to write"):
        write_samples(tmp_path, [])


def test_a_full_disk_is_an_os_error_and_other_failures_are_not_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DsparkSamples, **_: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(DsparkSamples, "download_and_prepare", fail)
    # What TFDS raised on a full file system.
    message = 'Failed to finalize writing of split "train": write() failed: No space left on device; at byte 1228800'
    with pytest.raises(OSError, match="No space left on device") as error:
        write_samples(tmp_path, [sample(0, 5)])
    assert error.value.errno == 28
    message = "another failure"
    with pytest.raises(RuntimeError, match="another failure"):
        write_samples(tmp_path, [sample(0, 5)])


def test_tfds_opens_the_directory_without_our_code_and_without_tensorflow(tmp_path: Path) -> None:
    write_samples(tmp_path, [sample(i, 5) for i in range(3)])
    code = (
        "import sys, tensorflow_datasets as tfds\n"
        f"builder = tfds.builder_from_directory({str(tmp_path / 'dspark_samples' / '1.0.0')!r})\n"
        "print([int(r['sample_id']) for r in builder.as_data_source('train')], 'tensorflow' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=dict(os.environ)
    )
    assert run.stdout.strip() == "[0, 1, 2] False"


DAMAGED = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut at the end": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "null": lambda path: path.write_text("null"),
    "an object": lambda path: path.write_text("{}"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    write_samples(folder, [sample(i, 50) for i in range(40)])
    return folder


@pytest.mark.parametrize("how", DAMAGED)
@pytest.mark.parametrize("name", ["dataset_info.json", "features.json", "dspark_samples-train.array_record*"])
def test_damaged_samples_are_one_line(whole: Path, tmp_path: Path, name: str, how: str) -> None:
    shutil.copytree(whole, tmp_path / "data")
    (path,) = (tmp_path / "data").rglob(name)
    DAMAGED[how](path)
    with pytest.raises(InputError, match=r"^[^\n]*/data[/:][^\n]*run python -m dspark_jax\.prepare[^\n]*$"):
        SampleReader(tmp_path / "data")


def test_a_damaged_class_name_is_one_line(whole: Path, tmp_path: Path) -> None:
    """TFDS imports the classes that features.json names."""
    shutil.copytree(whole, tmp_path / "data")
    (path,) = (tmp_path / "data").rglob("features.json")
    damaged = path.read_text().replace("tensorflow_datasets.core.features", "tensorflow_datasets.core.fdatures")
    assert damaged != path.read_text()
    path.write_text(damaged)
    with pytest.raises(InputError, match=r"^[^\n]*features[^\n]*run python -m dspark_jax\.prepare[^\n]*$"):
        SampleReader(tmp_path / "data")


def test_a_damaged_sample_is_named_and_the_others_are_read(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "data")
    (path,) = (tmp_path / "data").rglob("*.array_record*")
    content = bytearray(path.read_bytes())
    content[len(content) // 50] ^= 4
    path.write_bytes(content)
    reader, damaged = SampleReader(tmp_path / "data"), []
    for index in range(40):
        try:
            reader[index]
        except InputError as error:
            damaged.append(str(error))
    assert len(damaged) == 1 and "sample 5 is damaged (Corrupted" in damaged[0]
    assert damaged[0].endswith(f"; remove {tmp_path / 'data'} and run python -m dspark_jax.prepare again")


def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: DsparkSamples, **_: object) -> None:
        raise RuntimeError("open() failed: Permission denied; opening data/x.array_record")

    monkeypatch.setattr(DsparkSamples, "download_and_prepare", fail)
    with pytest.raises(PermissionError) as error:
        write_samples(tmp_path, [sample(0, 5)])
    assert error.value.filename == str(tmp_path)
