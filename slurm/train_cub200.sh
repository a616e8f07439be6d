#!/bin/bash
# Submits the training of configs/cub200_published.yaml, with the resources of train_vehicleid.sh: slurm/train_cub200.sh [--set key=value]...
here=$(dirname "$(readlink -f "$0")")
SBATCH_JOB_NAME=cub200 exec "$here/train_vehicleid.sh" "$here/../configs/cub200_published.yaml" "$@"
