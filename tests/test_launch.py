"""What is in `launch/` is valid, and its commands are command lines that are understood."""

import importlib
import itertools
import math
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from dspark_jax.__main__ import COMMANDS
from dspark_jax.attached import STATUS
from dspark_jax.command import parse
from dspark_jax.errors import AGAIN

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


def commands(spec):
    """Module and arguments of every container of a job or a set of jobs."""
    if isinstance(spec, dict):
        for container in spec.get("containers", ()):
            found = [*container.get("command", ()), *container.get("args", ())]
            yield found[2:] if found[:2] == ["python", "-m"] else found
    for value in spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ():
        yield from commands(value)


def read(name):
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((ROOT / "launch" / name).read_text()))


@pytest.mark.parametrize("name", ["gke.yaml", "jobset.yaml"])
def test_the_commands_of_cluster_jobs_exist_with_their_options(monkeypatch, name):
    """Also as one working directory with one config, which is what makes them steps of one run."""
    monkeypatch.chdir(ROOT)
    found = []
    for module, *arguments in itertools.chain.from_iterable(map(commands, read(name))):
        assert module.removeprefix("dspark_jax.") in COMMANDS
        config, workdir, extra = parse(arguments, getattr(importlib.import_module(module), "_define", None))
        assert extra["distributed"] and config.target.path == "Qwen/Qwen3-4B" and workdir.is_relative_to("/shared")
        found.append((module, config.name, workdir))
    steps = ["prepare", "train", "evaluate"] if name == "jobset.yaml" else ["train"]
    assert [module.removeprefix("dspark_jax.") for module, *_ in found] == steps
    assert len({(config, workdir) for _, config, workdir in found}) == 1


def test_the_steps_of_the_jobset():
    """Each waits for the one before it, has a whole slice, and is restarted but for bad input."""
    (jobset,) = read("jobset.yaml")
    jobs = jobset["spec"]["replicatedJobs"]
    for before, job in itertools.pairwise(jobs):
        assert job["dependsOn"] == [{"name": before["name"], "status": "Complete"}]
    for job in jobs:
        spec = job["template"]["spec"]
        pod, (container,) = spec["template"]["spec"], spec["template"]["spec"]["containers"]
        hosts, selector = spec["completions"], pod["nodeSelector"]
        chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
        assert hosts == spec["parallelism"] and hosts * container["resources"]["limits"]["google.com/tpu"] == chips
        assert spec["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
        (rule,) = spec["podFailurePolicy"]["rules"]
        assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    (bad, lost) = jobset["spec"]["failurePolicy"]["rules"]
    assert (bad["action"], bad["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert lost["action"] == "RestartJob" and "onJobFailureReasons" not in lost
    assert AGAIN not in rule["onExitCodes"]["values"] and STATUS not in rule["onExitCodes"]["values"]


def test_the_image(monkeypatch):
    """What is copied exists, everything that the package needs is copied, and extras and commands are known."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "launch" / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for name in line.split()[:-1]]
    assert all((ROOT / name).exists() for name in copied)
    assert {"dspark_jax", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE"} == set(copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    named = re.findall(r"(?:ACCELERATOR|EXTRAS)=([\w,]+)", text)
    assert {one for group in named for one in group.split(",")} <= extras and {"tpu", "cuda"} <= extras
    (base,) = re.findall(r"^ARG BASE=python:3\.(\d+)-slim$", text, re.MULTILINE)
    assert int(base) >= int(re.findall(r">=3\.(\d+)", project["requires-python"])[0])
    assert re.findall(r"^(?:ARG|ENV) (\w+)=", text, re.MULTILINE)[0] == "BASE" and "FROM ${BASE}" in text
    assert 'ENTRYPOINT ["python", "-m"]' in text
    ((module, arguments),) = re.findall(r"docker run .* dspark-jax:\w+ (dspark_jax\.\w+) (.*)", text)
    parse(arguments.split(), getattr(importlib.import_module(module), "_define", None))


@pytest.mark.parametrize(("accelerator", "expected"), [("", ".[answers]"), ("tpu", ".[tpu,answers]")])
def test_the_image_installs_what_is_asked_for(tmp_path, accelerator, expected):
    """Its RUN, with a pip that says what it is told."""
    text = (ROOT / "launch" / "Dockerfile").read_text()
    (run,) = re.findall(r"^RUN ((?:.*\\\n)*.*)", text, re.MULTILINE)
    (tmp_path / "pip").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "pip").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ACCELERATOR": accelerator, "EXTRAS": "answers"}
    done = subprocess.run(["sh", "-c", run], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"install -e {expected}\n"
    assert (tmp_path / "dspark_jax" / "__init__.py").exists() and (tmp_path / "configs").is_dir()
