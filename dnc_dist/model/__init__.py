"""Backbones, BatchNorm over the global batch, the embedding layer and the subspace masks."""
