"""Where a figure comes from: machine, versions and commit, which every line of results carries."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "numpy", "faiss-cpu", "faiss-gpu", "deepspeed", "triton")


def machine() -> dict[str, Any]:
    """Processor or GPU, cores, load, installed versions, commit (`-dirty` if files differ from it) and time."""
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 1),
        "versions": {package: found for package in PACKAGES if (found := _installed(package))},
        # A machine that is handed files without the repository is told the commit.
        "commit": commit.stdout.strip() or os.environ.get("DNC_COMMIT", "unknown"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def append(path: Path, line: dict[str, Any]) -> None:
    """Add one JSON line to a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def recorded_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} CPU"
