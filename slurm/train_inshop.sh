#!/bin/bash
# Submits the training of configs/inshop_published.yaml, with the resources of train_vehicleid.sh: slurm/train_inshop.sh [--set key=value]...
here=$(dirname "$(readlink -f "$0")")
SBATCH_JOB_NAME=inshop exec "$here/train_vehicleid.sh" "$here/../configs/inshop_published.yaml" "$@"
