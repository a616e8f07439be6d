"""What runs as ``python -m`` on the test cluster: a training that draws no report, and is slow where something is to happen to it.

``SLOW`` has a word for each start of the job, such as ``step=0.5 divide=3``: in the first start, every step waits half a second
before it is logged; in the second one, a division waits for three. ``slow-JOB-START`` in the working folder says that it waits.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

import dnc_dist.report
from dnc_dist.cli import run

PLACES = {
    "step": ("dnc_dist.engine.steplog", "StepLog", "step"),
    "features": ("dnc_dist.engine.objective", "DncObjective", "features"),
    "divide": ("dnc_dist.engine.next_division", "divide"),
    "embeddings": ("dnc_dist.engine.objective", "DncObjective", "embeddings"),
}


def slow_down(place: str, seconds: float, sign: Path) -> None:
    """Let a function wait before it does its work."""
    module, *path = PLACES[place]
    owner = importlib.import_module(module)
    for name in path[:-1]:
        owner = getattr(owner, name)
    function = getattr(owner, path[-1])

    @wraps(function)
    def slow(*args: Any, **options: Any) -> Any:
        sign.touch()
        time.sleep(seconds)
        return function(*args, **options)

    setattr(owner, path[-1], slow)


def main() -> None:
    """Entry point: ``-m dnc_dist`` and its arguments."""
    # The picture of the report takes longer than the training.
    dnc_dist.report.build_report = lambda run_dir: run_dir / "report.html"
    start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if start < len(words := os.environ["SLOW"].split()):
        place, seconds = words[start].split("=")
        slow_down(place, float(seconds), Path(f"slow-{os.environ['SLURM_JOB_ID']}-{start}"))
    sys.exit(run(sys.argv[3:]))


if __name__ == "__main__":
    main()
