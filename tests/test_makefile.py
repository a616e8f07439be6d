"""The Makefile on machines of every kind: which extras it installs, how many processes it starts, and what it says when it cannot."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from dnc_dist import cli
from dnc_dist.processes import launch

ROOT = Path(__file__).resolve().parent.parent
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")
RECORD = '#!/bin/bash\nprintf "%s " "${0##*/}" "$@" >> record.txt; echo >> record.txt\n'


class Clone:
    """A fresh clone whose environment has stubs that write down how they are called, and a PATH with next to nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder / "a b" / "clone", folder / "bin"
        self.path.mkdir()
        self.folder.mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.folder)
        for name in ("rm", "touch"):
            (self.path / name).symlink_to(str(shutil.which(name)))

    def script(self, place: Path, text: str) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        place.chmod(0o755)

    def environment_with(self, python: str) -> None:
        self.script(self.folder / ".venv" / "bin" / "python", python)
        self.script(self.folder / ".venv" / "bin" / "dnc-dist", RECORD)

    def make(self, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.path), "HOME": str(self.path.parent)}
        return subprocess.run(
            [str(MAKE), *arguments], cwd=folder or self.folder, env=environment, capture_output=True, text=True, timeout=60
        )

    def record(self) -> list[str]:
        return (self.folder / "record.txt").read_text().splitlines()


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def of_gpus(count: int) -> str:
    """What `nvidia-smi -L` prints."""
    return "".join(f"echo 'GPU {number}: NVIDIA X (UUID: GPU-{number})'\n" for number in range(count))


@pytest.mark.parametrize(
    ("listing", "usable", "extra", "processes"),
    [
        (None, 0, "cpu", 2),
        ("echo 'No devices were found'\nexit 6\n", 0, "cpu", 2),
        ("echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'\nexit 9\n", 0, "cpu", 2),
        (of_gpus(1), 1, "gpu", 1),
        (of_gpus(2), 2, "gpu", 2),
        (of_gpus(8), 8, "gpu", 8),
        # CUDA_VISIBLE_DEVICES is empty, or the driver too old for torch: what is installed stays that of the machine.
        (of_gpus(2), 0, "gpu", 2),
    ],
)
def test_quickstart_on_every_machine(
    listing: str | None, usable: int, extra: str, processes: int, clone: Clone, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone.environment_with(RECORD)
    if listing is not None:
        clone.script(clone.path / "nvidia-smi", f'#!/bin/bash\n[ "$*" = -L ] || exit 1\n{listing}')
    done = clone.make("quickstart")
    assert done.returncode == 0 and done.stderr == "", done
    *_, install, prepare, start = (shlex.split(line) for line in clone.record())
    assert install[-2:] == ["--editable", f".[{extra}]"]
    assert prepare[1:4] == ["data", "prepare", "glyphs"] and start[:2] == ["dnc-dist", "launch"]

    started: list[int] = []

    def launch_workers(command: Any, nproc: int, **options: Any) -> int:
        started.append(nproc)
        return 0

    monkeypatch.setattr(launch, "launch_workers", launch_workers)
    monkeypatch.setattr(launch.workers, "_has_driver", lambda: usable > 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: usable)
    monkeypatch.chdir(ROOT)
    assert cli.run(start[1:]) == 0 and started == [processes]


def test_docs_installs_what_builds_the_site(clone: Clone) -> None:
    clone.environment_with(RECORD)
    done = clone.make("docs")
    assert done.returncode == 0 and done.stderr == "", done
    *_, install, build = (shlex.split(line) for line in clone.record())
    assert install[-2:] == ["--editable", ".[cpu,docs]"] and build == ["python", "docs/site/build.py"]


@pytest.mark.parametrize("given", ["", "PYTHON=/nowhere/python3"])
def test_without_a_python_that_suits(given: str, clone: Clone) -> None:
    clone.script(clone.path / "python3", "#!/bin/bash\necho ImportError: no module named ensurepip >&2\nexit 1\n")
    done = clone.make("quickstart", *filter(None, [given]))
    assert done.returncode == 2 and done.stdout == ""
    message, of_make = done.stderr.splitlines()
    found = given.removeprefix("PYTHON=") or "no python3 found here"
    assert message.startswith(f"error: Python 3.11 or newer with the venv module is needed; {found} is none. Install one (Debian: apt ")
    assert of_make.startswith("make: ***")
    assert not (clone.folder / ".venv").exists()


def test_a_virtual_environment_that_cannot_be_made_is_not_left_half(clone: Clone) -> None:
    half = '#!/bin/bash\n[ "$2" = venv ] || exit 0\n/bin/mkdir -p .venv/bin\n: > .venv/bin/python\nexit 1\n'
    clone.script(clone.path / "python3", half)
    assert clone.make("quickstart").returncode == 2
    assert not (clone.folder / ".venv").exists()


def test_without_a_network(clone: Clone) -> None:
    clone.environment_with(f"{RECORD}echo 'ERROR: No matching distribution found for torch' >&2\nexit 1\n")
    done = clone.make("quickstart")
    assert done.returncode == 2 and len(clone.record()) == 1
    assert done.stderr.splitlines()[1] == (
        "error: pip could not install the packages (see above); it needs the network, or a copy of the packages that PIP_INDEX_URL "
        "or PIP_FIND_LINKS names"
    )
    assert not (clone.folder / ".venv" / ".installed").exists()


def test_from_another_folder(clone: Clone) -> None:
    elsewhere = clone.path.parent
    assert clone.make("--directory", os.path.relpath(clone.folder, elsewhere), "help", folder=elsewhere).returncode == 0
    done = clone.make("--file", str(clone.folder / "Makefile"), "help", folder=elsewhere)
    assert done.returncode == 2 and "make has to start in the folder of this Makefile: cd there, or make -C FOLDER" in done.stderr
