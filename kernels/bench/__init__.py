"""Benchmarks of the kernels, one command for each family: `PYTHONPATH=kernels python -m bench.margin` and `-m bench.kmeans`."""
