"""Progress lines, `metrics.jsonl` and TensorBoard files."""

import json
import math

from tensorboardX.proto.event_pb2 import Event

from dspark_jax.progress import MetricsWriter, Progress


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rows_behind_the_resumed_step_are_replaced(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 40, "lo')  # killed while writing
    with MetricsWriter(tmp_path, start=20) as writer:
        writer.write(30, {"loss": -1.0})
    assert rows(tmp_path) == [{"step": 10, "loss": 10.0}, {"step": 20, "loss": 20.0}, {"step": 30, "loss": -1.0}]


def test_a_fresh_run_starts_a_fresh_file(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 2.0})
    assert rows(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_numbers_that_json_lacks_become_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": math.nan, "grad_norm": math.inf, "ce": 0.1})
    assert rows(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "ce": 0.1}]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {"loss": 0.5, "accept@1": 0.25})
    scalars = {}
    for file in (tmp_path / "tensorboard").iterdir():
        data = file.read_bytes()
        while data:  # TFRecord: length (8), checksum (4), record, checksum (4)
            length = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            scalars |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    assert scalars == {(3, "loss"): 0.5, (3, "accept_at_1"): 0.25}


def test_plain_lines_without_a_terminal(capsys):
    with Progress("train", total=4, done=2, seconds=0.0) as progress:
        progress.update(3, {"loss": 1.23456})
        progress.advance()
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("train 3/4 steps loss=1.235 left=")
    assert last.startswith("train 4/4 steps loss=1.235 left=00:00")


def test_lines_are_not_printed_more_often_than_asked(capsys):
    with Progress("prepare", total=1000, unit="prompt", seconds=1e9) as progress:
        for _ in range(1000):
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("prepare 1000/1000 prompts")


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("train", total=10, done=4) as progress:
        progress.update(10, {"loss": 2.0})
        progress.print("saved")
    err = capsys.readouterr().err
    assert "train" in err and "10/10" in err and "loss=2" in err and "saved" in err


def test_a_damaged_row_is_left_out_and_named(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xf0p": 2}\n[3]\n{"step": 4}\n{"step')
    with MetricsWriter(tmp_path, start=4):
        pass
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 4]
    said = capsys.readouterr().err.splitlines()
    assert said == [f"{path}:{number}: left out, it is no row of metrics" for number in (2, 3)]
