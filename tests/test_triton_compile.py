"""What the compiler makes of the default configurations for an A100 and an H100, without a GPU: no spill, tensor cores, wide loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.machine_code import COLUMN_LOOPS
from bench.resources import SHARED_LIMIT, launched_kernels

# The compiler takes a minute of both cores, for kernels that change rarely.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def report() -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT / "kernels")
    command = [sys.executable, "-m", "bench.compiled"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=840, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def named(lines: list[dict]) -> list[str]:
    shown = ("stack", "spills", "registers", "shared", "products", "wgmma", "mma", "loads_16_bytes", "variant")
    return [f"{line['kernel']} for sm_{line['architecture']}, {line['case']}: { {name: line[name] for name in shown} }" for line in lines]


def test_every_kernel_is_compiled(report):
    kernels = launched_kernels()
    assert kernels
    for architecture in SHARED_LIMIT:
        assert kernels - {line["kernel"] for line in report["kernels"] if line["architecture"] == architecture} == set()


def test_nothing_spills(report):
    assert named([line for line in report["kernels"] if line["stack"] or line["spills"]]) == []


def test_the_pairs_of_every_kernel_that_goes_through_tiles_are_counted(report):
    counted = [line for line in report["kernels"] if line["kernel"] in COLUMN_LOOPS]
    assert {line["kernel"] for line in counted} == set(COLUMN_LOOPS)
    assert all(line["per_pair"] > line["per_pair_and_block"] > 0 for line in counted)


def test_shared_memory_is_within_the_limit(report):
    assert named([line for line in report["kernels"] if line["shared"] > SHARED_LIMIT[line["architecture"]]]) == []


def test_products_run_on_tensor_cores_from_wide_loads(report):
    products = [line for line in report["kernels"] if line["products"]]
    assert products
    assert named([line for line in products if not line["wgmma"] + line["mma"]]) == []
    assert named([line for line in products if not line["loads_16_bytes"]]) == []


def test_rows_are_read_in_wide_loads(report):
    """Also where only some columns are: a mask whose ends may fall anywhere would cut every load down to one element."""
    readers = {"project_kernel", "pair_loss_kernel", "pair_gradient_kernel", "masked_pair_gradient_kernel"}
    lines = [line for line in report["kernels"] if line["kernel"] in readers and line["case"] in ("small", "medium", "in parts")]
    assert {line["kernel"] for line in lines} == readers
    assert named([line for line in lines if line["loads_16_bytes"] < 4]) == []


def test_other_sizes_and_numbers_compile_nothing_new(report):
    assert named(report["recompiled"]) == []
