"""The parity check's reference: every case on one rank, in fp32 and in float64. ``python -m dnc_dist.doctor.reference PLAN FILE``

It writes a list of two dictionaries: the parts of the outcome of each case by its name.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from dnc_dist.base.progress import Progress
from dnc_dist.doctor.steps import Plan, outcomes
from dnc_dist.processes import distributed

if __name__ == "__main__":
    distributed.init()
    settings, learners, num_learners, last = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    plan = Plan(settings, tuple(learners), num_learners, last)
    found = [outcomes(plan, Progress(False))]
    os.environ["DNC_KERNELS"] = "reference"  # those of Triton have no float64
    found.append(outcomes(plan, Progress(False), torch.float64))
    torch.save([{name: tuple(outcome) for name, outcome in each.items()} for each in found], sys.argv[2])
    distributed.shutdown()
