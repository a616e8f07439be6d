"""Seconds and bytes of a step, a division and an evaluation on W GPUs: arithmetic alone, from measured times and a stated network.

Bytes are those that one rank receives, as `distributed.traffic` counts them (tests compare the two); gradients and optimizer
follow what DeepSpeed's ZeRO stages send. Times of collectives are a model: latency plus bytes over bandwidth. Ranks are taken to be slow
independently of each other, and to take nothing from each other but the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from dnc_dist.clustering.centroids import SAMPLE_ROWS_PER_CENTROID
from dnc_dist.clustering.features import REPLICATED_ROWS

# Statistics of a step besides losses, counts and presence of each learner, in float64: those of the draws, and the active pairs.
PAIRWISE_STATS = 15


@dataclass(frozen=True)
class Network:
    """Assumed, not measured: calibrate with `dnc-dist doctor network` on the cluster itself. Bytes a second and seconds."""

    gpus_per_node: int = 8
    nvlink: float = 450e9  # of one GPU inside a node
    nic: float = 45e9  # of one GPU's own adapter, 400 Gb/s at 90 %
    node_latency: float = 12e-6  # of an all-reduce inside a node; an all-gather takes half
    hop_latency: float = 10e-6  # more for every doubling of the nodes
    ring: bool = False  # all-gathers in one flat ring over all GPUs, each through its own adapter: the worst that NCCL may choose
    ring_hop_latency: float = 2.5e-6
    storage: float | None = 20e9  # what all ranks together read from shared storage; null: data lies on each node's own disk

    def _split(self, ranks: int) -> tuple[int, int]:
        """GPUs that take part in each node, and nodes."""
        local = min(ranks, self.gpus_per_node)
        return local, math.ceil(ranks / local)

    def latency(self, ranks: int) -> float:
        """Of one all-reduce of nothing."""
        return self.node_latency + self.hop_latency * math.log2(self._split(ranks)[1]) if ranks > 1 else 0.0

    def all_reduce(self, size: float, ranks: int) -> float:
        """Seconds to sum `size` bytes: reduce-scatter in each node, across nodes through all adapters, all-gather in each node."""
        if ranks == 1:
            return 0.0
        local, nodes = self._split(ranks)
        return self.latency(ranks) + 2 * (local - 1) / local * size / self.nvlink + 2 * (nodes - 1) / nodes * size / local / self.nic

    def all_gather(self, total: float, ranks: int) -> float:
        """Seconds until every rank has the `total` bytes of all: each node takes them in once through all its adapters."""
        if ranks == 1:
            return 0.0
        local, nodes = self._split(ranks)
        inside, across = (local - 1) / local * total / self.nvlink, (nodes - 1) / nodes * total / local / self.nic
        if self.ring and nodes > 1:
            return (ranks - 1) * self.ring_hop_latency + (ranks - 1) / ranks * total / self.nic
        return self.latency(ranks) / 2 + max(inside, across)


@dataclass(frozen=True)
class Workload:
    """What is trained: 32 learners in 512 dimensions on a million images, with batches that fill GPUs. BatchNorm is frozen.

    (BatchNorm with statistics of the global batch sums over ranks in every layer; that is not modelled.)
    """

    rows_per_gpu: int = 128  # of a step, in weak scaling
    batch: int = 1024  # rows of a step over all GPUs, in strong scaling
    dim: int = 512
    learners: int = 32
    learners_per_step: int = 1
    samples_per_class: int = 4
    loss: str = "margin"  # margin or proxy_anchor
    zero: int = 1
    images: int = 1_000_000
    queries: int = 10_000
    gallery: int = 1_000_000
    relevant: int = 50  # gallery rows of the largest class
    image_bytes: int = 40_000
    lloyd_iterations: int = 50
    loader_workers: int = 8  # of each GPU; 0: the training process reads and decodes by itself
    overlap: float = 0.5  # share of the backward pass behind which the sums of gradients hide (ZeRO 1 and 2, on GPUs)

    def group(self, ranks: int) -> int:
        """Ranks that share a learner's rows."""
        return ranks // self.learners_per_step if ranks % self.learners_per_step == 0 else ranks


@dataclass(frozen=True)
class StepTimes:
    """Times of the training step of one process, in seconds, as the training loop runs it on batches that are there."""

    parameters: int  # trainable, float32
    groups: int  # of the parameters, each with an optimizer's options of its own
    steps: Sequence[Sequence[float]]  # [rows, seconds]: the median of whole steps
    loss: Sequence[Sequence[float]]  # [anchors, references, seconds]: mining and loss, forward and backward
    optimizer: float  # what follows the backward pass: the norm of the gradients, clipping, an update of all parameters
    engine: float  # what a step takes longer with DeepSpeed's engine, which several processes run, on one process
    engine_update: float  # of it, after the backward pass: there ZeRO works on a rank's own part of the parameters
    jitter: Sequence[float]  # single steps of the most rows, over their median

    def step_costs(self, rows: float) -> tuple[float, float]:
        """Seconds of a step less loss and optimizer: what does not depend on its rows, and what does.

        A line is fitted to `steps`. How far they lie above or below it holds for the batches around them, too.
        """
        sizes, seconds = np.array(sorted(map(tuple, self.steps)), float).T
        seconds = (seconds - [self.loss_seconds(b, b) + self.optimizer for b in sizes]).clip(min=1e-9)
        (fixed, each), _ = nnls(np.stack([np.ones_like(sizes), sizes], 1), seconds)
        off = float(np.interp(rows, sizes, seconds / (fixed + each * sizes)))
        return off * float(fixed), off * float(each) * rows

    def loss_seconds(self, anchors: float, references: float) -> float:
        """Fitted to `loss`: a constant, a share of anchors x references, and one of the references (whose drawn pairs every rank walks)."""
        a, g, seconds = np.array(self.loss, float).T
        costs, _ = nnls(np.stack([np.ones_like(a), a * g, g], 1), seconds)
        return float(costs @ [1, anchors * references, references])

    def waiting(self, ranks: int) -> float:
        """What the slowest of the ranks takes longer than a rank does on average, as a share of a step.

        Assumed: the ranks' times are independent draws from `jitter`, and the ranks wait once in a step. Where something slows all ranks
        at once, as other work on their machine does, the true wait is shorter. It is longer since ranks meet several times in a step, and
        since the slowest of many ranks may be slower than any step that was measured.
        """
        return expected_slowest(self.jitter, ranks) - expected_slowest(self.jitter, 1)


def expected_slowest(seconds: Sequence[float], ranks: int) -> float:
    """Expected maximum of `ranks` independent draws, with replacement, from what was measured: from its order statistics."""
    at_most = (np.arange(len(seconds) + 1) / len(seconds)) ** ranks  # the probability that no draw exceeds the i-th smallest
    return float(np.sort(seconds) @ np.diff(at_most))


@dataclass(frozen=True)
class Measured:
    """Times of one device, in seconds, and sizes of the model that they belong to."""

    device: str
    features: int  # F
    step: StepTimes
    images_per_second: float  # extraction, decoded images given
    decoded_per_second: float  # images that one loader process decodes and crops
    lloyd_row: float  # one row in one iteration
    first_centroids: float  # k-means++ on its sample
    bookkeeping_row: float  # one row of the set in match, class counts and the new division, on every rank
    search_pair: float  # one query and one gallery row


def step_bytes(work: Workload, ranks: int, rows: int, level: int | None = None) -> dict[str, int]:
    """Bytes that a rank with `rows` rows receives for the loss of one step, as `traffic()` counts them; even parts, `level` learners."""
    k = work.learners if level is None else level
    peers = work.group(ranks) - 1
    if work.loss == "margin":
        row = 4 * work.dim + 3 * 8 + 2 * (work.samples_per_class - 1) * 4  # z; label, learner, row number; drawn pairs
        stats = 8 * (3 * k + PAIRWISE_STATS)
    else:
        row, stats = 4 * work.dim + 2 * 8, 8 * 2 * k
    return {"gather": peers * rows * row, "reduce": 2 * (ranks - 1) * stats // ranks}


def gradient_bytes(work: Workload, parameters: int, ranks: int) -> dict[str, float]:
    """Bytes that a rank receives from DeepSpeed in a step: sums of gradients (stages 1 and 2 sum whole buckets, too), then parameters."""
    size = 4 * parameters
    return {"gradients": 2 * (ranks - 1) / ranks * size, "parameters": (ranks - 1) / ranks * size if work.zero else 0.0}


def messages(work: Workload, groups: int) -> dict[str, int]:
    """Collectives of a step on several ranks, by what they carry. Most carry few bytes, but each costs its latency.

    "stats" counts the request to stop, which the ranks add up in every step. DeepSpeed adds up the norms of each group, and hands out the
    parameters of each; at stage 0 the ranks add up one number, whether the gradients are finite.
    """
    gathers = 3 if work.loss == "margin" else 2
    by_group = {"norms": groups, "parameters": groups} if work.zero else {"norms": 1, "parameters": 0}
    return {"gathers": gathers, "stats": 2, "gradients": 1, **by_group}


def lloyd_bytes(k: int, dim: int) -> int:
    """What one iteration sums over ranks: sums, counts, objective and moved rows, in float64."""
    return 8 * (k * dim + k + 2)


def division_bytes(work: Workload, features: int) -> dict[str, int]:
    """What all ranks together hand out in one division: gathered by all, or summed over all (which does not grow with the images)."""
    n, k = work.images, work.learners
    sample = min(n, SAMPLE_ROWS_PER_CENTROID * k)
    if n <= REPLICATED_ROWS:
        return {"features": 4 * n * features, "sample": 0, "ids": n, "broadcast": 2 * n, "iteration": 0}
    # Who could be decoded, and the clusters, which travel as bytes; then rank 0's division.
    ids = n + n * (1 if k <= 256 else 4)
    return {"features": 0, "sample": sample * (4 * features + 8), "ids": ids, "broadcast": 2 * n, "iteration": lloyd_bytes(k, features)}


def evaluation_bytes(work: Workload) -> dict[str, int]:
    """What all ranks together hand out in one evaluation: queries to everybody, what is found to each query's own rank, metrics."""
    return {
        "presence": 8 * (work.queries + work.gallery),  # summed over all
        # The vector, row and label; then once more row and label, with the relevant rows and the distances to them.
        "queries": work.queries * (4 * work.dim + 16 + 8 * (5 + 2 * work.relevant)),
        # From every rank its relevant rows with their distances, then how many others come before each of them, and the nearest row.
        "found": work.queries * (12 * work.relevant + 8 * (2 + work.relevant)),
        "values": work.queries * (8 + 5 * 8),
    }


def step(work: Workload, measured: Measured, network: Network, ranks: int, batch: int) -> dict[str, float]:
    """Seconds of each phase of one step with `batch` rows over all ranks."""
    phases = step_without_input(work, measured.step, network, ranks, batch)
    rows = max(1, math.ceil(batch / ranks))
    return phases | {"input": _waiting_for_input(work, measured, network, ranks, rows, sum(phases.values()))}


def step_without_input(work: Workload, times: StepTimes, network: Network, ranks: int, batch: int) -> dict[str, float]:
    """The same for batches that are there."""
    rows = max(1, math.ceil(batch / ranks))
    fixed, by_row = times.step_costs(rows)
    group = work.group(ranks)
    sizes = step_bytes(work, ranks, rows)
    total = sizes["gather"] * group / max(1, group - 1)
    sent = messages(work, times.groups)
    parts = ranks if work.zero else 1  # of parameters and moments
    summed = network.all_reduce(4 * times.parameters, ranks)
    hidden = work.overlap * 2 / 3 * (fixed + by_row) if work.zero else 0.0
    computed = {
        "rows": by_row,
        "launches": fixed,
        "loss": times.loss_seconds(rows, rows * group),
        "optimizer": times.optimizer / parts,
        "engine": times.engine - times.engine_update * (1 - 1 / parts) if ranks > 1 else 0.0,
    }
    updated = sent["norms"] * network.all_reduce(0, ranks)
    if work.zero:
        updated += (sent["parameters"] - 1) * network.all_gather(0, ranks) + network.all_gather(4 * times.parameters, ranks)
    reduced = sizes["reduce"] * ranks / max(1, 2 * (ranks - 1))
    return computed | {
        "gathers": (sent["gathers"] - 1) * network.all_gather(0, group) + network.all_gather(total, group),
        "stats": (sent["stats"] - 1) * network.all_reduce(0, ranks) + network.all_reduce(reduced, ranks),
        "gradients": max(0.0, summed - hidden) + updated,
        "stragglers": times.waiting(ranks) * sum(computed.values()),
    }


def _waiting_for_input(work: Workload, measured: Measured, network: Network, ranks: int, rows: float, meanwhile: float) -> float:
    """Seconds that a rank waits for `rows` images while the rest takes `meanwhile`.

    Loader processes work ahead: what is read and decoded meanwhile costs nothing. Without any, the rank reads and decodes by itself.
    """
    read = ranks * rows * work.image_bytes / network.storage if network.storage else 0.0
    if not work.loader_workers:
        return read + rows / measured.decoded_per_second
    return max(0.0, max(read, rows / (work.loader_workers * measured.decoded_per_second)) - meanwhile)


def division(work: Workload, measured: Measured, network: Network, ranks: int) -> dict[str, float]:
    """Seconds of each phase of one division into all learners (one k-means that needs no second trial)."""
    rows, sizes = work.images / ranks, division_bytes(work, measured.features)
    replicated = work.images <= REPLICATED_ROWS
    iterations = work.lloyd_iterations
    extraction = rows / measured.images_per_second
    return {
        "extraction": extraction,
        "input": _waiting_for_input(work, measured, network, ranks, rows, extraction),
        "init": network.all_gather(sizes["features"] + sizes["sample"], ranks) + measured.first_centroids,
        "lloyd": iterations * measured.lloyd_row * (work.images if replicated else rows),
        "lloyd sums": 0.0 if replicated else iterations * network.all_reduce(sizes["iteration"], ranks),
        "ids": network.all_gather(sizes["ids"], ranks) + network.all_gather(sizes["broadcast"], ranks),
        "bookkeeping": work.images * measured.bookkeeping_row,
    }


def evaluation(work: Workload, measured: Measured, network: Network, ranks: int) -> dict[str, float]:
    """Seconds of each phase of one evaluation with queries and a gallery."""
    images, sizes = work.queries + work.gallery, evaluation_bytes(work)
    extraction = images / ranks / measured.images_per_second
    moved = network.all_reduce(sizes["presence"], ranks) + network.all_gather(sizes["queries"] + sizes["values"], ranks)
    return {
        "extraction": extraction,
        "input": _waiting_for_input(work, measured, network, ranks, images / ranks, extraction),
        "search": work.queries * work.gallery / ranks * measured.search_pair,
        "exchange": moved + network.all_gather(sizes["found"], ranks),
    }
