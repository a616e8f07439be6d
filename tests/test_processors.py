"""Imitated processors: the variables reach the processes that tests fork, and one failure fails the whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import processors
from tests.spawn import spawn


def test_a_name_that_does_not_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert processors.main(["avx3", "--", "tests"]) == 2
    assert capsys.readouterr().err.startswith("avx3: no such processor; there are as-it-is, torch-default, ")


def test_one_failure_fails_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    file = tmp_path / "test_here.py"
    file.write_text("import os\n\n\ndef test_it():\n    assert 'MKL_CBWR' not in os.environ\n")
    assert processors.main(["as-it-is", "mkl-compatible", "--", str(file)]) == 1
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.split()[:2] == ["as-it-is", "passed"]
    assert second.split()[:3] == ["mkl-compatible", "FAILED", "(1)"] and second.endswith("MKL_CBWR=COMPATIBLE")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sse-machine", ("DEFAULT", True, 1, "COMPATIBLE")),
        ("avx2-machine", ("AVX2", True, 1, "AVX2")),
        ("plain-two-threads", ("DEFAULT", False, 2, "COMPATIBLE")),
    ],
)
def test_workers_compute_as_on_the_imitated_processor(name: str, expected: tuple[str, bool, int, str | None]) -> None:
    settings = processors.ENVIRONMENTS[name]
    if processors.lacking(settings):
        pytest.skip(f"this processor cannot imitate {name}")
    # These tests may themselves run as on another processor.
    found = [folder for folder in sys.path if folder != processors.NO_ONEDNN["PYTHONPATH"]]
    path = os.pathsep.join([*filter(None, [settings.get("PYTHONPATH")]), *found])
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | settings | {"PYTHONPATH": path, "ONEDNN_VERBOSE": "1"}
    done = subprocess.run([sys.executable, "-m", "tests.test_processors"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str([expected] * 2)
    # What oneDNN says of itself, in the workers' own output.
    level = {"SSE41": "SSE4.1", "AVX2": "AVX2"}.get(settings.get("ONEDNN_MAX_CPU_ISA", ""))
    assert (f"cpu,isa:Intel {level}" in done.stdout) == (level is not None)


def _convolve() -> tuple[str, bool, int, str | None]:
    torch.nn.Conv2d(3, 8, 3)(torch.zeros(16, 3, 8, 8))
    return torch.backends.cpu.get_cpu_capability(), torch.backends.mkldnn.enabled, torch.get_num_threads(), os.environ.get("MKL_CBWR")


if __name__ == "__main__":
    print(spawn(_convolve, 2))
