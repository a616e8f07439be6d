"""Which implementation serves which device, and that nothing falls back without a word."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import dnc_kernels
from dnc_kernels import dispatch


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No variable set, and nothing remembered of the machine."""
    monkeypatch.delenv("DNC_KERNELS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    dispatch._why_not_triton.cache_clear()
    yield
    dispatch._why_not_triton.cache_clear()


def pretend_gpu(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_the_cpu_runs_the_reference():
    assert dnc_kernels.implementation("cpu") == "reference"
    assert dnc_kernels.implementation_note("cpu") == "dnc_kernels: reference implementation (plain torch)"


def test_a_gpu_runs_triton_by_itself(monkeypatch):
    pretend_gpu(monkeypatch)
    assert dnc_kernels.implementation("cuda") == "triton"
    assert dnc_kernels.implementation_note("cuda:0") == "dnc_kernels: triton implementation (fused Triton kernels)"


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [((7, 5), True, "compute capability 7.5 is below 8.0"), ((9, 0), False, "triton is not installed")],
)
def test_where_triton_cannot_run_the_reference_does_and_the_note_says_why(monkeypatch, capability, installed, reason):
    pretend_gpu(monkeypatch, capability)
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert dnc_kernels.implementation("cuda") == "reference"
    assert reason in dnc_kernels.implementation_note("cuda") and "plain torch" in dnc_kernels.implementation_note("cuda")
    monkeypatch.setenv("DNC_KERNELS", "triton")
    with pytest.raises(RuntimeError, match=f"{reason}; unset the variable"):
        dnc_kernels.implementation("cuda")


def test_the_reference_can_be_forced_on_a_gpu(monkeypatch):
    pretend_gpu(monkeypatch)
    monkeypatch.setenv("DNC_KERNELS", "reference")
    assert dnc_kernels.implementation("cuda") == "reference"
    assert "DNC_KERNELS=reference" in dnc_kernels.implementation_note("cuda")


def test_triton_on_the_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("DNC_KERNELS", "triton")
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1"):
        dnc_kernels.project(torch.randn(3, 4), None, None)
    dispatch._why_not_triton.cache_clear()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dnc_kernels.implementation("cpu") == "triton"


def test_an_implementation_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("DNC_KERNELS", "fast")
    with pytest.raises(RuntimeError, match="allowed are reference and triton"):
        dnc_kernels.project(torch.randn(3, 4), None, None)


def test_every_function_of_the_contract_has_a_triton_implementation_with_the_same_signature():
    import inspect

    for name, module in dispatch.TRITON_MODULES.items():
        ours = inspect.signature(getattr(importlib.import_module(module), name))
        assert ours == inspect.signature(getattr(dnc_kernels, name)), name
