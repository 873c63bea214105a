#!/bin/bash
# A TPU slice of several hosts, from anywhere with gcloud; the checkout is in the same place on every host:
#   TPU=my-v5e-16 ZONE=us-west4-a launch/tpu_pod.sh \
#       --config configs/dspark_qwen3_4b.py --config.target.path=Qwen/Qwen3-4B --workdir /mnt/shared/a
# The working directory must be one that all hosts see: Filestore, or a bucket mounted with gcsfuse.
set -euo pipefail
: "${TPU:?name of the TPU}" "${ZONE:?its zone}" "${CHECKOUT:=dspark-jax}"
arguments=$(printf '%q ' "$@")
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker all \
  --command "cd $CHECKOUT && exec .venv/bin/python -m dspark_jax.train --distributed $arguments"
