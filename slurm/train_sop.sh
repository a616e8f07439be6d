#!/bin/bash
# Submits the training of configs/sop_published.yaml, with the resources of train_vehicleid.sh: slurm/train_sop.sh [--set key=value]...
here=$(dirname "$(readlink -f "$0")")
SBATCH_JOB_NAME=sop exec "$here/train_vehicleid.sh" "$here/../configs/sop_published.yaml" "$@"
