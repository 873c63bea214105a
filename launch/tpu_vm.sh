#!/bin/bash
# One TPU VM host (up to 8 chips), on the VM, in a checkout:
#   launch/tpu_vm.sh --config configs/dspark_qwen3_4b.py --config.target.path=Qwen/Qwen3-4B --workdir runs/a
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install --quiet -e '.[tpu]'
exec .venv/bin/python -m dspark_jax.train "$@"
