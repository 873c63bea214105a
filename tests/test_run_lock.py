"""One writer per directory: while it lives, and not a moment longer than can be known."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dspark_jax import run_lock
from dspark_jax.config import InputError
from dspark_jax.run_lock import FILE, locked

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from pathlib import Path
from dspark_jax import run_lock
run_lock.BEAT = 0.05
with run_lock.locked(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(workdir: Path, *program: str) -> subprocess.Popen[str]:
    """A process that holds the lock of a directory, when this returns."""
    command = [sys.executable, "-c", *(program or (HOLD,)), str(workdir)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=-1, stderr=-1, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def elsewhere(**changes: Any) -> dict[str, Any]:
    """What a process on another machine has written."""
    return dict(run_lock.Holder.this("train")) | {"host": "far", "boot": "another"} | changes


@pytest.fixture
def hasty(monkeypatch: Any) -> None:
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)


def test_a_second_writer_is_refused_and_a_dead_one_is_not_waited_for(tmp_path: Path) -> None:
    process = hold(tmp_path / "run")
    try:
        with pytest.raises(InputError) as error, locked(tmp_path / "run", "evaluate"):
            pytest.fail("two are in it")
        assert f"/run: in use by train (process {process.pid} on " in str(error.value)
        assert "wait for its end, or use another --workdir" in str(error.value) and "remove" not in str(error.value)
    finally:
        process.kill()
        process.communicate()
    assert (tmp_path / "run" / FILE).exists()
    with locked(tmp_path / "run", "evaluate"):
        assert json.loads((tmp_path / "run" / FILE).read_text())["command"] == "evaluate"
    assert list((tmp_path / "run").iterdir()) == []


def test_what_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with locked(tmp_path / "a" / "b", "train"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "a" / "b", "train"):
        (tmp_path / "a" / "kept").touch()
        raise ZeroDivisionError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]


def test_who_was_started_by_the_holder_passes(tmp_path: Path) -> None:
    """`compare` holds the directory in which its `prepare` writes; a stranger with its number in the file does not."""
    with locked(tmp_path, "compare"):
        written = (tmp_path / FILE).read_text()
        hold(tmp_path).kill()
        assert (tmp_path / FILE).read_text() == written
    (tmp_path / FILE).write_text(written)  # of a dead process that had the number of this one
    inside = hold(tmp_path)
    with pytest.raises(InputError, match=f"in use by train .process {inside.pid}"), locked(tmp_path, "compare"):
        pytest.fail("two are in it")
    inside.kill()
    inside.communicate()


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("lockable", [True, False])
def test_another_machine(tmp_path: Path, monkeypatch: Any, capsys: Any, lockable: bool) -> None:
    """Whether its process lives shows in the file alone, whatever flock says or cannot say."""
    if not lockable:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOTSUP, "not supported")))
    path = tmp_path / FILE
    path.write_text(json.dumps(elsewhere()))
    alive = threading.Timer(0.1, lambda: path.write_text(json.dumps(elsewhere(alive="later"))))
    alive.start()
    refusal = f"in use by train .* on far, .* if it has ended, remove {path}"
    with pytest.raises(InputError, match=refusal), locked(tmp_path, "train"):
        pytest.fail("two are in it")
    alive.join()
    capsys.readouterr()
    with locked(tmp_path, "evaluate"):  # no sign of life any more
        assert json.loads(path.read_text())["command"] == "evaluate"
    assert "if it shows no sign of life for" in capsys.readouterr().err and not path.exists()


@pytest.mark.usefixtures("hasty")
def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(run_lock, "now", lambda: f"{time.monotonic():020.3f}")
    with locked(tmp_path, "train"):
        first = (tmp_path / FILE).read_text()
        time.sleep(0.2)
        later = (tmp_path / FILE).read_text()
    assert first != later and len(first) == len(later)


def test_who_was_taken_for_dead_ends(tmp_path: Path) -> None:
    process = hold(tmp_path)
    (tmp_path / FILE).write_text(json.dumps(elsewhere()))
    _, error = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "this process stood still, and was taken for dead by train (process " in error


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")

    def refused(workdir: Path) -> str:
        with pytest.raises(InputError) as error, locked(workdir, "train"):
            pytest.fail("it ran")
        return str(error.value)

    assert refused(tmp_path / "file") == f"--workdir {tmp_path}/file: {tmp_path}/file is no directory; choose another place"  # fmt: skip # noqa: E501
    assert f"{tmp_path}/file is no directory" in refused(tmp_path / "file" / "run")
    assert f"{tmp_path}/dangling is no directory" in refused(tmp_path / "dangling")
    assert "cannot be written in (File name too long)" in refused(tmp_path / ("n" * 300))
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs the tests may write everywhere
    assert "cannot be written in; change its permissions" in refused(tmp_path / "there")

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert "cannot be written in (Read-only file system); choose another place" in refused(tmp_path / "other")
    assert (tmp_path / "file").read_text() == "mine"
