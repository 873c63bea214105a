"""The shared entry of every command: flags -> validated `Config` and working directory, bad input -> one line.

A command is a function `(config, workdir, **its own flags)`; its module ends in

    if __name__ == "__main__":
        command.run(train)

Exit status: 0 done, 2 bad input (`error: ...` on stderr), 130 interrupted.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import json
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags, logging
from ml_collections import config_flags

from dspark_jax import config as config_module
from dspark_jax import experiments
from dspark_jax.buckets.places import reading
from dspark_jax.config import CHOICES, Config, InputError
from dspark_jax.distributed import join_hosts, locked_by_one, parted, resolve_on_all
from dspark_jax.errors import reporting_errors
from dspark_jax.paths import bucket_url, check_local, check_path
from dspark_jax.registry import described
from dspark_jax.unicode import check_unicode

_OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)")


def run(
    main: Callable[..., Any],
    *,
    define: Callable[[flags.FlagValues], None] | None = None,
    argv: Sequence[str] | None = None,
    distributed: bool = True,
    writes: bool = True,
    together: bool = True,
    buckets: bool = True,
) -> None:
    """Runs a command and ends the process with status 2 on bad input.

    Args:
      main: called as `main(config, workdir, **extra)` with the resolved config; `extra` are the flags of `define`.
        The docstring of its module is the text of `--help`.
      define: adds the command's own absl flags to the given `FlagValues`.
      argv: the command line without the program's name; that of the process if None.
      distributed: whether it can run on several hosts.
      writes: whether it writes in the working directory, which is then locked as long as it runs.
      together: whether several hosts compute together. If not, each has its own devices and knows the number of hosts,
        and JAX does not end those that are left when one is gone.
      buckets: whether it can work in a bucket.
    """
    logging.set_verbosity(logging.ERROR)  # Orbax and TFDS warn about their own defaults; what fails is raised
    argv = list(sys.argv[1:] if argv is None else argv)
    text = sys.modules[main.__module__].__doc__ or ""
    with reporting_errors():
        if {"--help", "-help", "-h"} & set(argv):
            argv = [argument for argument in argv if argument not in ("--help", "-help", "-h")]
            print(_help(main.__name__, text, define, argv))
            return
        config, workdir, extra = parse(argv, define)
        if extra.pop("distributed"):
            if not distributed:
                raise InputError(f"--distributed: {main.__name__} runs on one host; leave the flag out")
            join_hosts()
        config = resolve_on_all(config)
        if bucket_url(workdir) and not buckets:
            raise InputError(f"--workdir {bucket_url(workdir)}: {main.__name__} needs a local one; give one")
        with locked_by_one(workdir, main.__name__) if writes else contextlib.nullcontext(reading(workdir)) as folder:
            apart = not together and jax.distributed.is_initialized()
            with parted() if apart else contextlib.nullcontext():
                main(config, folder, **extra)


def parse(
    argv: Sequence[str], define: Callable[[flags.FlagValues], None] | None = None
) -> tuple[Config, Path, dict[str, Any]]:
    """Reads a command line.

    Args:
      argv: `--config NAME|FILE[:ARG]`, overrides such as `--config.train.steps=100`, `--workdir DIR`, and own flags.
      define: as in `run`.

    Returns:
      The config with the overrides applied (types checked, facts not yet), the working directory, the other flags.

    Raises:
      InputError: an unknown flag or field, a value of the wrong type, text that is not UTF-8, a missing or broken
        config file.
    """
    for number, argument in enumerate(argv, start=1):
        check_unicode(f"argument {number} ({ascii(argument)})", argument)
    argv = _config_first(argv)
    for argument in argv:
        if match := _OVERRIDE.match(argument):
            _check_path(match[1])
    values = _flags(define, argv)
    try:
        rest = values(["command", *argv])[1:]
    except flags.IllegalFlagValueError as error:
        if isinstance(error.__context__, InputError):  # absl catches every ValueError of a parser
            raise error.__context__ from None
        raise InputError(_wrong_value(str(error))) from None
    except flags.Error as error:
        raise InputError(f"{error}; --help lists the flags") from None
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}; flags look like --config FILE and --config.train.steps=100")
    found: Any = values["config"].value
    if not isinstance(found, Config):
        raise InputError(f"--config is missing; give a file, or one of {', '.join(experiments.names())}")
    _check_types(found, Config, "config")
    extra = {name: values[name].value for name in values if name not in ("config", "workdir")}
    extra = {name: value for name, value in extra.items() if not name.startswith("config.")}
    workdir = values["workdir"].value
    return found, Path(workdir) if workdir else default_workdir(found), extra


def default_workdir(config: Config) -> Path:
    """Where a command works that is not given `--workdir`."""
    return Path("runs") / config.name


def load_config(spec: str) -> Config:
    """Calls `get_config` of a config file.

    Args:
      spec: FILE or FILE:ARG; ARG is handed to `get_config`. FILE may also be a `config.json` that a run has written, or
        the name of a config that comes with the package (`experiments.names()`).

    Returns:
      Its config; an empty name becomes the file's stem, with ARG after it.

    Raises:
      InputError: no such file, no `get_config`, or an error in the file itself (named with its line).
    """
    check_local("--config", spec)
    file, _, argument = spec.partition(":")
    path = experiments.find(file)
    if path.suffix == ".json":
        try:
            return config_module.from_json(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, TypeError, AttributeError, KeyError) as error:
            raise InputError(
                f"--config {file}: not a config that a run has written ({error}); put that back, or use the file it "
                "was made of"
            ) from None
    module_spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert module_spec and module_spec.loader
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise InputError(f"{file}: has no get_config(arg=''); add one that returns a dspark_jax.config.Config")
        config = module.get_config(argument) if argument else module.get_config()
    except InputError:
        raise
    except SyntaxError as error:
        raise InputError(f"{file}:{error.lineno or 1}: {error.msg}; correct the file") from None
    except _RAISED as error:
        where, line = _innermost(error)
        if Path(where).resolve() != path.resolve():
            raise  # not the config file's own mistake: the traceback is the better answer
        why = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{file}:{line}: {why}{_nearest_keyword(str(error))}") from None
    if not isinstance(config, Config):
        raise InputError(f"{file}: get_config returned {type(config).__name__}; return a dspark_jax.config.Config")
    config.name = config.name or path.stem + (f"-{argument}" if argument else "")
    return config


_RAISED = (TypeError, AttributeError, NameError, ImportError, AssertionError)
_RAISED += (ValueError, LookupError, ArithmeticError, RuntimeError, OSError)
"""What the code of a config file may raise."""


def define_path(values: flags.FlagValues, name: str, text: str) -> None:
    """Adds a flag that is a local path, or not given."""
    flags.DEFINE(_LocalPath(name), name, None, text, flag_values=values)


def define_checkpoint(values: flags.FlagValues) -> None:
    """Adds the flag that says which checkpoint of the working directory is used."""
    flags.DEFINE_string(
        "checkpoint",
        "newest",
        "Which checkpoint: newest, best (by accepted length on held-out prompts, see train.evaluate_every), or a step.",
        flag_values=values,
    )


def positive_integers(name: str, given: Sequence[str | int]) -> list[int]:
    """What a flag that is a list of them has, each once, in the order given. Raises InputError for anything else."""
    found: dict[int, None] = {}
    for one in given:
        if not re.fullmatch("[0-9]{1,9}", str(one).strip()) or int(one) < 1:
            raise InputError(f"--{name} has {one!r}; give positive integers, e.g. --{name}=1,8,32")
        found[int(one)] = None
    if not found:
        raise InputError(f"--{name} is empty; give positive integers, e.g. --{name}=1,8,32")
    return list(found)


class _LocalPath(flags.ArgumentParser):
    """Reads a flag that is a path."""

    def __init__(self, name: str):
        self.name = name

    def parse(self, argument: str) -> str:
        """The path, if it is local."""
        check_local(f"--{self.name}", argument)
        return argument


class _Path(_LocalPath):
    """Reads a flag that is a path, here or in a bucket."""

    def parse(self, argument: str) -> str:
        """The path, if it is one."""
        check_path(f"--{self.name}", argument)
        return argument


class _Weights(flags.ArgumentParser):
    """Reads a field that is a dict, which absl and ml_collections have no parser for."""

    def parse(self, argument: Any) -> Any:
        """The dict; one that is no text is the field's default."""
        try:
            value = ast.literal_eval(argument) if isinstance(argument, str) else argument
        except (SyntaxError, TypeError, MemoryError, RecursionError):  # absl knows a ValueError alone
            raise ValueError("no dict") from None
        if not isinstance(value, dict):
            raise ValueError("no dict")
        return value


config_flags.register_flag_parser_for_type(dict, _Weights())


def field_paths() -> dict[str, dataclasses.Field[Any]]:
    """Dotted path -> field of everything that can be overridden, in the order of the config."""

    def walk(cls: Any, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any]]]:
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.type):
                yield from walk(field.type, f"{prefix}{field.name}.")
            elif field.type != dict[str, Any]:  # of any content, which flags cannot write
                yield prefix + field.name, field

    return dict(walk(Config, ""))


def _innermost(error: BaseException) -> tuple[str, int]:
    """(file, line) where an error was raised."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code.co_filename, trace.tb_lineno


def _flags(define: Callable[[flags.FlagValues], None] | None, argv: Sequence[str]) -> flags.FlagValues:
    """The flags of a command: ours and its own, without those that libraries define globally."""
    values = flags.FlagValues()
    text = "Where everything is written and found again, here or in a bucket. Default: runs/<config name>."
    flags.DEFINE(_Path("workdir"), "workdir", None, text, flag_values=values)
    flags.DEFINE_boolean(
        "distributed",
        False,
        "Join the other hosts first (jax.distributed.initialize()): multi-host TPU, SLURM, GKE.",
        flag_values=values,
    )
    if define:
        define(values)
    config_flags.DEFINE_config_dataclass(
        "config",
        Config(),
        "The experiment: a file, or the name of one that comes with the package; :ARG after it is for the file.",
        flag_values=values,
        parse_fn=load_config,
        sys_argv=["command", *argv],
    )
    if not any(re.match(r"--?config(=|$)", argument) for argument in argv):
        values["config"].value = None
    return values


def _config_first(argv: Sequence[str]) -> list[str]:
    """Moves `--config FILE` to the front: overrides apply wherever they are."""
    first, rest, waiting = [], [], False
    for argument in argv:
        if waiting or re.match(r"--?config(=|$)", argument):
            first.append(argument)
            waiting = not waiting and "=" not in argument
        else:
            rest.append(argument)
    if waiting:
        raise InputError("--config needs a name or a file, e.g. --config quickstart")
    return first + rest


def _check_path(path: str) -> None:
    """Refuses an override of a field that does not exist, with the nearest one that does."""
    paths = list(field_paths())
    if path in paths:
        return
    inside = [name for name in paths if name.startswith(path + ".")]
    if inside:
        raise InputError(f"--config.{path} is a group of fields; set one of them, e.g. --config.{inside[0]}")
    raise InputError(f"--config.{path}: no such field; did you mean --config.{_nearest(path, paths)}?")


def _nearest(path: str, paths: Sequence[str]) -> str:
    """The path most like the given one; the last part counts twice, so that a wrong group is forgiven."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, path, candidate).ratio()
        last = difflib.SequenceMatcher(None, path.split(".")[-1], candidate.split(".")[-1]).ratio()
        return whole + 2 * last

    return max(paths, key=likeness)


def _nearest_keyword(message: str) -> str:
    """For 'X.__init__() got an unexpected keyword argument 'y'': the nearest field of X; else nothing."""
    match = re.match(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", message)
    cls = getattr(config_module, match[1], None) if match else None
    if match is None or cls is None:
        return ""
    return f"; did you mean {_nearest(match[2], [field.name for field in dataclasses.fields(cls)])!r}?"


def _wrong_value(message: str) -> str:
    """absl's 'flag --config.x=v: ...' with the type that is needed and the default as an example."""
    match = re.match(r"flag --config\.([\w.]+)=(.*?): ", message, re.DOTALL)
    field = field_paths().get(match[1]) if match else None
    if match is None or field is None:
        return message
    default = field.default if field.default is not dataclasses.MISSING else {"NAME": 0.5}
    return f"--config.{match[1]}={match[2]}: {_type_name(field.type)} is needed, e.g. --config.{match[1]}={default}"


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)


def _check_types(value: Any, cls: Any, where: str) -> None:
    """Refuses fields of the wrong type or name (a config file is Python: nothing else checks it); int becomes float."""
    if not isinstance(value, cls):
        raise InputError(f"{where}={value!r}: {cls.__name__} is needed")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in vars(value):
        if name not in fields:
            raise InputError(f"{where}.{name}: no such field; did you mean {where}.{_nearest(name, list(fields))}?")
    for name, field in fields.items():
        item, kind = getattr(value, name), field.type
        if dataclasses.is_dataclass(kind):
            _check_types(item, kind, f"{where}.{name}")
        elif typing.get_origin(kind) is tuple:
            element = typing.get_args(kind)[0]
            if not isinstance(item, tuple | list):
                raise InputError(f"{where}.{name}={item!r}: {_type_name(kind)} is needed")
            setattr(value, name, tuple(_typed(entry, element, f"{where}.{name}", kind) for entry in item))
        elif typing.get_origin(kind) is dict:
            if not isinstance(item, dict) or not all(isinstance(key, str) for key in item):
                raise InputError(f"{where}.{name}={item!r}: {_type_name(kind)} is needed")
            element = typing.get_args(kind)[1]
            named = {key: _typed(entry, element, f"{where}.{name}[{key!r}]", element) for key, entry in item.items()}
            setattr(value, name, named)
        else:
            setattr(value, name, _typed(item, kind, f"{where}.{name}", kind))


def _typed(value: Any, kind: Any, where: str, wanted: Any) -> Any:
    if kind is Any:  # a family's own fields
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not (typing.get_origin(kind) or kind):
        raise InputError(f"{where} has {value!r}: {_type_name(wanted)} is needed")
    return value


def _help(name: str, text: str, define: Callable[[flags.FlagValues], None] | None, argv: Sequence[str]) -> str:
    """The text of `--help`: what the command does, its flags, and every config field with its value."""
    with_config = any(re.match(r"--?config(=|$)", argument) for argument in argv)
    config = parse(argv, define)[0] if with_config else Config()
    values = _flags(define, [])
    lines = [
        f"usage: python -m dspark_jax.{name} --config NAME|FILE[:ARG] [--config.FIELD=VALUE ...] [--workdir DIR]",
        "",
    ]
    lines += [text.strip(), "", "Flags:"]
    for flag in ("config", *sorted(set(values) - {"config"})):
        default = f" (default: {values[flag].value})" if values[flag].value not in (None, False) else ""
        lines.append(_entry(f"--{flag}", (values[flag].help or "") + default))
    lines += ["", "Fields, with the values of " + ("this config" if with_config else "an empty config") + ":"]
    documentation = _field_documentation()
    for path, field in field_paths().items():
        value: Any = config
        for part in path.split("."):
            value = getattr(value, part)
        choices = f" Known here: {described(CHOICES[path])}." if path in CHOICES else ""
        if "choices" in field.metadata:
            choices = f" One of: {field.metadata['choices']()}."
        lines.append(_entry(f"--config.{path}={value}", documentation.get(path, "") + choices))
    return "\n".join(lines)


def _entry(head: str, text: str) -> str:
    return "  " + head + ("\n" + textwrap.indent(textwrap.fill(text, 100), "      ") if text else "")


def _field_documentation() -> dict[str, str]:
    """Dotted path -> the string below the field in its class (Python drops it, so it is read from the source)."""

    def walk(cls: Any, prefix: str) -> Iterator[tuple[str, str]]:
        (definition,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(definition, ast.ClassDef)
        body = definition.body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(after, ast.Expr):
                yield prefix + node.target.id, inspect.cleandoc(ast.literal_eval(after.value)).replace("\n", " ")
        for field in dataclasses.fields(cls):
            if dataclasses.is_dataclass(field.type):
                yield from walk(field.type, f"{prefix}{field.name}.")

    return dict(walk(Config, ""))
