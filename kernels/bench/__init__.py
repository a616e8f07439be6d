"""Measurements of the kernels: `PYTHONPATH=kernels python -m bench.margin`, `-m bench.kmeans`.

Without a GPU: `-m bench.turns`, `-m bench.resources`.
"""
