"""How tests compile: hundreds of small programs that run once or twice each."""

QUICKLY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
"""Flags of XLA that make compiling for a CPU cheap.

Optimising took a third of the suite's time. The older code generation of loops takes half of the time of the newer one
(XLA's fusion emitters), and what it makes runs no slower here. Both are of no concern on other platforms.
"""
