"""How many cores a rank has, and how many loader processes that makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from dnc_dist.base.errors import InputError
from dnc_dist.config import parse_tree
from dnc_dist.processes.cores import MOST_LOADERS, cores_per_rank, loader_processes, loaders_of, quota, usable_cores


def test_ranks_of_a_machine_share_its_cores() -> None:
    both = frozenset(range(8))
    assert cores_per_rank([("a", both, None)]) == 8
    assert cores_per_rank([("a", both, None)] * 2) == 4  # torchrun: each may use all of them
    assert cores_per_rank([("a", frozenset({0, 1}), None), ("a", frozenset({2, 3}), None)]) == 2  # srun: each has its own
    assert cores_per_rank([("a", both, None), ("b", frozenset({0}), None)]) == 1  # the same on all ranks
    assert cores_per_rank([("a", both, 3.0)] * 2) == 1.5


def test_loaders_leave_a_core_to_the_training() -> None:
    assert [loaders_of(cores, on_gpu=True) for cores in (0.5, 1, 2, 3.9, 12, 17, 96)] == [1, 1, 1, 2, 11, 16, MOST_LOADERS]
    assert [loaders_of(cores, on_gpu=False) for cores in (1, 64)] == [1, 1]
    assert loader_processes(0) == 0 and loader_processes(40) == 40


def test_a_container_has_a_quota(tmp_path: Path) -> None:
    file = tmp_path / "cpu.max"
    assert quota(file) is None
    for text, cores in (("max 100000\n", None), ("250000 100000\n", 2.5)):
        file.write_text(text)
        assert quota(file) == cores
    assert usable_cores()


@pytest.mark.parametrize("value", [-1, 1.5, "many"])
def test_what_is_no_number_of_workers(value: object) -> None:
    with pytest.raises(InputError, match=r"data\.workers.*must be a number from 0 on, or auto"):
        parse_tree({"data": {"root": ".", "workers": value}}, "test")
    assert parse_tree({"data": {"root": "."}}, "test").data.workers == "auto"
