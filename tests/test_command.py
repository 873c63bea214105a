"""The commands' entry: flags to config, and one line with exit status 2 for what cannot be used."""

import errno
from pathlib import Path

import pytest
from absl import flags

from dspark_jax import command
from dspark_jax.config import Config, InputError

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
        (["--config"], "--config needs a file"),
        (["--config=configs/tniy.py"], "no such file; did you mean configs/tiny.py?"),
        (["--config=configs/tiny.py:typo"], "configs/tiny.py:13: "),
        (["--config=configs/tiny.py:typo"], "did you mean 'steps'?"),
        (["--config=configs/tiny.py:attribute"], "config.drafter.num_layer: no such field; did you mean"),
        (["--config=configs/tiny.py:type"], "config.drafter.num_layers has '3': int is needed"),
        (["--config=configs/tiny.py:nothing"], "get_config returned NoneType"),
        (["--config=configs/broken.py"], "configs/broken.py:2: "),
        (["--config=configs/empty.py"], "has no get_config"),
    ],
)
def test_bad_config_files_give_one_line_and_status_2(config_file, capsys, argv, expected):
    Path("configs/broken.py").write_text("a = 1\nb = (\n")
    Path("configs/empty.py").write_text("")
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


def test_a_full_disk_is_one_line(config_file, capsys):
    def work(config, workdir):
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/metrics.jsonl")

    with pytest.raises(SystemExit) as stop:
        command.run(work, argv=["--config", config_file])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: runs/x/metrics.jsonl: No space left on device; free space and run again\n"
    )


def test_help_lists_flags_fields_values_and_their_meaning(config_file, capsys):
    command.run(command.load_config, argv=["--help"])  # any function: help never calls it
    general = capsys.readouterr().out
    assert "--workdir" in general and "--config.train.batch_size=512" in general
    assert "Sequences per optimizer step" in general
    command.run(command.load_config, argv=["--config", f"{config_file}:wide", "--help"])
    assert "--config.drafter.markov_rank=512" in capsys.readouterr().out
