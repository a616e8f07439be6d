"""A training in which every wait for the GPU is listed with its line: `python -m benchmarks.step_waits CONFIG [--set KEY=VALUE]...`

torch warns of each operation that makes the host wait (`torch.cuda.set_sync_debug_mode`). A warning is counted for the line of
dnc_dist that led to it, by part of the loop. A wait inside of a library that torch does not know of is not seen. Without a GPU the
training runs all the same, and nothing can be counted.
"""

from __future__ import annotations

import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import dnc_dist
from dnc_dist.commands.train import train

PACKAGE = Path(dnc_dist.__file__).parent
WORDS = "synchronizing CUDA operation"
PARTS = ("divide", "train_epoch", "evaluate", "save")  # methods of the trainer; what lies in none of them is "elsewhere"


class Waits:
    """Counts of waits by part of the loop and line; takes the place of `warnings.showwarning`."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self._show = warnings.showwarning

    def __call__(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
        if WORDS not in str(message):
            self._show(message, category, filename, lineno, *more)
            return
        frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).is_relative_to(PACKAGE)]
        part = next((frame.name for frame in frames if frame.name in PARTS and Path(frame.filename).name == "trainer.py"), "elsewhere")
        where = (
            f"{Path(frames[-1].filename).relative_to(PACKAGE.parent)}:{frames[-1].lineno} {frames[-1].name}"
            if frames
            else f"{filename}:{lineno}"
        )
        self.counts[part, where] += 1

    def table(self) -> str:
        """The lines, those of the most waits first in each part."""
        lines = [f"{sum(self.counts.values())} waits", "part         waits  line"]
        lines += [
            f"{part:<12} {count:>5}  {where}" for (part, where), count in sorted(self.counts.items(), key=lambda one: (one[0][0], -one[1]))
        ]
        return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Train, print the table, and give the exit code of the training."""
    waits = Waits()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=f".*{WORDS}")
        warnings.showwarning = waits
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            torch.ones((), device="cuda").item()
            if not waits.counts:
                raise SystemExit(f"torch {torch.__version__} warned of no wait where there was one: none can be counted")
            waits.counts.clear()
        code = train.main(args=arguments, standalone_mode=False)
    print(waits.table() if torch.cuda.is_available() else "no GPU: nothing waits for one, and nothing was counted", flush=True)
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
