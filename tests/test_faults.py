"""The table of faults: what the user sees, that it is soon, and that the run then ends as an undisturbed one does."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault_table import FAULTS, Fault, Table, disk_full, no_shared_memory

pytestmark = pytest.mark.slow
SECONDS = 30.0
"""Until a fault is visible, the start of two Pythons on a busy machine included; what a fault waits for comes on top."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Table]:
    yield Table(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault(table: Table, fault: Fault) -> None:
    if fault.inject in (disk_full, no_shared_memory) and os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    row = table.row(fault)
    assert row.code == fault.code
    assert re.search(fault.sees, row.sees)
    assert row.seconds <= SECONDS + fault.waits
    assert row.same


def test_the_page_in_docs_has_every_fault() -> None:
    page = (Path(__file__).parent.parent / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows if "---" not in row] == [fault.name for fault in FAULTS]
    assert all(row.endswith("| yes |") for row in rows if "---" not in row)
