"""The run directory: the only place that knows the names of its files."""
