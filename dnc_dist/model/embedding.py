"""From features to embeddings in training, and from embeddings to what retrieval compares."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnc_dist.model.masks import MaskKind


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
            dropout_uniforms: (B, F) in [0, 1), keyed by step and position in the global batch, so that a row drops the
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


def inference(embeddings: Tensor, kind: MaskKind, num_learners: int) -> Tensor:
    """Unit embeddings for retrieval: the whole embedding, normalised; of sliced learners the unit slices side by side / sqrt(K).

    Args:
        embeddings: (B, D) raw.

    Returns:
        (B, D) with rows of norm 1, in fp32 at least.
    """
    embeddings = at_least_fp32(embeddings)
    if kind != "sliced":
        return F.normalize(embeddings, dim=1)
    slices = F.normalize(embeddings.view(len(embeddings), num_learners, -1), dim=2)
    return slices.reshape(embeddings.shape) / num_learners**0.5
