"""The peak of a process's memory, in the unit of its name on every system."""

from __future__ import annotations

import resource
import sys
from types import SimpleNamespace

import pytest
import torch

from dnc_dist.processes import distributed
from dnc_dist.processes.memory import peak_memory_mb


@pytest.mark.parametrize(("platform", "counted"), [("linux", 3_000_000), ("darwin", 3_072_000_000)])
def test_of_the_machine(platform: str, counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux counts in kibibytes, macOS in bytes."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=counted))
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    assert peak_memory_mb() == 3072.0


def test_of_the_gpu_if_it_computes_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 5_000_000)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda"))
    assert peak_memory_mb() == 5.0
