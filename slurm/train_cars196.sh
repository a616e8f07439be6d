#!/bin/bash
# Submits the training of configs/cars196_published.yaml, with the resources of train_vehicleid.sh: slurm/train_cars196.sh [--set key=value]...
here=$(dirname "$(readlink -f "$0")")
SBATCH_JOB_NAME=cars196 exec "$here/train_vehicleid.sh" "$here/../configs/cars196_published.yaml" "$@"
