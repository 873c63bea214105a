"""Working directories in a bucket: what is whole, what a kill leaves, who may write (dspark_jax/buckets)."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_jax import command, run_lock
from dspark_jax.buckets import mirror as mirror_module
from dspark_jax.buckets import places
from dspark_jax.buckets.inputs import files_at, local_folder
from dspark_jax.buckets.lock import BucketLock
from dspark_jax.buckets.mirror import Mirror
from dspark_jax.buckets.store import Store
from dspark_jax.data import benchmark_prompts
from dspark_jax.data.files import content_hashes, prompt_files
from dspark_jax.data.prompts import read_prompts
from dspark_jax.errors import InputError
from tests import fake_bucket
from tests.conftest import others_slow

URL = "gs://bucket/run"


pytestmark = pytest.mark.usefixtures("bucket")


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


class Killed(BaseException):
    """The machine is taken away."""


class Requests:
    """Counts requests to the store, and dies before the one of a number, and at all that follow."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, die_at: int | None = None):
        self.count, self.die_at, self.log = 0, die_at, list[tuple[str, str]]()
        self._lock = threading.Lock()
        monkeypatch.setattr(fake_bucket.FakeBucket, "before", staticmethod(self))

    def __call__(self, what: str, key: str) -> None:
        with self._lock:
            self.count += 1
            self.log.append((what, key))
            if self.die_at is not None and self.count > self.die_at:
                raise Killed


def a_run(folder: Path, done: list[str], mirror: Mirror) -> None:
    """What commands do with a working directory, in little; notes what they say is done."""
    partial, data = folder / "data.partial", folder / "data"
    for version in ("one", "two"):
        write(partial / "inputs.json", version)
        mirror.begin_logs(partial)
        log = partial / "answers.jsonl"
        log.touch()
        mirror.watch(log)
        for number in range(3):
            with log.open("a") as file:
                file.write(f"{version} {number}\n{version} half a li")
            mirror.put_lines()
            log.write_text(log.read_text().rpartition("\n")[0] + "\n")
            done.append(f"{version} {number}")
        write(data / "shard", f"shard {version}")
        write(data / "deep" / "report.json", f"report {version}")
        if version == "one":
            write(data / "only_one", "only one")
        else:
            (data / "only_one").unlink()
        mirror.publish(data)
        done.append(f"data {version}")
        mirror.withdraw(partial)
        for file in sorted(partial.rglob("*")):
            file.unlink()
    for step in range(1, 4):
        for name in ("about/metadata", "params/array", "optimizer/array"):
            write(folder / "checkpoints" / str(step) / name, f"{name} {step}")
        write(folder / "metrics.jsonl", f"rows to {step}")
        mirror.publish(folder / "checkpoints" / str(step))
        done.append(f"checkpoint {step}")
        if step > 1:
            for file in list((folder / "checkpoints" / str(step - 1)).rglob("*")):
                file.unlink() if file.is_file() else None
            (folder / "checkpoints" / str(step - 1)).rename(folder / f"gone{step}")
            mirror.prune(folder / "checkpoints")


def sets_of(mirror: Mirror) -> dict[str, dict[str, str]]:
    """What is whole, fetched."""
    for name in mirror.sets:
        mirror.fetch(mirror.folder / name)
    return {name: contents(mirror.folder / name) for name in mirror.sets}


def data_of(version: str) -> dict[str, str]:
    more = {"only_one": "only one"} if version == "one" else {}
    return {"shard": f"shard {version}", "deep/report.json": f"report {version}", **more}


@pytest.mark.parametrize("part", others_slow(range(12), 0))
def test_a_kill_before_any_request_leaves_what_was_said_to_be_done(part: int, tmp_path: Path, monkeypatch: Any) -> None:
    requests = Requests(monkeypatch)
    mirror = Mirror(Store(URL), tmp_path / "whole")
    a_run(tmp_path / "whole", [], mirror)
    total = requests.count
    assert total > 60
    for die_at in range(part, total, 12):
        for key in fake_bucket.objects():
            fake_bucket._place(key).unlink()
        done = list[str]()
        Requests(monkeypatch, die_at)
        with pytest.raises(Killed):
            folder = tmp_path / f"local{die_at}"
            a_run(folder, done, Mirror(Store(URL), folder))
        Requests(monkeypatch)
        found = Mirror(Store(URL), tmp_path / f"fresh{die_at}")
        sets = sets_of(found)
        versions = [version for version in ("one", "two") if sets.get("data") == data_of(version)]
        assert len(versions) == ("data" in sets)
        said = [one.removeprefix("data ") for one in done if one.startswith("data ")]
        assert not said or versions and versions >= said[-1:]
        steps = [int(one.rpartition(" ")[2]) for one in done if one.startswith("checkpoint")]
        for name in set(sets) - {"data"}:
            step = name.rpartition("/")[2]
            assert sets[name] == {f"{part}": f"{part} {step}" for part in sets[name]} and len(sets[name]) == 3
        assert not steps or f"checkpoints/{steps[-1]}" in sets
        # The answers that are in the bucket, unless the data that is made of them is there.
        found.fetch(found.folder / "data.partial")
        answers = found.folder / "data.partial" / "answers.jsonl"
        lines = answers.read_text().splitlines() if answers.exists() else []
        for version in {"one", "two"} - {*said, *versions}:
            made = [one for one in done if one.startswith(version)]
            assert not made or lines[: len(made)] == made
        assert all(line.split() == [line[:3], str(number)] for number, line in enumerate(lines))


def test_only_what_is_needed_is_downloaded_and_only_once(bucket: Callable[[], None], monkeypatch: Any) -> None:
    with places.working_directory(Path(URL), "train") as folder:
        for step in (1, 2):
            for name in ("about/metadata", "params/array", "optimizer/array"):
                write(folder / "checkpoints" / str(step) / name, f"{name} {step}")
            places.publish(folder / "checkpoints" / str(step))
        write(folder / "data" / "shard", "x")
        places.publish(folder / "data")
        write(folder / "eval" / "metrics.json", "{}")
        write(folder / "tensorboard" / "events", "...")
    bucket()
    requests = Requests(monkeypatch)
    folder = places.reading(URL)
    places.fetch(folder / "checkpoints" / "2" / "params")
    heads = {"eval/metrics.json": "{}"} | {f"checkpoints/{s}/about/metadata": f"about/metadata {s}" for s in (1, 2)}
    assert contents(folder) == heads | {"checkpoints/2/params/array": "params/array 2"}
    before = len([key for what, key in requests.log if what == "read"])
    places.fetch(places.reading(URL) / "checkpoints" / "2" / "params")
    again = [key for what, key in requests.log if what == "read"][before:]
    assert again and all("manifests/" in key for key in again)


def test_what_the_bucket_does_not_have_is_gone_from_the_local_folder(capsys: Any) -> None:
    with places.working_directory(Path(URL), "train") as folder:
        write(folder / "checkpoints" / "1" / "params", "1")
        places.publish(folder / "checkpoints" / "1")
        write(folder / "checkpoints" / "2" / "params", "2")  # never said to be whole
        write(folder / "eval" / "old.png", "...")
    with places.working_directory(Path(URL), "train") as folder:
        assert contents(folder / "checkpoints") == {"1/params": "1"}
        assert not (folder / "checkpoints" / "2").exists()
        (folder / "eval" / "old.png").unlink()
        write(folder / "checkpoints" / "1" / "params", "changed by somebody")
    assert "bucket/run/eval/old.png" not in fake_bucket.objects()
    with places.working_directory(Path(URL), "train") as folder:
        places.fetch(folder / "checkpoints" / "1")
        assert contents(folder / "checkpoints") == {"1/params": "1"}


def test_sets_without_a_manifest_are_named(capsys: Any) -> None:
    fake_bucket.put("bucket/run/checkpoints/7/params", b"copied")
    with places.working_directory(Path(URL), "train") as folder:
        assert not (folder / "checkpoints").exists()
    assert "gs://bucket/run/checkpoints/7: left out, it has no manifests/checkpoints/7.json" in capsys.readouterr().err


def test_a_piece_of_the_answers_that_is_missing_is_named(tmp_path: Path) -> None:
    fake_bucket.put("bucket/run/data.partial/inputs.json", b"{}")
    fake_bucket.put("bucket/run/data.partial/answers.jsonl/000000000000005", b"1234\n")
    mirror = Mirror(Store(URL), tmp_path / "run")
    with pytest.raises(InputError, match="answers.jsonl/000000000000005: a piece before it is missing"):
        mirror.fetch(tmp_path / "run" / "data.partial")


def test_what_grows_is_put_into_the_bucket_while_a_command_runs(monkeypatch: Any) -> None:
    monkeypatch.setattr(mirror_module, "INTERVAL", 0.02)
    with places.working_directory(Path(URL), "train") as folder:
        write(folder / "metrics.jsonl", "row\n")
        write(folder / "tensorboard" / "events", "...")
        write(folder / "eval" / "half.json", "{")
        fake_bucket.wait_for("bucket/run/tensorboard/events")
        fake_bucket.wait_for("bucket/run/metrics.jsonl")
        assert "bucket/run/eval/half.json" not in fake_bucket.objects()
    assert "bucket/run/eval/half.json" in fake_bucket.objects()


def test_what_is_gone_while_it_is_listed_is_no_end_of_it(monkeypatch: Any) -> None:
    """A directory that is made and removed between two looks: what grows goes on into the bucket."""
    monkeypatch.setattr(mirror_module, "INTERVAL", 0.02)
    listed = mirror_module._files_below
    vanishing = iter([FileNotFoundError("probe"), FileNotFoundError("probe")])

    def files_below(folder: Path) -> Any:
        if threading.current_thread() is not threading.main_thread() and (error := next(vanishing, None)):
            raise error
        return listed(folder)

    monkeypatch.setattr(mirror_module, "_files_below", files_below)
    with places.working_directory(Path(URL), "train") as folder:
        write(folder / "tensorboard" / "events", "...")
        fake_bucket.wait_for("bucket/run/tensorboard/events", seconds=10)
    assert next(vanishing, None) is None


def test_a_set_is_published_when_it_has_its_name(monkeypatch: Any) -> None:
    with places.working_directory(Path(URL), "train") as folder:
        final = folder / "checkpoints" / "1"
        places.publish(final, wait=False)
        write(folder / "checkpoints" / "1.orbax-checkpoint-tmp" / "params", "1")
        time.sleep(0.1)
        assert not fake_bucket.objects().keys() - {"bucket/run/lock.json"}
        final.with_name("1.orbax-checkpoint-tmp").rename(final)
        places.settle(folder / "checkpoints")
        assert "bucket/run/manifests/checkpoints/1.json" in fake_bucket.objects()
        final.rename(folder / "elsewhere")
        places.settle(folder / "checkpoints")
        assert "bucket/run/checkpoints/1/params" not in fake_bucket.objects()


def test_a_set_that_nobody_waited_for_is_whole_or_an_error(monkeypatch: Any) -> None:
    with places.working_directory(Path(URL), "train") as folder:
        write(folder / "checkpoints" / "1" / "params", "1")
        places.publish(folder / "checkpoints" / "1", wait=False)
    assert "bucket/run/manifests/checkpoints/1.json" in fake_bucket.objects()

    def fail(what: str, key: str) -> None:
        if (what, key) == ("write", "bucket/run/checkpoints/2/params"):
            raise PermissionError("Access Denied")

    monkeypatch.setattr(fake_bucket.FakeBucket, "before", staticmethod(fail))
    refused = pytest.raises(InputError, match="checkpoints/2/params: cannot be written")
    with refused, places.working_directory(Path(URL), "train") as folder:
        write(folder / "checkpoints" / "2" / "params", "2")
        places.publish(folder / "checkpoints" / "2", wait=False)
    assert "bucket/run/lock.json" not in fake_bucket.objects()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "PATIENCE", 0.4)
    monkeypatch.setattr(run_lock, "now", lambda: f"{time.monotonic():020.3f}")


def lock_on(folder: Path, name: str) -> BucketLock:
    """The lock of a process on another machine."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = BucketLock(Store(URL), name, folder)
    lock.holder["boot"] = name
    return lock


def test_one_command_at_a_time_writes(tmp_path: Path, monkeypatch: Any, quick: None) -> None:
    with places.working_directory(Path(URL), "train"):
        with pytest.raises(InputError, match="in use by train"), places.working_directory(Path(URL), "evaluate"):
            pytest.fail("two at once on this machine")
        with pytest.raises(InputError, match=r"gs://bucket/run: in use by train .*remove gs://bucket/run/lock.json"):
            lock_on(tmp_path / "other", "evaluate").take()
    assert not fake_bucket.objects()
    with places.working_directory(Path(URL), "evaluate"):
        assert json.loads(fake_bucket.objects()["bucket/run/lock.json"])["command"] == "evaluate"


def test_of_many_that_find_a_dead_holder_one_follows(tmp_path: Path, quick: None) -> None:
    dead = lock_on(tmp_path / "dead", "dead")
    fake_bucket.put("bucket/run/lock.json", dead._content())
    locks = [lock_on(tmp_path / f"{number}", f"one{number}") for number in range(6)]
    taken, refused = list[BucketLock](), list[InputError]()

    def take(lock: BucketLock) -> None:
        try:
            lock.take()
            taken.append(lock)
        except InputError as error:
            refused.append(error)

    threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 1 and len(refused) == 5
    assert set(fake_bucket.objects()) == {"bucket/run/lock.json"}
    taken[0].release()
    assert not fake_bucket.objects()


def test_two_that_follow_a_dead_holder_do_not_meet(tmp_path: Path, monkeypatch: Any, quick: None) -> None:
    """The other one comes while the first is at it, and again when it is done."""
    dead, one, two = (lock_on(tmp_path / name, name) for name in ("dead", "one", "two"))
    fake_bucket.put("bucket/run/lock.json", dead._content())
    there = dead._read()
    assert there is not None
    met = list[str]()

    def before(what: str, key: str) -> None:
        if (what, key) == ("write", "bucket/run/lock.json") and not met:
            met.append(key)
            with pytest.raises(InputError, match="another command is taking the place of dead"):
                two._follow(there)

    monkeypatch.setattr(fake_bucket.FakeBucket, "before", staticmethod(before))
    one._follow(there)
    two._follow(there)
    assert met and json.loads(fake_bucket.objects()["bucket/run/lock.json"])["token"] == one.holder["token"]


def test_what_died_in_this_folder_is_followed_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    fake_bucket.put("bucket/run/lock.json", BucketLock(Store(URL), "train", folder)._content())
    began = time.monotonic()
    lock = BucketLock(Store(URL), "train", folder)
    lock.take()
    assert time.monotonic() - began < 5 < run_lock.PATIENCE
    lock.release()


def test_a_holder_that_was_taken_for_dead_says_nothing_is_whole(tmp_path: Path, monkeypatch: Any) -> None:
    ended = list[int]()

    def leave(status: int) -> None:
        ended.append(status)
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", leave)
    with pytest.raises(SystemExit), places.working_directory(Path(URL), "train") as folder:
        fake_bucket.put("bucket/run/lock.json", lock_on(tmp_path / "other", "another")._content())
        write(folder / "data" / "shard", "late")
        places.publish(folder / "data")
    assert ended and "bucket/run/manifests/data.json" not in fake_bucket.objects()
    assert json.loads(fake_bucket.objects()["bucket/run/lock.json"])["command"] == "another"


@pytest.mark.parametrize(
    ("url", "why"),
    [("gs://bucket", "names no folder in a bucket; write gs://bucket/NAME"), ("s3://b/..", "names no folder")],
)
def test_addresses_that_cannot_be_a_working_directory(url: str, why: str) -> None:
    with pytest.raises(InputError, match=why), places.working_directory(Path(url), "train"):
        pytest.fail("it was taken")


def test_a_bucket_that_is_not_there(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv(fake_bucket.FOLDER, str(tmp_path / "no such"))
    with pytest.raises(InputError, match="there is no such bucket"):
        Store(URL).write("a", b"")


@pytest.mark.parametrize("error", [PermissionError("Access Denied"), TimeoutError("..."), ValueError("Bad Request")])
def test_what_a_store_raises_is_one_line(error: Exception, monkeypatch: Any) -> None:
    def fail(what: str, key: str) -> None:
        raise error

    monkeypatch.setattr(fake_bucket.FakeBucket, "before", staticmethod(fail))
    calls: list[Callable[[], Any]] = [
        lambda: Store(URL).list(), lambda: Store(URL).read("a"), lambda: Store(URL).write("a", b""),
        lambda: Store(URL).create("a", b""), lambda: Store(URL).delete(["a"]), lambda: Store(URL).version("a"),
        lambda: Store(URL).get([("a", Path("never"))]), lambda: Store(URL).put([(Path(__file__), "a")]),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(InputError, match=f"^{URL}.* cannot be .*{error}.*; check the name of the bucket"):
            call()


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_package_is_named(scheme: str, extra: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("fsspec.filesystem", lambda *_, **__: (_ for _ in ()).throw(ImportError("no")))
    with pytest.raises(InputError, match=rf"needs a package that is missing; pip install 'dspark-jax\[{extra}\]'"):
        Store(f"{scheme}://bucket/run")


def test_prompts_in_a_bucket(tmp_path: Path) -> None:
    row = b'{"prompt": "%d"}\n'
    for name in ("a.jsonl", "b.jsonl", "deep/c.jsonl", "README.md", "deep/.hidden.jsonl"):
        fake_bucket.put(f"bucket/prompts/{name}", row % len(name))
    entry = "gs://bucket/prompts"
    assert prompt_files([f"{entry}/"]) == [f"{entry}/a.jsonl", f"{entry}/b.jsonl", f"{entry}/deep/c.jsonl"]
    assert prompt_files([f"{entry}/*.jsonl"]) == [f"{entry}/a.jsonl", f"{entry}/b.jsonl"]
    assert prompt_files([f"{entry}/README.md"]) == [f"{entry}/README.md"]
    assert len(prompt_files(["gs://bucket"])) == 3
    assert files_at(f"{entry}/**/*.jsonl") == [f"{entry}/a.jsonl", f"{entry}/b.jsonl", f"{entry}/deep/c.jsonl"]
    assert files_at(f"{entry}/[!b]*.jsonl") == files_at(f"{entry}/[a].json?") == [f"{entry}/a.jsonl"]
    (one,) = read_prompts([f"{entry}/b.jsonl"])
    assert (one.prompt_set, one.file, one.line) == ("b", f"{entry}/b.jsonl", 1)
    (tmp_path / "b.jsonl").write_bytes(row % 7)
    assert content_hashes([f"{entry}/b.jsonl"], "x") == content_hashes([str(tmp_path / "b.jsonl")], "x")
    with pytest.raises(InputError, match="no prompt file there in the bucket"):
        prompt_files(["gs://bucket/none.jsonl"])
    with pytest.raises(InputError, match="no prompt file there in the bucket"):
        prompt_files(["gs://other"])


def test_a_model_in_a_bucket_is_downloaded_as_far_as_it_is_needed(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "onnx/model.json"):
        fake_bucket.put(f"bucket/models/m/{name}", name.encode())
    folder = local_folder("gs://bucket/models/m", ("*.json", "*.safetensors"))
    assert contents(folder) == {name: name for name in ("config.json", "model.safetensors")}
    requests = Requests(monkeypatch)
    fake_bucket.put("bucket/models/m/config.json", b"newer")
    local_folder.cache_clear()
    folder = local_folder("gs://bucket/models/m", ("*.json", "*.safetensors"))
    assert contents(folder)["config.json"] == "newer"
    assert [key for what, key in requests.log if what == "read"] == ["bucket/models/m/config.json"]
    with pytest.raises(InputError, match="no such folder in the bucket"):
        local_folder("gs://bucket/models/none", ("*.json",))


def test_several_hosts_are_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: True)
    refused = pytest.raises(InputError, match="gs://bucket/run: with --distributed all hosts have to see one folder")
    with refused, command.locked_by_one(Path(URL), "train"):
        pytest.fail("it began")


def test_prompts_of_benchmarks_are_fetched_into_local_files() -> None:
    with pytest.raises(InputError, match="gs://bucket/gsm8k.jsonl: prompts are fetched into local files"):
        benchmark_prompts.places([], ["gs://bucket/gsm8k.jsonl"])
