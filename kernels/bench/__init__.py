"""Measurements of the kernels: `PYTHONPATH=kernels python -m bench.margin`, `-m bench.kmeans`; without a GPU `-m bench.resources`."""
