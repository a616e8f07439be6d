"""Environment: versions, GPUs, kernels, CPU, memory, disks, shared folders and clocks, on every rank."""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from dnc_dist.base.errors import InputError
from dnc_dist.config import RunConfig
from dnc_dist.doctor.facts import ABSENT, Facts, clock_offsets, existing_parent, gather_facts
from dnc_dist.doctor.table import Check, Section
from dnc_dist.processes import distributed
from dnc_dist.processes.cores import cores_per_rank, loaders_of
from dnc_dist.trackers.wandb import wandb_route

_GB = 2**30
# Below these the hint is given; a training may still work.
_ENOUGH_MEMORY, _ENOUGH_DISK, _ENOUGH_SHARED_MEMORY, _ENOUGH_FILES = 2 * _GB, 5 * _GB, 1 * _GB, 1024
_NETWORK_FILE_SYSTEMS = re.compile(r"afs|beegfs|ceph|cifs|gpfs|lustre|nfs\d?|panfs|smb\d?|wekafs|fuse\.(ceph|glusterfs|sshfs)")
_SHARED_WITHIN_SECONDS = 20.0
# Log lines and the question which rank failed first are read by the hosts' clocks.
_MOST_SKEW_SECONDS = 1.0
# Of the packages that a plain installation has; the others are looked at where they are needed.
_SHOWN = ("python", "dnc-dist", "torch", "deepspeed", "faiss", "triton", "timm", "webdataset")


def check_env(cfg: RunConfig) -> Section:
    """Collective. Whether this is a place to train, on every rank."""
    facts, offsets = gather_facts(cfg.run.dir), clock_offsets()
    broken = any(one.import_error for one in facts)
    checks = [*_software(facts), *_devices(facts)]
    if not broken:
        checks += [_kernels(cfg), _faiss_search(), _wandb(cfg, facts[0].versions["wandb"])]
    checks += [
        *_toolchain(facts),
        *_resources(facts, cfg),
        shared_folder(cfg.run.dir, [one.host for one in facts]),
        _clocks(facts, offsets),
    ]
    hosts = list(dict.fromkeys(one.host for one in facts))
    note = f"{len(facts)} rank(s) on {len(hosts)} host(s): {', '.join(hosts[:8])}{', …' if len(hosts) > 8 else ''}"
    ranks = [asdict(one) | {"cores": len(one.cores), "clock_offset": offset} for one, offset in zip(facts, offsets, strict=True)]
    return Section("env", note, checks, {"env": {"ranks": ranks}}, final=broken)


def _software(facts: Sequence[Facts]) -> Iterator[Check]:
    mine = facts[0].versions
    for name in _SHOWN:
        absent = mine[name] == ABSENT
        if name == "faiss" and absent:
            yield Check(name, mine[name], "failed", "pip install 'dnc-dist[cpu]' or 'dnc-dist[gpu]'")
        elif name == "faiss" and "," in mine[name]:
            yield Check(name, mine[name], "warning", "they overwrite each other's files; uninstall all of them, then install one")
        elif name == "triton" and absent and facts[0].gpu is not None:
            yield Check(name, mine[name], "warning", "without it mining and loss take memory for every pair; pip install triton")
        else:
            yield Check(name, mine[name])
    errors = {rank: one.import_error for rank, one in enumerate(facts) if one.import_error}
    if errors:
        rank = min(errors)
        yield Check(
            "imports",
            f"{_on(rank, facts)}: {errors[rank]}",
            "failed",
            "repair the installation there; constraints.txt names versions that fit",
        )
    else:
        yield Check("imports", "the whole program can be imported")
    differing = [name for name in mine if len({one.versions[name] for one in facts}) > 1]
    if not differing:
        yield Check("same versions", f"on {len(facts)} rank(s)")
    for name in differing:
        other = next(rank for rank, one in enumerate(facts) if one.versions[name] != mine[name])
        value = f"{name} {mine[name]} on rank 0, {facts[other].versions[name]} on {_on(other, facts)}"
        yield Check(
            "same versions", value, "failed", "install the same versions everywhere: results and messages between ranks depend on them"
        )


def _devices(facts: Sequence[Facts]) -> Iterator[Check]:
    without = [rank for rank, one in enumerate(facts) if one.gpu is None]
    if len(without) == len(facts):
        if any(one.driver for one in facts):
            yield Check(
                "GPUs",
                "nvidia-smi lists some, but torch finds none: the CPU trains",
                "failed",
                "install a CUDA build of torch"
                if facts[0].versions["cuda"] == "none"
                else f"torch is built for CUDA {facts[0].versions['cuda']}: update the driver, and look at CUDA_VISIBLE_DEVICES",
            )
        else:
            yield Check("GPUs", "none, the CPU trains", "warning", "enough to try things out; real datasets want a GPU")
        return
    if without:
        yield Check(
            "GPUs", f"none on {_on(without[0], facts)}", "failed", "every rank needs its own; look at the driver and the job's GPUs"
        )
    yield Check("CUDA", facts[0].versions["cuda"])
    for one in dict.fromkeys(one.gpu for one in facts if one.gpu is not None):
        count = sum(other.gpu == one for other in facts)
        old = one.capability < (8, 0)
        yield Check(
            "GPU",
            f"{count} x {one.name}, {one.memory / _GB:.0f} GB, capability {one.capability[0]}.{one.capability[1]}",
            "warning" if old else "ok",
            "older than 8.0: no fused kernels and slow bf16; set engine.precision=fp32" if old else "",
        )
    for host in dict.fromkeys(one.host for one in facts):
        here = [one for one in facts if one.host == host and one.gpu is not None]
        if here and len(here) > here[0].num_gpus > 1:
            yield Check("GPUs", f"{len(here)} ranks share {here[0].num_gpus} GPUs of {host}", "failed", "start one rank per GPU (--nproc)")


def _kernels(cfg: RunConfig) -> Check:
    from dnc_dist.engine.setup import kernels_note

    notes = distributed.gather_objects(_note_or_error(lambda: kernels_note(cfg.division.kmeans_backend)))
    errors = [error for _, error in notes if error]
    if errors:
        return Check("kernels", "cannot run", "failed", errors[0])
    if len({note for note, _ in notes}) > 1:
        return Check(
            "kernels", "; ".join(sorted({note for note, _ in notes})), "failed", "set DNC_KERNELS and install triton alike on every rank"
        )
    return Check("kernels", notes[0][0].removeprefix("dnc_kernels: "))


def _faiss_search() -> Check:
    from dnc_dist.retrieval.faiss_check import faiss_note

    notes = distributed.gather_objects(_note_or_error(lambda: faiss_note(distributed.device().index)))
    error = next((error for _, error in notes if error), "")
    return Check(
        "faiss search", "cannot search" if error else "; ".join(sorted({note for note, _ in notes})), "failed" if error else "ok", error
    )


def _toolchain(facts: Sequence[Facts]) -> Iterator[Check]:
    """What Triton builds its launcher with, and where it keeps kernels: of no account without a GPU, whatever it is."""
    on_gpu = [rank for rank, one in enumerate(facts) if one.gpu is not None]
    for name, found, cure in (
        ("C compiler", [one.compiler for one in facts], "Triton needs one for its first kernel: install gcc, or set CC"),
        ("Python headers", [one.python_header for one in facts], "Triton needs Python.h for its first kernel: install python3-dev"),
    ):
        lacking = next((rank for rank in on_gpu if not found[rank]), None)
        if lacking is None:
            yield Check(name, found[on_gpu[0] if on_gpu else 0] or "none; only GPUs need it")
        else:
            yield Check(name, f"none on {_on(lacking, facts)}", "warning", cure)
    far = next((rank for rank in on_gpu if _NETWORK_FILE_SYSTEMS.fullmatch(facts[rank].kernel_cache_system or "")), None)
    one = facts[far or 0]
    value = f"{one.kernel_cache} ({one.kernel_cache_system or 'unknown file system'})"
    hint = "ranks wait for a network there; set TRITON_CACHE_DIR to a folder on a disk of each machine, or unset it"
    yield Check("kernel cache", value) if far is None else Check("kernel cache", f"{value} on {_on(far, facts)}", "warning", hint)


def _note_or_error(function: Callable[[], str]) -> tuple[str, str]:
    try:
        return function(), ""
    except InputError as error:
        return "", str(error)


def _wandb(cfg: RunConfig, version: str) -> Check:
    if cfg.tracker.kind.name != "wandb":
        return Check("W&B", f"not chosen (tracker.kind={cfg.tracker.kind.name})")
    if version == ABSENT:
        return Check("W&B", version, "warning", "pip install wandb, or set tracker.kind=jsonl; without it metrics.jsonl is all there is")
    route = distributed.broadcast_object(wandb_route() if distributed.is_main() else "")
    offline = "`wandb sync` sends runs later; `wandb login` or WANDB_API_KEY sends them at once"
    return Check("W&B", f"{version}, {route}", "ok", offline if route == "offline" else "")


def _resources(facts: Sequence[Facts], cfg: RunConfig) -> Iterator[Check]:
    hosts = [[one for one in facts if one.host == host] for host in dict.fromkeys(one.host for one in facts)]
    cores = cores_per_rank((one.host, one.cores, one.core_quota) for one in facts)
    threads = max(one.threads for one in facts)
    crowded = threads > max(1.0, cores)
    advice = f"threads wait for each other; set OMP_NUM_THREADS={max(1, int(cores))}" if crowded else ""
    yield Check("CPU", f"{cores:g} core(s) and {threads} thread(s) per rank", "warning" if crowded else "ok", advice)
    memories = [here[0].memory / len(here) for here in hosts if here[0].memory is not None]
    yield _size("memory per rank", min(memories, default=None), _ENOUGH_MEMORY, "give the job more, or start fewer ranks (--nproc)")
    yield _size(
        "free below run.dir",
        min(one.run_disk for one in facts),
        _ENOUGH_DISK,
        f"checkpoints go to run.dir={cfg.run.dir}; make room, or set it",
    )
    temporary = min(one.temporary_disk for one in facts)
    yield _size("free for temporary files", temporary, _ENOUGH_DISK, f"{tempfile.gettempdir()}; make room, or set TMPDIR")
    shared = min((one.shared_memory for one in facts if one.shared_memory is not None), default=None)
    yield _size(
        "/dev/shm",
        shared,
        max(_ENOUGH_SHARED_MEMORY, _loaded_ahead(cfg, max(map(len, hosts)), loaders_of(cores, on_gpu=facts[0].gpu is not None))),
        "loader workers pass images through it; in Docker, start with --shm-size=8g, or set data.workers=0",
    )
    files = min(one.open_files for one in facts)
    few = files < _ENOUGH_FILES
    yield Check("open files", f"at most {files:,}", "warning" if few else "ok", "loaders need many: `ulimit -n 65536`" if few else "")


def _loaded_ahead(cfg: RunConfig, ranks: int, workers: int) -> int:
    """Bytes of the batches that the loader workers of so many ranks keep ready, two each, in training and in an evaluation beside it.

    ``workers`` of a rank, where the configuration leaves their number open.
    """
    workers = workers if cfg.data.workers == "auto" else cfg.data.workers
    rows = -(-cfg.schedule.batch_size // distributed.world_size()) + cfg.evaluation.batch_size
    return ranks * workers * 2 * rows * 3 * cfg.data.image_size**2


def _size(name: str, size: float | None, enough: int, hint: str) -> Check:
    if size is None:
        return Check(name, "this system does not tell")
    value = f"{size / _GB:,.1f} GB"
    return Check(name, value) if size >= enough else Check(name, value, "warning", hint)


def shared_folder(run_dir: Path, hosts: Sequence[str]) -> Check:
    """Collective. Whether every rank sees what rank 0 writes below ``run_dir``, and rank 0 what they write; nothing is left there."""
    folder, problem = distributed.broadcast_object(_open_meeting(run_dir) if distributed.is_main() else None)
    if problem:
        return Check("run.dir", f"{folder.parent}: {problem}", "failed", "set run.dir to a folder that can be written")
    errors = distributed.gather_objects(_eventually(lambda: _attend(folder)))
    if distributed.is_main():
        errors = [error or _eventually((folder / str(rank)).read_text) for rank, error in enumerate(errors)]
        shutil.rmtree(folder)
    missing = [rank for rank, error in enumerate(distributed.broadcast_object(errors)) if error]
    if missing:
        value = f"{folder.parent} of rank 0 is not shared with rank {missing[0]} ({hosts[missing[0]]})"
        return Check("run.dir", value, "failed", "set run.dir to a folder that all machines share")
    return Check("run.dir", f"{folder.parent} is written and read by all ranks")


def _open_meeting(run_dir: Path) -> tuple[Path, str]:
    """A new folder below ``run_dir``, and why it cannot be made."""
    folder = existing_parent(run_dir) / f".dnc-dist-doctor-{secrets.token_hex(4)}"
    try:
        folder.mkdir()
    except OSError as error:
        return folder, str(error.strerror)
    return folder, ""


def _attend(folder: Path) -> None:
    (folder / str(distributed.rank())).write_text("here")


def _eventually(action: Callable[[], object]) -> str:
    """Try for some seconds, since a network file system may be late; why it failed, or empty."""
    deadline = time.monotonic() + _SHARED_WITHIN_SECONDS
    while True:
        try:
            action()
            return ""
        except OSError as error:
            if time.monotonic() > deadline:
                return str(error.strerror)
        time.sleep(0.1)


def _clocks(facts: Sequence[Facts], offsets: Sequence[float]) -> Check:
    worst = max(range(len(offsets)), key=lambda rank: abs(offsets[rank]))
    if abs(offsets[worst]) <= _MOST_SKEW_SECONDS:
        return Check("clocks", f"apart by {abs(offsets[worst]):.4f} s at most")
    value = f"{_on(worst, facts)} is {offsets[worst]:+.1f} s from rank 0"
    return Check("clocks", value, "warning", "logs of the machines cannot be compared; start NTP (chrony)")


def _on(rank: int, facts: Sequence[Facts]) -> str:
    return f"rank {rank} ({facts[rank].host})"
