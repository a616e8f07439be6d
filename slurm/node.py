"""What a job does on its nodes before it trains: read the configuration (``settings``), then look at each node (``check``).

``check`` runs once on every node. It fails, with a message for the user, where the training would fail later or, worse, hang:
other versions than on the first node, missing GPUs, no data, a run directory that the nodes do not share. If the site wants it,
it copies the data to the node's own disk.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import NoReturn

SHARED_WITHIN_SECONDS = 60  # what a network file system may take until it shows a file to another machine


def fail(message: object, code: int = 2) -> NoReturn:
    print(f"error on {socket.gethostname()}: {message}", file=sys.stderr)
    sys.exit(code)


def versions() -> str:
    """What must be equal on all nodes, in words; torch is imported to see that it can be."""
    import torch

    import dnc_dist

    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"dnc-dist {dnc_dist.__version__}, Python {sys.version.split()[0]}, torch {torch.__version__}{cuda}"


def gpus() -> str:
    """The GPUs of this node, in words, after a look at whether they are those that SLURM gave to the job."""
    import torch

    from dnc_dist.base.foreign import environment_int

    given, found = environment_int("SLURM_GPUS_ON_NODE", 0), torch.cuda.device_count()
    if found and not given:
        fail("here are GPUs that the job did not ask for; set SBATCH_GPUS_PER_NODE in slurm/site.sh, or submit with --exclusive")
    if found < given:
        fail(f"SLURM gives {given} GPU(s) to this node, torch sees {found}; is this the CPU build of torch, or has the driver a problem?")
    return f"{found} x {torch.cuda.get_device_name(0)}" if found else "no GPU"


def meet(job_dir: Path, text: str) -> None:
    """Wait until every node has left its versions in the job's folder, and compare them with the first node's."""
    from dnc_dist.base.foreign import environment_int

    me, nodes = environment_int("SLURM_NODEID"), environment_int("SLURM_NNODES", least=1)
    if not job_dir.is_dir():
        fail(f"{job_dir} is not visible here; run.dir must be on a file system that all nodes share")
    (job_dir / f".node-{me}").write_text(text)
    (job_dir / f".node-{me}").rename(job_dir / f"node-{me}")
    deadline = time.monotonic() + SHARED_WITHIN_SECONDS
    while missing := [node for node in range(nodes) if f"node-{node}" not in os.listdir(job_dir)]:
        if time.monotonic() > deadline:
            fail(f"nothing of node {missing[0]} in {job_dir}; run.dir must be on a file system that all nodes share")
        time.sleep(0.1)
    if (first := (job_dir / "node-0").read_text()) != text:
        fail(f"this node has {text}, but the first one has {first}")


def stage(source: Path, place: Path) -> Path:
    """A copy of the prepared data in ``place``; one that is already there is used again."""
    from dnc_dist.data.manifest import read_manifest

    target = place / f"dnc-dist-{os.getuid()}" / read_manifest(source).layout_hash[:16]
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    size = sum(file.stat().st_size for file in source.rglob("*"))
    if size > (free := shutil.disk_usage(place).free):
        fail(f"{place} has {free >> 20} MB free, the data needs {size >> 20} MB; set another STAGE_DIR in slurm/site.sh, or none")
    # Complete or absent, also if the job is killed meanwhile or a second one copies, too.
    copy = Path(tempfile.mkdtemp(dir=target.parent))
    shutil.copytree(source, copy, dirs_exist_ok=True)
    try:
        copy.rename(target)
    except OSError:
        shutil.rmtree(copy)
    return target


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["settings", "check"])
    parser.add_argument("config")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--resume")
    arguments = parser.parse_args()
    try:
        from dnc_dist.base.errors import InputError, RunError, exit_code, explain
        from dnc_dist.config import load_config
    except ImportError as error:
        fail(f"{sys.executable} cannot import dnc_dist ({error}); load the environment that has it in slurm/site.sh")
    try:
        cfg = load_config(arguments.config, arguments.overrides)
        if arguments.action == "settings":
            print(cfg.run.path.absolute())
            return
        place = os.environ.get("STAGE_DIR")
        if place and isinstance(cfg.data.root, str):
            fail(
                f"STAGE_DIR={place} copies a data set from a folder, but data.root={cfg.data.root} is on a web server; "
                "take STAGE_DIR out of slurm/site.sh, and set data.cache to a folder on the disks of the nodes"
            )
        from dnc_dist.data.index import open_index

        text, devices, job_dir = versions(), gpus(), Path(os.environ["DNC_JOB_DIR"])
        rows, data = len(open_index(cfg.data.root)), cfg.data.root
        meet(job_dir, text)
        if place:
            data = stage(data, Path(place))
            if os.environ["SLURM_NODEID"] == "0":
                (job_dir / "data").write_text(f"{data}\n")
    except (InputError, RunError, OSError, MemoryError) as error:
        explained = explain(error)
        fail(explained, exit_code(explained))
    print(f"{socket.gethostname()}: {text}, {devices}; {rows} images in {data}", file=sys.stderr)


if __name__ == "__main__":
    main()
