"""Lists the commands, and the configs that come with the package."""

import ast
import sys
from pathlib import Path

from dspark_jax import experiments
from dspark_jax.errors import InputError, reporting_errors

COMMANDS = (
    "prepare",
    "train",
    "evaluate",
    "calibrate",
    "profile",
    "compare",
    "generate",
    "serve",
    "demo",
    "convert",
    "plan",
    "kernels",
)


def listing() -> str:
    """What is printed: the first lines of the modules, which are not imported for it."""
    here = Path(__file__).parent
    lines = ["usage: python -m dspark_jax.COMMAND --config NAME|FILE[:ARG] [--config.FIELD=VALUE ...] [--workdir DIR]"]
    lines += ["       python -m dspark_jax.COMMAND --help", "", "Commands:"]
    width = max(map(len, (*COMMANDS, *experiments.names()))) + 2
    for name in COMMANDS:
        file = here / f"{name}.py"
        lines.append(_entry(name, width, file if file.exists() else here / name / "__main__.py"))
    lines += ["", "Configs:"]
    lines += [_entry(name, width, experiments.directory() / f"{name}.py") for name in experiments.names()]
    return "\n".join(lines)


def _entry(name: str, width: int, file: Path) -> str:
    text = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
    return f"  {name:<{width}}{text.splitlines()[0]}"


if __name__ == "__main__":
    with reporting_errors():
        if set(sys.argv[1:]) - {"--help", "-h"}:
            raise InputError(f"{sys.argv[1]}: commands are modules, e.g. python -m dspark_jax.train; see --help")
        print(listing())
