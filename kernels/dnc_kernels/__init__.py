"""Fused mining, margin loss and Lloyd steps behind one contract; `kernels/README.md` describes it.

Shapes: B anchors, G references, D embedding, K learners, C classes, N rows of k-means.
"""

from __future__ import annotations

from dnc_kernels import reference
from dnc_kernels.contract import MarginLossOutput, Pairs, Rows, Sampling
from dnc_kernels.dispatch import check_implementation, dispatched, implementation, implementation_note
from dnc_kernels.reference import negative_weights

__all__ = [
    "MarginLossOutput",
    "Pairs",
    "Rows",
    "Sampling",
    "check_implementation",
    "implementation",
    "implementation_note",
    "lloyd_step",
    "margin_loss",
    "margin_loss_on_pairs",
    "negative_weights",
    "project",
    "sample_pairs",
]

project = dispatched(reference.project)
sample_pairs = dispatched(reference.sample_pairs)
margin_loss_on_pairs = dispatched(reference.margin_loss_on_pairs)
margin_loss = dispatched(reference.margin_loss)
lloyd_step = dispatched(reference.lloyd_step)
