"""Ctrl-C: one line and status 130 while modules are imported, while XLA compiles, and at a second one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_jax import interrupt
from dspark_jax.errors import InputError, reporting_errors

ROOT = Path(__file__).resolve().parents[1]


def interrupted(folder: Path, arguments: list[str]) -> tuple[int, str]:
    """Status and standard error of `python -m ARGUMENTS`, which was sent SIGINT when it had printed its first line."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }  # XLA says that it is slow
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        try:
            assert process.stdout and process.stdout.readline() == "now\n"
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=120)[1]
        finally:
            process.kill()
    return process.returncode, said


def test_an_interrupt_during_imports(tmp_path: Path) -> None:
    """Also where a C extension makes an `ImportError` of it: nothing is raised at all."""
    slow = (
        "import time\nprint('now', flush=True)\ntry:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError"
    )
    (tmp_path / "jax.py").write_text(slow)
    assert interrupted(tmp_path, ["dspark_jax.prepare"]) == (130, "interrupted\n")


COMPILE = """
import threading, jax, jax.numpy as jnp

SIZE = 1_000_000

def slow(x):  # folding the constant takes XLA minutes
    return x + jax.lax.reduce_window(jnp.arange(float(SIZE)), 0.0, jax.lax.add, (1_000,), (1,), "SAME")

def get_config(arg=""):
    lowered = jax.jit(slow).lower(jnp.zeros(SIZE))
    threading.Timer(0.5, print, ["now"], {"flush": True}).start()
    lowered.compile()
"""


def test_an_interrupt_while_xla_compiles(tmp_path: Path) -> None:
    """The end of the interpreter would wait for the compilation, and crash when it is done."""
    (tmp_path / "slow.py").write_text(COMPILE)
    assert interrupted(tmp_path, ["dspark_jax.plan", "--config", str(tmp_path / "slow.py")]) == (130, "interrupted\n")


class Left(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process as `guard_imports` leaves it, but that `os._exit` raises `Left`."""

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(os, "_exit", leave)
    before = signal.signal(signal.SIGINT, interrupt.leave)
    yield
    signal.signal(signal.SIGINT, before)


def test_what_was_begun_is_undone_first(guarded: None, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever the interrupt becomes on its way out: libraries raise errors of their own from it."""
    undone = []
    with pytest.raises(Left) as left, reporting_errors():
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise InputError("a file cannot be read") from error
        finally:
            undone.append(True)
    assert left.value.args == (130,) and undone
    assert capfd.readouterr().err == "interrupted\n"


def test_a_second_interrupt_does_not_wait(guarded: None) -> None:
    with pytest.raises(Left), reporting_errors():
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the process went on")


def test_an_interrupt_that_python_drops_comes_again(guarded: None, capfd: pytest.CaptureFixture[str]) -> None:
    class Collected:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Left), reporting_errors():
        Collected()
        time.sleep(20)
    assert capfd.readouterr().err == "interrupted\n"


def test_other_errors_and_other_processes_are_left_alone(guarded: None) -> None:
    with pytest.raises(SystemExit) as ended, reporting_errors():
        raise InputError("a value")
    assert ended.value.code == 2 and signal.getsignal(signal.SIGINT) is interrupt.leave
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(SystemExit) as ended, reporting_errors():
        signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 130


@pytest.mark.parametrize(
    ("argv", "whole", "handler", "guards"),
    [
        (["-m"], ["python", "-X", "utf8", "-m", "dspark_jax.train"], signal.default_int_handler, True),
        (["-m"], ["python", "-m", "dspark_jax.train"], signal.SIG_IGN, False),
        (["-m"], ["python", "-m", "other", "dspark_jax.train"], signal.default_int_handler, False),
        (["train.py"], ["python", "-m", "dspark_jax.train"], signal.default_int_handler, False),
    ],
)
def test_only_commands_are_guarded(monkeypatch, argv, whole, handler, guards) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", whole)
    before = signal.signal(signal.SIGINT, handler)
    try:
        interrupt.guard_imports()
        assert (signal.getsignal(signal.SIGINT) is interrupt.leave) == guards
    finally:
        signal.signal(signal.SIGINT, before)
