"""Divide and Conquer for a training loop that is not ours: who learns what, in which subspace, in which batches.

``docs/divider.md`` has a whole loop. The parts are those of our own trainer: ``clustering`` divides, ``data.batching`` makes the
batches, ``model.masks`` holds the subspaces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dnc_kernels
from dnc_dist.base import parts
from dnc_dist.base.errors import InputError
from dnc_dist.base.rng import seed_for
from dnc_dist.clustering import Division, DivisionRules, check_num_learners, divide, spread_features
from dnc_dist.clustering.check import check_features, check_labels, check_learner, check_whole
from dnc_dist.clustering.divide import Mode, Start
from dnc_dist.data.batch_sampler import Batches
from dnc_dist.data.batching import epoch_schedule
from dnc_dist.model.masks import SubspaceMasks
from dnc_dist.processes import distributed


class Divider(nn.Module):
    """The learners of a training set: their rows, their subspaces of the embedding, their batches (TPAMI 2021, section 3).

    Its only parameter is ``masks.masks`` (K, D); give ``divider.parameters()`` to the optimizer. All processes construct it with the
    same arguments. Where ``torch.distributed`` has a process group, its methods that begin with "Collective." are called by every
    process; without one there is one process.

    Args:
        labels: (N,) integers, the class of every row of the training set.
        num_learners: final number of learners K; in hierarchical mode a power of two.
        embedding_dim: D, columns of the embeddings that ``project`` is given.
        mode: ``hierarchical``: 1, 2, 4 ... K learners, doubling at every division; ``flat``: K from the first division on.
        masks: ``learned`` (ones at the start, trained), ``fixed`` (0/1, halved at every split), or ``sliced`` (D/K coordinates each;
            flat mode only).
        start: of the k-means; ``previous`` begins at the last division's centroids, so that learners keep more of their rows.
        seed: of k-means and batches.

    Raises:
        InputError: too few classes for K learners, or arguments that do not fit together.
    """

    def __init__(
        self,
        labels: Sequence[int] | np.ndarray | Tensor,
        num_learners: int,
        embedding_dim: int,
        *,
        mode: Mode = "hierarchical",
        masks: str = "learned",
        start: Start = "k-means++",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, kind in (("mode", mode, Mode), ("start", start, Start)):
            if value not in get_args(kind):
                raise InputError(f"{name}={value!r} does not exist; use {' or '.join(get_args(kind))}")
        num_learners, embedding_dim = check_whole("num_learners", num_learners, 1), check_whole("embedding_dim", embedding_dim, 1)
        seed = check_whole("seed", seed, 0)
        if mode == "hierarchical" and num_learners & (num_learners - 1):
            raise InputError(f"num_learners={num_learners} must be a power of two in hierarchical mode; use 2, 4, 8 ... or mode='flat'")
        if mode == "hierarchical" and masks == "sliced":
            raise InputError("masks='sliced' needs mode='flat': a slice cannot be split; use mode='flat' or masks='fixed'")
        self.labels = check_labels(labels)
        self.rules = DivisionRules(num_learners, mode=mode, seed=seed, start=start)
        check_num_learners(self.labels, num_learners)
        self.masks: SubspaceMasks = parts.build("mask", masks, num_learners=num_learners, embedding_dim=embedding_dim)
        self.division: Division | None = None
        """The current division, with the sizes of the learners and the number of rows left out; None before the first."""
        self.conquering = False
        """Whether the whole embedding is trained together."""
        settings = (num_learners, embedding_dim, mode, masks, seed)
        self._digest = hashlib.sha256(repr(settings).encode() + self.labels.tobytes()).hexdigest()

    @property
    def level(self) -> int:
        """Current number of learners k; 1 before the first division."""
        return 1 if self.division is None else self.division.num_learners

    @property
    def learner_of(self) -> Tensor:
        """(N,) int64, the learner of each row; -1: left out until the next division, since no row of its class shares its cluster.

        Raises:
            InputError: ``divide`` was not called yet.
        """
        return torch.from_numpy(self._divided().learner_of.astype(np.int64))

    def local_rows(self) -> range:
        """The consecutive rows whose features this process computes for ``divide``, if all are to have about as many."""
        rank, world = _process()
        return range(*distributed.local_range(len(self.labels), rank, world))

    def divide(self, features: Tensor) -> Tensor:
        """Collective. Divide the training set anew: k-means, match to the division before, in hierarchical mode twice the learners.

        Args:
            features: (n, F) L2-normalised features of this process's rows, without gradient: all N rows on one process; on several
                consecutive rows in the order of the ranks, as ``local_rows`` has them (other sizes are fine, also none).

        Returns:
            ``learner_of`` (N,), the same on every process.

        Raises:
            InputError: on every process, if one has features of a wrong shape, not finite or not normalised, or another Divider.
        """
        _process()
        previous = self.division
        times = 0 if previous is None else previous.epoch + 1
        width = previous.centroids.shape[1] if previous is not None and self.rules.start == "previous" else 0
        start = check_features(features, len(self.labels), width or None, (self._digest, times))
        spread = spread_features(features, start, len(self.labels), device=_device(features))
        self.division = divide(spread, self.labels, self.rules, epoch=times, previous=previous)
        return self.learner_of

    def batches(self, epoch: int, *, batch_size: int, samples_per_class: int = 4) -> Batches:
        """The batches of an epoch, as many as fill the training set: each of one learner, balanced over its classes.

        A pure function of the division and these arguments. Learners take turns, also while conquering.

        Args:
            epoch: number of the epoch, from 0; every epoch has other batches.
            batch_size: rows of a step over all processes.
            samples_per_class: rows of each class of a batch, where the class has so many.

        Raises:
            InputError: ``divide`` was not called yet, or a batch would have fewer rows than there are processes.
        """
        schedule = epoch_schedule(
            self._divided().learner_of,
            self.labels,
            seed=seed_for(self.rules.seed, "schedule"),
            epoch=check_whole("epoch", epoch, 0),
            batch_size=check_whole("batch_size", batch_size, 2),
            samples_per_class=check_whole("samples_per_class", samples_per_class, 2),
        )
        rank, world = _process()
        fewest = int(np.diff(schedule.starts).min())
        if fewest < world:
            raise InputError(
                f"a batch of {fewest} rows cannot be shared by {world} processes; "
                "raise batch_size, or use fewer learners if a learner has no more rows than that"
            )
        return Batches(schedule, rank, world)

    def project(self, embeddings: Tensor, learner: int | Tensor) -> Tensor:
        """Unit embeddings in the subspace of their learner, normalise(relu(m_a) * e), for any metric loss; while conquering, ``inference``.

        The gradient of the masks is averaged over processes in the backward, as DistributedDataParallel averages its own: so the
        masks stay equal on all of them. Every process then calls the backward.

        Args:
            embeddings: (B, D) of this process's rows, not normalised.
            learner: of all rows, or (B,) of each row, as ``learner_of`` has it. A row of learner -1 takes part in nothing: leave it
                out of the loss.

        Returns:
            (B, D) with rows of norm 1, in fp32 at least.

        Raises:
            InputError: embeddings of another shape, a learner that does not exist (of a tensor on a GPU, which would be waited for,
                the values are not looked at), or ``divide`` was not called yet.
        """
        self._check_embeddings(embeddings)
        if self.conquering:
            return self.inference(embeddings)
        level = self._divided().num_learners
        learner = check_learner(learner, len(embeddings), level)
        masks = _AveragedGradient.apply(self.masks.level_masks(level).to(embeddings.device))
        return dnc_kernels.project(embeddings, learner.to(embeddings.device), masks)

    def inference(self, embeddings: Tensor) -> Tensor:
        """Unit embeddings as retrieval compares them, whatever the division: (B, D) raw -> (B, D) of norm 1, in fp32 at least."""
        self._check_embeddings(embeddings)
        return self.masks.whole(embeddings)

    def penalty(self) -> Tensor:
        """Mean cosine between learned masks, to be added to the loss (times 0.01, as published).

        Equal masks get no gradient from it, so it separates only masks that differ already.
        0 for one learner, for masks that are not learned, and while conquering.
        """
        if self.conquering or not self.masks.learned:
            return self.masks.masks.new_zeros(())
        return self.masks.penalty(self.masks.level_masks(self.level))

    def gather(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Collective. Embeddings and labels of the whole step, for a loss that then is the same on every process; as given on one.

        The gradient of a process's own rows is multiplied by the number of processes, which undoes the averaging of
        DistributedDataParallel: the gradient on several processes is that on one.

        Args:
            embeddings: (B, D) of this process, as ``project`` returns them.
            labels: (B,).

        Returns:
            (rows of all processes, D) and their labels, in rank order.
        """
        return distributed.gather_rows(embeddings, grad="own"), distributed.gather_rows(labels.to(embeddings.device))

    def conquer(self) -> None:
        """From now on train the whole embedding together: no masks, no penalty. Batches still come from one learner's rows."""
        self.conquering = True

    def get_extra_state(self) -> dict[str, Any]:
        """What ``state_dict`` holds beside the masks: the division, whether the whole embedding is trained, and what it belongs to."""
        division = None if self.division is None else self.division.state_dict()
        return {"digest": self._digest, "division": division, "conquering": self.conquering}

    def set_extra_state(self, state: Any) -> None:
        """Go on from what ``get_extra_state`` returned; part of ``load_state_dict``.

        Raises:
            InputError: the state is damaged, or was saved with other arguments.
        """
        if not isinstance(state, dict) or state.keys() != {"digest", "division", "conquering"}:
            raise InputError("the state of a Divider is damaged; load what its state_dict() returned")
        if state["digest"] != self._digest:
            raise InputError(
                "the state belongs to a Divider with other labels, num_learners, embedding_dim, mode, masks or seed; "
                "construct this one with the same"
            )
        division = state["division"]
        if division is not None:
            division = Division.from_state(division, "the state of the Divider")
            if len(division.learner_of) != len(self.labels) or self.rules.num_learners % division.num_learners:
                raise InputError("the state of the Divider is damaged: its division is of another training set")
        self.division, self.conquering = division, bool(state["conquering"])

    def _divided(self) -> Division:
        if self.division is None:
            raise InputError("there is no division yet; call divide(features) first")
        return self.division

    def _check_embeddings(self, embeddings: Tensor) -> None:
        width = self.masks.embedding_dim
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            kind = embeddings.dtype if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise InputError(f"embeddings of type {kind} must be a floating-point tensor (B, {width})")
        if embeddings.ndim != 2 or embeddings.shape[1] != width:
            raise InputError(f"embeddings of shape {tuple(embeddings.shape)} must be (B, {width}), as embedding_dim says")


class _AveragedGradient(torch.autograd.Function):
    """Collective in the backward. The same values; their gradient is averaged over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return distributed.all_reduce_sum(grads[0].contiguous()) / distributed.group_size()


def _process() -> tuple[int, int]:
    """Rank and number of processes of the process group.

    Raises:
        InputError: a launcher started several processes, and there is no process group.
    """
    if distributed.group_size() == 1 and distributed.world_size() > 1:
        raise InputError(f"{distributed.world_size()} processes were started; call torch.distributed.init_process_group first")
    return distributed.group_rank(), distributed.group_size()


def _device(features: Tensor) -> torch.device:
    """Where k-means may run and tensors travel between ranks: with these features, unless the process group reaches GPUs only."""
    if distributed.group_size() > 1 and f"{features.device.type}:" not in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return features.device
