"""From features to embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EmbeddingHead(nn.Module):
    """Dropout on the features, then one linear layer: f -> W f + b."""

    def __init__(self, feature_dim: int, embedding_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear = nn.Linear(feature_dim, embedding_dim)

    def forward(self, features: Tensor, dropout_uniforms: Tensor | None = None) -> Tensor:
        """Raw embeddings, not normalised.

        Args:
            features: (B, F).
            dropout_uniforms: (B, F) in [0, 1), keyed by step and slot in the global batch, so that a row drops the
                same features on whichever rank it stands; None: no dropout (evaluation).

        Returns:
            (B, D)
        """
        if dropout_uniforms is not None and self.dropout > 0:
            features = features * ((dropout_uniforms >= self.dropout) / (1 - self.dropout)).to(features.dtype)
        return self.linear(features)


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32, or in float64 if it came so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
