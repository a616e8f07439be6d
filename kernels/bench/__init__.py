"""Benchmarks of the kernels, one command a family: `PYTHONPATH=kernels python -m bench.margin` and `-m bench.kmeans`."""
