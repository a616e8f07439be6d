"""The parity check's reference: every case on one rank, in a process that rank 0 starts. ``python -m dnc_dist.doctor.reference FILE``"""

from __future__ import annotations

import sys

import torch

from dnc_dist import distributed
from dnc_dist.doctor.steps import outcomes
from dnc_dist.progress import Progress

if __name__ == "__main__":
    distributed.init()
    torch.save({name: tuple(outcome) for name, outcome in outcomes(Progress(False)).items()}, sys.argv[1])
    distributed.shutdown()
