"""A start that cannot work ends soon, with exit code 2 and one message that names the variable; what listens, listens on one address."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from dnc_dist.base.errors import InputError
from dnc_dist.base.foreign import environment_int
from dnc_dist.processes import distributed, rendezvous
from dnc_dist.processes.launch import workers
from dnc_dist.processes.launch.peers import Alone
from tests.run_fixtures import dnc, make_dataset, start, write_config
from tests.spawn import spawn

QUICK = ("--set", "engine.timeout=3", "--set", "engine.stall_timeout=3")
RANKS = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "PATH": "/nowhere",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendezvous")
    write_config(folder, folder / "data")
    return folder


@pytest.fixture
def silent() -> Iterator[str]:
    """A port on which somebody listens and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield str(server.getsockname()[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "abc"}, "the environment variable RANK is 'abc', not a whole number from 0"),
        ({"WORLD_SIZE": "0"}, "the environment variable WORLD_SIZE is '0', not a whole number from 1"),
        ({"RANK": "2"}, "the environment variable RANK is '2', not a whole number from 0 to 1"),
        ({"LOCAL_RANK": "-1"}, "the environment variable LOCAL_RANK is '-1', not a whole number from 0"),
        ({"MASTER_PORT": "70000"}, "the environment variable MASTER_PORT is '70000', not a whole number from 1 to 65535"),
        (
            {"MASTER_ADDR": "no.such.invalid"},
            "MASTER_ADDR=no.such.invalid MASTER_PORT=29511: this machine finds no address for that",
        ),
        ({"MASTER_ADDR": "a" * 70 + ".invalid"}, "this machine finds no address for that name ("),
        (
            {"RANK": "1"},
            "rank 1 of 2 could not reach rank 0 at MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 (Connection refused): was it",
        ),
        ({}, "rank(s) 1 of 2 did not come to MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 in time; start all, with the same variables"),
    ],
)
def test_wrong_variables_of_torchrun(changes: dict[str, str], message: str, place: Path) -> None:
    done = dnc("train", "run.yaml", *QUICK, folder=place, env=RANKS | changes, timeout=30)
    assert done.code == 2 and "Traceback" not in done.err and done.err.count("error") == 1 and message in done.err, done


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            "scontrol, which knows its hosts, cannot be run (No such file or directory); set MASTER_ADDR for all",
        ),
        ({"SLURM_NTASKS": "two"}, "the environment variable SLURM_NTASKS is 'two', not a whole number from 1"),
        ({"SLURM_LOCALID": ""}, "the environment variable SLURM_LOCALID is '', not a whole number from 0"),
        ({"MASTER_ADDR": "127.0.0.1", "SLURM_JOB_ID": "7+1"}, "the environment variable SLURM_JOB_ID is '7+1', not a whole number from 0"),
    ],
)
def test_wrong_variables_of_slurm(changes: dict[str, str], message: str, place: Path) -> None:
    assert message in dnc("train", "run.yaml", *QUICK, folder=place, env=SLURM | changes, timeout=30).error


def test_scontrol_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'no such node' >&2\nexit 1\n")
    (tmp_path / "scontrol").chmod(0o755)
    for name, value in (SLURM | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}).items():
        monkeypatch.setenv(name, value)
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"scontrol finds no hosts in the node list 'n\[1-2\]' \('no such node'\); set MASTER_ADDR"):
        rendezvous.read_environment()


def test_ports_of_others(place: Path, silent: str) -> None:
    """Rank 0 cannot open it; rank 1 finds somebody there who is no store."""
    first = start(["train", "run.yaml", *QUICK], place, env=RANKS | {"MASTER_PORT": silent})
    second = start(["train", "run.yaml", *QUICK], place, env=RANKS | {"MASTER_PORT": silent, "RANK": "1", "LOCAL_RANK": "1"})
    where = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={silent}"
    assert first.wait(30).error == f"{where} cannot be opened on rank 0 (Address already in use); choose another MASTER_PORT"
    done = second.wait(30)
    assert done.code == 2 and "Traceback" not in done.err
    assert f"{where} takes connections but does not answer as torch's store does; another program may have the port" in done.err


def _listening(process: psutil.Process | None = None) -> list[str]:
    """Addresses on which a process, by default this one, listens."""
    return [one.laddr.ip for one in (process or psutil.Process()).net_connections("inet") if one.status == psutil.CONN_LISTEN]


@pytest.mark.parametrize("world", [1, 2])
def test_ranks_of_one_machine_listen_on_the_loopback_only(world: int) -> None:
    found = spawn(_listening, world)
    assert all(found) and {address for addresses in found for address in addresses} == {"127.0.0.1"}


def test_the_launcher_of_one_machine_holds_its_store_on_the_loopback() -> None:
    before = set(_listening())
    alone = Alone(2)
    alone.open_store()
    assert alone.store[0] == "127.0.0.1" and set(_listening()) - before <= {"127.0.0.1"} and "127.0.0.1" in _listening()


@pytest.mark.parametrize("opened", [False, True])
def test_the_launcher_of_one_machine_leaves_no_port(opened: bool) -> None:
    alone = Alone(2)
    if opened:
        alone.open_store()
    socket.create_connection(alone.store).close()
    alone.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(alone.store)


def test_a_launch_that_fails_leaves_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Alone] = []
    monkeypatch.setattr(workers, "Alone", lambda count: made.append(Alone(count)) or made[0])
    with pytest.raises(FileNotFoundError):
        workers.launch_workers(["/nowhere/python"], 2)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(made[0].store)


@pytest.mark.slow
def test_nothing_of_a_launch_on_one_machine_listens_for_others(tmp_path: Path) -> None:
    """The launcher with torch's store, workers with gloo, their loader processes, and the service of W&B, from start to end."""
    write_config(
        tmp_path,
        make_dataset(tmp_path),
        data={"workers": 1},
        schedule={"epochs": 1},
        division={"num_learners": 1, "conquer_from": None},
        tracker={"kind": "wandb"},
    )
    environment = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0", "WANDB_MODE": "offline"}
    launcher = start(["launch", "run.yaml", "--nproc", "2"], tmp_path, env=environment)
    found: set[tuple[int, str]] = set()
    names = set()
    while launcher.alive():
        with suppress(psutil.Error):
            for process in [psutil.Process(launcher.pid), *psutil.Process(launcher.pid).children(recursive=True)]:
                with suppress(psutil.Error):
                    names.add(process.name())
                    found |= {(process.pid, address) for address in _listening(process)}
        time.sleep(0.2)
    assert launcher.wait().result["epoch"] == 1
    assert any("wandb" in name for name in names), names
    assert len({pid for pid, _ in found}) >= 3 and {address for _, address in found} <= {"127.0.0.1", "::1"}, found


def test_a_process_that_sees_one_gpu_uses_it_whatever_its_local_rank_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under ``srun --gpus-per-task=1``; DeepSpeed takes LOCAL_RANK for the number of a device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for local, devices, expected in ((3, 1, 0), (3, 4, 3), (0, 1, 0), (5, 4, 1)):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setattr(distributed, "_local_rank", None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda devices=devices: devices)
        assert distributed._claim_device() == torch.device("cuda", expected)
        assert environment_int("LOCAL_RANK") == expected and distributed.device() == torch.device("cuda", expected)
        # Who downloads for this machine, say, is still told apart.
        assert distributed.local_rank() == local
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(distributed, "_local_rank", None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed._claim_device() is None and environment_int("LOCAL_RANK") == 3
