"""URLs are refused wherever a path is given, buckets where they cannot be used: no folder called `gs:` is made.

What works in a bucket is in test_buckets.
"""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from absl import flags

from dspark_jax import command
from dspark_jax.__main__ import COMMANDS
from dspark_jax.config_rules import PATHS
from dspark_jax.convert.__main__ import LOCAL_PATHS as LOCAL_OPTIONS
from dspark_jax.convert.__main__ import PATHS as OPTIONS
from dspark_jax.convert.__main__ import main, parser
from dspark_jax.errors import InputError
from dspark_jax.paths import bucket_url, check_local, check_path
from tests.quickstart.builder.build import parse

OTHER_FIELDS = {
    "data.answers.endpoints", "data.answers.model", "data.answers.mode", "data.answers.key_variable",
    "train.recompute", "train.wandb_project",
    "data.supervised",
    "data.thinking",
    "imports",
    "name", "target.dtype", "target.architecture.model_type", "target.architecture.layer_types",
    "target.architecture.unsupported", "drafter.kind", "drafter.dtype", "drafter.markov_head_type",
    "drafter.block_layout", "drafter.init_layers", "drafter.eagle3_norms", "drafter.draft_vocabulary",
    "drafter.layer_types", "drafter.rope_type",
    "data.system_prompt", "data.features", "data.feature_dtype", "optim.kind", "compare.drafters",
    "compare.depth_drafters", "compare.length_drafters",
}  # fmt: skip
OTHER_FLAGS = {"traffic", "temperatures", "fit_on", "slots", "contexts", "studies", "prompt", "scheduler", "topology"}
OTHER_FLAGS |= {"parts", "benchmarks", "beam", "checkpoint", "drafter", "schedulers", "users", "requests", "context"}
OTHER_OPTIONS = {"checkpoint", "format", "dtype", "name", "target_name", "push", "config"}


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("gs://bucket/run", True), ("s3://bucket/run", True), ("hf://datasets/a/b.jsonl", True),
        ("https://huggingface.co/Qwen/Qwen3-4B", True), ("file:///run", True), (Path("gs://bucket/run"), True),
        ("runs/a", False), ("/runs/a:b", False), ("Qwen/Qwen3-4B", False), ("configs/quickstart.py:dflash", False),
        ("", False),
    ],
)  # fmt: skip
def test_what_has_a_scheme(path: Any, refused: bool) -> None:
    if refused:
        with pytest.raises(InputError, match="^--workdir=.*:// is not supported here, only local paths are; mount"):
            check_local("--workdir", path)
    else:
        check_local("--workdir", path)
    if refused and not bucket_url(path):
        with pytest.raises(InputError, match=r"not supported here, only local paths and buckets \(gs://, s3://\) are"):
            check_path("--workdir", path)
    else:
        check_path("--workdir", path)


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("gs://bucket/run/", "gs://bucket/run"), (Path("s3://bucket/run"), "s3://bucket/run"),
        ("gs://", None), ("gs:bucket", None), ("runs/gs://a", None), ("gcs://bucket/run", None),
    ],
)  # fmt: skip
def test_addresses_in_buckets(path: Any, url: str | None) -> None:
    assert bucket_url(path) == url


def test_every_field_that_is_text_is_known_to_be_a_path_or_not() -> None:
    text = {name for name, field in command.field_paths().items() if field.type in (str, tuple[str, ...])}
    assert text == OTHER_FIELDS | set(PATHS)


def test_every_flag_and_option_that_is_text_is_known_to_be_a_path_or_not() -> None:
    found: dict[str, Any] = {}
    for name in set(COMMANDS) - {"convert"}:
        values = command._flags(getattr(importlib.import_module(f"dspark_jax.{name}"), "_define", None), [])
        found |= {flag: values[flag].parser for flag in values if not flag.startswith("config")}
    local = {flag for flag, kind in found.items() if isinstance(kind, command._LocalPath)}
    numbers = (flags.BooleanParser, flags.IntegerParser, flags.FloatParser)
    assert local == {"workdir", "cost_table", "json", "out"}
    assert {flag for flag in local if isinstance(found[flag], command._Path)} == {"workdir"}
    assert {flag for flag, kind in found.items() if not isinstance(kind, numbers)} == OTHER_FLAGS | local
    options = {action.dest for action in actions(parser()) if action.nargs != 0 and action.type is None}
    assert options == OTHER_OPTIONS | set(OPTIONS + LOCAL_OPTIONS)


def actions(of: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from actions(sub)
        else:
            yield action


GIVEN = [
    *([f"--config.{field}=hf://bucket/x"] for field in PATHS),
    ["--workdir=file:///x"],
    ["--workdir", "s3a://bucket/x"],
]


@pytest.mark.parametrize("arguments", GIVEN)
def test_commands_refuse_them(arguments: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command.run(lambda config, workdir: pytest.fail("the command ran"), argv=["--config", "quickstart", *arguments])
    assert stop.value.code == 2 and list(tmp_path.iterdir()) == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ":// is not supported here, only local paths and" in error
    assert arguments[0].removeprefix("--config.") in error.replace("=s3", " s3") or len(arguments) == 2


@pytest.mark.parametrize("spec", ["gs://bucket/quickstart.py", "https://a/b.py:dflash"])
def test_a_config_is_a_local_file(spec: str) -> None:
    with pytest.raises(InputError, match="--config=.* is not supported"):
        command.load_config(spec)


def test_commands_that_need_a_local_directory_refuse_a_bucket(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--config", "quickstart", "--workdir=gs://bucket/x"]
    with pytest.raises(SystemExit) as stop:
        command.run(lambda config, workdir: pytest.fail("the command ran"), argv=arguments, buckets=False)
    assert stop.value.code == 2 and list(tmp_path.iterdir()) == []
    assert "error: --workdir gs://bucket/x: <lambda> needs a local one" in capsys.readouterr().err
    for module in ("compare", "plan"):
        assert "buckets=False" in Path(f"{command.__file__}/../{module}.py").resolve().read_text()


@pytest.mark.parametrize("option", OPTIONS + LOCAL_OPTIONS)
def test_convert_refuses_them(option: str, capsys: Any) -> None:
    url = "gs://bucket/x" if option in LOCAL_OPTIONS else "hf://bucket/x"
    given = {"drafter": "d", "target": "t"} | {option: url}
    name = {"workdir": "import", "output": "export"}.get(option, "check")
    given |= {"import": {"workdir": given.get("workdir", "w")}, "export": {"output": url}}.get(name, {})
    with pytest.raises(SystemExit) as stop:
        main([name, *(f"--{key}={value}" for key, value in given.items())])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: --{option}={url}: {url[:2]}:// is not supported here")


def test_the_builder_refuses_them(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(["--out", "gs://bucket/x"])
    assert stop.value.code == 2 and "--out=gs:/bucket/x: gs:// is not supported here" in capsys.readouterr().err
