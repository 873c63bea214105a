"""Processes that we start: what they said last, what ends us with them, and what ends them with us."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dspark_jax.attached import run_module, run_quietly

ROOT = Path(__file__).resolve().parents[1]


def test_the_last_words_of_a_process(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "dying.py").write_text("import sys\nprint('error: no bread', file=sys.stderr)\nsys.exit(2)\n")
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    (tmp_path / "garbled.py").write_text("import sys\nsys.stderr.buffer.write(b'caf\\xe9\\n')\nsys.exit(1)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    assert run_module(["garbled"], {}) == "caf\ufffd (garbled, status 1)"
    assert run_module(["dying"], {}) == "no bread (dying, status 2)"
    assert run_module(["killed"], {}) == "killed by signal 9, perhaps for its memory (killed)"


@pytest.mark.parametrize(
    ("ending", "error"),
    [
        ("sys.exit(143)", SystemExit),
        ("os.kill(os.getpid(), signal.SIGTERM)", SystemExit),
        ("sys.exit(130)", KeyboardInterrupt),
        ("signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)", KeyboardInterrupt),
    ],
)
def test_a_process_that_was_told_to_stop_ends_the_comparison(
    tmp_path: Path, monkeypatch: Any, ending: str, error: type[BaseException]
) -> None:
    (tmp_path / "told.py").write_text(f"import os, signal, sys\n{ending}\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    with pytest.raises(error) as ended:
        run_module(["told"], {})
    assert error is KeyboardInterrupt or getattr(ended.value, "code", None) == 143


def test_ctrl_c_is_told_once(tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """A terminal interrupts both, and both say so; what the other one says besides is shown."""
    said = "import sys\nprint('half way\\ninterrupted', file=sys.stderr)\nsys.exit(130)\n"
    (tmp_path / "told.py").write_text(said)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    with pytest.raises(KeyboardInterrupt):
        run_module(["told"], {})
    assert capsys.readouterr().err == "half way\n"


@pytest.mark.parametrize("function", ["run_module", "run_quietly"])
def test_who_is_killed_takes_them_along(tmp_path: Path, function: str) -> None:
    """SIGKILL, after which nothing of ours runs: the process ends in order, as one that trains would."""
    (tmp_path / "training.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(number, frame):\n"
        "    print('told to stop', flush=True)\n"
        "    print('told to stop', file=sys.stderr, flush=True)\n"
        f"    pathlib.Path({str(tmp_path / 'saved')!r}).touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        "time.sleep(60)\n"
    )
    program = f"from dspark_jax.attached import {function}; {function}(['training'], {{}})"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    appears(tmp_path / "begun")
    assert not (tmp_path / "saved").exists()
    process.kill()
    process.wait()
    appears(tmp_path / "saved")


def appears(path: Path) -> None:
    """Waits for a file."""
    ends = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < ends, f"{path} does not appear"
        time.sleep(0.02)


def test_who_ends_in_order_is_not_disturbed(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "quick.py").write_text("import sys\nprint(sys.argv[1:], __name__)\nassert not sys.stdin.isatty()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    done = run_quietly(["quick", "a", "b"], {"WITH": "this"})
    assert (done.returncode, done.stdout) == (0, "['a', 'b'] __main__\n"), done.stderr
