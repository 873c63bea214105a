"""Hosts are threads here; tests/test_prepare_hosts.py has processes."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_jax import hosts as module
from dspark_jax.config import DecodeMeshConfig
from dspark_jax.errors import HostLost, InputError
from dspark_jax.hosts import Hosts, mesh_of_one_host, wait_for_files


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work` returns or raises on each of so many hosts."""
    found: list[Any] = [None] * count

    def run(index: int) -> None:
        try:
            found[index] = work(index)
        except BaseException as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def stale(workdir: Path, **changes: Any) -> None:
    """Files of three hosts of an earlier run that has gone far and failed."""
    (workdir / module.FOLDER).mkdir()
    for index in range(3):
        state = {"token": f"old{index}", "heard": {"0": "old0", "1": "old1", "2": "old2"}, "met": 9, "facts": {}}
        state |= {"beat": 5, "failed": "of yesterday", "lost": False}
        (workdir / module.FOLDER / f"{index}.json").write_text(json.dumps(state | changes))


@pytest.mark.parametrize("before", [False, True], ids=["new", "after a run that failed"])
def test_hosts_meet_and_leave_nothing_behind(tmp_path: Path, before: bool) -> None:
    if before:
        stale(tmp_path)
    arrived = []

    def work(index: int) -> Any:
        with Hosts(tmp_path, index, 3) as hosts:
            time.sleep(0.05 * index)
            arrived.append(index)
            first = hosts.meet(number=index)
            assert sorted(arrived) == [0, 1, 2]
            return first, hosts.meet(number=10 + index)

    found = together(3, work)
    assert found[0] == ([{"number": 0}, {"number": 1}, {"number": 2}], [{"number": n} for n in (10, 11, 12)])
    assert found[1] == found[2] == ([{"number": 0}], [{"number": 10}])
    assert not list(tmp_path.iterdir())


def test_shares_are_disjoint_and_whole(tmp_path: Path) -> None:
    owned = [[number for number in range(11) if Hosts(tmp_path, index, 4).owns(number)] for index in range(4)]
    assert sorted(sum(owned, [])) == list(range(11)) and {len(one) for one in owned} == {2, 3}


def test_a_host_alone_writes_nothing_and_removes_what_failed_hosts_have_left(tmp_path: Path) -> None:
    stale(tmp_path)
    with Hosts(tmp_path, 0, 1) as hosts:
        assert not list(tmp_path.iterdir()) and hosts.meet(a=1) == [{"a": 1}] and hosts.owns(7)
        hosts.check()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("working", [False, True], ids=["waiting", "working"])
def test_a_failure_of_one_host_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, working: bool
) -> None:
    """Each says in one line which host it was, and why."""
    monkeypatch.setattr(module, "BEAT", 0.01)

    def work(index: int) -> None:
        with Hosts(tmp_path, index, 3) as hosts:
            if index == failing:  # at once
                raise InputError("prompts.jsonl: cannot be read")
            while working:
                hosts.check()
            hosts.meet()

    found = together(3, work)
    assert all(isinstance(error, InputError) for error in found)
    expected = ["host", failing, ": prompts.jsonl: cannot be read"]
    others = {str(error) for index, error in enumerate(found) if index != failing}
    assert others == {"{} {}{}".format(*expected)} and str(found[failing]) == expected[2][2:]


def test_what_is_no_mistake_of_the_users_is_told_as_a_loss(tmp_path: Path) -> None:
    def work(index: int) -> None:
        with Hosts(tmp_path, index, 2) as hosts:
            hosts.meet()
            if index == 1:
                raise SystemExit(143)
            hosts.meet()

    lost, left = together(2, work)
    assert isinstance(left, SystemExit) and isinstance(lost, HostLost)
    assert str(lost).startswith("host 1: ended before its work was done (SystemExit); start the same command on all")


@pytest.mark.parametrize("dying", [0, 1])
def test_a_host_that_dies_is_missed_and_a_slow_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dying: int
) -> None:
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "PATIENCE", 0.5)

    def work(index: int) -> None:
        hosts = Hosts(tmp_path, index, 2).__enter__()
        hosts.meet()
        time.sleep(1)  # slow, and alive
        hosts.meet()
        if index == dying:
            hosts._ended.set()  # as if it were killed: no sign of life any more, and no farewell
        else:
            hosts.meet()

    found = together(2, work)
    assert found[dying] is None and isinstance(found[1 - dying], HostLost)
    assert str(found[1 - dying]).startswith(f"host {dying} has shown no sign of life for 0 s; start the same command")


def test_a_host_that_never_comes_or_comes_twice_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale(tmp_path)
    monkeypatch.setattr(module, "COMING", 0.1)
    with pytest.raises(HostLost, match=r"^host 1 has not come within 0 s; --workdir has to be one that all hosts see"):
        Hosts(tmp_path, 0, 2).__enter__()
    monkeypatch.setattr(module, "COMING", 300)

    def work(index: int) -> None:
        hosts = Hosts(tmp_path, index, 2).__enter__()
        hosts.meet()
        if index == 1:  # restarted by itself
            hosts._ended.set()
            Hosts(tmp_path, 1, 2)._write()
        else:
            hosts.meet()

    with pytest.raises(HostLost, match=r"^host 1 has begun once more; "):
        raise together(2, work)[0]


def test_files_of_other_hosts_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "answers-1.jsonl"
    file.write_text("abc")
    wait_for_files({file: 3})
    monkeypatch.setattr(module, "PATIENCE", 0)
    with pytest.raises(HostLost, match=r"answers-1\.jsonl: is not here as the host that wrote it has it \(4 bytes\)"):
        wait_for_files({file: 4})


@pytest.mark.parametrize(
    ("given", "devices", "expected"),
    [
        ((-1, 1, 1), 4, (-1, 1, 1)),
        ((1, -1, 4), 4, (1, -1, 4)),
        ((2, 8, 2), 4, (1, 2, 2)),
        ((2, 8, 8), 4, (1, 1, 4)),
        ((16, 1, 1), 8, (8, 1, 1)),
        ((1, 1, 2), 8, (4, 1, 2)),
        ((-1, 1, 0), 4, (-1, 1, 0)),
        ((16, 1, 0), 4, (4, 1, 0)),
    ],
)
def test_the_mesh_of_one_host(given: tuple, devices: int, expected: tuple) -> None:
    found = mesh_of_one_host(DecodeMeshConfig(*given), devices)
    assert (found.data, found.fsdp, found.tensor) == expected
