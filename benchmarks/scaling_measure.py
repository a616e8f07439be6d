"""What the model of scaling stands on, measured on this machine's one device with the project's own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from benchmarks.scaling_model import Measured, Workload
from benchmarks.scaling_step import CLASSES, median_seconds, noise, step_times
from dnc_dist.clustering import Features, KMeansOptions, kmeans
from dnc_dist.clustering.centroids import SAMPLE_ROWS_PER_CENTROID, first_centroids
from dnc_dist.clustering.division import make_division, match
from dnc_dist.clustering.repair import class_sizes
from dnc_dist.config import RunConfig
from dnc_dist.data.images import encode
from dnc_dist.data.loading import load_image
from dnc_dist.data.transforms import CROP_UNIFORMS, Geometry
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.setup import build_objective
from dnc_dist.processes import distributed
from dnc_dist.processes.cores import cores_per_rank, loaders_of, quota, usable_cores
from dnc_dist.retrieval import evaluate

PHOTO = (500, 375)  # pixels of the image that is decoded, the size of many photographs on the web


def measure(cfg: RunConfig, rows: Sequence[int], *, calls: int, steps: int, size: int) -> Measured:
    """Time everything once on this rank's device.

    Args:
        cfg: what is trained; its data is not read.
        rows: of the batches whose steps are timed; two different numbers at least.
        calls: of what is timed, but for whole steps; the median counts.
        steps: whole steps of each kind.
        size: rows with which k-means, bookkeeping and search are timed, whose cost grows with the rows.
    """
    step = step_times(cfg, rows, calls=calls, steps=steps)
    objective = build_objective(cfg, CLASSES)
    features = objective.head.linear.in_features
    learners, dim = cfg.division.num_learners, cfg.model.embedding_dim
    seconds = partial(median_seconds, calls=calls)
    random = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(size, features, generator=random), dim=1).to(distributed.device())
    rows_of_x = Features.alone(x)
    lloyd = [
        seconds(partial(kmeans, rows_of_x, learners, seed=0, options=KMeansOptions(n, tolerance=0), init=x[:learners])) for n in (1, 5)
    ]
    z = torch.nn.functional.normalize(torch.randn(size, dim, generator=random), dim=1)
    ids, labels = torch.arange(size), np.arange(size) % max(2, size // 50)
    asks = np.arange(size) < min(1024, size // 4)
    roles = {"protocol": "query-gallery", "sample": 0}
    search = [seconds(partial(evaluate, z[:n], ids[:n], labels[:n], asks[:n], ~asks[:n], **roles)) for n in (size // 2, size)]
    return Measured(
        device=record.machine()["device"],
        features=features,
        step=step,
        images_per_second=max(rows) / seconds(_extraction(objective, cfg, max(rows))),
        decoded_per_second=1 / seconds(_decoding(cfg)),
        lloyd_row=max(0.0, lloyd[1] - lloyd[0]) / (4 * size),
        first_centroids=seconds(_init(x, learners)) * max(1.0, SAMPLE_ROWS_PER_CENTROID * learners / size),
        bookkeeping_row=seconds(_bookkeeping(size, learners)) / size,
        search_pair=max(0.0, search[1] - search[0]) / int(asks.sum()) / (size - size // 2),
    )


def workload(cfg: RunConfig) -> Workload:
    """What the configuration says about the work; the rest, as the size of the data, keeps its default."""
    return Workload(
        batch=cfg.schedule.batch_size,
        dim=cfg.model.embedding_dim,
        learners=cfg.division.num_learners,
        learners_per_step=cfg.division.learners_per_step,
        samples_per_class=cfg.schedule.samples_per_class,
        loss=cfg.loss.name,
        zero=cfg.engine.zero,
        loader_workers=_loaders(cfg.data.workers),
    )


def _loaders(wanted: int | Literal["auto"]) -> int:
    """What ``data.workers`` means on machines like this one, with a rank on each GPU; without GPUs cores do not matter."""
    if wanted != "auto":
        return wanted
    gpus, mine = torch.cuda.device_count(), ("this machine", usable_cores(), quota())
    return loaders_of(cores_per_rank([mine] * max(1, gpus)), on_gpu=gpus > 0)


def _extraction(objective: DncObjective, cfg: RunConfig, rows: int) -> Callable[[], None]:
    images = noise(cfg, rows).images

    def call() -> None:
        objective.eval()
        with torch.inference_mode():
            objective.features(images).cpu()

    return call


def _decoding(cfg: RunConfig) -> Callable[[], Any]:
    blurred = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    data = encode(Image.fromarray(blurred).resize(PHOTO, Image.Resampling.BICUBIC))
    geometry, uniforms = Geometry(cfg.data.augment, cfg.data.image_size, cfg.data.crop), torch.full((CROP_UNIFORMS,), 0.5)
    return lambda: load_image(data, geometry, uniforms)


def _init(x: torch.Tensor, learners: int) -> Callable[[], Any]:
    """k-means++ on a sample of these rows."""
    parent, count = np.zeros(len(x), np.int64), np.array([len(x)])
    return lambda: first_centroids(Features.alone(x), parent, count, learners, 0)


def _bookkeeping(size: int, learners: int) -> Callable[[], None]:
    random = np.random.default_rng(0)
    labels, previous, cluster = random.integers(0, size // 20 + 1, size), *random.integers(0, learners, (2, size))

    def call() -> None:
        class_sizes(cluster, labels).trainable(learners)
        make_division(match(previous, cluster, learners), labels, learners, np.empty((learners, 0), np.float32), 0)

    return call
