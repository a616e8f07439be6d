"""One step of Lloyd's algorithm in Triton: which kernels run, behind the contract of `reference.lloyd_step`."""

from __future__ import annotations

import torch
from torch import Tensor

from dnc_kernels import kmeans_resident, kmeans_streamed
from dnc_kernels.contract import check_below, check_matrix, integer_column
from dnc_kernels.target import check_dtypes


@torch.library.custom_op(
    "dnc_kernels::lloyd_step",
    mutates_args=(),
    schema="(Tensor x, Tensor centroids, Tensor? parent) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _lloyd_step(x: Tensor, centroids: Tensor, parent: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num_centroids, width = centroids.shape
    if x.shape[0] == 0:
        return (
            torch.empty(0, dtype=torch.int64, device=x.device),
            torch.empty(0, device=x.device),
            torch.zeros(num_centroids, width, dtype=torch.float64, device=x.device),
            torch.zeros(num_centroids, dtype=torch.int64, device=x.device),
        )
    x, parent = x.contiguous(), None if parent is None else parent.contiguous()
    if tile := kmeans_resident.shape(x.dtype, width, num_centroids, x.device):
        return kmeans_resident.lloyd_resident(x, centroids, parent, tile)
    assignment, distance = kmeans_streamed.nearest(x, centroids, parent, kmeans_streamed.nearest_shape(x.dtype, num_centroids))
    if num_centroids <= kmeans_streamed.ONE_HOT_CENTROIDS:
        sums, counts = kmeans_streamed.one_hot_sums(x, assignment, num_centroids, kmeans_streamed.one_hot_shape(num_centroids))
    else:
        sums, counts = kmeans_streamed.segment_sums(x, assignment, num_centroids)
    return assignment, distance, sums, counts


@_lloyd_step.register_fake
def _(x: Tensor, centroids: Tensor, parent: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape[0], dtype=torch.int64),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(centroids.shape, dtype=torch.float64),
        x.new_empty(centroids.shape[0], dtype=torch.int64),
    )


@torch.no_grad()
def lloyd_step(x: Tensor, centroids: Tensor, *, restrict: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.lloyd_step` by fused kernels: no (N, K) matrix, no wait for the device, the same bits in every run.

    The distance is |x|² - 2 x·c + |c|² in float32, not below 0. Its error is a few 1e-6 of (|x| + |c|)²; float16 rows add
    6e-8 Σ|x|. Of two centroids whose distances differ by less, either may be taken.

    Raises:
        ValueError: as the reference; a dtype other than float32, bfloat16 and float16.
    """
    check_matrix("x", x)
    check_matrix("centroids", centroids, width=x.shape[1], device=x.device)
    check_dtypes(x=x, centroids=centroids)
    num_centroids = centroids.shape[0]
    if num_centroids == 0:
        raise ValueError("centroids is empty")
    if restrict is not None:
        restrict = integer_column("restrict", restrict, x)
        if num_centroids % 2:
            raise ValueError(f"restrict needs a pair of centroids for every parent; got {num_centroids} centroids")
        check_below("restrict", restrict, num_centroids // 2, f"-1 (left out) to {num_centroids // 2 - 1}")
    return _lloyd_step(x, centroids, restrict)
