"""Every interpreter that finds this folder in PYTHONPATH computes without oneDNN, for which torch has no variable. See `processors.py`."""

import torch

torch.backends.mkldnn.set_flags(False)
