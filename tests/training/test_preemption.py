"""SIGTERM to one of two processes: both stop after the same step. (One process alone: test_train.)"""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROCESS = """
import os, signal, sys, time
import jax
from dspark_jax.training.preemption import Preemption

number = int(sys.argv[2])
jax.distributed.initialize(sys.argv[1], 2, number)
with Preemption() as preemption:
    for step in range(1, 2000):
        if number == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if preemption.reached(step):
            print("leaves behind", step, flush=True)
            break
        time.sleep(0.01 if number else 0.02)  # one is ahead of the other
"""


def test_processes_that_train_together_leave_together():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(number)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert said[0] == said[1] and said[0].startswith("leaves behind"), said
