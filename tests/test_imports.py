"""Imports point one way (docs/design.md): checked over the syntax tree, so nothing needs to be importable."""

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dspark_jax"

BASE = {
    "architecture",
    "attached",
    "benchmarks",
    "buckets",
    "config",
    "config_fields",
    "config_rules",
    "distributed",
    "errors",
    "experiments",
    "hosts",
    "hub",
    "interrupt",
    "jobs",
    "json_file",
    "kinds",
    "layer_sizes",
    "metrics",
    "paths",
    "platform",
    "presets",
    "progress",
    "ranges",
    "recompute",
    "registry",
    "rope_scaling",
    "run_lock",
    "sharding",
    "shown_paths",
    "templates",
    "tokenizer",
    "target.families",
    "target.quantised",
    "target.weights",
    "unicode",
    "vocabulary",
}
LIGHT = (
    "target.families",
    "target.quantised",
    "target.weights",
)  # parts of a package that are loaded with the config, before JAX
ALLOWED = {
    **{name: BASE for name in BASE},
    "target.families": BASE | {"ops", "target"},  # the latter two for types, and where a family makes its own model
    "ops": BASE | {"ops"},
    "data": BASE | {"data"},
    "target": BASE | {"ops", "target"},
    "drafter": BASE | {"ops", "target", "drafter"},
    "training": BASE | {"ops", "data", "target", "drafter", "run", "training"},
    "engine": BASE | {"ops", "target", "drafter", "engine"},
    "convert": BASE | {"ops", "target", "drafter", "convert"},
    "evaluation": BASE | {"ops", "data", "target", "drafter", "run", "training", "engine", "convert", "evaluation"},
    "run": BASE | {"data", "target"},
    "planning": BASE | {"ops", "target", "drafter", "training", "engine", "planning"},
    "answering": BASE | {"data", "target", "engine", "run"},
    "prepare_answers": BASE | {"data", "run", "answering"},
    "refresh": BASE | {"data", "target", "drafter", "run", "training", "engine", "evaluation", "answering"},
    "start": BASE | {"target", "drafter", "run", "training", "convert"},
    "command": BASE,
    "serve": BASE | {"ops", "data", "target", "drafter", "run", "training", "engine", "evaluation", "serve"},
    "__main__": BASE,
}
COMMANDS = {"prepare", "train", "evaluate", "calibrate", "compare", "demo", "generate", "kernels", "plan", "profile"}
FOLDERS = {"convert": {"__main__", "check_command", "sources"}, "serve": {"__main__"}}  # of commands that are a package
CALLS = {"train": {"prepare", "evaluate"}}  # the data it needs, and the checkpoint it has just written


def imported(path: Path) -> set[str]:
    """What of the package a file imports: `part_of` each `dspark_jax.x`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {part_of(name.split(".")[1:]) for name in names if name.startswith("dspark_jax.")}
    return found


def part_of(module: Sequence[str]) -> str:
    """The part that a module belongs to: its first component, or the first two of what is `LIGHT`."""
    return light if (light := ".".join(module[:2])) in LIGHT else module[0]


def test_imports_point_one_way():
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        part = part_of(path.relative_to(PACKAGE).with_suffix("").parts)
        if part in ("__init__", "quickstart"):
            continue
        allowed = ALLOWED.get(part)
        if part in COMMANDS or path.stem in FOLDERS.get(part, ()):
            allowed = set(ALLOWED) | CALLS.get(part, set())
        assert allowed is not None, f"{path}: say in this test what {part} may import"
        wrong += [f"{path.relative_to(ROOT)} imports {name}" for name in imported(path) - allowed - {part}]
    assert not wrong


def test_a_config_is_read_without_jax():
    """Families are loaded with it; those that need JAX import it where they make their model."""
    code = "import sys, dspark_jax.config; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_configs_import_only_config():
    wrong = [
        (path.name, imported(path))
        for path in (ROOT / "configs").glob("*.py")
        if imported(path) - {"config", "kinds", "presets"}
    ]
    assert not wrong
    assert list((ROOT / "configs").glob("*.py"))
