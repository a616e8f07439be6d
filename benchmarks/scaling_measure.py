"""What the model of scaling stands on, measured on this machine's one device with the project's own code."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from benchmarks.scaling_model import Measured, Workload
from dnc_dist.clustering import Features, KMeansOptions, kmeans
from dnc_dist.clustering.centroids import SAMPLE_ROWS_PER_CENTROID, first_centroids
from dnc_dist.clustering.division import make_division, match
from dnc_dist.clustering.repair import class_sizes
from dnc_dist.config import RunConfig
from dnc_dist.data.images import encode
from dnc_dist.data.loading import Batch, load_image
from dnc_dist.data.transforms import CROP_UNIFORMS, Geometry
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.optimizer import WaitingAdamW
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective, parameter_groups
from dnc_dist.loss.base import StepRows
from dnc_dist.processes import distributed
from dnc_dist.retrieval import evaluate

CLASSES = 1000
PHOTO = (500, 375)  # pixels of the image that is decoded, the size of many photographs on the web


def measure(cfg: RunConfig, rows: Sequence[int], *, calls: int, size: int) -> Measured:
    """Time everything once on this rank's device.

    Args:
        cfg: what is trained; its data is not read.
        rows: of the batches with which forward and backward are timed; two different numbers at least.
        calls: of what is timed; the median counts.
        size: rows with which k-means, bookkeeping and search are timed, whose cost grows with the rows.
    """
    objective = build_objective(cfg, CLASSES)
    clock = _Clock(calls)
    features = objective.head.linear.in_features
    learners, dim = cfg.division.num_learners, cfg.model.embedding_dim
    few = max(2 * cfg.schedule.samples_per_class, min(rows))
    loss = [(a, a * times, clock.seconds(_loss(objective, cfg, a, times))) for a in sorted({few, max(rows)}) for times in (1, 4, 16)]
    alone = {a: seconds for a, references, seconds in loss if a == references}
    step = [(b, clock.seconds(_step(objective, cfg, b))) for b in rows]
    random = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(size, features, generator=random), dim=1).to(distributed.device())
    rows_of_x = Features.alone(x)
    lloyd = [
        clock.seconds(partial(kmeans, rows_of_x, learners, seed=0, options=KMeansOptions(n, tolerance=0), init=x[:learners]))
        for n in (1, 5)
    ]
    z = torch.nn.functional.normalize(torch.randn(size, dim, generator=random), dim=1)
    ids, labels = torch.arange(size), np.arange(size) % max(2, size // 50)
    asks = np.arange(size) < min(1024, size // 4)
    roles = {"protocol": "query-gallery", "sample": 0}
    search = [clock.seconds(partial(evaluate, z[:n], ids[:n], labels[:n], asks[:n], ~asks[:n], **roles)) for n in (size // 2, size)]
    return Measured(
        device=record.machine()["device"],
        parameters=sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad),
        features=features,
        # The loss is a part of the step; it is modelled apart, since it grows with the ranks.
        forward_backward=[(b, max(0.0, seconds - alone.get(b, min(alone.values())))) for b, seconds in step],
        loss=loss,
        optimizer=clock.seconds(_optimizer(objective, cfg)),
        images_per_second=max(rows) / clock.seconds(_extraction(objective, cfg, max(rows))),
        decoded_per_second=1 / clock.seconds(_decoding(cfg)),
        lloyd_row=max(0.0, lloyd[1] - lloyd[0]) / (4 * size),
        first_centroids=clock.seconds(_init(x, learners)) * max(1.0, SAMPLE_ROWS_PER_CENTROID * learners / size),
        bookkeeping_row=clock.seconds(_bookkeeping(size, learners)) / size,
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
    )


class _Clock:
    """Median seconds of several calls, after one that warms up."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def seconds(self, call: Callable[[], Any]) -> float:
        call()
        times = []
        for _ in range(self.calls):
            _synchronize()
            at = time.perf_counter()
            call()
            _synchronize()
            times.append(time.perf_counter() - at)
        return statistics.median(times)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _batch(cfg: RunConfig, rows: int) -> Batch:
    """Noise, of classes with as many rows each as in training, all of learner 0."""
    images = torch.randint(256, (rows, 3, cfg.data.image_size, cfg.data.image_size), dtype=torch.uint8)
    number, nothing = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    labels = number // cfg.schedule.samples_per_class
    valid = torch.ones(rows, dtype=torch.bool)
    batch = Batch(images, labels, nothing, number, number, valid, [], 0, [rows], max_positives=cfg.schedule.samples_per_class - 1)
    return batch.to(distributed.device())


def _step(objective: DncObjective, cfg: RunConfig, rows: int) -> Callable[[], None]:
    batch, phase = _batch(cfg, rows), Phase(0, cfg.division.num_learners, False, False)

    def call() -> None:
        objective.zero_grad()
        loss, _ = objective(batch, phase)
        loss.backward()

    objective.train()
    return call


@dataclass(frozen=True)
class _RowsOfMany(StepRows):
    """Rows of the first of several ranks. What the others hold is made up, by dtype, and nothing is sent."""

    others: Mapping[torch.dtype, torch.Tensor] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        return not self.others

    def gather(self, rows: torch.Tensor, grad: str = "none") -> torch.Tensor:
        mine = rows.detach() if grad == "none" else rows
        if rows.dtype == torch.int32:  # the pairs that were drawn
            return mine.repeat(len(self.rows_of_ranks), 1)
        return torch.cat([mine, self.others[rows.dtype][:, : rows.shape[1]]]) if self.others else mine


def _loss(objective: DncObjective, cfg: RunConfig, anchors: int, times: int) -> Callable[[], None]:
    """Mining and loss of one rank's anchors against the rows of `times` ranks, forward and backward; nothing is sent."""
    device, every = distributed.device(), anchors * times
    made = torch.nn.functional.normalize(torch.randn(every, cfg.model.embedding_dim), dim=1).to(device)
    number, nothing = torch.arange(every, device=device), torch.zeros(every, dtype=torch.int64, device=device)
    labels = number // cfg.schedule.samples_per_class % CLASSES
    columns = torch.stack([labels, nothing, number], 1)
    rows = _RowsOfMany(
        made[:anchors].clone().requires_grad_(),
        None,
        *columns[:anchors].unbind(1),
        num_learners=1,
        seed=0,
        step=0,
        rows_of_ranks=[anchors] * times,
        max_positives=cfg.schedule.samples_per_class - 1,
        others={} if times == 1 else {made.dtype: made[anchors:], columns.dtype: columns[anchors:]},
    )
    return lambda: objective.loss.of_step(rows)[0].backward()


def _optimizer(objective: DncObjective, cfg: RunConfig) -> Callable[[], None]:
    """A step with the gradients that the timed steps have left behind."""
    return WaitingAdamW(parameter_groups(objective, cfg.optim.weight_decay), lr=1e-9).step


def _extraction(objective: DncObjective, cfg: RunConfig, rows: int) -> Callable[[], None]:
    images = _batch(cfg, rows).images

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
