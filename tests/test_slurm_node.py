"""What a job looks at on each node before it trains: here without SLURM, which only sets variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

NODE = Path(__file__).resolve().parent.parent / "slurm" / "node.py"


def test_data_on_a_web_server_cannot_be_staged(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: {root: https://127.0.0.1:9/data/}\n")
    env = os.environ | {"DNC_JOB_DIR": str(tmp_path), "SLURM_NODEID": "0", "STAGE_DIR": str(tmp_path / "disk")}
    done = subprocess.run([sys.executable, NODE, "check", tmp_path / "run.yaml"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"STAGE_DIR={tmp_path / 'disk'} copies a data set" in line and "data.root=https://127.0.0.1:9/data/ is on a web server" in line
    assert "data.cache" in line and not (tmp_path / "disk").exists()


_FAILING_DISK = """
import errno, os, runpy, sys
from dnc_dist.data import index
def fail(*given): raise OSError(errno.EIO, os.strerror(errno.EIO), "data/manifest.json")
index.open_index = fail
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_disk_that_fails_is_no_wrong_input(tmp_path: Path) -> None:
    """SLURM may start such a job again."""
    (tmp_path / "run.yaml").write_text("data: {root: data}\n")
    env = os.environ | {"DNC_JOB_DIR": str(tmp_path), "SLURM_NODEID": "0"}
    command = [sys.executable, "-c", _FAILING_DISK, NODE, "check", tmp_path / "run.yaml"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "data/manifest.json: Input/output error; check the disk" in done.stderr, done.stderr
