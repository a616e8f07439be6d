"""What one rank sees of its machine: plain values that can be gathered and compared."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import dnc_dist
from dnc_dist.processes import distributed
from dnc_dist.processes.cores import quota, usable_cores
from dnc_kernels import toolchain

# What is compared between ranks, and the names that its distributions have.
_PACKAGES = {
    "torch": ("torch",),
    "deepspeed": ("deepspeed",),
    "faiss": ("faiss-gpu", "faiss-gpu-cu12", "faiss-cpu"),
    "triton": ("triton", "pytorch-triton"),
    "timm": ("timm",),
    "webdataset": ("webdataset",),
    "wandb": ("wandb",),
    "numpy": ("numpy",),
    "scipy": ("scipy",),
    "pillow": ("pillow",),
    "simplejpeg": ("simplejpeg",),
}
ABSENT = "not installed"
_ROUNDS = 11
# The part of the program that needs nearly all the others.
_WHOLE_PROGRAM = "dnc_dist.engine.trainer"
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Gpu:
    """This rank's GPU; memory in bytes."""

    name: str
    memory: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """One rank's view. Sizes in bytes; None: this system does not tell.

    ``import_error`` why the program cannot be imported, or empty; ``cores`` the CPUs that this rank may use, and ``core_quota`` how
    many at a time; ``run_disk`` and ``temporary_disk`` what is free there; ``driver`` whether the driver has GPUs that this process may
    use; ``compiler`` and ``python_header`` what Triton builds its launcher with, empty if absent; ``kernel_cache`` and
    ``kernel_cache_system`` where it keeps compiled kernels, and the kind of that file system.
    """

    host: str
    versions: dict[str, str]
    import_error: str
    gpu: Gpu | None
    num_gpus: int
    driver: bool
    cores: frozenset[int]
    core_quota: float | None
    threads: int
    memory: int | None
    run_disk: int
    temporary_disk: int
    shared_memory: int | None
    open_files: int
    compiler: str
    python_header: str
    kernel_cache: str
    kernel_cache_system: str | None


def gather_facts(run_dir: Path) -> list[Facts]:
    """Collective. What every rank sees, in rank order."""
    shm, header, kernels = Path("/dev/shm"), toolchain.python_header(), toolchain.cache_folder()
    return distributed.gather_objects(
        Facts(
            host=socket.gethostname(),
            versions=_versions(),
            import_error=_import_error(),
            gpu=_gpu(),
            num_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
            driver=_driver_has_gpus(),
            cores=usable_cores(),
            core_quota=quota(),
            threads=torch.get_num_threads(),
            memory=_available_memory(),
            run_disk=shutil.disk_usage(existing_parent(run_dir)).free,
            temporary_disk=shutil.disk_usage(tempfile.gettempdir()).free,
            shared_memory=shutil.disk_usage(shm).total if shm.is_dir() else None,
            open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            compiler=toolchain.compiler() or "",
            python_header=str(header) if header.is_file() else "",
            kernel_cache=str(kernels),
            kernel_cache_system=_file_system(kernels),
        )
    )


def existing_parent(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def clock_offsets() -> list[float]:
    """Collective. Seconds by which each rank's clock is ahead of rank 0's: the median over several rounds.

    A rank leaves a collective within about one round trip of the others, so they look at their clocks at nearly the same time.
    """
    seen = []
    for _ in range(_ROUNDS):
        distributed.any_rank(False)
        seen.append(time.time())
    times = torch.tensor(distributed.gather_objects(seen), dtype=torch.float64)
    return (times - times[0]).median(dim=1).values.tolist()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "dnc-dist": dnc_dist.__version__, "cuda": torch.version.cuda or "none"}
    for name, distributions in _PACKAGES.items():
        found[name] = ", ".join(filter(None, map(_version, distributions))) or ABSENT
    return found


def _version(distribution: str) -> str:
    """Its version, with the name where that says more than the version; empty if it is not installed."""
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"{version} ({distribution})" if distribution.startswith("faiss") else version


def _import_error() -> str:
    try:
        importlib.import_module(_WHOLE_PROGRAM)
    except Exception as error:  # whatever a broken installation raises is what is looked for
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return ""


def _driver_has_gpus() -> bool:
    """Whether nvidia-smi lists a GPU and CUDA_VISIBLE_DEVICES does not hide all of them; also if it does not answer, as it should."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1", "NoDevFiles"):
        return False
    try:
        return "GPU 0:" in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False).stdout
    except subprocess.TimeoutExpired:
        return True


def _file_system(path: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str | None:
    """The kind of file system that a folder lies on, or would lie on."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    place, found = existing_parent(path).resolve(), (0, "")
    for line in lines:  # "36 35 98:0 / /mount/point options tags - type source options", a space as \040; the later covers the earlier
        left, _, right = line.partition(" - ")
        mount = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), left.split()[4])
        if place.is_relative_to(mount) and len(mount) >= found[0]:
            found = (len(mount), right.split()[0])
    return found[1] or None


def _gpu() -> Gpu | None:
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(distributed.device())
    return Gpu(device.name, device.total_memory, (device.major, device.minor))


def _available_memory() -> int | None:
    """Bytes that this process may still take: what the machine has left, or less if its cgroups are limited."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip()
    except OSError:
        return None
    left = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    inside = _CGROUPS / group.lstrip("/")
    for folder in (inside, *inside.parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
            left.append(int(most) - int(used.read_text()))
    return min(left, default=None)
