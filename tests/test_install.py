"""The package, installed without its repository, works from any folder: data, training, and the three lines that use the model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGED = ("pyproject.toml", "README.md", "LICENSE", "dnc_dist", "kernels")
THREE_LINES = """
import dnc_dist
model = dnc_dist.load("runs/mine")
z = model.embed("photos")
assert z.shape == (3, 128), z.shape
assert dnc_dist.__file__.startswith({installed!r}), dnc_dist.__file__
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip put the package; what it depends on is already there."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in PACKAGED:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(pip, check=True)
    return target


@pytest.mark.slow
def test_the_installed_package_works_from_any_folder(installed: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}

    def python(*arguments: str) -> None:
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]

    python("-m", "dnc_dist", "data", "prepare", "glyphs", "--out", "data/glyphs", "--classes", "40")
    python("-m", "dnc_dist", "init", "data/glyphs", "--out", "mine.yaml")
    python("-m", "dnc_dist", "launch", "mine.yaml", "--nproc", "2", "--set", "schedule.epochs=1")
    (tmp_path / "photos").mkdir()
    for at in range(3):
        Image.new("RGB", (64, 48), (80 * at, 0, 0)).save(tmp_path / "photos" / f"{at}.jpg")
    python("-c", THREE_LINES.format(installed=str(installed)))
