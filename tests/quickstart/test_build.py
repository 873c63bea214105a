"""The build command's arguments."""

import pytest

from tests.quickstart.builder.build import checkpoint_of, parse


def test_help_names_every_way_to_run(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in ("--out", "--work", "--minutes", "--steps", "--seed", "--resume", "--export-only", "--no-report"):
        assert option in out


def test_work_lies_in_out_by_default(tmp_path):
    assert parse(["--out", str(tmp_path)]).work == tmp_path / "work"


def test_export_needs_a_checkpoint(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--out", str(tmp_path), "--export-only"])
    assert stop.value.code == 2 and "train first" in capsys.readouterr().err


def test_a_checkpoint_is_never_overwritten_by_a_fresh_run(tmp_path, capsys):
    checkpoint_of(tmp_path).touch()
    arguments = ["--out", str(tmp_path / "out"), "--work", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        parse(arguments)
    assert stop.value.code == 2 and "--resume" in capsys.readouterr().err
    assert parse([*arguments, "--resume"]).resume


def test_minutes_and_steps_exclude_each_other(tmp_path):
    with pytest.raises(SystemExit):
        parse(["--out", str(tmp_path), "--minutes", "1", "--steps", "1"])
