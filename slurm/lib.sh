# shellcheck shell=bash
# What every batch script does: it sources this file and calls `train DEFAULT_CONFIG "$@"`. slurm/README.md tells the user's side.
#
# A job is three steps of srun: `settings` on one node reads the configuration, `check` on every node looks at the environment
# and stages the data, `train` runs one task per GPU. Tasks are wrapped in slurm/task.sh; the first one that ends with anything
# but 0 leaves its exit code in $DNC_JOB_DIR, a folder beside the run directory, for this script. The folder is there from one
# start of the job to the next; what one start writes into it is in start/.

DNC_DIST=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
STOPPED=75 # the exit code of a run that was asked to stop and has saved its state
VAIN=3     # so many starts in a row that save nothing new are the last ones

# ---------------------------------------------------------------- the site
# What slurm/site.sh may set, see site.sh.example.
PYTHON=python
SRUN=()
CONTAINER=()
STAGE_DIR=
[ ! -x "$DNC_DIST/.venv/bin/python" ] || PATH=$DNC_DIST/.venv/bin:$PATH
SITE=${SITE:-$DNC_DIST/slurm/site.sh}
# shellcheck source=/dev/null
[ ! -e "$SITE" ] || . "$SITE"
export DNC_DIST STAGE_DIR PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1

# Outside a job, the script submits itself: now with the site's partition and account, which sbatch takes from SBATCH_*.
[ -n "${SLURM_JOB_ID:-}" ] || exec sbatch "$0" "$@"

# ---------------------------------------------------------------- steps and signals
stop=''    # set once this script has been asked to stop
step=''    # pid of the srun that is running
run_dir='' # the run directory, once the configuration has been read
job_dir='' # what this job keeps from one start to the next, a folder beside it

say() { echo "[$(date +%T) job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1))] $*" >&2; }

# USR1 comes before the time limit and at preemption, TERM if there is no other warning. srun passes USR1 on to its tasks;
# TERM would make it kill them.
on_signal() {
  stop=$1
  say "SIG$1: the run saves its state and stops"
  [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
}
for name in USR1 USR2 TERM; do
  # shellcheck disable=SC2064
  trap "on_signal $name" "$name"
done

# Run srun and return its exit code. In the background, since bash only acts on a signal between commands; and a trapped
# signal ends `wait` early, so wait until srun is really gone.
run() {
  local code
  srun --kill-on-bad-exit=1 "${SRUN[@]}" "$@" &
  step=$!
  [ -z "$stop" ] || kill -USR1 "$step" # the signal came after the last step
  while wait "$step"; code=$?; kill -0 "$step" 2>/dev/null; do :; done
  # If a signal and the end came together, `wait` has told of the signal; asked again, it tells how srun ended.
  wait "$step" || code=$?
  step=''
  return "$code"
}

saved() { echo "checkpoint $(cat "$run_dir/checkpoints/latest" 2>/dev/null)"; }

# Whether this start and the ones before it began with the checkpoint that there still is. Two such starts can be bad luck, a stop
# in an evaluation and one in the division after it; more mean that a time limit is too short, and would go on for ever.
in_vain() {
  [ -n "$job_dir" ] && { tail -n "$VAIN" "$job_dir/starts"; saved; } | uniq -c | grep -q "^ *$((VAIN + 1)) "
}

# End the job with the exit code of a step, or requeue it if it was stopped. SLURM itself requeues a job that is preempted or
# lost a node, and a cancelled one must stay where it is: if it is no longer RUNNING, that has been decided.
finish() { # CODE
  local code=$1 who='' state
  if [ -e "$DNC_JOB_DIR/end" ]; then
    read -r code who <"$DNC_JOB_DIR/end"
  elif [ -n "$stop" ] && [ "$code" != 0 ]; then
    code=$STOPPED # before any task had something to save
  fi
  state=$(scontrol show job --oneliner "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p')
  case $code,$state in
    0,*) say "done" ;;
    2,*) say "wrong input or environment, see above; nothing was trained" ;;
    "$STOPPED",RUNNING)
      if in_vain; then
        say "$VAIN starts in a row were stopped before they could save anything new, so no further one; submit again with a longer --time"
      else
        say "back into the queue; the next start goes on from here"
        scontrol requeue "$SLURM_JOB_ID" && exit "$code"
        say "SLURM does not requeue this job; submit again to go on"
      fi ;;
    *,RUNNING) say "failed with exit code $code${who:+, first in $who}; submit again to go on from the last checkpoint" ;;
    *) say "ended with exit code $code${who:+, first in $who}; SLURM has decided whether it goes back into the queue" ;;
  esac
  [ -z "$job_dir" ] || rm -rf "$job_dir"
  exit "$code"
}

# ---------------------------------------------------------------- the job
train() { # DEFAULT_CONFIG [CONFIG] [--set key=value]... [--resume ...]
  local settings code tasks cpus
  if [ $# -gt 1 ] && [ "${2#-}" = "$2" ]; then shift; fi
  # One task per GPU; without GPUs as many as `--ntasks-per-node` says, or one. A step does not get its job's GPUs by itself if
  # the job got them by --exclusive.
  if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
    tasks=$SLURM_GPUS_ON_NODE
    SRUN+=(--gpus-per-node="$tasks")
  else
    tasks=${SLURM_NTASKS_PER_NODE:-1}
  fi
  cpus=$((SLURM_CPUS_ON_NODE / tasks))
  if [ "$cpus" = 0 ]; then
    say "$tasks tasks on a node, but only $SLURM_CPUS_ON_NODE CPU(s): submit with --exclusive, --cpus-per-gpu or --cpus-per-task"
    exit 2
  fi
  export DNC_JOB_DIR=/nowhere OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
  # sbatch's own count of tasks must not contradict what the steps ask for.
  unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_TRES_PER_TASK SLURM_CPUS_PER_TASK SLURM_CPUS_PER_GPU \
    SLURM_GPUS SLURM_GPUS_PER_TASK

  case ,${SBATCH_PARTITION:-$SLURM_JOB_PARTITION}, in
    *,"$SLURM_JOB_PARTITION",*) ;;
    *) say "this is partition $SLURM_JOB_PARTITION, not $SBATCH_PARTITION of $SITE: that file is read by sbatch only after \`. $SITE\`" ;;
  esac
  say "$* on $SLURM_JOB_NODELIST, $tasks task(s) of $cpus CPU(s) on each node"
  settings=$(srun "${SRUN[@]}" --nodes=1 --ntasks=1 "${CONTAINER[@]}" "$PYTHON" "$DNC_DIST/slurm/node.py" settings "$@")
  code=$?
  [ "$code" = 0 ] || finish "$code"
  run_dir=${settings##*$'\n'}
  job_dir=$(dirname "$run_dir")/.slurm-$SLURM_JOB_ID
  DNC_JOB_DIR=$job_dir/start
  rm -rf "$DNC_JOB_DIR" # of the last start
  mkdir -p "$DNC_JOB_DIR" || finish 1
  saved >>"$job_dir/starts"
  [ -z "$stop" ] || finish "$STOPPED"

  run --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --cpus-per-task="$cpus" \
    "$DNC_DIST/slurm/task.sh" "${CONTAINER[@]}" "$PYTHON" "$DNC_DIST/slurm/node.py" check "$@"
  code=$?
  [ -z "$stop" ] || finish "$STOPPED"
  [ "$code" = 0 ] || finish "$code"
  if [ -n "$STAGE_DIR" ]; then
    DNC_LOCAL_DATA=$(cat "$DNC_JOB_DIR/data") || finish 1
    export DNC_LOCAL_DATA
  fi

  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  # Another port for every start: the last one's may not be free yet.
  MASTER_PORT=$((20000 + (SLURM_JOB_ID + ${SLURM_RESTART_COUNT:-0}) % 10000))
  export MASTER_ADDR MASTER_PORT
  run --nodes="$SLURM_NNODES" --ntasks=$((SLURM_NNODES * tasks)) --ntasks-per-node="$tasks" --cpus-per-task="$cpus" \
    "$DNC_DIST/slurm/task.sh" "${CONTAINER[@]}" "$PYTHON" -m dnc_dist train "$@"
  finish $?
}
