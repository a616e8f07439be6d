"""What a checkpoint every ten steps costs a training: written while training waits, and in the background.

    python -m benchmarks.checkpoints --out benchmarks/results/checkpoints.jsonl

Arms take turns on one engine, so that other work on the machine meets all of them alike. Each turn is ten steps:

* none: no checkpoint;
* waited: a checkpoint first, until it is published, as at the end of an epoch;
* background: a checkpoint first that is written while the ten steps run, as `checkpoint.every_steps` does it. If it is not published by
  then, training waits for it, which counts as a pause, too.

The pause is how long the training loop stands still, as a share of the time of ten steps without a checkpoint. A CPU that trains on all
cores also writes and takes checksums on them, so the table shows the processor time of the threads beside the loop, too: by how much it is
more than without a checkpoint. The time of whole turns is in the line of results; it varies with other work on the machine. The first
copy, for which memory has to be found, is told apart. Processes each train 80 rows on one thread; one process has its own engine, several
have DeepSpeed's. Rank 0 measures.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.batches import random_batch
from benchmarks.engine_step import EngineStep
from benchmarks.step import BACKBONES, LR, configuration
from dnc_dist.engine.state import TrainState
from dnc_dist.engine.zero import prepare_checkpoint
from dnc_dist.processes import distributed
from dnc_dist.rundir.checkpoints import Checkpoints
from dnc_dist.rundir.writing import CheckpointWriter

EVERY = 10
ARMS = ("none", "waited", "background")


def measure(backbone: str, rounds: int, folder: Path) -> dict[str, dict[str, float]]:
    """Median seconds of a turn by arm: the whole "turn", the "pause" in it, and processor time of threads "beside" the loop; the "first"
    pause."""
    rows, size = BACKBONES[backbone]
    cfg, batch = configuration(backbone, rows, size), random_batch(rows, size).to(distributed.device())
    step = EngineStep(cfg, rows * distributed.world_size() // 4, lr=LR)
    state, writer = TrainState(), CheckpointWriter(Checkpoints(folder, keep=2))
    seconds: dict[str, dict[str, list[float]]] = {arm: {"turn": [], "pause": [], "beside": []} for arm in ARMS}
    for _ in range(1 + rounds):
        for arm in ARMS:
            distributed.barrier()
            begun, beside = time.perf_counter(), time.process_time() - time.thread_time()
            if arm != "none":
                writer.save(state.step, partial(prepare_checkpoint, step.engine, state), background=arm == "background")
            paused = time.perf_counter() - begun
            for _step in range(EVERY):
                step(batch, state.step)
                state.step += 1
            trained = time.perf_counter()
            writer.finish()
            ended = time.perf_counter()
            beside = time.process_time() - time.thread_time() - beside
            for name, value in {"turn": ended - begun, "pause": paused + ended - trained, "beside": beside}.items():
                seconds[arm][name].append(value)
    return {
        arm: {"first": values["pause"][0]} | {name: statistics.median(each[1:]) for name, each in values.items()}
        for arm, values in seconds.items()
    }


def on_ranks(world: int, backbone: str, rounds: int, work: Path) -> dict[str, dict[str, float]]:
    """Measure with so many processes on this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    folder = Path(tempfile.mkdtemp(dir=work))
    command = [sys.executable, "-m", "benchmarks.checkpoints", "--alone", "--backbone", backbone, "--rounds", str(rounds)]
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [*command, "--work", str(folder)],
            cwd=record.ROOT,
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    said = [rank.communicate()[0] for rank in ranks]
    shutil.rmtree(folder)
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a process failed")
    found: dict[str, dict[str, float]] = json.loads(said[0].splitlines()[-1])
    return found


def main() -> None:
    """Measure with each number of processes and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--backbone", choices=list(BACKBONES), default="resnet18")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7, help="measured turns of each arm")
    parser.add_argument("--work", type=Path, help="where the checkpoints are written; by default a temporary folder")
    parser.add_argument("--out", type=Path, help="file of results to which a line for each number of processes is added")
    parser.add_argument("--alone", action="store_true", help="be one of the processes, and print JSON")
    args = parser.parse_args()
    if args.alone:
        distributed.init()
        torch.set_num_threads(1)
        print(json.dumps(measure(args.backbone, args.rounds, args.work)))
        distributed.shutdown()
        return
    print(f"{'processes':>9} {'ten steps':>10} {'pause, waited':>14} {'background':>11} {'beside it':>10}")
    for world in args.processes:
        where = record.machine()
        with tempfile.TemporaryDirectory() as folder:
            found = on_ranks(world, args.backbone, args.rounds, args.work or Path(folder))
        steps, background = found["none"]["turn"], found["background"]
        shares = {"pause_waited": found["waited"]["pause"] / steps, "pause_background": background["pause"] / steps}
        shares["beside_background"] = (background["beside"] - found["none"]["beside"]) / steps
        shown = [f"{100 * value:.2f} %" for value in shares.values()]
        print(f"{world:>9} {steps:>8.2f} s {shown[0]:>14} {shown[1]:>11} {shown[2]:>10}", flush=True)
        if args.out:
            rows, size = BACKBONES[args.backbone]
            problem = {"backbone": args.backbone, "rows": rows, "image_size": size, "processes": world, "every_steps": EVERY}
            record.append(args.out, {"problem": problem, "rounds": args.rounds, "seconds": found, **shares, **where})


if __name__ == "__main__":
    main()
