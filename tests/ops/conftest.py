"""What tests of the operations share."""

import pytest
from jax.experimental.pallas import tpu as pltpu

from dspark_jax.ops import mosaic


@pytest.fixture
def strict_tpu(monkeypatch):
    """TPU kernels run in the interpreter that keeps a TPU's memories apart; gives a function: was there a race?"""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # where the public module has no name for it

    monkeypatch.setattr(mosaic, "INTERPRETER", pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))
    yield lambda: interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()
