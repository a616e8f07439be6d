"""Masks that are trained (TPAMI 2021, section 3.4), from equal ones or from ones that differ since the split."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from dnc_dist.base import parts
from dnc_dist.model.masks.base import SubspaceMasks, blocks


class LearnedMasks(SubspaceMasks):
    """Ones at the start, trained, with a penalty on their mean cosine. Equal masks get no gradient from it."""

    learned = True

    class Options(parts.Options):
        split_scale: float = Field(1.0, ge=0, le=1)
        """Factor on half of a child's coordinates at its split, on the other half of its sibling's; 1: children begin equal (published)."""

        def conflicts(self, cfg: Any) -> Iterator[str]:
            learners = cfg.division.num_learners
            if self.split_scale < 1 and learners & (learners - 1):
                yield (
                    f"model.masks.split_scale={self.split_scale:g} halves the coordinates at every split, so "
                    f"division.num_learners={learners} must be a power of two; use 2, 4, 8 ..., or model.masks.split_scale=1"
                )
            if cfg.division.distill and self.split_scale == 1 and cfg.optim.mask_lr_mult == 0:
                yield (
                    f"division.distill={cfg.division.distill:g} has no effect: with model.masks.split_scale=1 and optim.mask_lr_mult=0 "
                    "every learner's subspace is the whole embedding; lower the one, raise the other, or set division.distill=0"
                )

    options: Options

    def __init__(self, options: Options, *, num_learners: int, embedding_dim: int) -> None:
        super().__init__(options, num_learners=num_learners, embedding_dim=embedding_dim)
        self.options = options
        if options.split_scale < 1:
            for level, scale in split_scales(num_learners, embedding_dim, options.split_scale).items():
                # Follows from the options, so no checkpoint holds it.
                self.register_buffer(_buffer(level), scale, persistent=False)

    def first(self) -> Tensor:
        return torch.ones(self.num_learners, self.embedding_dim)

    def level_masks(self, level: int) -> Tensor:
        """(k, D) the common value of each learner's leaves, each of which receives the full gradient.

        The leaves then stay equal and move exactly as one parent would, and after a split the children go on with their parent's
        Adam moments. What makes children differ is no part of the parameter, but a factor that the level brings.

        Raises:
            ValueError: level does not divide K.
        """
        rows = self.leaves(level)
        common = rows.detach()[:, 0] + (rows - rows.detach()).sum(1)
        return common if self.options.split_scale == 1 else common * self.get_buffer(_buffer(level))


def split_scales(num_learners: int, embedding_dim: int, scale: float) -> dict[int, Tensor]:
    """By level k = 1, 2, 4 ... K: (k, D) the factors of its learners.

    At the split into k learners the coordinates form k contiguous blocks. Child 2c of any parent keeps the even ones, 2c + 1 the odd ones,
    and each multiplies the others by ``scale``. Blocks halve as learners do. So a learner multiplies a coordinate by scale^h, where h is
    the number of splits at which they went different ways, and the masks of learners that parted at h splits have the cosine
    (2 scale / (1 + scale²))^h, if the blocks are equally large.

    Args:
        num_learners: K, a power of two.
        embedding_dim: D, at least K.
        scale: between 0 and 1.

    Raises:
        InputError: the embedding has fewer coordinates than there are learners.
    """
    level, scales = 1, {1: torch.ones(1, embedding_dim)}
    while level < num_learners:
        block = blocks(2 * level, embedding_dim).argmax(0)
        keeps = torch.arange(2 * level)[:, None] % 2 == block % 2
        scales[2 * level] = scales[level].repeat_interleave(2, 0) * torch.where(keeps, 1.0, scale)
        level *= 2
    return scales


def _buffer(level: int) -> str:
    return f"scale_of_{level}"
