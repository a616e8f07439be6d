"""Learners as teachers of the whole embedding: their similarities are its soft targets.

Similarities are distilled instead of embeddings, as in relational knowledge distillation (Park et al., CVPR 2019): a subspace and the whole
embedding have different coordinates, but the same pairs. The divergence of softmax distributions over the batch, with the gradient to
the student alone, is that of S2SD (Roth et al., ICML 2021), where wide heads teach a narrow one. That the teachers are experts of one
domain each, on the student's own backbone, is the idea of UDON (Ypsilantis et al., NeurIPS 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dnc_dist.loss.base import StepRows


def distillation(student: StepRows, teachers: StepRows, temperature: float) -> Tensor:
    """Collective. The divergence () of a step's whole embedding from its learners' subspaces; equal on all ranks.

    Every rank computes it on the gathered rows, so own rows get the factor W in the gather, as with a ``BatchLoss``.

    Args:
        student: the rows of the step in the whole embedding.
        teachers: the same rows in the subspaces of their learners; they get no gradient.
        temperature: of both softmax distributions.
    """
    z = student.gather(student.z, "own")
    target, learner = teachers.gather(teachers.z), teachers.gather(teachers.learner)
    with torch.autocast(z.device.type, enabled=False):
        return similarity_divergence(z, target, learner, temperature)


def similarity_divergence(z: Tensor, target: Tensor, learner: Tensor, temperature: float) -> Tensor:
    """T² · mean over rows i of KL(softmax of the target's cosines of i / T, softmax of the student's), over the other rows of i's learner.

    T² keeps the size of the gradient: where the two differ little, it is half the variance of their difference, whatever T is.

    Args:
        z: (N, D) unit rows of the student.
        target: (N, D') unit rows of the teacher, without gradient.
        learner: (N,) int64; a row of learner -1, or alone with its learner, has no distribution and counts nowhere.
        temperature: T.

    Returns:
        (), 0 where no row counts.
    """
    others = (learner[:, None] == learner) & (learner >= 0)
    others.fill_diagonal_(False)
    counts = others.any(1)
    # A row without others keeps all its entries, which are finite, and counts nowhere.
    hidden = ~others & counts[:, None]
    wanted, found = ((rows @ rows.T / temperature).masked_fill(hidden, -torch.inf).log_softmax(1) for rows in (target.detach(), z))
    terms = wanted.exp() * torch.where(others, wanted - found, 0.0)
    return temperature**2 * terms.sum() / counts.sum().clamp(min=1)
