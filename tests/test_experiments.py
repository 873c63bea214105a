"""Configs by name from anywhere, in a checkout and in a wheel, and the list of commands."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from dspark_jax import __main__ as listing
from dspark_jax import command, experiments
from dspark_jax.config import resolve

ROOT = Path(__file__).resolve().parents[1]


def test_configs_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # what a run of that name may have left
    assert {path.stem for path in (ROOT / "configs").glob("*.py")} == set(experiments.names())
    config, workdir, _ = command.parse(["--config", "quickstart"])
    assert resolve(config).target.architecture.vocab_size == 4096 and workdir == Path("runs/quickstart_dspark")
    eagle3 = command.load_config("dspark_qwen3_4b:eagle3")
    assert (eagle3.name, eagle3.drafter.kind) == ("eagle3_qwen3_4b", "eagle3")
    (tmp_path / "quickstart.py").write_text("from dspark_jax.config import Config\nget_config = lambda: Config('mine')")
    assert command.load_config("quickstart.py").name == "mine"  # a file is a file
    assert command.load_config("quickstart").name == "quickstart_dspark"


def test_a_wheel_has_them_inside(tmp_path: Path, monkeypatch: Any) -> None:
    """And what lies beside the installed package is somebody else's."""
    package = tmp_path / "dspark_jax"
    for folder, name in ((package / "configs", "ours"), (tmp_path / "configs", "theirs")):
        folder.mkdir(parents=True)
        (folder / f"{name}.py").touch()
    monkeypatch.setattr(experiments, "__file__", str(package / "experiments.py"))
    assert experiments.names() == ["ours"] and experiments.find("ours") == package / "configs" / "ours.py"


def test_the_package_lists_its_commands(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.delitem(sys.modules, "dspark_jax.__main__")
    monkeypatch.setattr(sys, "argv", ["dspark_jax"])
    runpy.run_module("dspark_jax", run_name="__main__")
    shown = re.findall(r"^  (\w+) +(\S.*)$", capsys.readouterr().out, re.MULTILINE)
    package = ROOT / "dspark_jax"
    texts = [path.read_text() for path in (*package.glob("*.py"), *package.glob("*/__main__.py"))]
    runs = {match[1] for text in texts if (match := re.search(r"^ +command\.run\((\w+)", text, re.MULTILINE))}
    assert {name for name, _ in shown} == runs | {"convert"} | set(experiments.names())
    assert set(listing.COMMANDS) == runs | {"convert"}
    assert dict(shown)["train"] == "Trains a drafter for a frozen target, then evaluates it."
    monkeypatch.setattr(sys, "argv", ["dspark_jax", "train"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("dspark_jax", run_name="__main__")
    assert stop.value.code == 2 and "train: commands are modules" in capsys.readouterr().err


@pytest.mark.slow
def test_a_wheel_is_built_installed_and_used(tmp_path: Path) -> None:
    """In a virtual environment that sees the packages of this one, but not this checkout."""
    pytest.importorskip("setuptools", minversion="77")
    for folder in ("dspark_jax", "configs"):  # building leaves files beside what is built
        shutil.copytree(ROOT / folder, tmp_path / "source" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tmp_path / "source")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tmp_path / "source"], check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", packages, wheel], check=True)
    (packages / "shared.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = (
        "import dspark_jax; from dspark_jax.command import load_config; from dspark_jax.config import resolve\n"
        "config = resolve(load_config('quickstart:eagle3'))\n"
        "from dspark_jax.convert.servers import servers; assert servers()\n"
        "from dspark_jax.evaluation.measured_costs import cost_files; assert cost_files()\n"
        "print(dspark_jax.__file__, config.name, config.target.architecture.vocab_size)"
    )
    done = subprocess.run([python, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{packages / 'dspark_jax' / '__init__.py'} quickstart_eagle3 4096\n", done.stderr
