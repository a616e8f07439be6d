"""What the kernels are measured against: good vectorised torch, and the usual libraries.

The torch baselines do the same work as the kernels in float32. They have no Python loop over rows and never wait for the
device. They draw with torch's own random numbers. Memory grows with B². This is also what torch.compile gets.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, normalize

from bench.measure import NotRun
from dnc_kernels.contract import DEFAULT_SAMPLING, MARGIN

CUTOFF, NONZERO_LOSS_CUTOFF = DEFAULT_SAMPLING.cutoff, DEFAULT_SAMPLING.nonzero_loss_cutoff
ANTIPODE_MIN = 1e-6
CHUNK_ELEMENTS = 1 << 28  # of the (N, K) matrix that k-means in plain torch holds at once


def positives(labels: Tensor, learner: Tensor, num_slots: int) -> Tensor:
    """All rows of each row's label and learner but itself, (B, num_slots) int64, -1 where there are fewer."""
    rows = torch.arange(labels.shape[0], device=labels.device)
    code = learner * labels.shape[0] + labels  # labels lie below B here
    ordered, order = code.sort(stable=True)
    own = torch.empty_like(order).scatter_(0, order, rows)
    start, end = torch.searchsorted(ordered, code)[:, None], torch.searchsorted(ordered, code, right=True)[:, None]
    slot = start + torch.arange(num_slots, device=labels.device)
    slot = slot + (slot >= own[:, None])  # not itself
    return torch.where(slot < end, order[slot.clamp(max=labels.shape[0] - 1)], -1)


def negatives(z: Tensor, labels: Tensor, learner: Tensor, num_slots: int, n: Tensor | float, blocks: int) -> tuple[Tensor, Tensor]:
    """Distance-weighted draws without replacement inside the learner: (B, num_slots) int64, and their keys (-inf: no candidate).

    With blocks = K the rows must stand in K equally large runs, one a learner: K matrices of (B/K)² instead of one of B².
    """
    split, size = z.detach().view(blocks, -1, z.shape[1]), z.shape[0] // blocks
    labels, learner = labels.view(blocks, size), learner.view(blocks, size)
    squared = (2.0 - 2.0 * split @ split.mT).clamp_(min=CUTOFF**2)
    key = (0.5 * (2.0 - n)) * squared.log() - (0.5 * (n - 3.0)) * (1.0 - 0.25 * squared).clamp_(min=ANTIPODE_MIN).log_()
    candidate = (labels[:, :, None] != labels[:, None]) & (squared <= NONZERO_LOSS_CUTOFF**2)
    if blocks == 1:
        candidate &= learner[:, :, None] == learner[:, None]
    key -= torch.rand_like(key).clamp_(min=1e-30).log_().neg_().log_()  # exponential race, as the kernels run it
    found = key.masked_fill_(~candidate, -torch.inf).topk(num_slots, dim=2)
    first = size * torch.arange(blocks, device=z.device)[:, None, None]
    return (found.indices + first).view(-1, num_slots), found.values.view(-1, num_slots)


def margin_step(
    embeddings: Tensor,
    masks: Tensor,
    beta: Tensor,
    labels: Tensor,
    learner: Tensor,
    n: Tensor | float,
    num_slots: int,
    blocks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Project, sample, loss: the mean over active pairs, and the sampled rows (B, 2 · num_slots), -1 = empty slot."""
    z = normalize(embeddings.float() * embedding(learner, masks.relu()))
    known = positives(labels, learner, num_slots)
    unknown, key = negatives(z, labels, learner, num_slots, n, blocks)
    wanted = torch.minimum((known >= 0).sum(1), (key != -torch.inf).sum(1))
    slots = torch.arange(num_slots, device=z.device)
    others = torch.cat([known, torch.where(slots < wanted[:, None], unknown, -1)], dim=1)
    squared = (z[:, None] - embedding(others.clamp_min(0), z)).square().sum(2)
    apart = squared > 0
    distance = torch.where(apart, torch.where(apart, squared, 1.0).sqrt(), 0.0)
    beyond = distance - beta[labels][:, None]
    is_positive = torch.arange(2 * num_slots, device=z.device) < num_slots
    terms = (torch.where(is_positive, beyond, -beyond) + MARGIN).relu().masked_fill(others < 0, 0.0)
    return terms.sum() / (terms > 0).sum().clamp_min(1), others


class MetricLearningLibrary:
    """pytorch-metric-learning's miner and MarginLoss, once per learner. It draws with replacement and averages per learner."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        try:
            from pytorch_metric_learning.losses import MarginLoss
            from pytorch_metric_learning.miners import DistanceWeightedMiner
        except ImportError:
            raise NotRun("pytorch-metric-learning is not installed") from None
        self.miner = DistanceWeightedMiner(cutoff=CUTOFF, nonzero_loss_cutoff=NONZERO_LOSS_CUTOFF)
        self.loss = MarginLoss(margin=MARGIN, nu=0, beta=1.2, learn_beta=True, num_classes=num_classes).to(device)

    def __call__(self, embeddings: Tensor, masks: Tensor, labels: Tensor, sliced: bool) -> Tensor:
        """The mean over the learners of their losses; row i of the K equal runs belongs to learner i·K/B."""
        num_learners, width = masks.shape
        losses = []
        for learner, (rows, names) in enumerate(zip(embeddings.chunk(num_learners), labels.chunk(num_learners), strict=True)):
            x = rows.float() * masks[learner].relu()
            if sliced:  # its density of distances knows the width of x only
                x = x[:, learner * width // num_learners : (learner + 1) * width // num_learners]
            losses.append(self.loss(x, names, self.miner(x, names)))
        return torch.stack(losses).mean()


def lloyd(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (K, D) and counts (K,) of one Lloyd iteration by two matrix products, as float32.

    A one-hot product, because adding rows to a handful of addresses would make plain torch look slower than it is.
    """
    half_norms = 0.5 * centroids.float().square().sum(1)
    means, num_centroids = centroids.to(x.dtype).T, centroids.shape[0]
    column = torch.arange(num_centroids, device=x.device)
    sums, counts = torch.zeros_like(centroids, dtype=torch.float32), torch.zeros_like(half_norms)
    for rows in x.split(max(1, CHUNK_ELEMENTS // num_centroids)):
        member = (half_norms - (rows @ means).float()).argmin(1)[:, None] == column
        sums += (member.to(x.dtype).T @ rows).float()
        counts += member.sum(0, dtype=torch.float32)
    return sums, counts
