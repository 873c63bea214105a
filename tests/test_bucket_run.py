"""From prompts to an export in a bucket, killed on the way, every command on a machine with an empty disk.

The commands run in processes of their own, with `fake_bucket` in the place of gcsfs.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import fake_bucket
from tests.compiling import QUICKLY

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = ROOT / "dspark_jax" / "quickstart"
CLOCK = ("tokens_per_second", "seconds_per_step")
RUN = """
import runpy, sys
from dspark_jax import run_lock
from tests import fake_bucket
fake_bucket.register()
run_lock.BEAT, run_lock.PATIENCE = 0.5, 3.0
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
SMALL = [
    "--config=quickstart",
    "--config.target.path=gs://bucket/models/target",
    "--config.data.prompts=('gs://bucket/prompts/*.train.jsonl',)",
    "--config.data.limit=4",
    "--config.data.max_length=192",
    "--config.train.steps=6",
    "--config.train.checkpoint_every=2",
    "--config.train.evaluate=False",
    "--config.eval.prompts=('gs://bucket/prompts/math.heldout.jsonl',)",
    "--config.eval.limit=2",
    "--config.eval.speed_prompts=0",
    "--config.eval.max_new_tokens=24",
]

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, bucket: Callable[[], None]) -> Start:
    """Starts a command on a machine with this name."""
    for file in [*(QUICKSTART / "target").iterdir(), *(QUICKSTART / "prompts").iterdir()]:
        place = "models/target" if file.parent.name == "target" else "prompts"
        fake_bucket.put(f"bucket/{place}/{file.name}", file.read_bytes())

    def start(machine: str, module: str, *arguments: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / machine)}
        environment |= {"XLA_FLAGS": QUICKLY}
        environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
        line = [sys.executable, "-c", RUN, f"dspark_jax.{module}", *arguments]
        return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def end(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=900)[1]
    assert process.returncode == 0, said
    return said


def rows(run: str) -> list[dict[str, Any]]:
    lines = fake_bucket.objects()[f"bucket/{run}/metrics.jsonl"].decode().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCK} for line in lines]


def sums(run: str) -> Any:
    return json.loads(fake_bucket.objects()[f"bucket/{run}/checkpoints/6/about/metadata"])["sums"]


@pytest.mark.slow
def test_from_prompts_to_an_export_with_a_kill_and_empty_disks(start: Start, tmp_path: Path) -> None:
    end(start("first", "train", *SMALL, "--workdir=gs://bucket/whole"))
    train = [*SMALL, "--workdir=gs://bucket/run"]
    killed = start("second", "train", *train)
    fake_bucket.wait_for("bucket/run/manifests/checkpoints/2.json", seconds=900)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    said = end(start("third", "train", *train))
    assert "continuing from step" in said and "gs://bucket/run/checkpoints/" in said
    assert rows("run") == rows("whole") and sums("run") == sums("whole")
    end(start("fourth", "evaluate", *train))
    end(start("fifth", "calibrate", *train))
    there = {name.removeprefix("bucket/run/") for name in fake_bucket.objects() if name.startswith("bucket/run/")}
    assert {"eval/metrics.json", "eval/report.html", "calibration.json", "config.json"} <= there
    assert not any(name.startswith(("lock", "data.partial")) for name in there)
    end(start("sixth", "convert", "export", "--workdir=gs://bucket/run", f"--output={tmp_path / 'exported'}"))
    assert {"config.json", "model.safetensors", "calibration.json"} <= set(os.listdir(tmp_path / "exported"))
    assert not list((tmp_path / "sixth").rglob("optimizer")) and not list((tmp_path / "sixth").rglob("*record*"))
