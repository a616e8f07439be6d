"""The clusters of the last division as the network sees them now: subspaces, where they lie, what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dnc_dist.base.exact import contingency
from dnc_dist.clustering.division import Division
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.mistakes import drawn
from dnc_dist.engine.network import EmbeddingNetwork
from dnc_dist.processes import distributed
from dnc_dist.rundir import DIVISIONS

CLUSTER_SAMPLE = 64
"""Training images of each learner that say where its cluster lies now."""
MONTAGE, MOST_MONTAGE = 12, 240
"""Pictures of each cluster, and of all."""
BLOCK = 32
"""Training images that go through the network together, whichever rank has them."""


class Clusters(NamedTuple):
    """The clusters of the last division that had several, and the subspaces of their learners."""

    masks: Tensor  # (k, D) at least 0
    centres: np.ndarray  # (k, D) mean embeddings of some of their images, now
    montage: np.ndarray  # (k, t) int64 rows of the index; -1: no more
    facts: np.ndarray  # (k, 4) float32: images, classes, classes of which most lie here, mean share of an image's class


def last_division(now: Division | None, run_dir: Path) -> Division | None:
    """The last division of a run that had several learners; None if there was none. While conquering only the run directory has it.

    Raises:
        InputError: the file of a division is damaged.
    """
    if now is not None and now.num_learners > 1:
        return now
    made = sorted((run_dir / DIVISIONS).glob("epoch-*.npz"), key=lambda path: (len(path.name), path.name))
    return next((found for path in reversed(made) if (found := Division.load(path)).num_learners > 1), None)


def clusters_now(network: EmbeddingNetwork, data: RunData, division: Division) -> Clusters:
    """Collective. The clusters of a division of the training view, as the network sees them now."""
    learners, learner_of, labels = division.num_learners, division.learner_of, data.train.labels
    sample = [drawn(f"cluster {learner}", np.flatnonzero(learner_of == learner), CLUSTER_SAMPLE) for learner in range(learners)]
    embeddings = _embed(network, data, data.train.rows[np.concatenate(sample)])
    centres = [part.mean(0) for part in np.split(embeddings, np.cumsum([len(rows) for rows in sample])[:-1])]
    table = contingency(learner_of, labels, learners, data.train.num_classes)
    # Of the class of an image of the cluster, how much lies in the cluster with it.
    share = (table * (table / np.maximum(table.sum(0), 1))).sum(1) / np.maximum(table.sum(1), 1)
    main = np.bincount(table.argmax(0)[table.sum(0) > 0], minlength=learners)
    montage = np.full((learners, min(MONTAGE, max(1, MOST_MONTAGE // learners))), -1)
    for line, rows in zip(montage, sample, strict=True):
        # Classes stand together in the order of the rows: some of all of them.
        some = rows[np.linspace(0, len(rows) - 1, min(len(line), len(rows))).round().astype(int)]
        line[: len(some)] = data.train.rows[some]
    with torch.no_grad():
        masks = network.masks.level_masks(learners).float().relu().cpu()
    return Clusters(masks, np.stack(centres), montage, np.stack([table.sum(1), (table > 0).sum(1), main, share], 1).astype(np.float32))


def _embed(network: EmbeddingNetwork, data: RunData, rows: np.ndarray) -> np.ndarray:
    """Collective. (n, D) embeddings of a few rows of the index, in blocks that do not depend on the number of ranks."""
    blocks = [np.arange(at, min(at + BLOCK, len(rows))) for at in range(0, len(rows), BLOCK)]
    start, stop = distributed.local_range(len(blocks))
    device, own = distributed.device(), torch.zeros(0, network.masks.embedding_dim, device=distributed.device())
    was_training = network.training
    network.eval()
    with torch.inference_mode():
        for block in blocks[start:stop]:
            pixels = data.thumbnails(rows[block], data.cfg.data.image_size, data.cfg.data.crop)
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
            own = torch.cat([own, network.embeddings(images).float()])
        every = distributed.gather_rows(own).cpu().numpy()
    network.train(was_training)
    return every
