"""A part of the matrix of broken files (`broken_files.py` runs all of it): no command may end in a traceback."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def load() -> Any:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("broken_files", Path(__file__).with_name("broken_files.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_counts_as_a_clear_answer(tmp_path: Path, monkeypatch: Any) -> None:
    """The judge itself: one line and status 2, or it worked; not a traceback, wherever it is printed."""
    import traceback

    matrix = load()

    def ends(*lines: str, status: int | None) -> bool:
        def run(world: Path) -> None:
            print(*lines, sep="\n", file=sys.stderr)
            if status is None:
                raise KeyError("x")
            raise SystemExit(status)

        monkeypatch.setitem(matrix.COMMANDS, "evaluate", run)
        return matrix.outcome("evaluate", tmp_path).good

    assert ends("error: a/b: damaged; remove it", status=2) and ends("progress", status=0)
    assert not ends("error: a", "error: b", status=2) and not ends("no reason", status=2)
    assert not ends("error: a", status=1) and not ends("error: a", status=None)
    assert not ends("error: a", "".join(traceback.format_exception(ValueError("x"))), "Traceback (most", status=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, files",
    [
        ("generate", "target/*,run/*.json,run/checkpoints/4/about*,run/checkpoints/4/params*,!*/ocdbt.process_0/*"),
        ("train", "run,run/metrics.jsonl,run/config.json,run/checkpoints,run/checkpoints/4/data*"),
        ("export", "run/*.json,run/eval/*,target/config.json"),
        ("convert", "drafter/*"),
        ("check", "drafter/*"),
    ],
)
def test_no_traceback(tiny_target: Path, base: Path, command: str, files: str) -> None:
    """In a process of its own, which has one device."""
    script = Path(__file__).with_name("broken_files.py")
    argv = ["--target", str(tiny_target), "--base", str(base), "--commands", command, "--files", files]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    # Every trial compiles the same programs.
    env |= {
        "JAX_COMPILATION_CACHE_DIR": str(base.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    done = subprocess.run([sys.executable, str(script), *argv], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves the run that all of them damage copies of."""
    return tmp_path_factory.mktemp("matrix") / "base"
