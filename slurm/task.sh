#!/bin/bash
# One task of a step: gives the worker its rank, and tells the batch script how the first worker ended that did not
# end with 0. srun alone cannot: it kills the other tasks when one ends, and reports the highest of all exit codes.

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS

# A worker that is still starting dies of the signal by which it is asked to stop; then there is nothing to save.
stop=''
trap 'stop=1; kill -USR1 "$worker" 2>/dev/null' TERM USR1 USR2

"$@" &
worker=$!
while wait "$worker"; code=$?; kill -0 "$worker" 2>/dev/null; do :; done
wait "$worker" || code=$?

starting=''
case $((code - 128)) in
  10 | 12 | 15) [ -z "$stop" ] || starting=1 ;;
esac
[ -z "$starting" ] || code=75
[ "$code" != 0 ] || exit 0
# noclobber: of all tasks, the first one writes.
(set -o noclobber && echo "$code task $RANK on $(hostname)" >"$DNC_JOB_DIR/end") 2>/dev/null
# All workers stop together, each at its own pace: none of them may make srun kill the others. The peers of one that never
# started, however, wait for it in vain.
[ "$code" != 75 ] || [ -n "$starting" ] || exit 0
exit "$code"
