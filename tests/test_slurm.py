"""The batch scripts on a real SLURM cluster of two nodes, which ``slurm_cluster.sh`` sets up on this machine.

One undisturbed job; and jobs that something happens to, each of which must end with the same curve, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.run_fixtures import assert_same_run, last_step, make_dataset, wait_until, write_config

HERE = Path(__file__).resolve().parent
HARNESS = HERE / "slurm_cluster.sh"
SCRIPT = HERE.parent / "slurm" / "train_vehicleid.sh"
STEPS_PER_EPOCH = 8
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# The site's Python. Its trainings draw no report, which takes longer than they do; in their first start they may be slow, so
# that something can happen to them.
PYTHON = """#!{python}
import os, runpy, sys, time
if sys.argv[1] != "-m":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    import dnc_dist.report
    from dnc_dist.cli import run
    from dnc_dist.engine.steplog import StepLog
    dnc_dist.report.build_report = lambda run_dir: run_dir / "report.html"
    log, seconds = StepLog.step, float(os.environ["STEP_SECONDS"])
    def step(self, *args):
        log(self, *args)
        time.sleep(0 if "SLURM_RESTART_COUNT" in os.environ else seconds)
    StepLog.step = step
    sys.exit(run(sys.argv[3:]))
"""


class Job:
    """A submitted training."""

    def __init__(self, cluster: Cluster, number: str, name: str) -> None:
        self.cluster, self.number = cluster, number
        self.run = cluster.place / "runs" / name

    @property
    def output(self) -> str:
        path = self.cluster.place / f"vehicleid-{self.number}.out"
        return path.read_text() if path.exists() else ""

    def __getattr__(self, field: str) -> str:
        """A field of ``scontrol show job``: job.JobState, job.Restarts."""
        shown = self.cluster.command("scontrol", "show", "job", "--oneliner", self.number)
        found = re.search(rf" {field}=(\S*)", shown)
        assert found, shown
        return found[1]

    def wait(self, state: str, timeout: float = 200) -> Job:
        """Wait for its end, which must be ``state``."""
        deadline = time.monotonic() + timeout
        while (now := self.JobState) not in ENDED:
            assert time.monotonic() < deadline, f"{now} after {timeout} s\n{self.output}"
            time.sleep(0.3)
        assert now == state, self.output
        return self

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: last_step(self.run) >= step or self.JobState in ENDED)
        assert self.JobState == "RUNNING", self.output

    def worker(self, rank: int) -> int:
        """The pid, seen from outside of the cluster, of the process that trains as this rank."""
        for process in Path("/proc").glob("[0-9]*"):
            try:
                variables = (process / "environ").read_bytes().split(b"\0")
                command = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if {f"SLURM_JOB_ID={self.number}".encode(), f"RANK={rank}".encode()} <= set(variables) and b"dnc_dist" in command:
                return int(process.name)
        raise AssertionError(f"rank {rank} is not running")

    @property
    def result(self) -> dict[str, object]:
        (line,) = [line for line in self.output.splitlines() if line.startswith("RESULT ")]
        return json.loads(line.removeprefix("RESULT "))


class Cluster:
    """The cluster, and the folder from which jobs are submitted."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place

    def harness(self, *arguments: str | Path) -> str:
        done = subprocess.run([HARNESS, *arguments], cwd=self.place, env=self.environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def command(self, *command: str) -> str:
        return self.harness("run", self.folder, *command)

    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "WANDB"))}
        return {**ours, "OMP_NUM_THREADS": "1"}

    def submit(self, name: str, *options: str, overrides: Sequence[str] = (), seconds: float = 0.0, site: str = "site.sh") -> Job:
        """``sbatch`` for the run ``name``; ``seconds`` are slept after every step of its first start."""
        command = ["env", f"STEP_SECONDS={seconds}", f"SITE={self.place / site}", "sbatch", "--parsable", *options, str(SCRIPT), "run.yaml"]
        for override in (f"run.name={name}", *overrides):
            command += ["--set", override]
        return Job(self, self.command(*command).strip(), name)


def unavailable() -> str:
    """Why there can be no cluster here; empty: there can."""

    def check() -> str:
        done = subprocess.run([HARNESS, "check"], capture_output=True, text=True)
        return "" if done.returncode == 0 else done.stdout.strip() or done.stderr.strip()

    why = check()
    # Packages are installed in containers, where tests run unattended, and on nobody's own machine.
    if "not installed" in why and os.getuid() == 0 and shutil.which("apt-get") and not Path("/run/systemd/system").exists():
        subprocess.run([HARNESS, "install"], capture_output=True, timeout=200)
        why = check()
    return why


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if why := unavailable():
        pytest.skip(f"no SLURM cluster on this machine: {why}")
    place = tmp_path_factory.mktemp("slurm")
    cluster = Cluster(place / "cluster", place)
    write_config(place, make_dataset(place))
    (place / "python").write_text(PYTHON.format(python=sys.executable))
    (place / "python").chmod(0o755)
    (place / "site.sh").write_text(f"PYTHON={place}/python\n")
    cluster.harness("start", cluster.folder)
    try:
        yield cluster
    finally:
        cluster.harness("stop", cluster.folder)


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Job:
    """A job that nothing happened to."""
    return cluster.submit("whole").wait("COMPLETED")


def assert_same_end(job: Job, whole: Job) -> None:
    assert job.result | {"run": ""} == whole.result | {"run": ""}
    assert_same_run(job.run, whole.run)
    assert not list(job.run.parent.glob(".slurm-*"))


def test_a_job_on_two_nodes(whole: Job) -> None:
    assert whole.Restarts == "0" and last_step(whole.run) == 4 * STEPS_PER_EPOCH
    assert whole.result["epoch"] == 4 and "2 process(es)" in whole.output
    assert "node1: dnc-dist " in whole.output and "node2: dnc-dist " in whole.output
    assert not list(whole.run.parent.glob(".slurm-*"))


def test_the_scripts_are_clean() -> None:
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    scripts = [*SCRIPT.parent.glob("*.sh"), *SCRIPT.parent.glob("*.sh.example"), HARNESS]
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_wrong_input_ends_the_job_before_it_trains(cluster: Cluster) -> None:
    """A wrong value and missing data; the message says what to change."""
    for override, message in (("schedule.epochs=0", "schedule.epochs"), ("data.root=nowhere", "nowhere holds no prepared data set")):
        job = cluster.submit("wrong", overrides=[override]).wait("FAILED")
        assert job.ExitCode == "2:0" and message in job.output and "Traceback" not in job.output, job.output
        assert not job.run.exists() and not list(job.run.parent.glob(".slurm-*"))


@pytest.mark.slow
def test_two_tasks_on_one_node(cluster: Cluster, whole: Job) -> None:
    """The same number of processes is the same run. Started by its name, the script submits itself as site.sh says."""
    (cluster.place / "one.sh").write_text(f"PYTHON={cluster.place}/python\nexport SBATCH_PARTITION=urgent\n")
    job = cluster.submit("one-node", "--nodes=1", "--ntasks-per-node=2", site="one.sh").wait("COMPLETED")
    assert "2 task(s) of 2 CPU(s)" in job.output and "this is partition main, not urgent" in job.output
    assert_same_end(job, whole)
    said = cluster.command("env", f"SITE={cluster.place}/one.sh", str(SCRIPT), "run.yaml", "--set", "run.name=itself")
    itself = Job(cluster, said.split()[-1], "itself")
    assert itself.Partition == "urgent"
    cluster.command("scancel", itself.number)
    itself.wait("CANCELLED")


@pytest.mark.slow
def test_data_on_the_disks_of_the_nodes(cluster: Cluster, whole: Job) -> None:
    """/dev/shm is each node's own. Afterwards the run names the data where everybody finds it."""
    (cluster.place / "staged.sh").write_text(f"PYTHON={cluster.place}/python\nSTAGE_DIR=/dev/shm\n")
    job = cluster.submit("staged", site="staged.sh").wait("COMPLETED")
    for node in ("node1", "node2"):
        (copy,) = re.findall(rf"{node}: .* images in (/dev/shm/\S+)", job.output)
        assert "manifest.json" in cluster.command("--on", node, "ls", copy)
    assert_same_end(job, whole)
    assert (job.run / "config.yaml").read_text() == (whole.run / "config.yaml").read_text().replace("name: whole", "name: staged")


@pytest.mark.slow
def test_requeued_in_an_epoch(cluster: Cluster, whole: Job) -> None:
    """SLURM's TERM reaches the workers and srun alike; the save that follows, some steps of three seconds later, still has its time."""
    job = cluster.submit("requeued", seconds=3)
    job.wait_for_step(2)
    cluster.command("scontrol", "requeue", job.number)
    job.wait("COMPLETED")
    assert job.Restarts == "1" and re.search("saved runs/requeued/checkpoints/step-0000000[345]", job.output)
    assert "resumed in epoch 0, after step " in job.output
    assert_same_end(job, whole)


@pytest.mark.slow
def test_stopped_by_its_time_limit(cluster: Cluster, whole: Job) -> None:
    """The signal before the limit reaches the batch script alone; it hands it on, waits and requeues."""
    job = cluster.submit("limited", "--time=2", "--signal=B:USR1@60", seconds=3)
    job.wait("COMPLETED", timeout=280)
    assert job.Restarts == "1" and "SIGUSR1: the run saves its state and stops" in job.output
    assert "back into the queue" in job.output and "resumed in epoch " in job.output
    assert_same_end(job, whole)


@pytest.mark.slow
def test_preempted(cluster: Cluster, whole: Job) -> None:
    job = cluster.submit("preempted", seconds=0.5)
    job.wait_for_step(STEPS_PER_EPOCH + 2)
    cluster.command("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=urgent.out", "--wrap", "sleep 3")
    job.wait("COMPLETED")
    assert job.Restarts == "1" and "resumed in epoch " in job.output
    assert_same_end(job, whole)


@pytest.mark.slow
def test_cancelled_jobs_stay_cancelled(cluster: Cluster, whole: Job) -> None:
    job = cluster.submit("cancelled", seconds=0.5)
    job.wait_for_step(STEPS_PER_EPOCH + 2)
    cluster.command("scancel", job.number)
    job.wait("CANCELLED")
    time.sleep(5)
    assert job.JobState == "CANCELLED" and job.Restarts == "0" and "back into the queue; the next start" not in job.output
    # It was asked nicely first, so nothing is lost.
    assert (job.run / "checkpoints" / "latest").read_text() == f"step-{last_step(job.run):08d}"
    assert_same_end(cluster.submit("cancelled").wait("COMPLETED"), whole)


@pytest.mark.slow
def test_a_killed_worker_fails_the_job(cluster: Cluster, whole: Job) -> None:
    """As when the kernel runs out of memory: the job ends within seconds and says which worker it was; the next one goes on."""
    job = cluster.submit("killed", seconds=0.5)
    job.wait_for_step(STEPS_PER_EPOCH + 2)
    os.kill(job.worker(1), signal.SIGKILL)
    job.wait("FAILED", timeout=30)
    assert job.ExitCode == "137:0" and job.Restarts == "0" and "exit code 137, first in task 1 on node2" in job.output
    assert_same_end(cluster.submit("killed").wait("COMPLETED"), whole)


@pytest.mark.slow
def test_a_node_is_switched_off(cluster: Cluster, whole: Job) -> None:
    job = cluster.submit("powerless", seconds=0.5)
    job.wait_for_step(STEPS_PER_EPOCH + 2)
    cluster.harness("off", cluster.folder, "node2")
    wait_until(lambda: job.JobState == "PENDING", timeout=100)
    cluster.harness("on", cluster.folder, "node2")
    job.wait("COMPLETED")
    assert job.Restarts == "1" and "resumed in epoch 1, after step " in job.output
    assert_same_end(job, whole)
