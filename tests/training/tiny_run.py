"""Runs the train command in its own process and lets it die at a given moment: see test_train.

python tiny_run.py CONFIG WORKDIR [between|during|after|told|full]
"""

import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np

from dspark_jax import command, train
from dspark_jax.data.sources import Sample, write_samples

LENGTH, VOCAB = 24, 67


def fake_prepare(config, workdir):
    """Random samples in the place of the target's answers."""
    if (workdir / "data").exists():
        return
    rng, samples = np.random.default_rng(0), []
    for index in range(21):  # no multiple of the batch: batches run over the ends of epochs
        length = int(rng.integers(LENGTH // 2, LENGTH + 1))
        mask = (np.arange(length) >= 3).astype(np.uint8)
        samples.append(Sample(rng.integers(0, VOCAB - 1, length).astype(np.int32), mask, "random", index))
    write_samples(workdir / "data", samples)


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


if __name__ == "__main__":
    config_file, workdir, *moment = sys.argv[1:]
    train.prepare = fake_prepare
    if moment:
        arm(moment[0], Path(workdir) / "checkpoints")
    command.run(train.train, argv=["--config", config_file, "--workdir", workdir])
