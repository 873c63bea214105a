"""The commands' entry: flags to config, and one line with exit status 2 for what cannot be used."""

import contextlib
import errno
import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from dspark_jax import command, distributed
from dspark_jax.config import Config, InputError
from dspark_jax.kinds import KINDS
from dspark_jax.run_lock import locked

CONFIG = """
from dspark_jax.config import Config, DrafterConfig, TargetArchitecture, TargetConfig, TrainConfig

def get_config(arg=""):
    arch = TargetArchitecture(
        vocab_size=67, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=64,
    )
    drafter = DrafterConfig(target_layer_ids=(0, 1), mask_token_id=66)
    if arg == "wide":
        drafter.markov_rank = 512
    elif arg == "typo":
        return Config(train=TrainConfig(step=3))
    elif arg == "attribute":
        drafter.num_layer = 3
    elif arg == "type":
        drafter.num_layers = "3"
    elif arg == "nothing":
        return None
    return Config(target=TargetConfig(architecture=arch), drafter=drafter)
"""


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    path = Path("configs/tiny.py")
    path.write_text(CONFIG)
    return str(path)


def test_overrides_reach_the_config_wherever_they_stand(config_file):
    argv = ["--config.train.steps=7", "--config", f"{config_file}:wide", "--config.optim.learning_rate=1"]
    argv += ["--noconfig.train.evaluate", "--config.target.path", "somewhere"]
    config, workdir, extra = command.parse(argv)
    assert (config.train.steps, config.drafter.markov_rank, config.train.evaluate) == (7, 512, False)
    assert config.optim.learning_rate == 1.0 and isinstance(config.optim.learning_rate, float)
    assert config.target.path == "somewhere"
    assert (config.name, workdir) == ("tiny-wide", Path("runs/tiny-wide"))
    assert extra == {"distributed": False}


def test_weights_by_name_are_one_value(config_file):
    argv = ["--config", config_file, "--config.loss.extra={'mine': 1}"]
    extra = command.parse(argv)[0].loss.extra
    assert extra == {"mine": 1.0} and isinstance(extra["mine"], float)
    for value in (
        "mine",
        "0.5",
        "{'mine': 'x'}",
        "{1: 0.5}",
        "{'mine':",
        "",
        "{'a': 1}\n b",
        "[" * 3000,
        "-" * 100_000,
    ):
        said = r"loss\.extra\['mine'\] has 'x': float" if "'x'" in value else r"loss\.extra.*dict\[str, float\]"
        with pytest.raises(InputError, match=f"{said} is needed"):
            command.parse(["--config", config_file, f"--config.loss.extra={value}"])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config.eval.temperatures=1,0.5"], (1.0, 0.5)),
        (["--config.eval.temperatures=(0,)"], (0.0,)),
        (["--config.eval.temperatures=0.7", "--config.eval.temperatures=0"], (0.7, 0.0)),
        (["--config.eval.temperatures=0.3"], (0.3,)),
    ],
)
def test_tuples_can_be_overridden(config_file, arguments, expected):
    config, _, _ = command.parse(["--config", config_file, *arguments])
    assert config.eval.temperatures == expected
    assert all(type(value) is float for value in config.eval.temperatures)


def test_defaults_of_one_command_line_do_not_leak_into_the_next(config_file):
    first, _, _ = command.parse(["--config", config_file, "--config.train.steps=7"])
    second, workdir, _ = command.parse(["--config", config_file, "--workdir", "here"])
    assert (first.train.steps, second.train.steps, workdir) == (7, 1000, Path("here"))


def test_a_command_gets_its_own_flags(config_file):
    seen = {}

    def work(config, workdir, *, prompt):
        seen.update(config=config, workdir=workdir, prompt=prompt)

    def define(values):
        flags.DEFINE_string("prompt", "", "What to continue.", flag_values=values)

    command.run(work, define=define, argv=["--config", config_file, "--prompt=def f", "--workdir=out"])
    assert isinstance(seen["config"], Config)
    assert (seen["prompt"], seen["workdir"]) == ("def f", Path("out"))


BAD = {
    "field": (["--config.train.stps=3"], "--config.train.stps: no such field; did you mean --config.train.steps?"),
    "group": (["--config.steps=3"], "did you mean --config.train.steps?"),
    "section": (["--config.train=3"], "--config.train is a group of fields"),
    "type": (["--config.train.steps=many"], "--config.train.steps=many: int is needed, e.g. --config.train.steps=1000"),
    "fraction": (["--config.train.steps=1.5"], "--config.train.steps=1.5: int is needed"),
    "bool": (["--config.train.evaluate=7"], "--config.train.evaluate=7: bool is needed"),
    "element": (["--config.drafter.target_layer_ids=0,x"], "tuple[int, ...] is needed"),
    "fact": (["--config.drafter.target_layer_ids=0,2"], "the last layer"),
    "flag": (["--wrkdir=x"], "Did you mean: workdir"),
    "positional": (["now"], "unexpected argument 'now'"),
    "encoding": (
        ["--config.data.system_prompt=caf\udce9"],
        r"argument 3 ('--config.data.system_prompt=caf\udce9') is not UTF-8: it has the byte 0xe9 as its character 31",
    ),
    "no value": (["--config.train.steps"], "Missing value for flag --config.train.steps"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_give_one_line_and_status_2(config_file, capsys, case):
    arguments, expected = BAD[case]
    with pytest.raises(SystemExit) as stop:
        command.run(lambda config, workdir: pytest.fail("the command ran"), argv=["--config", config_file, *arguments])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert expected in err


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], "--config is missing"),
        (["--config"], "--config needs a name or a file"),
        (["--config=configs/tniy.py"], "no such file; did you mean configs/tiny.py?"),
        (["--config=configs/quickstart.py"], "no such file; did you mean quickstart, which comes with the package?"),
        (["--config=quickstrat"], "no config of this name; did you mean quickstart?"),
        (["--config=another"], "no config of this name; use one of compare_quickstart, "),
        (["--config=configs/tiny"], "no such file; did you mean configs/tiny.py?"),
        (["--config=configs/notes.txt"], "a config is a .py file, or a config.json"),
        (["--config=configs/tiny.py:typo"], "configs/tiny.py:13: "),
        (["--config=configs/tiny.py:typo"], "did you mean 'steps'?"),
        (["--config=configs/tiny.py:attribute"], "config.drafter.num_layer: no such field; did you mean"),
        (["--config=configs/tiny.py:type"], "config.drafter.num_layers has '3': int is needed"),
        (["--config=configs/tiny.py:nothing"], "get_config returned NoneType"),
        (["--config=configs/broken.py"], "configs/broken.py:2: "),
        (["--config=configs/empty.py"], "has no get_config"),
        (["--config=configs/chosen.py:other"], "configs/chosen.py:2: no 'other'"),
        (["--config=configs/chosen.py:file"], "configs/chosen.py:2: [Errno 2] No such file or directory: 'nothing'"),
        (["--config=configs/chosen.py:again"], "configs/chosen.py:2: maximum recursion depth exceeded"),
        (["--config=configs/folder.py"], "a directory, not a file; name a config in it"),
        (["--config=configs/list.json"], "not a config that a run has written ('list' object"),
        (["--config=configs/deep.json"], "not a config that a run has written (maximum recursion depth exceeded"),
    ],
)
def test_bad_config_files_give_one_line_and_status_2(config_file, capsys, argv, expected):
    Path("configs/broken.py").write_text("a = 1\nb = (\n")
    Path("configs/empty.py").write_text("")
    Path("configs/notes.txt").write_text("")
    Path("configs/list.json").write_text("[]")
    Path("configs/deep.json").write_text("[" * 100_000)
    Path("configs/folder.py").mkdir()
    Path("configs/chosen.py").write_text(
        "def get_config(arg):\n    return {'file': lambda: open('nothing'), 'again': lambda: get_config(arg)}[arg]()\n"
    )
    with pytest.raises(SystemExit) as stop:
        command.run(lambda config, workdir: pytest.fail("the command ran"), argv=argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and expected in err


def test_errors_of_the_command_itself_are_reported_alike(config_file, capsys):
    def work(config, workdir):
        raise InputError("a.jsonl:3: no prompt;\n  add one")

    with pytest.raises(SystemExit) as stop:
        command.run(work, argv=["--config", config_file])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: a.jsonl:3: no prompt; add one\n"


@pytest.mark.parametrize(
    "error, expected",
    [
        (
            MemoryError("Unable to allocate 9 TiB"),
            "the memory of this machine is full (Unable to allocate 9 TiB); lower",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmore"),
            "the memory of a device is full (RESOURCE_EXHAUSTED: ",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 327680, available: 232448"),
            "a kernel takes more memory than there is on the chip (RESOURCE_EXHAUSTED: Shared memory size limit "
            "exceeded: requested 327680, available: 232448); set DSPARK_JAX_WITHOUT=pallas_gpu",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom: Ran out of memory in memory space vmem"),
            "a kernel takes more memory than there is on the chip (RESOURCE_EXHAUSTED: E1001",
        ),
    ],
)
def test_memory_that_does_not_suffice_is_one_line(config_file, capsys, error, expected):
    def work(config, workdir):
        raise error

    with pytest.raises(SystemExit) as stop:
        command.run(work, argv=["--config", config_file])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith(f"error: {expected}") and said.count("\n") == 1


def test_other_errors_keep_their_traceback(config_file):
    def work(config, workdir):
        raise RuntimeError("a mistake of ours")

    with pytest.raises(RuntimeError, match="a mistake of ours"):
        command.run(work, argv=["--config", config_file])


def test_a_full_disk_is_one_line(config_file, capsys):
    def work(config, workdir):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    with pytest.raises(SystemExit) as stop:
        command.run(work, argv=["--config", config_file])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: runs/x/metrics.jsonl: No space left on device; free space and run again\n"
    )


def test_a_file_that_may_not_be_written_is_one_line(config_file, capsys):
    def work(config, workdir):
        raise OSError(errno.EROFS, "Read-only file system", "runs/x/eval")

    with pytest.raises(SystemExit) as stop:
        command.run(work, argv=["--config", config_file])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: runs/x/eval: Read-only file system; change its permissions, or use another place\n"
    )


def test_a_run_is_locked_while_a_command_writes_in_it(config_file, capsys):
    lock = Path("here/lock.json")

    def work(config, workdir):
        assert json.loads(lock.read_text())["command"] == "work"
        with pytest.raises(SystemExit) as stop:
            command.run(lambda config, workdir: pytest.fail("it ran"), argv=argv)
        assert stop.value.code == 2
        command.run(read, argv=argv, writes=False)
        (workdir / "written").touch()

    read_by = []

    def read(config, workdir):
        read_by.append(workdir)

    argv = ["--config", config_file, "--workdir=here"]
    command.run(work, argv=argv)
    assert capsys.readouterr().err.startswith("error: here: in use by work (process ")
    assert read_by == [Path("here")] and not lock.exists() and Path("here/written").exists()
    command.run(read, argv=["--config", config_file, "--workdir=elsewhere/run"])
    assert not Path("elsewhere").exists()


def test_hosts_that_cannot_be_joined_are_one_line(config_file, capsys, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit) as stop:
        command.run(lambda config, workdir: pytest.fail("it ran"), argv=["--config", config_file, "--distributed"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --distributed: the other hosts cannot be joined (coordinator_address should be")
    assert error.count("\n") == 1


@pytest.mark.parametrize("process", [0, 1])
def test_one_host_takes_the_lock_for_all(config_file, monkeypatch, process):
    """And where it is refused, those end that did not ask for it, too."""
    told = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    agree = lambda value: told.append(value) or int(taken)  # noqa: E731
    monkeypatch.setattr(distributed.multihost_utils, "broadcast_one_to_all", agree)
    taken = False
    with command.locked_by_one(Path("here"), "train"):
        assert Path("here/lock.json").exists() == (process == 0)
    assert told == [0] and not Path("here").exists()
    taken = True
    with locked(Path("here"), "evaluate"):
        message = "here: in use by evaluate" if process == 0 else "here: cannot be used; process 0 says why"
        with pytest.raises(InputError, match=message), command.locked_by_one(Path("here"), "train"):
            pytest.fail("it ran")
    assert told[1:] == [process == 0]


@pytest.mark.parametrize(("mine", "refused"), [("", [0, 1, 0]), ("--config.train.steps=0", [0, 1, 0]), ("", [0, 0, 0])])
def test_what_one_host_cannot_use_ends_all(config_file, monkeypatch, capsys, mine, refused):
    told = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(command, "join_hosts", lambda: None)
    monkeypatch.setattr(distributed.multihost_utils, "process_allgather", lambda x: told.append(x) or np.array(refused))
    ran = []
    argv = ["--config", config_file, "--distributed", *filter(None, [mine])]
    with pytest.raises(SystemExit) if any(refused) else contextlib.nullcontext():
        command.run(lambda config, workdir: ran.append(config), argv=argv, writes=False)
    said = capsys.readouterr().err
    assert told == [np.int32(bool(mine))] and bool(ran) == (not any(refused)) and said.count("\n") == any(refused)
    line = "config.train.steps" if mine else "host 1 cannot use what it was given; its own output says why"
    assert (line.removeprefix("config.") in said) == any(refused)


@pytest.mark.parametrize("together", [False, True])
def test_hosts_that_do_not_compute_together_leave_each_other(config_file, monkeypatch, together):
    """After they know their numbers: JAX would end those that are left when one is gone. It keeps SIGTERM to itself."""
    done = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: done.append("left"))
    monkeypatch.setattr(command, "join_hosts", lambda: done.append("joined"))
    for name, result in {"process_allgather": np.zeros(2), "broadcast_one_to_all": np.int32(0)}.items():
        monkeypatch.setattr(distributed.multihost_utils, name, lambda value, result=result: result)
    argv = ["--config", config_file, "--distributed", "--workdir=here"]

    def work(config, workdir):
        done.append("ran")
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: done.append("ignored"))
    try:
        with contextlib.nullcontext() if together else pytest.raises(SystemExit, match="143"):
            command.run(work, argv=argv, together=together)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done == (["joined", "ran", "ignored"] if together else ["joined", "left", "ran"])


def test_help_lists_flags_fields_values_and_their_meaning(config_file, capsys):
    command.run(command.load_config, argv=["--help"])  # any function: help never calls it
    general = capsys.readouterr().out
    assert "--workdir" in general and "--config.train.batch_size=512" in general
    assert "Sequences per optimizer step" in general
    assert all(f"{name} ({kind.description})" in " ".join(general.split()) for name, kind in KINDS.items())
    command.run(command.load_config, argv=["--config", f"{config_file}:wide", "--help"])
    assert "--config.drafter.markov_rank=512" in capsys.readouterr().out


@pytest.mark.parametrize("break_it", [Path.mkdir, Path.touch], ids=["a directory", "a file"])
def test_what_stands_in_the_place_of_something_else_is_one_line(tmp_path, capsys, break_it):
    path = tmp_path / "x"
    break_it(path)
    with pytest.raises(SystemExit) as status, command.reporting_errors():
        path.read_text() if path.is_dir() else (path / "y").mkdir()
        pytest.fail("it can be used")
    said = capsys.readouterr().err
    assert status.value.code == 2 and len(said.splitlines()) == 1
    assert said.startswith(f"error: {path}") and "put back what belongs there" in said
    with pytest.raises(OSError), command.reporting_errors():
        raise OSError(errno.ENOENT, "no file is named")
