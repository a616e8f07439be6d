"""Run tests as if on other processors: ``python tests/processors.py NAME... -- PYTEST-ARGUMENTS``, or all of them; then a table.

Libraries choose their instructions by the processor, and each choice adds up in another order. Variables make them choose as they
would on another one: a test that passes here by its rounding fails there. `make test-processors` is the way to call it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
# torch has no variable that switches oneDNN off. Every interpreter imports this folder's `sitecustomize`, and workers are forked from one.
NO_ONEDNN = {"PYTHONPATH": str(HERE / "without_onednn")}
# Threads that wait for each other must not keep the cores busy: tests run more processes than there are.
TWO_THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "as-it-is": {},
    "torch-default": {"ATEN_CPU_CAPABILITY": "default"},
    "torch-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "torch-avx512": {"ATEN_CPU_CAPABILITY": "avx512"},
    "onednn-sse41": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "onednn-avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "onednn-off": NO_ONEDNN,
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "mkl-avx2": {"MKL_CBWR": "AVX2"},
    "two-threads": TWO_THREADS,
    # Whole machines: one with SSE only, one with AVX2, one with AVX-512 but without AMX; and what is left when all of them are off.
    "sse-machine": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
    "avx2-machine": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "avx512-machine": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_CBWR": "AVX512"},
    "plain-two-threads": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"} | TWO_THREADS | NO_ONEDNN,
}
_LEVELS = ["default", "avx2", "avx512"]


def lacking(settings: dict[str, str]) -> bool:
    """Whether this processor lacks the instructions that torch would use without asking. Other libraries only ever use fewer."""
    here = _LEVELS.index(torch.backends.cpu.get_cpu_capability().lower())
    return _LEVELS.index(settings.get("ATEN_CPU_CAPABILITY", "default")) > here


def main(arguments: list[str]) -> int:
    """Exit code 0 if the tests passed in every environment, 1 if they failed in one, 2 for a name that does not exist."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    names, rest = arguments[:at] or list(ENVIRONMENTS), arguments[at + 1 :]
    if unknown := [name for name in names if name not in ENVIRONMENTS]:
        print(f"{', '.join(unknown)}: no such processor; there are {', '.join(ENVIRONMENTS)}", file=sys.stderr)
        return 2
    table, failed = [], False
    for name in names:
        settings = ENVIRONMENTS[name]
        shown = " ".join(f"{key}={value}" for key, value in settings.items())
        if lacking(settings):
            table.append(f"{name:18} not on this processor      {shown}")
            continue
        print(f"==== {name} {shown}", flush=True)
        start = time.monotonic()
        code = subprocess.run([sys.executable, "-m", "pytest", *rest], env=os.environ | settings, cwd=HERE.parent).returncode
        failed |= code != 0
        table.append(f"{name:18} {'passed' if code == 0 else f'FAILED ({code})':12} {time.monotonic() - start:6.0f} s      {shown}")
    print("\n".join(["==== all processors", *table]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
