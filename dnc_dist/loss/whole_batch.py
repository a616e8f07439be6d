"""Losses of a whole batch: every rank computes the loss of a learner's gathered rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import dnc_kernels
from dnc_dist.base.rng import seed_for
from dnc_dist.loss.base import Loss, StepRows
from dnc_dist.processes import distributed
from dnc_dist.processes.transfer import to_device


class BatchLoss(Loss):
    """Write ``forward``: the loss of one learner's rows of the global batch, wherever they are. Ranks and learners are done here.

    Rows come in the order of the global batch. What torch draws in ``forward`` is equal on every rank and for any number of ranks.
    """

    @abstractmethod
    def forward(self, z: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss () of one learner.

        Args:
            z: (n, D), projected into the learner's subspace and normalised; n >= 1.
            labels: (n,) int64, 0 to C-1.
            mask: (D,) the learner's subspace mask, for ``project``; None: the whole embedding.
        """

    @staticmethod
    def project(weights: Tensor, mask: Tensor | None) -> Tensor:
        """Learned proxies (n, D) in the subspace of a learner, normalised: as z came to be."""
        return dnc_kernels.project(weights, None, None if mask is None else mask[None])

    def of_step(self, rows: StepRows) -> tuple[Tensor, dict[str, Tensor]]:
        """Collective. See ``Loss.of_step``: own rows get the factor W in the gather, the loss's own parameters need none."""
        learners, masks = rows.num_learners, rows.masks
        z = rows.gather(rows.z, "own")
        labels, learner = rows.gather(torch.stack([rows.labels, rows.learner], 1)).unbind(1)
        losses = {}
        with torch.autocast(z.device.type, enabled=False):
            for a, places in _places_of_learners(rows, learner).items():
                with _seeded(seed_for(rows.seed, "loss", rows.step, a), z.device):
                    losses[a] = self(z.index_select(0, places), labels.index_select(0, places), None if masks is None else masks[a])
        share = 1.0 / distributed.group_size(rows.group)
        values = torch.zeros(2 * learners, dtype=torch.float64, device=z.device)
        for a, value in losses.items():
            values[a], values[learners + a] = share * value.detach(), share
        sums, counts = distributed.all_reduce_sum(values).split(learners)
        in_step = (counts > 0).sum().clamp(min=1)
        per_learner = torch.where(counts > 0, sums / counts.clamp(min=1e-12), torch.nan)
        stats = {"loss": torch.where(counts > 0, per_learner, 0.0).sum() / in_step, "learner_loss": per_learner}
        # A group without a decodable row has no loss, but takes part in the backward's collectives with the same parameters.
        nothing = 0 * sum((parameter.sum() for parameter in self.parameters()), z.sum())
        scale = (distributed.world_size() * share / in_step).to(z.dtype)
        return nothing + scale * torch.stack(list(losses.values()) or [nothing]).sum(), stats


def _places_of_learners(rows: StepRows, learner: Tensor) -> dict[int, Tensor]:
    """Learner -> places (n,) of its rows among the gathered ones; only learners that have some.

    With several ranks the host waits for the device: only its own rank knows which of its images could not be decoded.
    """
    known = rows.learner_on_host if rows.alone and rows.learner_on_host is not None else learner.cpu()
    found = {a: (known == a).nonzero().flatten() for a in range(rows.num_learners)}
    found = {a: places for a, places in found.items() if len(places)}
    if not found:
        return {}
    together = to_device(torch.cat(list(found.values())), learner.device)
    return dict(zip(found, together.split([len(places) for places in found.values()]), strict=True))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of torch as this seed gives them; afterwards as if none had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
