"""How tests compile: hundreds of small programs that run once or twice each."""

from importlib import metadata

_OLDER = tuple(int(part) for part in metadata.version("jax").split(".")[:2]) < (0, 11)

QUICKLY = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * _OLDER
"""Flags of XLA that make compiling for a CPU cheap.

Optimising took a third of the suite's time. Before JAX 0.11, which has it no more and knows no such flag, there is an
older code generation of loops that takes half of the time of the newer one (XLA's fusion emitters), and what it makes
runs no slower here. Both are of no concern on other platforms.
"""
