"""Which implementation serves which device, and that nothing falls back without a word."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest
import torch

import dnc_kernels
from dnc_kernels import dispatch, probe, toolchain


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


# ---------------------------------------------------------------- what a launch needs


EXTENSION = """#include <Python.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "tiny", 0, -1, 0};
PyMODINIT_FUNC PyInit_tiny(void) { return PyModule_Create(&module); }
"""


def triton_builds_an_extension(folder: Path) -> bool:
    """Whether Triton's own code finds all that it needs for its launcher."""
    from triton.runtime.build import _build

    (folder / "tiny.c").write_text(EXTENSION)
    try:
        return Path(_build("tiny", str(folder / "tiny.c"), str(folder), [], [], [], [])).is_file()
    except (RuntimeError, OSError, subprocess.CalledProcessError):
        return False


@pytest.mark.parametrize(
    ("environment", "headers", "message"),
    [
        ({"CC": "/nonexistent"}, True, "CC=/nonexistent is no program; install gcc, or set CC to a C compiler"),
        ({"CC": ""}, True, "CC= is no program; install gcc, or set CC to a C compiler"),
        ({"PATH": ""}, True, r"there is no C compiler \(gcc or clang\); install gcc, or set CC to a C compiler"),
        ({}, False, r"Python's headers are not installed \(/nonexistent/Python.h does not exist\); install python3-dev"),
    ],
)
def test_what_triton_needs_is_missed_where_triton_misses_it(environment, headers, message, tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    if toolchain.missing() is not None:
        pytest.skip(toolchain.missing())
    assert triton_builds_an_extension(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not headers:
        monkeypatch.setattr(sysconfig, "get_paths", lambda *args, **kwargs: {"include": "/nonexistent"})
    assert re.match(message, toolchain.missing())
    (tmp_path / "again").mkdir()
    assert not triton_builds_an_extension(tmp_path / "again")


def test_a_run_on_a_gpu_ends_at_its_start_if_no_kernel_can_be_compiled(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a kernel that was compiled before needs no compiler")
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setenv("CC", "/nonexistent")
    message = r"^Triton cannot launch a kernel on cuda:0: CC=/nonexistent is no program; .*DNC_KERNELS=reference"
    with pytest.raises(RuntimeError, match=message):
        dnc_kernels.check_implementation("cuda:0")
    monkeypatch.setenv("DNC_KERNELS", "reference")
    dnc_kernels.check_implementation("cuda:0")


def test_a_kernel_is_launched_where_triton_serves(monkeypatch):
    dnc_kernels.check_implementation("cpu")  # the reference: nothing to prove
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setenv("TRITON_INTERPRET", "0" if device == "cuda" else "1")
    monkeypatch.setenv("DNC_KERNELS", "triton")
    dnc_kernels.check_implementation(device)
    assert probe.add_one(torch.arange(16.0, device=device)).tolist() == list(range(1, 17))


# ---------------------------------------------------------------- where compiled kernels lie


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Nothing is chosen, and the folder for temporary files is an empty one; the folder for kernels in it."""
    for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.setenv(name, "")  # so that the end of the test restores it
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"dnc-dist-triton-{os.getuid()}"


def test_kernels_lie_in_a_folder_of_this_user_on_this_machine(temporary):
    for _ in range(2):
        toolchain.use_cache_folder()
        assert os.environ["TRITON_CACHE_DIR"] == str(temporary) and temporary.stat().st_mode & 0o777 == 0o700
        os.environ["TRITON_CACHE_DIR"] = ""


@pytest.mark.parametrize("name", ["TRITON_CACHE_DIR", "TRITON_HOME"])
def test_another_folder_can_be_chosen(name, temporary, monkeypatch):
    monkeypatch.setenv(name, "/chosen")
    toolchain.use_cache_folder()
    assert os.environ[name] == "/chosen" and not temporary.exists()
    assert toolchain.cache_folder() == Path("/chosen" if name == "TRITON_CACHE_DIR" else "/chosen/.triton/cache")


def others_may_write(folder):
    folder.mkdir()
    folder.chmod(0o777)


def lead_elsewhere(folder):
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to("elsewhere")


@pytest.mark.parametrize("prepare", [others_may_write, lead_elsewhere, Path.touch])
def test_a_folder_that_others_could_fill_is_refused(prepare, temporary):
    prepare(temporary)
    with pytest.raises(RuntimeError, match=r"dnc-dist-triton-.* for compiled kernels .*; .*set TRITON_CACHE_DIR to "):
        toolchain.use_cache_folder()


def test_the_folder_of_somebody_else_is_refused(temporary, monkeypatch):
    uid = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: uid)
    with pytest.raises(RuntimeError, match="is not a folder that this user alone can use"):
        toolchain.use_cache_folder()
