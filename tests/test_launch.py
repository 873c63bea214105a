"""The launch scripts are valid, and their one line of Python is a command line that is understood."""

import subprocess
from pathlib import Path

import pytest

from dspark_jax.command import parse

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts(script):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    text = script.read_text()
    assert text.count("-m dspark_jax.train") == 1 and "set -euo pipefail" in text
    assert ("--distributed" in text) == (script.name != "tpu_vm.sh")
    assert script.stat().st_mode & 0o111


def test_a_script_hands_its_arguments_on_as_they_are(tmp_path):
    """gcloud is a stub that runs the remote command with bash, as ssh would."""
    (tmp_path / "gcloud").write_text('#!/bin/bash\nbash -c "${@: -1}"\n')
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    for file in (tmp_path / "gcloud", tmp_path / ".venv" / "bin" / "python"):
        file.chmod(0o755)
    prompts = '--config.data.prompts=("a b.jsonl",)'
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TPU": "t", "ZONE": "z", "CHECKOUT": str(tmp_path)}
    command = [str(ROOT / "launch" / "tpu_pod.sh"), "--config", "c.py", prompts]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["-m", "dspark_jax.train", "--distributed", "--config", "c.py", prompts]


def test_the_cluster_job(monkeypatch):
    yaml = pytest.importorskip("yaml")
    monkeypatch.chdir(ROOT)
    service, job = yaml.safe_load_all((ROOT / "launch" / "gke.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    assert pod["subdomain"] == service["metadata"]["name"]
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"] * job["spec"]["completions"]
    assert chips == 16 and job["spec"]["completions"] == job["spec"]["parallelism"]
    command = pod["containers"][0]["command"]
    assert command[:3] == ["python", "-m", "dspark_jax.train"]
    config, workdir, extra = parse(command[3:])
    assert config.target.path == "Qwen/Qwen3-4B" and workdir.is_relative_to("/shared") and extra["distributed"]
