"""Every phase at the real size of Stanford Online Products: prepare, one epoch with a division, evaluation with NMI and recall@1000.

    python -m benchmarks.sop_size --work /tmp/sop

Makes an archive in the published layout, with the published counts (59,551 training images of 11,318 classes, 60,502 test images of
11,316) and tiny JPEGs whose classes can be told apart, runs the product's own commands on it, and prints a table of seconds and memory:
for each command wall time, CPU time of all its processes and the peak of its largest process; for each phase the time that the command
itself prints. Nothing is chosen by what it reaches. Appends a JSON line to benchmarks/results/sop_size.jsonl.
`benchmarks.retrieval` and `benchmarks.kmeans` time search, division and NMI of this size beside other libraries.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.record import RESULTS, append, machine

SPLITS = {"Ebay_train.txt": (59_551, 11_318), "Ebay_test.txt": (60_502, 11_316)}
KINDS = ["bicycle", "cabinet", "chair", "coffee_maker", "fan", "kettle", "lamp", "mug", "sofa", "stapler", "table", "toaster"]
LEAST, MOST = 2, 12  # images of a class in the archive
SIDE = 32
CONFIG = """
data: {root: DATA, image_size: 32, crop: 1.0, augment: light, mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25], workers: 0}
model: {backbone: conv4, weights: none, embedding_dim: 512, dropout: 0.0}
division: {num_learners: 4, mode: flat, every: 1, conquer_from: null, backbone_frozen_epochs: 0}
schedule: {epochs: 1, batch_size: 128, samples_per_class: 4}
optim: {lr: 0.001}
evaluation: {recall_at: [1, 10, 100, 1000], nmi: final}
"""
PHASE = re.compile(r"^(?P<name>.+): (?P<count>\d+)/\d+ \S+, .* in (?P<time>[\d:]+)(, .*)?$")
"""The last line of a phase, as the product prints it."""


def main() -> None:
    """Run all commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for archive, data set and run; needs 2 GB")
    parser.add_argument("--nproc", type=int, default=2)
    args = parser.parse_args()
    work = args.work.resolve()
    archive, data, config = work / "Stanford_Online_Products", work / "sop", work / "sop_size.yaml"
    if not (archive / "Ebay_info.txt").exists():
        make_archive(archive)
    config.write_text(CONFIG.replace("DATA", str(data)))
    for left in (data, work / "runs"):
        shutil.rmtree(left, ignore_errors=True)
    command = [sys.executable, "-m", "dnc_dist"]
    nproc = ["--nproc", str(args.nproc)]
    run = work / "runs" / "sop"
    found = {
        "prepare": measure([*command, "data", "prepare", "sop", "--root", str(archive), "--out", str(data)], work),
        "launch": measure([*command, "launch", str(config), *nproc, "--set", f"run.dir={run.parent}", "--set", "run.name=sop"], work),
        "evaluate": measure([*command, "evaluate", str(run), *nproc, "--json"], work),
    }
    metrics = json.loads(found["evaluate"].pop("printed"))
    found["launch"].pop("printed"), found["prepare"].pop("printed")
    kept = {key: value for key, value in metrics.items() if key.startswith("recall@") or key in ("map@r", "r_precision", "nmi")}
    append(RESULTS / "sop_size.jsonl", {"nproc": args.nproc, "commands": found, "metrics": kept, **machine()})
    print("| command, phase | wall s | CPU s | peak MB of a process |\n|---|---|---|---|")
    for name, cost in found.items():
        print(f"| **{name}** | {cost['wall_s']:.0f} | {cost['cpu_s']:.0f} | {cost['peak_mb']:.0f} |")
        for phase, seconds in cost["phases"].items():
            print(f"| {phase} | {seconds} | | |")
    print(", ".join(f"{key} {value:.4f}" for key, value in kept.items()))


def make_archive(root: Path) -> None:
    """Stanford Online Products as it is laid out: lists, and a folder for each of twelve super-classes."""
    rng = np.random.default_rng(0)
    for kind in KINDS:
        (root / f"{kind}_final").mkdir(parents=True, exist_ok=True)
    label, number = 0, 0
    for name, (images, classes) in SPLITS.items():
        lines = ["image_id class_id super_class_id path"]
        for size in _class_sizes(images, classes, rng):
            label += 1
            kind = label % len(KINDS)
            # A class is a coarse pattern of colours; its images are shifted and noisy.
            pattern = np.kron(rng.integers(0, 256, (4, 4, 3)), np.ones((SIDE // 4, SIDE // 4, 1)))
            for at in range(size):
                number += 1
                path = f"{KINDS[kind]}_final/{111_085_122_871 + label}_{at}.JPG"
                shifted = np.roll(pattern, rng.integers(-6, 7, 2), (0, 1)) + rng.normal(0, 40, pattern.shape)
                Image.fromarray(shifted.clip(0, 255).astype(np.uint8)).save(root / path, format="JPEG", quality=90)
                lines.append(f"{number} {label} {kind + 1} {path}")
        (root / name).write_text("\n".join(lines) + "\n")
    (root / "Ebay_info.txt").write_text("image_id class_id super_class_id path\n")  # last: the archive is whole


def _class_sizes(images: int, classes: int, rng: np.random.Generator) -> np.ndarray:
    """(classes,) from LEAST to MOST, with this sum."""
    sizes = np.full(classes, LEAST)
    while (missing := images - sizes.sum()) > 0:
        sizes += np.bincount(rng.choice(np.flatnonzero(sizes < MOST), min(missing, classes // 2), replace=False), minlength=classes)
    return sizes


def measure(command: list[str], folder: Path) -> dict[str, Any]:
    """What a command costs: wall and CPU seconds of all its processes, peak memory of the largest, and the phases that it prints."""
    print("$", *command, file=sys.stderr)
    messages = folder / "messages.txt"
    with messages.open("w") as errors, (folder / "printed.txt").open("w") as printed:
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=folder, stdout=printed, stderr=errors, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, used = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
    text = messages.read_text()
    if status:
        raise SystemExit(f"{' '.join(command)}\nended with {os.waitstatus_to_exitcode(status)}:\n{text[-3000:]}")
    phases: dict[str, str] = {}
    for line in text.splitlines():
        if match := PHASE.match(line):
            phases[match["name"]] = match["time"]
    return {
        "wall_s": round(wall, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss / 1024),
        "phases": phases,
        "printed": (folder / "printed.txt").read_text(),
    }


if __name__ == "__main__":
    main()
