"""All of DeepSpeed: how its engine is made, the private layouts of its optimizers and files, and what stands in for it in one process.

Nothing else knows them.
"""

import os

import torch

# DeepSpeed reads it when it is imported, and without it says at length that it found no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from dnc_dist.engine.zero.checkpoint import load_checkpoint, load_weights, prepare_checkpoint, read_model
from dnc_dist.engine.zero.start import gradient_is_finite, quiet_third_parties, start_deepspeed, start_engine

__all__ = [
    "gradient_is_finite",
    "load_checkpoint",
    "load_weights",
    "prepare_checkpoint",
    "quiet_third_parties",
    "read_model",
    "start_deepspeed",
    "start_engine",
]
