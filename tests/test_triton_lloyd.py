"""The Lloyd kernels against the float64 reference, on a GPU or in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from dnc_kernels import kmeans, kmeans_resident, kmeans_streamed, kmeans_tiles, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Result = tuple[Tensor, Tensor, Tensor, Tensor]


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(x: Tensor, centroids: Tensor, restrict: Tensor | None, result: Result) -> None:
    """Every row is at its nearest centroid, up to rounding, and exactly those rows are in the sums."""
    assignment, distance, sums, counts = result
    nearest, expected, _, _ = reference.lloyd_step(x.double(), centroids.double(), restrict=restrict)
    assert assignment.dtype == counts.dtype == torch.int64 and distance.dtype == torch.float32 and sums.dtype == torch.float64
    taken = nearest >= 0
    assert torch.equal(assignment >= 0, taken)
    if restrict is not None:
        assert torch.equal(assignment[taken] // 2, restrict[taken].long())
    chosen = (x.double() - centroids.double()[assignment.clamp_min(0)]).square().sum(1) * taken
    scale = (x.double().norm(dim=1) + centroids.double().norm(dim=1).max()).square()
    assert (chosen - expected <= 3e-6 * scale).all()
    assert ((distance - chosen).abs() <= 3e-6 * scale).all()
    member = (assignment[:, None] == torch.arange(centroids.shape[0], device=DEVICE)).double()
    assert torch.equal(counts, member.sum(0).long())
    assert ((sums - member.T @ x.double()).abs() <= 1e-5 * x.double().abs().sum(0)).all()


@pytest.fixture(params=["one-hot", "sorted"])
def many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few centroids are many enough to be summed by sorting; 16-bit rows then leave the registers, too."""
    if request.param == "sorted":
        monkeypatch.setattr(kmeans_streamed, "ONE_HOT_CENTROIDS", 1)
        monkeypatch.setattr(kmeans_resident, "MOST_CENTROIDS", 1)


SIZES = [(1, 1, 1), (37, 5, 3), (64, 16, 16), (131, 24, 4), (100, 64, 32), (97, 130, 7), (60, 17, 40), (70, 600, 20)]


@pytest.mark.parametrize(
    ("rows", "width", "k", "dtype"),
    [
        *[(*size, dtype) for size in SIZES for dtype in (torch.float32, torch.bfloat16)],
        *[pytest.param(*size, torch.float16, marks=pytest.mark.slow) for size in SIZES],
        (70, 8, 129, torch.float32),
    ],
)
def test_equals_the_reference(rows: int, width: int, k: int, dtype: torch.dtype) -> None:
    x, centroids = random(rows, width, seed=0, dtype=dtype), random(k, width, seed=1)
    check(x, centroids, None, kmeans.lloyd_step(x, centroids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [2, 34])
def test_a_parent_leaves_two_centroids(k: int, dtype: torch.dtype, many: None) -> None:
    x, centroids = random(110, 20, seed=2, dtype=dtype), random(k, 20, seed=3)
    restrict = (torch.arange(110, device=DEVICE) % (k // 2 + 1) - 1).to(torch.int32)
    check(x, centroids, restrict, kmeans.lloyd_step(x, centroids, restrict=restrict))


def test_the_parents_may_be_a_column(many: None) -> None:
    x, centroids = random(60, 8, seed=2, dtype=torch.bfloat16), random(6, 8, seed=3)
    columns = torch.arange(180, device=DEVICE).view(60, 3) % 4 - 1
    check(x, centroids, columns[:, 1], kmeans.lloyd_step(x, centroids, restrict=columns[:, 1]))


def streamed(x: Tensor, centroids: Tensor, parent: Tensor | None, rows: int, columns: int, candidates: int) -> Result:
    tile = kmeans_streamed.nearest_shape(x.dtype, len(centroids))
    tile |= {"BLOCK_ROWS": rows, "BLOCK_WIDTH": columns, "BLOCK_CENTROIDS": candidates}
    assignment, distance = kmeans_streamed.nearest(x, centroids, parent, tile)
    tile = kmeans_streamed.one_hot_shape(len(centroids)) | {"BLOCK_ROWS": rows, "BLOCK_WIDTH": columns}
    return assignment, distance, *kmeans_streamed.one_hot_sums(x, assignment, len(centroids), tile)


@pytest.mark.slow
@pytest.mark.parametrize("restricted", [False, True])
def test_all_routes_and_tiles_agree(restricted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small chunks, too: partial sums of several programs are added up."""
    monkeypatch.setattr(kmeans_tiles, "ROWS_PER_SUM", 64)
    x, centroids = random(200, 40, seed=4, dtype=torch.float16), random(20, 40, seed=5)
    parent = torch.arange(200, device=DEVICE) % 11 - 1 if restricted else None
    results = [streamed(x, centroids, parent, *tile) for tile in ((16, 16, 16), (64, 64, 32), (32, 128, 16))]
    shape = kmeans_resident.shape(x.dtype, 40, 20, DEVICE)
    assert shape is not None
    results += [kmeans_resident.lloyd_resident(x, centroids, parent, shape | {"BLOCK_ROWS": rows}) for rows in (16, 32, 128)]
    assignment, distance = results[0][:2]
    results += [(assignment, distance, *kmeans_streamed.segment_sums(x, assignment, 20, rows_per_segment=n)) for n in (7, 256)]
    for result in results:
        check(x, centroids, parent, result)
        # But for a row that rounding lets choose between two centroids, and takes out of one sum into another.
        same = result[0] == assignment
        assert int((~same).sum()) <= 2
        assert ((result[1] - distance).abs() <= 1e-5 * distance.abs().clamp(min=1))[same].all()


def test_the_same_bits_in_every_run(many: None) -> None:
    x, centroids = random(100, 24, seed=6), random(9, 24, seed=7)
    for rows in (x, x.bfloat16()):
        first = kmeans.lloyd_step(rows, centroids)
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(kmeans.lloyd_step(rows, centroids), first, strict=True))


@pytest.mark.parametrize("k", [6, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lowest_of_equal_centroids_wins(k: int, dtype: torch.dtype) -> None:
    """In one tile of centroids, and in different ones."""
    x = random(50, 12, seed=8, dtype=dtype)
    centroids = random(k // 2, 12, seed=9).repeat(2, 1)
    assignment, _, _, counts = kmeans.lloyd_step(x, centroids)
    assert int(assignment.max()) < k // 2 and not counts[k // 2 :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_a_centroid_have_distance_zero(dtype: torch.dtype, many: None) -> None:
    x = torch.nn.functional.normalize(random(20, 32, seed=10), dim=1).to(dtype)
    assignment, distance, sums, _ = kmeans.lloyd_step(x, x)
    assert torch.equal(assignment, torch.arange(20, device=DEVICE))
    assert float(distance.max()) < 1e-5 and float(distance.min()) >= 0
    torch.testing.assert_close(sums, x.double(), rtol=1e-6, atol=1e-7)


def test_close_centroids_are_told_apart_in_16_bit_rows() -> None:
    """Centroids rounded to bfloat16 would be equal here, and every row would go to the first."""
    centre = torch.nn.functional.normalize(random(1, 64, seed=11), dim=1)
    x = (centre * (1 + 0.3 * random(100, 1, seed=12))).bfloat16()
    centroids = torch.cat([centre, centre * (1 + 1e-3)])
    check(x, centroids, None, kmeans.lloyd_step(x, centroids))
    assert (kmeans.lloyd_step(x, centroids)[3] > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # by numpy, in the interpreter
def test_a_broken_row_shows_up_and_harms_no_other(
    dtype: torch.dtype, restricted: bool, many: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type == "cpu":  # a GPU's maximum drops NaN, the interpreter's would not
        monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", lambda self, *values: self.binary_op(*values, np.fmax))
    x, centroids = random(60, 8, seed=12, dtype=dtype), random(4, 8, seed=13)
    restrict = torch.arange(60, device=DEVICE) % 2 if restricted else None
    good = kmeans.lloyd_step(x, centroids, restrict=restrict)
    x[7, 3] = torch.nan
    assignment, distance, sums, counts = kmeans.lloyd_step(x, centroids, restrict=restrict)
    others = torch.arange(60, device=DEVICE) != 7
    assert torch.equal(assignment[others], good[0][others]) and torch.equal(distance[others], good[1][others])
    assert 0 <= int(assignment[7]) < 4 and (restrict is None or int(assignment[7]) // 2 == int(restrict[7]))
    assert distance[7].isnan() and sums.isnan().any() and int(counts.sum()) == 60


def test_no_rows_one_centroid_and_all_left_out() -> None:
    centroids = random(4, 6, seed=14)
    assignment, distance, sums, counts = kmeans.lloyd_step(random(0, 6, seed=0), centroids)
    assert assignment.shape == distance.shape == (0,) and not sums.any() and not counts.any()
    for dtype in (torch.float32, torch.bfloat16):
        x = random(50, 6, seed=15, dtype=dtype)
        assert int(kmeans.lloyd_step(x, centroids[:1])[3]) == 50
        out = torch.full((50,), -1, device=DEVICE)
        assignment, distance, sums, counts = kmeans.lloyd_step(x, centroids, restrict=out)
        assert (assignment == -1).all() and not distance.any() and not sums.any() and not counts.any()


def test_strided_rows_and_16_bit_centroids() -> None:
    wide = random(80, 48, seed=16)
    x, centroids = wide[::2, 8:40], random(32, 5, seed=17, dtype=torch.bfloat16).T
    check(x, centroids, None, kmeans.lloyd_step(x, centroids))
    check(x.half(), centroids, None, kmeans.lloyd_step(x.half(), centroids))


def test_counts_and_sums_of_one_large_cluster() -> None:
    x = torch.ones(1000, 16, device=DEVICE, dtype=torch.bfloat16)
    centroids = torch.stack([torch.zeros(16), torch.ones(16), torch.full((16,), 3.0)]).to(DEVICE)
    for result in (kmeans.lloyd_step(x, centroids), kmeans.lloyd_step(x.float(), centroids)):
        assert result[3].tolist() == [0, 1000, 0] and float(result[2][1].min()) == float(result[2][1].max()) == 1000


@pytest.mark.parametrize(
    ("x", "centroids", "restrict", "message"),
    [
        (torch.zeros(4, 2), torch.zeros(0, 2), None, "centroids is empty"),
        (torch.zeros(4, 2), torch.zeros(2, 3), None, "must be 2 wide"),
        (torch.zeros(4, 2), torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), "a pair of centroids for every parent"),
        (torch.zeros(4, 2), torch.zeros(2, 2), torch.zeros(4), "restrict must hold 4 integers"),
        (torch.zeros(4, 2, dtype=torch.float64), torch.zeros(2, 2), None, "float64"),
        (torch.zeros(4, 9000), torch.zeros(2, 9000), None, "9000 wide"),
    ],
)
def test_wrong_input_is_refused(x: Tensor, centroids: Tensor, restrict: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kmeans.lloyd_step(x.to(DEVICE), centroids.to(DEVICE), restrict=None if restrict is None else restrict.to(DEVICE))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="reading the values would wait for the GPU, so they are not checked there")
def test_a_parent_without_centroids_is_refused() -> None:
    with pytest.raises(ValueError, match="restrict contains 1"):
        kmeans.lloyd_step(torch.zeros(4, 2), torch.zeros(2, 2), restrict=torch.ones(4, dtype=torch.int64))


@pytest.mark.parametrize(("capability", "widest"), [((8, 0), 512), ((8, 9), 256), ((9, 0), 512), ((10, 0), 256), ((12, 0), 256)])
def test_wide_rows_stay_in_registers_where_shared_memory_holds_them(
    capability: tuple[int, int], widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    for width in (256, 512):
        found = kmeans_resident.shape(torch.bfloat16, width, 4, torch.device("cuda"))
        assert (found is not None) == (width <= widest)


def test_the_operator_is_registered_correctly_and_compiles() -> None:
    x, centroids = random(40, 8, seed=18), random(4, 8, seed=19)
    parent = torch.arange(40, device=DEVICE) % 2
    for arguments in ((x, centroids, None), (x, centroids, parent), (x[:0], centroids, None)):
        torch.library.opcheck(torch.ops.dnc_kernels.lloyd_step, arguments)
    compiled = torch.compile(lambda a, b: kmeans.lloyd_step(a, b)[2] / 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, centroids), kmeans.lloyd_step(x, centroids)[2] / 2)
