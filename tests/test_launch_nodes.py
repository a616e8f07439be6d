"""`launch` on several machines, which are hosts in network namespaces: one run, one curve, and one cause when something dies anywhere.

The trainings are real; where only the launchers matter, the workers are small scripts that sum numbers with gloo.
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

from tests.network_namespaces import Host, missing, network
from tests.run_fixtures import assert_same_run, last_step, make_dataset, start, wait_until, write_config

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

RDZV = "10.77.0.1:29500"
ALPHA, BETA, GAMMA = (f"{name} (10.77.0.{number})" for number, name in enumerate(("alpha", "beta", "gamma"), 1))
WAITING = f"1 of 2 machines is here ({ALPHA}); waiting for the others"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "GLOO", "NCCL"))} | {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}

# A launch of small workers: each joins the group, says so, sums until it is stopped, and does what the test adds.
SCRIPT = """
import sys
from pathlib import Path
from dnc_dist.processes.launch import launch_workers
from dnc_dist.base.errors import InputError
body, rdzv, nproc, nnodes, wait = sys.argv[1:]
options = {"nnodes": int(nnodes), "rendezvous": rdzv, "wait": float(wait), "secret_file": Path("secret")}
try:
    sys.exit(launch_workers([sys.executable, "-c", body], int(nproc), **options))
except InputError as error:
    sys.exit(f"error: {error}")
"""
WORKER = """
import os, signal, sys, time
from pathlib import Path
import torch
from dnc_dist.processes import distributed
from dnc_dist.base.errors import InputError, Stopped
from dnc_dist.processes.worker import run_worker
def work():
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    distributed.init(120)
    rank, step = distributed.rank(), 0
    while True:
        stop = distributed.all_reduce_sum(torch.tensor(float(bool(asked))))
        step += 1
        if step == 2:
            Path(f"{rank}.ready").write_text(str(distributed.world_size()))
        if stop:
            distributed.shutdown()
            raise Stopped("saved")
        happen(rank, step)
        time.sleep(0.05)
def happen(rank, step):
    pass
"""
END = "\nsys.exit(run_worker(work))\n"


class Launched:
    """The launchers of one run, one on each host."""

    def __init__(self, hosts: Sequence[Host], processes: Sequence[subprocess.Popen[str]], folder: Path) -> None:
        self.hosts, self.processes, self.folder = hosts, processes, folder

    def wait_until_ready(self, ranks: int) -> None:
        wait_until(lambda: self.ended() or all((self.folder / f"{rank}.ready").exists() for rank in range(ranks)), 120)
        assert not self.ended(), self.end()

    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def end(self, within: float = 120) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each, all of which must end in time; nothing may be left running."""
        ends = []
        deadline = time.monotonic() + within
        for process in self.processes:
            out, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            ends.append((process.returncode, out, err))
        return ends


def launch_script(
    hosts: Sequence[Host], folder: Path, body: str = "", *, nproc: int = 1, nnodes: int = 0, wait: float = 60, rdzv: str = RDZV
) -> Launched:
    """A launch of the small workers; ``body`` defines what happens in them."""
    arguments = [WORKER + body + END, rdzv, str(nproc), str(nnodes or len(hosts)), str(wait)]
    return Launched(hosts, [host.start([sys.executable, "-c", SCRIPT, *arguments], folder, ENVIRONMENT) for host in hosts], folder)


def launch(
    hosts: Sequence[Host], folder: Path, *options: str, nproc: int = 1, nnodes: int = 0, folders: Sequence[str] = (".", ".")
) -> Launched:
    """`dnc-dist launch run.yaml` on all hosts, which may be in different folders."""
    counts = ["--nproc", str(nproc), "--nnodes", str(nnodes or len(hosts))]
    command = [sys.executable, "-m", "dnc_dist", "launch", "run.yaml", *counts, "--rdzv", RDZV, *options]
    processes = [host.start(command, folder / place, ENVIRONMENT) for host, place in zip(hosts, folders, strict=False)]
    return Launched(hosts, processes, folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes")
    make_dataset(folder)
    write_config(
        folder, folder / "data", division={"num_learners": 2, "conquer_from": 2}, schedule={"epochs": 3}, checkpoint={"every_steps": 3}
    )
    return folder


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Sequence[Host]]:
    with network(2, tmp_path) as net:
        yield net.hosts


def on_one_machine(place: Path, world: int) -> dict[str, object]:
    """The same training as so many processes of this machine."""
    ranks = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29533"}
    arguments = ["train", "run.yaml", "--set", f"run.name=whole-{world}"]
    workers = [start(arguments, place, env={**ranks, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
    first, *_ = [worker.wait() for worker in workers]
    return first.result


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_everywhere_and_the_same_command_goes_on(place: Path, hosts: Sequence[Host]) -> None:
    """SIGKILL of rank 1 on the second host; then the same command at once, to the curve of one machine with two processes."""
    whole = on_one_machine(place, 2)
    run = place / "runs" / "run"
    first = launch(hosts, place)
    wait_until(lambda: last_step(run) >= 8 or first.ended())
    (worker,) = hosts[1].pids("RANK=1", "dnc_dist", "train")
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    ends = first.end(within=15)
    assert time.monotonic() - killed < 10
    assert [code for code, _, _ in ends] == [1, 1]
    for _, _, err in ends:
        assert err.splitlines()[-1] == f"rank 1 on {BETA} was killed by SIGKILL" and "Traceback" not in err
    assert hosts[0].pids("dnc_dist") == hosts[1].pids("dnc_dist") == []

    (code, out, err), (other, other_out, other_err) = launch(hosts, place).end()
    assert (code, other) == (0, 0), err + other_err
    assert json.loads(out.splitlines()[-1].removeprefix("RESULT ")) | {"run": ""} == whole | {"run": ""}
    assert_same_run(run, place / "runs" / "whole-2")
    assert other_out == "" and "resumed in epoch" in out
    said = f"{BETA}: machine 2 of 2, rank 1 of 2; GLOO_SOCKET_IFNAME eth0, NCCL_SOCKET_IFNAME =eth0; rank 0 writes on {ALPHA}"
    assert other_err.splitlines()[-1] == said


@pytest.mark.slow
def test_two_processes_on_each_of_two_hosts(place: Path, hosts: Sequence[Host]) -> None:
    """SIGTERM to the launcher on the second host: all save and end with 75; then to the end, with the curve of four processes."""
    name = ["--set", "run.name=four"]
    first = launch(hosts, place, *name, nproc=2)
    wait_until(lambda: last_step(place / "runs" / "four") >= 4 or first.ended())
    (launcher,) = hosts[1].pids("dnc_dist", "launch")
    os.kill(launcher, signal.SIGTERM)
    (code, _, err), (other, _, other_err) = first.end(within=60)
    assert (code, other) == (75, 75), err + other_err
    assert f"{BETA}: SIGTERM; the workers save and stop (at most 300 s)" in err and err.count("stopped: ") == 1
    assert "SIGTERM: the workers save and stop (at most 300 s)" in other_err

    ends = launch(hosts, place, *name, nproc=2).end()
    assert [code for code, _, _ in ends] == [0, 0], ends
    whole = on_one_machine(place, 4)
    assert json.loads(ends[0][1].splitlines()[-1].removeprefix("RESULT ")) | {"run": ""} == whole | {"run": ""}
    assert_same_run(place / "runs" / "four", place / "runs" / "whole-4")


@pytest.mark.slow
def test_wrong_input_on_one_host_only(place: Path, hosts: Sequence[Host], tmp_path: Path) -> None:
    """The second host lacks the data: nothing is trained, and everybody says what is missing where."""
    for name in ("alpha", "beta"):
        (tmp_path / name).mkdir()
        shutil.copy(place / "run.yaml", tmp_path / name)
    shutil.copytree(place / "data", tmp_path / "alpha" / "data")
    ends = launch(hosts, tmp_path, "--set", "data.root=data", "--set", f"run.dir={tmp_path / 'runs'}", folders=("alpha", "beta")).end()
    for code, _, err in ends:
        assert code == 2, err
        assert re.match(f"error: rank 1 on {re.escape(BETA)}: .*beta/data holds no prepared data set", err.splitlines()[-1])


@pytest.mark.slow
def test_machines_that_start_different_runs_are_told(place: Path, hosts: Sequence[Host]) -> None:
    first, second = launch(hosts[:1], place, nnodes=2), launch(hosts[1:], place, "--set", "optim.lr=1", nproc=2, nnodes=2)
    for code, _, err in [*first.end(), *second.end()]:
        assert code == 2
        assert err.splitlines()[-1] == (
            f"error: the machines do not start the same: --nproc is 1 on alpha and 2 on {BETA}, "
            f"optim.lr is 0.003 on alpha and 1.0 on {BETA}; start the same command on all of them"
        )


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_the_error_of_a_rank_is_shown_everywhere(nproc: int, hosts: Sequence[Host], tmp_path: Path) -> None:
    """The peers of the failed rank hang, as NCCL's do; nobody waits for them."""
    body = """
def happen(rank, step):
    if rank == 1 and step == 5:
        raise RuntimeError("the real reason")
    while step == 5:
        time.sleep(1)
"""
    launched = launch_script(hosts, tmp_path, body, nproc=nproc)
    launched.wait_until_ready(2 * nproc)
    ends = launched.end(within=15)
    where = BETA if nproc == 1 else ALPHA
    for code, _, err in ends:
        assert code == 1 and err.count("Traceback") == 1
        assert err.splitlines()[-1] == f"rank 1 on {where} failed: RuntimeError: the real reason"
    assert hosts[0].pids() == hosts[1].pids() == []


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_launcher_makes_all_save_and_stop(victim: int, hosts: Sequence[Host], tmp_path: Path) -> None:
    launched = launch_script(hosts, tmp_path)
    launched.wait_until_ready(2)
    os.kill(hosts[victim].pids(SCRIPT)[0], signal.SIGKILL)
    code, _, err = launched.end(within=20)[1 - victim]
    assert code == 75, err
    gone = f"{(ALPHA, BETA)[victim]}: its launcher was killed, or has ended"
    assert f"{gone}; the workers save and stop (at most 60 s)" in err.splitlines()
    assert err.splitlines()[-1] == f"{gone}; the other workers have stopped"
    wait_until(lambda: hosts[0].pids() == hosts[1].pids() == [], 10)


@pytest.mark.slow
def test_a_cut_cable_ends_both_sides(tmp_path: Path) -> None:
    """Nobody is told: packets just stop. Gloo would wait for its timeout, the launchers do not."""
    with network(2, tmp_path) as net:
        launched = launch_script(net.hosts, tmp_path)
        launched.wait_until_ready(2)
        net.cut(net.hosts[1])
        start = time.monotonic()
        ends = launched.end(within=60)
        assert 25 < time.monotonic() - start < 45
        for (code, _, err), other in zip(ends, (BETA, ALPHA), strict=True):
            assert code == 1
            assert err.splitlines()[-1] == f"{other}: nothing was heard of it for 30 s; it is down, or the network between"
        assert net.hosts[0].pids() == net.hosts[1].pids() == []


@pytest.mark.slow
def test_a_host_that_is_switched_off_is_named_on_the_others(tmp_path: Path) -> None:
    with network(3, tmp_path) as net:
        launched = launch_script(net.hosts, tmp_path)
        launched.wait_until_ready(3)
        net.hosts[2].off()
        for code, _, err in launched.end(within=30)[:2]:
            assert code == 1
            assert err.splitlines()[-1].startswith(f"{GAMMA}: its launcher was killed, or has ended")


@pytest.mark.slow
def test_a_machine_that_does_not_come(hosts: Sequence[Host], tmp_path: Path) -> None:
    """The first host waits for its time; the second one finds nobody there; a stop while waiting is one."""
    (code, _, err), *_ = launch_script(hosts[:1], tmp_path, nnodes=2, wait=3).end()
    assert code == 1
    assert err.splitlines() == [
        WAITING,
        f"error: 1 of 2 machines is here ({ALPHA}) at {RDZV} after 3 s; start the same command on the others, too",
    ]
    (code, _, err), *_ = launch_script(hosts[1:], tmp_path, nnodes=2, wait=3).end()
    assert code == 1
    assert err.splitlines() == [
        f"waiting at most 3 s for {RDZV}: Connection refused",
        f"error: no start at {RDZV} (--rdzv) within 3 s: Connection refused",
    ]
    launched = launch_script(hosts[:1], tmp_path, nnodes=2)
    assert launched.processes[0].stderr is not None
    assert launched.processes[0].stderr.readline() == WAITING + "\n"
    os.kill(hosts[0].pids(SCRIPT)[0], signal.SIGINT)
    assert launched.end(within=10) == [(75, "", "stopped: SIGINT before the workers were started\n")]


# Beside the launch itself: what its machine sends is kept for others to send it again.
RECORDING = """
from dnc_dist.processes.launch import channel, meeting
answer, seal = channel.answer, channel.Channel.seal
def keep(part):
    with open("recorded", "ab") as file:
        file.write(part)
    return part
meeting.answer = lambda *args: keep(answer(*args))
channel.Channel.seal = lambda self, message: keep(seal(self, message))
"""
LISTENING = """
import psutil
def happen(rank, step):
    if step == 20:
        tree = [psutil.Process(), psutil.Process().parent()]
        found = {one.laddr for process in tree for one in process.net_connections("inet") if one.status == psutil.CONN_LISTEN}
        Path(f"{rank}.ports").write_text("\\n".join(address.ip for address in found))
    if step == 40:
        os.kill(os.getppid(), signal.SIGTERM) if rank == 0 else None
"""


@pytest.mark.slow
def test_two_strangers_at_the_port_change_nothing(tmp_path: Path) -> None:
    """Hosts that know the address but not the secret: garbage, a recorded session, a flood, long, deep and slow lines, from before
    the launch to after its end. And nothing listens but on the address of --rdzv and that of the interface to the others."""
    environment = ENVIRONMENT | {"DNC_LAUNCH_SECRET": "the same in both launches, so that a record is of use"}
    with network(4, tmp_path) as net:

        def run(script: str) -> list[tuple[int, str, str]]:
            arguments = [WORKER + LISTENING + END, RDZV, "1", "2", "60"]
            command = [sys.executable, "-c", script, *arguments]
            return Launched(net.hosts[:2], [host.start(command, tmp_path, environment) for host in net.hosts[:2]], tmp_path).end()

        alone = run(RECORDING + SCRIPT)
        assert [code for code, _, _ in alone] == [75, 75], alone
        recorded = (tmp_path / "recorded").read_bytes()
        assert b'"card": {' in recorded
        for number in range(2):
            (tmp_path / f"{number}.ports").unlink()
        attack = [sys.executable, "-m", "tests.strangers", RDZV, "recorded"]
        root = str(Path(__file__).resolve().parent.parent)
        strangers = [host.start(attack, tmp_path, environment | {"PYTHONPATH": root}) for host in net.hosts[2:]]
        disturbed = run(SCRIPT)
        (tmp_path / "over").touch()
        told = [json.loads(stranger.communicate(timeout=60)[0]) for stranger in strangers]
        assert all(connections > 300 and told == 0 for connections, told in told), told
        assert [code for code, _, _ in disturbed] == [75, 75], disturbed
        for (_, _, before), (_, _, after) in zip(alone, disturbed, strict=True):
            kept = [line for line in after.splitlines() if not line.startswith(("refused 10.77.0.", "waiting at most"))]
            assert "Traceback" not in after, after[:3000]
            assert sorted(kept) == sorted(line for line in before.splitlines() if not line.startswith("waiting at most"))
        assert sum("refused 10.77.0." in line for line in disturbed[0][2].splitlines()) == 1
        for number, (_, address) in enumerate((("alpha", "10.77.0.1"), ("beta", "10.77.0.2"))):
            assert set((tmp_path / f"{number}.ports").read_text().split()) == {address}
