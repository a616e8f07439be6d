"""Divide-and-Conquer deep metric learning on one process or many."""

__version__ = "0.1.0"
