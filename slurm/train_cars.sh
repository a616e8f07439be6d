#!/bin/bash
#SBATCH --job-name=cars
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Trains configs/cars196_published.yaml on whole nodes, one task per GPU; the number of nodes stands above and nowhere else.
#
#   sbatch slurm/train_cars.sh [CONFIG] [--set key=value]...      see slurm/README.md

# SLURM starts a copy of this script from its own folder, so the way back to the original leads through the job.
slurm=$(dirname "$0")
[ -e "$slurm/lib.sh" ] || slurm=$(dirname "$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* Command=\([^ ]*\).*/\1/p')")
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$slurm/lib.sh"

train "$DNC_DIST/configs/cars196_published.yaml" "$@"
