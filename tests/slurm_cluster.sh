#!/usr/bin/env bash
# A real SLURM cluster of several hosts on one Linux machine, for tests; needs root.
#
#   slurm_cluster.sh check                      0: possible here; 77: not, and why
#   slurm_cluster.sh install                    the packages, by apt-get
#   slurm_cluster.sh start DIR [NODES]          controller "ctl" and node1..nodeN (2); returns when all of them are idle
#   slurm_cluster.sh run DIR [--on HOST] CMD..  a command on a host; on ctl, the "login node", by default
#   slurm_cluster.sh off DIR NODE | on DIR NODE switch a node off, as a power cut does, and on again
#   slurm_cluster.sh stop DIR
#
# A host is a set of namespaces (network, host name, processes, mounts, ipc) that one process holds as PID 1: killing it is a
# power cut. The hosts are wired to a bridge that lives inside ctl, without a route out of it, so the machine's own network and
# files stay as they are. They share its file system, except /run, /dev/shm, /etc/hosts and /etc/slurm. Everything ends when
# DIR is deleted, or after TTL seconds. Two partitions: "main", and "urgent", which preempts it.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
self=$(readlink -f "${BASH_SOURCE[0]}")
net=10.77.0
: "${TTL:=1800}"
spaces=(--net --uts --ipc --pid --mount)

die() { echo "slurm_cluster: $*" >&2; exit 1; }

# ---------------------------------------------------------------- hosts
# A pid alone may have been given to another process meanwhile; with its start time it is unique.
born() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

pid_of() { # HOST: the pid of its PID 1 as seen from here; fails if the host is off
  local pid start
  read -r pid start 2>/dev/null <"$dir/host/$1" || return 1
  [ "$(born "$pid")" = "$start" ] && echo "$pid"
}

on() { # HOST CMD...
  local pid
  pid=$(pid_of "$1") || die "$1 is off"
  nsenter --target "$pid" --mount --uts --ipc --net --pid -- "${@:2}"
}

init() { # HOST: what its PID 1 does
  mount -t sysfs sysfs /sys
  mount -t tmpfs tmpfs /sys/fs/cgroup   # slurmd looks for a file system there, even if it needs no cgroup
  mount -t tmpfs -o mode=755 tmpfs /run
  mount -t tmpfs -o mode=1777 tmpfs /dev/shm
  mount --bind "$dir/etc/hosts" /etc/hosts
  mount --bind "$dir/etc" /etc/slurm
  hostname "$1"
  ip link set lo up
  mkdir -m 755 /run/munge
  trap : TERM INT HUP
  touch "$dir/host/$1.ready"
  while [ "$SECONDS" -lt "$TTL" ] && [ -e "$dir/host" ]; do sleep 2 & wait "$!" || true; done
}

boot() { # HOST NUMBER
  local holder pid n bridge
  rm -f "$dir/host/$1" "$dir/host/$1.ready"
  setsid unshare "${spaces[@]}" --fork --kill-child --mount-proc --propagation private \
    bash "$self" init "$dir" "$1" </dev/null >"$dir/log/$1.boot" 2>&1 &
  holder=$!
  for n in $(seq 200); do [ -e "$dir/host/$1.ready" ] && break; sleep 0.05; done
  read -r pid _ <"/proc/$holder/task/$holder/children" || true
  if [ -z "$pid" ] || [ "$n" = 200 ]; then die "$1 does not start: $(cat "$dir/log/$1.boot")"; fi
  echo "$pid $(born "$pid")" >"$dir/host/$1"
  if [ "$1" = ctl ]; then
    on ctl ip link add name bridge0 type bridge
    on ctl ip addr add "$net.1/24" dev bridge0
    on ctl ip link set bridge0 up
  else
    bridge=(nsenter --target "$(pid_of ctl)" --net --)
    "${bridge[@]}" ip link del "port$2" 2>/dev/null || true
    "${bridge[@]}" ip link add name "port$2" type veth peer name eth0 netns "$pid"
    "${bridge[@]}" ip link set "port$2" master bridge0 up
    on "$1" ip addr add "$net.$((10 + $2))/24" dev eth0
    on "$1" ip link set eth0 up
  fi
  on "$1" munged --key-file="$dir/munge.key" --seed-file=/run/munge/seed --log-file="$dir/log/$1.munged"
  if [ "$1" = ctl ]; then on ctl slurmctld -c; else on "$1" slurmd; fi
}

off() { # HOST
  local pid
  pid=$(pid_of "$1") || return 0
  kill -KILL "$pid"
  while pid_of "$1" >/dev/null; do sleep 0.05; done
}

# ---------------------------------------------------------------- the cluster
configure() { # NODES
  local n
  mkdir -p "$dir"/{etc,host,log,state,spool}
  chmod 755 "$dir"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  echo CgroupPlugin=cgroup/v1 >"$dir/etc/cgroup.conf"
  # A host's own name must stand for its network address, or gloo listens where nobody can reach it.
  { echo "127.0.0.1 localhost"; echo "$net.1 ctl"; for n in $(seq "$1"); do echo "$net.$((10 + n)) node$n"; done; } >"$dir/etc/hosts"
  cat >"$dir/etc/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=ctl
SlurmUser=root
SlurmdUser=root
# New ids in every cluster: no job may append to the output of an older one.
FirstJobId=$((1000 + $(date +%s) % 60000000))
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits that long (and a second) before it may start again; 5 is the least that counts.
AuthInfo=cred_expire=5
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=20
SlurmdTimeout=10
MinJobAge=3600
ReturnToService=2
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile=$dir/log/slurmctld
SlurmdLogFile=$dir/log/slurmd.%n
NodeName=node[1-$1] CPUs=4 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF
CONF
}

idle() { on ctl sinfo --noheader --Node --partition=main --format=%T 2>/dev/null | grep -cx idle || true; }

start() { # NODES
  local n
  pid_of ctl >/dev/null && die "$dir is in use"
  configure "$1"
  trap stop EXIT
  boot ctl 0
  for n in $(seq "$1"); do boot "node$n" "$n"; done
  for n in $(seq 120); do [ "$(idle)" = "$1" ] && break; sleep 0.25; done
  [ "$n" -lt 120 ] || { tail "$dir"/log/* >&2; die "the nodes do not become idle"; }
  trap - EXIT
}

stop() {
  local host
  for host in "$dir"/host/*.ready; do off "$(basename "$host" .ready)"; done
}

check() {
  local name
  [ "$(id -u)" = 0 ] || { echo "needs root"; exit 77; }
  for name in slurmctld slurmd sbatch munged ip nsenter unshare; do
    command -v "$name" >/dev/null || { echo "$name is not installed (apt-get: slurmctld slurmd slurm-client munge iproute2)"; exit 77; }
  done
  mkdir -p /etc/slurm
  # shellcheck disable=SC2016
  unshare "${spaces[@]}" --fork --mount-proc --propagation private sh -c \
    'hostname x && mount -t tmpfs tmpfs /run && ip link add name bridge0 type bridge && ip link add name a1 type veth peer name b1' \
    >/dev/null 2>&1 || { echo "namespaces, bridges or veth pairs are not allowed here"; exit 77; }
}

command=${1:-help}
[ "$command" = help ] || shift
case $command in
  check) check; exit ;;
  install)
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2
    exit ;;
  init | start | stop | run | on | off) ;;
  *) sed -n '2,/^$/s/^# \{0,1\}//p' "$self" | sed '/^set /,$d'; exit 2 ;;
esac
dir=$(readlink -m "${1:?DIR}")
shift
case $command in
  init) init "$1" ;;
  start) start "${1:-2}" ;;
  stop) stop ;;
  off) off "$1" ;;
  on) boot "$1" "${1#node}" ;;
  run)
    host=ctl
    [ "$1" != --on ] || { host=$2; shift 2; }
    # The command sees this host's processes alone, and starts in the caller's folder.
    # shellcheck disable=SC2016
    on "$host" bash -c 'cd -- "$1" && shift && exec "$@"' run "$PWD" "$@" ;;
esac
