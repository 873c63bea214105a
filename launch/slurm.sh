#!/bin/bash
# GPUs under SLURM, one process per node:
#   sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh --config configs/dspark_qwen3_4b.py --workdir /shared/a
#SBATCH --job-name=dspark
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit with sbatch from the checkout}"
# A requeued job goes on from its newest checkpoint. jax.distributed finds the other nodes in SLURM's variables.
exec srun .venv/bin/python -m dspark_jax.train --distributed "$@"
