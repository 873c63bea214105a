"""Runs the train command in its own process and lets it die at a given moment, or decode afterwards: see test_train.

python tiny_run.py CONFIG WORKDIR [between|during|after|told|full|decode]

Several processes that SLURM's variables describe train together.
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

from dspark_jax import command, train
from dspark_jax.config import InputError
from dspark_jax.data.sources import Sample, write_samples
from dspark_jax.engine import generate
from dspark_jax.engine.models import Models
from dspark_jax.engine.serving import Engine
from dspark_jax.evaluation import speed
from dspark_jax.evaluation.decoding import Decoder as Evaluated
from dspark_jax.evaluation.decoding import Request, Requests
from dspark_jax.sharding import make_mesh
from dspark_jax.target.loading import load_target
from dspark_jax.training.checkpoint import load_drafter, saved_config

LENGTH, VOCAB = 24, 67
PROMPTS, BUDGET = ([3, 5, 7], [11, 2], [1, 4, 9, 16, 25], [8]), 12


def fake_prepare(run):
    """Random samples in the place of the target's answers."""
    if run.data_folder.exists():
        return
    rng, samples = np.random.default_rng(0), []
    for index in range(21):  # no multiple of the batch: batches run over the ends of epochs
        length = int(rng.integers(LENGTH // 2, LENGTH + 1))
        mask = (np.arange(length) >= 3).astype(np.uint8)
        samples.append(Sample(rng.integers(0, VOCAB - 1, length).astype(np.int32), mask, "random", index))
    write_samples(run.data_folder, samples)


def die():
    """No clean-up of any kind, as when the machine is taken away."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(moment: str, checkpoints: Path) -> None:
    """Arranges for the end of the process; checkpoints are written at steps 3, 6 and 8."""
    original = train.place_batch
    step = max((int(path.name) for path in checkpoints.glob("*") if path.name.isdigit()), default=0)

    def place_batch(*args):
        nonlocal step
        step += 1
        if moment == "between" and step == 5:
            die()
        if moment == "after" and step == 7:
            while not (checkpoints / "6").exists():
                time.sleep(0.01)
            die()
        if moment == "told" and step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    def audit(event, args):
        partial = event in ("os.rename", "os.mkdir") and str(args[0]).startswith(str(checkpoints))
        if partial and moment == "during" and event == "os.rename" and str(args[0]).endswith("/6.orbax-checkpoint-tmp"):
            die()  # everything is written, and not yet under its name
        if partial and moment == "full" and event == "os.mkdir":
            resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))

    train.place_batch = place_batch
    sys.addaudithook(audit)


def decode(workdir: Path) -> None:
    """Writes the greedy answers that this process gets from `generate` and from the serving engine.

    Speed is measured, too, with hosts that find different costs of a round.
    """
    config = saved_config(workdir)
    mesh = make_mesh(config.mesh)
    models = Models(load_target(config.target, mesh), load_drafter(workdir, mesh)[1])
    with jax.set_mesh(mesh):
        together = generate(models, PROMPTS, max_new_tokens=BUDGET).tokens
        engine = Engine(models, slots=2, capacity=32)
        requests = [engine.submit(prompt, max_new_tokens=BUDGET) for prompt in PROMPTS]
        refused = ""
        try:
            engine.start()
        except InputError as error:
            refused = str(error)
        served = [list(request.result().tokens) for request in requests]
        speed._seconds_per_round = lambda decoder, *_: 1.9 + 0.2 * jax.process_index() if decoder.models.drafts else 1.0
        asked = Requests([Request(prompt, 0, 0, 0) for prompt in PROMPTS[:2]], 8)
        measured = speed.measure_speed(Evaluated(models, None, (), BUDGET, 4, 0), asked, 0.0)
    answers = {
        "prompts": PROMPTS,
        "budget": BUDGET,
        "together": [tokens.tolist() for tokens in together],
        "served": served,
        "refused": refused,
        "round_cost": measured.round_cost,
        "tokens": measured.tokens.tolist(),
    }
    (workdir / f"answers{jax.process_index()}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    config_file, workdir, *moment = sys.argv[1:]
    train.prepare_run = fake_prepare
    if moment and moment[0] != "decode":
        arm(moment[0], Path(workdir) / "checkpoints")
    hosts = ["--distributed", "--config.mesh.fsdp=2"] if "SLURM_NTASKS" in os.environ else []
    if hosts:  # one is ahead of the other where they look for what is there
        train.check_host_memory = lambda *_: time.sleep(jax.process_index())
    command.run(train.train, argv=["--config", config_file, "--workdir", workdir, *hosts])
    if moment == ["decode"]:
        decode(Path(workdir))
