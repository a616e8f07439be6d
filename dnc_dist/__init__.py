"""Divide-and-Conquer deep metric learning on one process or many."""

from dnc_dist.base import torchvision_guard

__version__ = "0.1.0"

torchvision_guard.install()
