"""The training: everything that reads the configuration and turns it into steps."""

import os

import torch

# DeepSpeed reads it when it is imported, and without it says at length that it found no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
