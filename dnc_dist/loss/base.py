"""What every loss is: a module with options, and with a value of one step over all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.distributed import ProcessGroup

import dnc_kernels
from dnc_dist.base import parts
from dnc_dist.processes import distributed


@dataclass(frozen=True)
class StepRows:
    """This rank's rows of a step, b of them, and what else the loss of the step depends on.

    ``labels``, ``learner``, ``row_ids`` (b,) int64; a row of learner -1 takes part in nothing.
    """

    embeddings: Tensor
    """(b, D) in fp32 at least: raw where there are masks, else unit rows of the whole embedding."""
    masks: Tensor | None
    """(K, D) the masks of the learners; None: the whole embedding is trained."""
    labels: Tensor
    learner: Tensor
    row_ids: Tensor
    num_learners: int
    """K."""
    seed: int
    step: int
    rows_of_ranks: Sequence[int]
    """b on each of the ranks that share the step's learners."""
    group: ProcessGroup | None = None
    """Those ranks; None: all."""
    rows_of_world: Sequence[int] | None = None
    """b on every rank; None: nobody has counted them."""
    max_positives: int | None = None
    """An upper bound of the positives of a row among the rows of all these ranks; None: nobody has counted them."""
    learner_on_host: Tensor | None = None
    """``learner`` on the CPU; None: nobody has kept it."""

    @cached_property
    def z(self) -> Tensor:
        """(b, D) projected into the subspaces of the rows' learners and normalised."""
        return self.embeddings if self.masks is None else dnc_kernels.project(self.embeddings, self.learner, self.masks)

    @property
    def alone(self) -> bool:
        """Whether no other rank shares the learners."""
        return distributed.group_size(self.group) == 1

    @property
    def start(self) -> int:
        """Where this rank's rows begin among those of all ranks of the group."""
        return sum(self.rows_of_ranks[: distributed.group_rank(self.group)])

    def gather(self, rows: Tensor, grad: Literal["none", "own", "sum"] = "none") -> Tensor:
        """Collective. (b, ...) of every rank of the group, as ``distributed.gather_rows`` brings them together."""
        return distributed.gather_rows(rows, grad=grad, counts=self.rows_of_ranks, group=self.group)

    def gather_world(self, rows: Tensor) -> Tensor:
        """Collective. (b, ...) of every rank, also of those that serve other learners: the step's global batch, without gradient."""
        return distributed.gather_rows(rows, counts=self.rows_of_ranks if self.group is None else self.rows_of_world)


class Loss(nn.Module, ABC):
    """Base of all losses; write one as a ``PairwiseLoss`` or a ``BatchLoss``. What it learns are parameters of the module.

    Args:
        options: an instance of the class's ``Options``.
        num_classes: C, the number of training classes; labels are 0 to C-1.
        embedding_dim: D, the width of the whole embedding.
    """

    class Options(parts.Options):
        """Default, range and meaning of every option; nowhere else."""

    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Options that the parity checks (doctor and tests) compute steps with, on several ranks and on one."""
    options: Options

    def __init__(self, options: Options, *, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.options, self.num_classes, self.embedding_dim = options, num_classes, embedding_dim

    def forget(self) -> None:
        """Drop what is kept of past embeddings: those that follow lie in other subspaces."""

    @abstractmethod
    def of_step(self, rows: StepRows) -> tuple[Tensor, dict[str, Tensor]]:
        """Collective. This rank's loss of a step, and statistics.

        The loss is scaled so that the mean over the W ranks of its gradients is the gradient of the loss of the step, which is the
        mean over the learners that have rows in it of their losses.

        Returns:
            The loss (), and tensors that are equal on all ranks and carry no factor W: ``loss`` () and ``learner_loss`` (K,), NaN
            for learners without rows.
        """
