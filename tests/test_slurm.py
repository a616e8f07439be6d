"""The batch scripts on a real SLURM cluster of three nodes, which ``slurm_cluster.sh`` sets up on this machine.

VehicleID in miniature is trained by undisturbed jobs, on two and on three nodes; and by jobs that something happens to, each of
which must end with the same curve, bit for bit.
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

from dnc_dist import cli
from tests.run_fixtures import assert_same_run, last_step, metrics, wait_until
from tests.vehicleid_fixtures import make_vehicleid

HERE = Path(__file__).resolve().parent
HARNESS = HERE / "slurm_cluster.sh"
SCRIPT = HERE.parent / "slurm" / "train_vehicleid.sh"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
# 16 training classes of 8 images; the smaller test lists are parts of the larger ones, as in the archive.
LISTS = {"train": range(1, 17), "small": range(21, 24), "medium": range(21, 27), "large": range(21, 31)}
# What makes configs/vehicleid.yaml as small: epochs of one learner, of two, and of conquering.
SMALL = (
    *("data.image_size=16", "data.crop=1.0", "data.augment=light", "data.workers=0"),
    *("model.backbone=conv4", "model.weights=none", "model.embedding_dim=16", "model.batch_norm=global"),
    *("division.num_learners=2", "division.every=1", "division.conquer_from=2", "division.backbone_frozen_epochs=0"),
    *("schedule.epochs=3", "schedule.batch_size=16", "optim.lr=0.0001"),
    *("evaluation.batch_size=16", "tracker.kind=jsonl", "tracker.log_every=1"),
)
FIRST_EPOCH = 8  # steps
# The site's Python; slurm_python.py tells what a training does there.
PYTHON = f"""#!/bin/sh
[ "$1" != -m ] || exec {sys.executable} {HERE / "slurm_python.py"} "$@"
exec {sys.executable} "$@"
"""

# A machine that others use, too, may need several times as long as an idle one.
pytestmark = pytest.mark.timeout(900)


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

    def wait(self, state: str, timeout: float = 400) -> Job:
        """Wait for its end, which must be ``state``."""
        deadline = time.monotonic() + timeout
        while (now := self.JobState) not in ENDED:
            assert time.monotonic() < deadline, f"{now} after {timeout} s\n{self.output}"
            time.sleep(0.3)
        assert now == state, self.output
        return self

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: last_step(self.run) >= step or self.JobState in ENDED, timeout=400)
        assert self.JobState == "RUNNING", self.output

    def wait_for_sign(self, start: int) -> None:
        """Until a training waits where ``slow`` told it to in this start."""
        sign = self.cluster.place / f"slow-{self.number}-{start}"
        wait_until(lambda: sign.exists() or self.JobState in ENDED, timeout=400)
        assert sign.exists(), self.output

    def wait_for_output(self, text: str) -> None:
        wait_until(lambda: text in self.output or self.JobState in ENDED, timeout=400)
        assert text in self.output, self.output

    def stop(self) -> None:
        """The signal that also comes before the time limit, to the batch script alone."""
        self.cluster.command("scancel", "--batch", "--signal=USR1", self.number)

    @property
    def minutes(self) -> int:
        """Full minutes for which it has been running."""
        hours, minutes, _ = map(int, self.RunTime.split(":"))
        return 60 * hours + minutes

    def limit_to(self, minutes: int) -> None:
        """Another time limit."""
        self.cluster.command("scontrol", "update", f"JobId={self.number}", f"TimeLimit={minutes}")

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
        done = subprocess.run([HARNESS, *arguments], cwd=self.place, env=self.environment(), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def command(self, *command: str) -> str:
        return self.harness("run", self.folder, *command)

    def environment(self) -> dict[str, str]:
        # sbatch takes the environment along, and a test in this process may have been a rank that had itself for company.
        of_others = ("SLURM", "SBATCH", "WANDB", "GLOO_", "NCCL_", "MASTER_", "RANK", "LOCAL_RANK", "WORLD_SIZE")
        ours = {name: value for name, value in os.environ.items() if not name.startswith(of_others)}
        return {**ours, "OMP_NUM_THREADS": "1", "TTL": "7200"}

    def submit(self, name: str, *options: str, overrides: Sequence[str] = (), slow: str = "", site: str = "site.sh") -> Job:
        """``sbatch slurm/train_vehicleid.sh`` for the run ``name``; ``slow`` is explained in slurm_python.py."""
        changes = [word for override in (*SMALL, f"run.name={name}", *overrides) for word in ("--set", override)]
        site = f"SITE={self.place / site}"
        return Job(self, self.command("env", f"SLOW={slow}", site, "sbatch", "--parsable", *options, str(SCRIPT), *changes).strip(), name)


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
    archive = make_vehicleid(place / "VehicleID_V1.0", LISTS, per_id=8)
    # Where configs/vehicleid.yaml looks for it.
    assert cli.run(["data", "prepare", "vehicleid", "--root", str(archive), "--out", str(place / "data" / "vehicleid")]) == 0
    (place / "python").write_text(PYTHON)
    (place / "python").chmod(0o755)
    (place / "site.sh").write_text(f"PYTHON={place}/python\n")
    cluster.harness("start", cluster.folder, "3")
    try:
        yield cluster
    finally:
        cluster.harness("stop", cluster.folder)


@pytest.fixture(scope="module")
def whole(cluster: Cluster) -> Job:
    """A job on two nodes that nothing happened to."""
    return cluster.submit("whole").wait("COMPLETED")


@pytest.fixture(scope="module")
def whole_on_three(cluster: Cluster) -> Job:
    """The same on three nodes: sums over more ranks differ in their last bits."""
    return cluster.submit("whole-on-three", "--nodes=3").wait("COMPLETED")


def assert_same_end(job: Job, whole: Job) -> None:
    assert job.result | {"run": ""} == whole.result | {"run": ""}
    assert_same_run(job.run, whole.run)
    assert not list(job.run.parent.glob(".slurm-*"))


def assert_same_training(job: Job, whole: Job) -> None:
    """The same as far as another number of nodes allows, on which sums differ in their last bits.

    Rounding that turns a ReLU on or off changes a gradient by 0.1 %, and so in a few small steps the loss by far less than that of
    the largest one; a lost row changes losses by several per cent. Of the few queries rounding may decide one or two.
    """
    assert job.result.keys() == whole.result.keys()
    for key, value in (whole.result | {"run": job.result["run"]}).items():
        assert job.result[key] == (pytest.approx(value, abs=0.05) if isinstance(value, float) else value), key
    ours, theirs = ([(line["step"], line["loss"]) for line in metrics(run, "train")] for run in (job.run, whole.run))
    largest = max(loss for _, loss in theirs)
    assert ours == [(step, pytest.approx(loss, rel=0, abs=1e-3 * largest)) for step, loss in theirs]


def test_a_job_on_two_nodes(whole: Job) -> None:
    assert whole.Restarts == "0" and "2 process(es)" in whole.output
    assert (whole.result["protocol"], whole.result["list"], whole.result["epoch"]) == ("vehicleid-loo", "large", 3)
    assert 0.5 < whole.result["recall@1"] < 1, whole.result
    assert "node1: dnc-dist " in whole.output and "node2: dnc-dist " in whole.output
    assert not list(whole.run.parent.glob(".slurm-*"))


def test_the_scripts_are_clean() -> None:
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    scripts = [*SCRIPT.parent.glob("*.sh"), *SCRIPT.parent.glob("*.sh.example"), HARNESS]
    done = subprocess.run([shellcheck, "-x", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("name", "config"), [("sop", "sop"), ("inshop", "inshop"), ("cub", "cub200"), ("cars", "cars196")])
def test_the_scripts_of_the_benchmarks_differ_in_their_names_only(name: str, config: str) -> None:
    script = (SCRIPT.parent / f"train_{name}.sh").read_text()
    assert script.count(f"configs/{config}_published.yaml") == 2
    script = script.replace(f"configs/{config}_published.yaml", "configs/vehicleid.yaml").replace(f"train_{name}.sh", SCRIPT.name)
    assert script.replace(f"--job-name={name}\n", "--job-name=vehicleid\n") == SCRIPT.read_text()


@pytest.mark.slow
def test_a_job_on_three_nodes(whole_on_three: Job, whole: Job) -> None:
    assert whole_on_three.Restarts == "0" and "3 process(es)" in whole_on_three.output and "node3: dnc-dist " in whole_on_three.output
    assert_same_training(whole_on_three, whole)


@pytest.mark.slow
def test_the_doctor_looks_at_the_nodes(cluster: Cluster) -> None:
    said = cluster.command("srun", "--nodes=3", "--ntasks=3", sys.executable, "-m", "dnc_dist", "doctor", "env")
    assert "env: 3 rank(s) on 3 host(s): node1, node2, node3" in said and re.search("run.dir .* is written and read by all ranks", said)


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
    said = cluster.command("env", f"SITE={cluster.place}/one.sh", str(SCRIPT), "--set", "run.name=itself")
    itself = Job(cluster, said.split()[-1], "itself")
    assert itself.Partition == "urgent"
    cluster.command("scancel", itself.number)
    itself.wait("CANCELLED")


@pytest.mark.slow
def test_data_on_the_disks_of_the_nodes(cluster: Cluster, whole: Job) -> None:
    """/dev/shm is each node's own. The run names the data where everybody finds it."""
    (cluster.place / "staged.sh").write_text(f"PYTHON={cluster.place}/python\nSTAGE_DIR=/dev/shm\n")
    job = cluster.submit("staged", site="staged.sh", slow="divide=5")
    job.wait_for_sign(0)
    for rank, node in enumerate(("node1", "node2")):
        (copy,) = re.findall(rf"{node}: .* images in (/dev/shm/\S+)", job.output)
        mapped = Path(f"/proc/{job.worker(rank)}/maps").read_text()
        assert f"{copy}/index/label.npy" in mapped and str(cluster.place / "data") not in mapped
    job.wait("COMPLETED")
    assert_same_end(job, whole)
    assert (job.run / "config.yaml").read_text() == (whole.run / "config.yaml").read_text().replace("name: whole", "name: staged")


@pytest.mark.slow
def test_requeued_in_an_epoch(cluster: Cluster, whole_on_three: Job) -> None:
    """SLURM's TERM reaches the workers and srun alike; the save that follows, some steps of two seconds later, still has its time."""
    job = cluster.submit("requeued", "--nodes=3", slow="step=2")
    job.wait_for_step(2)
    cluster.command("scontrol", "requeue", job.number)
    job.wait("COMPLETED")
    assert job.Restarts == "1" and re.search("saved runs/requeued/checkpoints/step-0000000[345]", job.output)
    assert "resumed in epoch 0, after step " in job.output
    assert_same_end(job, whole_on_three)


@pytest.mark.slow
def test_stopped_outside_of_the_steps(cluster: Cluster, whole: Job) -> None:
    """In the extraction of features, in a division, in an evaluation: each start of one job in another of them."""
    job = cluster.submit("phases", slow="features=1 divide=3 embeddings=1")
    for start in range(3):
        job.wait_for_sign(start)
        job.stop()
    job.wait("COMPLETED")
    assert job.Restarts == "3"
    # With little data every rank computes the whole k-means for itself, and is stopped after it.
    expected = ["during epoch 1: features", "in epoch 1 after step .*", "during epoch 1: evaluation on test"]
    stops = re.findall("stopped: (.*?);", job.output)
    assert len(stops) == 3 and all(map(re.fullmatch, expected, stops)), stops
    assert_same_end(job, whole)


@pytest.mark.slow
def test_stopped_while_it_starts(cluster: Cluster) -> None:
    """As a time limit does that is too short for a start: it would go on for ever."""
    job = cluster.submit("starting")
    for start in range(1, 4):
        job.wait_for_output(f"start {start}] ")
        job.stop()
    job.wait("FAILED")
    assert job.ExitCode == "75:0" and job.Restarts == "2" and job.output.count("back into the queue; the next") == 2
    assert "3 starts in a row were stopped before they could save anything new" in job.output
    assert not list(job.run.parent.glob(".slurm-*"))


@pytest.mark.slow
def test_stopped_by_its_time_limit(cluster: Cluster, whole: Job) -> None:
    """The signal before the limit reaches the batch script alone; it hands it on, waits and requeues."""
    job = cluster.submit("limited", "--time=60", "--signal=B:USR1@100", slow="step=3")
    job.wait_for_step(2)
    # Two minutes from now at the most, so the signal is due; the next start has its time again.
    job.limit_to(job.minutes + 2)
    job.wait_for_output("back into the queue")
    job.limit_to(60)
    job.wait("COMPLETED")
    assert job.Restarts == "1" and "SIGUSR1: the run saves its state and stops" in job.output and "resumed in epoch " in job.output
    assert_same_end(job, whole)


@pytest.mark.slow
def test_preempted(cluster: Cluster, whole: Job) -> None:
    job = cluster.submit("preempted", slow="step=0.5")
    job.wait_for_step(FIRST_EPOCH + 2)
    cluster.command("sbatch", "--partition=urgent", "--nodes=3", "--exclusive", "--output=urgent.out", "--wrap", "sleep 3")
    job.wait("COMPLETED")
    assert job.Restarts == "1" and "resumed in epoch " in job.output
    assert_same_end(job, whole)


@pytest.mark.slow
def test_cancelled_and_submitted_again_with_more_nodes(cluster: Cluster, whole: Job) -> None:
    job = cluster.submit("grown", slow="step=0.5")
    job.wait_for_step(FIRST_EPOCH + 2)
    cluster.command("scancel", job.number)
    job.wait("CANCELLED")
    # It was asked nicely first, so nothing is lost.
    assert (job.run / "checkpoints" / "latest").read_text() == f"step-{last_step(job.run):08d}"
    grown = cluster.submit("grown", "--nodes=3").wait("COMPLETED")
    assert "3 process(es)" in grown.output and "resumed in epoch 1, after step " in grown.output
    assert_same_training(grown, whole)
    # Long after a requeued one would have started.
    assert job.JobState == "CANCELLED" and job.Restarts == "0" and "back into the queue; the next start" not in job.output


@pytest.mark.slow
def test_a_killed_worker_fails_the_job(cluster: Cluster, whole: Job) -> None:
    """As when the kernel runs out of memory: the job ends within seconds and says which worker it was; the next one goes on."""
    job = cluster.submit("killed", slow="step=0.5")
    job.wait_for_step(FIRST_EPOCH + 2)
    os.kill(job.worker(1), signal.SIGKILL)
    job.wait("FAILED", timeout=30)
    assert job.ExitCode == "137:0" and job.Restarts == "0" and "exit code 137, first in task 1 on node2" in job.output
    assert_same_end(cluster.submit("killed").wait("COMPLETED"), whole)


@pytest.mark.slow
def test_a_node_is_switched_off(cluster: Cluster, whole_on_three: Job) -> None:
    """The first one, and with it the batch script and rank 0. Three nodes are needed, so the job waits until it is back."""
    job = cluster.submit("powerless", "--nodes=3", slow="step=0.5")
    job.wait_for_step(FIRST_EPOCH + 2)
    cluster.harness("off", cluster.folder, "node1")
    wait_until(lambda: job.JobState == "PENDING", timeout=200)
    cluster.harness("on", cluster.folder, "node1")
    job.wait("COMPLETED")
    # What SLURM wanted from the node while it was off may reach it now, and stop the job once more.
    assert job.Restarts in ("1", "2") and "resumed in epoch 1, after step " in job.output
    assert_same_end(job, whole_on_three)
