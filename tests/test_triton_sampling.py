"""Sampling kernels against the reference: the same positives, counts and draws, for any tile, order and shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import normalize

from dnc_kernels import philox, race, race_keys, race_splits, reference_columns, reference_sampling, sampling
from dnc_kernels.contract import Pairs, Rows, Sampling
from dnc_kernels.ordering import COUNTED_ROWS, canonical_order

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
default_tile = race.default_tile  # tests replace it
NEAR_TIE = 1e-3  # of the float64 keys of a draw that differs from the reference's


@pytest.fixture(autouse=True)
def _large_tiles_in_the_interpreter(monkeypatch):
    if DEVICE.type == "cpu":  # it takes as long for a large tile as for a small one
        monkeypatch.setattr(race, "default_tile", lambda *_: race.Tile(64, 128, 4, 1))


def unit_rows(num_rows: int, dim: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed)))


def shuffled_ids(num_rows: int, start: int = 0) -> Tensor:
    return start + torch.randperm(10 * num_rows, generator=torch.Generator().manual_seed(num_rows))[:num_rows]


def on_device(rows: Rows | None) -> Rows | None:
    return None if rows is None else Rows(*(None if column is None else column.to(DEVICE) for column in rows))


def keys(anchors: Rows, references: Rows | None, sampling: Sampling) -> Tensor:
    """Race keys (B, G) in float64, columns in the order of the references as given."""
    own, _, _, columns = reference_columns.compared(anchors, references)
    order, position = columns.order, columns.position
    words = philox.draw_words(own.row_ids, int(position.max()) + 1, sampling.seed, sampling.step)
    log_weight = reference_sampling.negative_weights(anchors, references, sampling=sampling).log()
    return log_weight - torch.empty_like(log_weight).index_copy_(1, order, philox.exponentials(words).log()[:, position])


def assert_same(anchors: Rows, references: Rows | None = None, **options) -> Pairs:
    """The kernels find what the reference finds; the rare draw that differs is a near tie. Returns the kernels' pairs."""
    drawn = Sampling(**options)
    expected = reference_sampling.sample_pairs(anchors, references, sampling=drawn)
    pairs = sampling.sample_pairs(on_device(anchors), on_device(references), sampling=drawn)
    found = Pairs(*(column.cpu() for column in pairs[:3]), {name: value.cpu() for name, value in pairs.stats.items()})
    assert {name: int(value) for name, value in found.stats.items()} == {name: int(value) for name, value in expected.stats.items()}
    assert torch.equal(found.anchor, expected.anchor) and torch.equal(found.positive, expected.positive)
    assert torch.equal(found.other >= 0, expected.other >= 0)
    different = found.other != expected.other
    assert not (different & found.positive).any()
    if different.any():
        print(f"{int(different.sum())} of {int((found.other >= 0).sum())} draws differ")
        assert int(different.sum()) <= 2
        key = keys(anchors, references, drawn)
        anchor = found.anchor[different]
        assert bool(((key[anchor, found.other[different]] - key[anchor, expected.other[different]]).abs() < NEAR_TIE).all())
    return found


@pytest.mark.parametrize("mode", ["paper", "reference"])
@pytest.mark.parametrize("dim", [5, 130, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (1, 17, 64))])
def test_square(mode, dim):
    labels, learner = torch.arange(53) % 11, torch.arange(53) // 2 % 4 - 1
    rows = Rows(unit_rows(53, dim), labels, learner, shuffled_ids(53, 2**33))
    found = assert_same(rows, nonzero_loss_cutoff=1.5, mode=mode, seed=(5 << 32) + 7, step=9)
    assert int(found.stats["anchors"]) == int((learner >= 0).sum())


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_rectangular(mode):
    rows = Rows(unit_rows(75, 12), torch.arange(75) % 11, torch.arange(75) // 5 % 3, shuffled_ids(75))
    own, order = slice(31, 48), torch.randperm(75, generator=torch.Generator().manual_seed(1))
    options = {"mode": mode, "max_positives": 9, "seed": torch.tensor(-3), "step": torch.tensor(2**40 + 1)}
    whole = assert_same(rows, **options)
    anchors, references = (Rows(*(column[chosen] for column in rows)) for chosen in (own, order))
    part = assert_same(anchors, references, **options)
    # A slice of the anchors draws what the whole batch draws for them, whatever the order of the references.
    chosen = order[part.other.clamp_min(0)].where(part.other >= 0, part.other).view(17, 18)
    assert torch.equal(chosen, whole.other.view(75, 18)[own])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_draws_do_not_depend_on_the_tile(mode, monkeypatch):
    z, labels, learner = unit_rows(50, 24), torch.arange(50) % 13, (torch.arange(50) % 7 > 4).long()
    drawn = []
    for tile in [race.Tile(16, 64, 4, 3), race.Tile(64, 32, 4, 1), race.Tile(32, 256, 4, 1)]:
        monkeypatch.setattr(race, "default_tile", lambda *_, tile=tile: tile)
        drawn.append(assert_same(Rows(z, labels, learner), mode=mode, seed=11).other)
    # Each is judged above; a near tie may go one way in one tile and another way in the next.
    assert all(int((drawn[0] != other).sum()) <= 2 for other in drawn)


@pytest.mark.parametrize(
    ("capability", "tiles"),
    [((8, 0), race.TILES_BEFORE), ((9, 0), race.TILES_HOPPER), ((10, 0), race.TILES_HOPPER), ((12, 0), race.TILES_BEFORE)],
)
def test_tiles_suit_the_device(capability, tiles, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert tuple(default_tile(n, torch.device("cuda")) for n in (4096, 4097, 16385)) == tiles


def ragged_segments() -> tuple[Rows, Rows]:
    """Anchors of four learners, whose segments have 1, 9, 40 and 270 references."""
    row_ids = shuffled_ids(320)
    learner = torch.tensor([0] + [1] * 9 + [2] * 40 + [3] * 270)[row_ids.argsort()]
    labels, z = torch.arange(320) % 25, unit_rows(320, 10)
    chosen = torch.cat([(learner == k).nonzero()[:8, 0] for k in range(4)])
    return Rows(z[chosen], labels[chosen], learner[chosen], row_ids[chosen]), Rows(z, labels, learner, row_ids)


def few_candidates() -> tuple[Rows, None]:
    """Eleven positives and two negatives."""
    return Rows(unit_rows(14, 6), torch.cat([torch.zeros(12, dtype=torch.int64), torch.tensor([3, 4])])), None


def nobody() -> tuple[Rows, None]:
    return Rows(unit_rows(5, 4), torch.arange(5) // 2, torch.full((5,), -1)), None


@pytest.mark.parametrize(
    ("given", "max_positives"),
    [(ragged_segments, 3), (ragged_segments, None), (few_candidates, 3), (few_candidates, None), (few_candidates, 0), (nobody, 2)],
)
def test_a_split_race_draws_the_same(given, max_positives, monkeypatch):
    """Bit for bit, also where a split has no tile, fewer candidates than are wanted, or needs more than one pass."""
    anchors, references = given()
    monkeypatch.setattr(race, "default_tile", lambda *_: race.Tile(64, 64, 4, 1))
    merged, merge = [], race.merge_splits
    monkeypatch.setattr(race, "merge_splits", lambda *args: (merged.append(args[2].counts.shape[1]), merge(*args)))
    drawn = Sampling(nonzero_loss_cutoff=1.6, max_positives=max_positives, seed=3, step=8)
    found = []
    for splits in (1, 2, 3, 5):
        monkeypatch.setattr(race, "num_splits", lambda *_, splits=splits: splits)
        found.append(sampling.sample_slots(on_device(anchors), on_device(references), sampling=drawn))
    sampling.sample_slots(on_device(anchors), on_device(references), sampling=replace(drawn, mode="reference"))
    assert merged == [2, 3, 5], "mode reference is not split"
    expected = found[0]
    if given is ragged_segments:
        num_slots = expected.others.shape[1] // 2
        assert int((expected.others[:, num_slots:] >= 0).sum(1).max()) == num_slots
        assert num_slots == max_positives or num_slots > race.KEPT_MANY
    for slots in found[1:]:
        assert torch.equal(slots.others, expected.others)
        assert {name: int(value) for name, value in slots.stats.items()} == {name: int(value) for name, value in expected.stats.items()}


def test_equal_keys_of_two_splits_are_merged_by_position():
    window = torch.zeros(2, 16, dtype=torch.int32)
    window[:, 4], window[1, 8] = 4, 1  # both want four negatives; the second is row 1
    window[:, 0] = 10  # where their segment starts
    keys = torch.tensor([[[2.0, 1.0, 0.0, 0.0], [2.0, 2.0, 1.0, 0.5]], [[-3.0, 9.0, 9.0, 9.0], [-3.0, -4.0, 9.0, 9.0]]])
    positions = torch.tensor([[[5, 7, 9, 11], [3, 6, 2, 4]], [[8, 0, 0, 0], [1, 2, 0, 0]]], dtype=torch.int32)
    counts = torch.tensor([[9, 4], [1, 2]], dtype=torch.int32)
    others, stats = torch.full((2, 8), -1, device=DEVICE), torch.zeros(7, dtype=torch.int64, device=DEVICE)
    kept = race_splits.Kept(*(values.to(DEVICE) for values in (keys, positions, counts)))
    race_splits.merge_splits(window.to(DEVICE), 100 + torch.arange(30, device=DEVICE), kept, others, stats)
    assert others[:, 4:].tolist() == [[113, 115, 116, 112], [111, 118, 112, -1]]
    assert others[:, :4].tolist() == [[-1] * 4] * 2
    assert stats.tolist() == [2, 0, 0, 1, 0, 0, 0]  # the second has three candidates for four positives


@pytest.mark.parametrize(
    ("anchor_tiles", "num_references", "num_warps", "processors", "expected"),
    [
        (8, 128, 4, 132, 1),  # 128 anchors with themselves: a split would have next to nothing to do
        (8, 1024, 4, 132, 4),  # with those of eight ranks
        (8, 131_072, 4, 132, 33),  # with those of 1024 ranks: 264 programs of four warps fit on 132 processors
        (8, 131_072, 8, 132, 16),
        (1, 131_072, 4, 132, race_splits.MOST_SPLITS),
        (132, 131_072, 4, 132, 2),
        (133, 131_072, 4, 132, 1),  # one wave already
        (10**6, 10**6, 4, 132, 1),
        (8, 131_072, 4, 1, 1),  # the interpreter
        (1, 0, 4, 132, 1),
    ],
)
def test_the_race_is_split_where_anchors_do_not_fill_the_device(anchor_tiles, num_references, num_warps, processors, expected):
    assert race_splits.num_splits(anchor_tiles, num_references, num_warps, processors) == expected


@triton.jit
def _words_kernel(row_ids, seed, step, words, log2_draws, num_positions, TILE: tl.constexpr, ANCHORS: tl.constexpr):
    base, offset, counters = race_keys.tile_positions(tl.program_id(0), TILE)
    position = base + offset
    row_id = tl.load(row_ids + tl.arange(0, ANCHORS))
    word = race_keys.draw_words(counters, row_id.to(tl.int32), (row_id >> 32).to(tl.int32), tl.load(seed), tl.load(step), ANCHORS, TILE)
    target = tl.arange(0, ANCHORS)[:, None] * num_positions + position[None, :]
    tl.store(words + target, word.to(tl.int64), mask=position[None, :] < num_positions)
    tl.store(log2_draws + target, race_keys.log2_exponentials(word), mask=position[None, :] < num_positions)


@pytest.mark.parametrize("tile", [16, 64, 256])
def test_words_and_exponentials_are_those_of_the_contract(tile):
    row_ids = torch.cat([shuffled_ids(14), torch.tensor([2**40 + 3, -5])])
    seed, step, num_positions = -(2**50) + 1, 2**35 + 6, 600
    words = torch.full((16, num_positions), -1, device=DEVICE)
    log2_draws = torch.empty(16, num_positions, device=DEVICE)
    numbers = (torch.tensor(value, device=DEVICE) for value in (seed, step))
    _words_kernel[(triton.cdiv(num_positions, 256) * 256 // tile,)](
        row_ids.to(DEVICE), *numbers, words, log2_draws, num_positions, TILE=tile, ANCHORS=16
    )
    expected = philox.draw_words(row_ids, num_positions, seed, step)
    assert torch.equal(words.cpu(), expected)
    offset = log2_draws.cpu().double() - philox.exponentials(expected).log2()
    assert float(offset.max() - offset.min()) < 2e-4  # a common offset would change no order


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_more_than_a_philox_block_and_more_draws_than_are_kept_at_once(mode):
    z = unit_rows(300, 8)
    labels = torch.cat([torch.full((12,), 7), torch.arange(288) + 10])
    anchors, references = (Rows(z[:n], labels[:n], row_ids=torch.arange(n)) for n in (14, 300))
    found = assert_same(anchors, references, nonzero_loss_cutoff=1.9, mode=mode, max_positives=40)
    drawn = found.other.view(14, 80)[:12, 40:]
    assert (drawn[:, :11] >= 0).all() and (drawn[:, 11:] == -1).all() and int(drawn.max()) > 256


def test_sliced_rows_of_several_learners_meet_in_a_tile():
    z, learner = torch.zeros(60, 200), torch.arange(60) % 3
    for k in range(3):
        z[learner == k, 70 * k : 70 * k + 40] = unit_rows(20, 40, seed=k)
    assert_same(Rows(z, torch.arange(60) % 7, learner), effective_dim=40, nonzero_loss_cutoff=1.6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    z, labels = unit_rows(50, 40).to(dtype), torch.arange(50) % 8
    assert_same(Rows(z, labels), nonzero_loss_cutoff=1.6)
    references = Rows(unit_rows(50, 40), labels, row_ids=torch.arange(50))
    assert_same(Rows(z[:9], labels[:9], row_ids=torch.arange(9)), references, nonzero_loss_cutoff=1.6)


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_rows_in_no_pair_are_counted(mode):
    z = unit_rows(40, 6)
    z[3, 1], z[5, 0], z[7], z[8] = torch.nan, torch.inf, 0.0, torch.nan
    learner = torch.zeros(40, dtype=torch.int64)
    learner[8] = -1
    found = assert_same(Rows(z, torch.arange(40) // 4, learner), mode=mode, nonzero_loss_cutoff=1.9)
    assert not set(found.other.tolist()) & {3, 5, 7, 8}
    assert [int(found.stats[name]) for name in ("non_finite_rows", "zero_rows", "anchors")] == [2, 1, 36]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_beyond_the_copy_count_as_not_finite(dtype):
    """The scaled float16 copy holds values below 255."""
    z = unit_rows(30, 6)
    z[3, 1] = 254.0
    assert_same(Rows(z.to(dtype), torch.arange(30) // 3), nonzero_loss_cutoff=1.9)
    z[4, 2], z[9, 5] = 255.0, -6e4
    found = sampling.sample_pairs(Rows(z.to(DEVICE, dtype), (torch.arange(30) // 3).to(DEVICE)), sampling=Sampling(nonzero_loss_cutoff=1.9))
    z[[4, 9]] = torch.nan
    expected = assert_same(Rows(z.to(dtype), torch.arange(30) // 3), nonzero_loss_cutoff=1.9)
    assert torch.equal(found.other.cpu(), expected.other)
    assert {name: int(value) for name, value in found.stats.items()} == {name: int(value) for name, value in expected.stats.items()}


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_duplicates_and_antipodes(mode):
    z = unit_rows(4, 16).repeat(4, 1)
    assert_same(Rows(torch.cat([z, -z]), torch.arange(32) % 3), nonzero_loss_cutoff=2.1, mode=mode)


@pytest.mark.parametrize("max_positives", [0, 2, None, 30])
def test_bounds_on_the_positives(max_positives):
    found = assert_same(Rows(unit_rows(33, 9), torch.arange(33) // 11), max_positives=max_positives, effective_dim=5.5)
    assert found.other.shape == (33 * 2 * (10 if max_positives is None else max_positives),)


@pytest.mark.parametrize(
    ("num_rows", "labels"),
    [(0, lambda n: n), (1, lambda n: n), (2, lambda n: 0 * n), (19, lambda n: 0 * n), (19, lambda n: n), (19, lambda n: n // 19)],
)
@pytest.mark.parametrize("max_positives", [None, 3])
def test_few_rows_one_class_no_positives(num_rows, labels, max_positives):
    assert_same(Rows(unit_rows(num_rows, 4), labels(torch.arange(num_rows))), max_positives=max_positives)


def test_nobody_anywhere():
    z, labels = unit_rows(5, 4), torch.arange(5) // 2
    assert_same(Rows(z, labels, torch.full((5,), -1)), max_positives=2)
    assert_same(Rows(z, labels, torch.arange(5)), max_positives=2)  # learners of one row
    assert_same(Rows(z, labels, row_ids=torch.arange(5)), Rows(z[:0], labels[:0], row_ids=labels[:0]))


def test_rows_need_not_be_contiguous():
    z = unit_rows(45, 10)
    wide, columns = torch.zeros(45, 21), torch.arange(135).view(45, 3)
    wide[:, 1::2] = z
    rows = Rows(wide[:, 1::2], columns[:, 0] % 6, columns[:, 1] % 2, columns[:, 2])
    found, expected = assert_same(rows), assert_same(rows._replace(z=z))
    assert torch.equal(found.other, expected.other)


@pytest.mark.parametrize("num_rows", [1, 77, COUNTED_ROWS + 3])
def test_canonical_order(num_rows):
    random = torch.Generator().manual_seed(num_rows)
    labels, learner, row_ids = (torch.randint(-3, 4, (num_rows,), generator=random) * 2**shift for shift in (0, 0, 40))
    found = canonical_order(*(column.to(DEVICE) for column in (labels, learner, row_ids)))
    expected = sorted(range(num_rows), key=lambda i: (int(learner[i]), int(labels[i]), int(row_ids[i])))
    assert found.order.tolist() == expected
    assert found.labels.tolist() == labels[expected].tolist() and found.row_ids.tolist() == row_ids[expected].tolist()


def test_operator_is_well_formed_and_traced_without_data():
    z, column = unit_rows(12, 8).to(DEVICE), (torch.arange(12) // 2 % 3).to(DEVICE)
    number = torch.zeros((), dtype=torch.int64, device=DEVICE)
    arguments = (z, column, 0 * column, column, None, None, None, None, 0.5, 1.4, "paper", 8.0, 2, number, number)
    torch.library.opcheck(torch.ops.dnc_kernels.sample_pairs, arguments)

    def shapes(z: Tensor, seed: Tensor) -> Tensor:
        return sampling.sample_pairs(Rows(z, column), sampling=Sampling(max_positives=2, seed=seed)).other + 1

    compiled = torch.compile(shapes, backend="aot_eager", fullgraph=True)
    for seed in (3, 4):
        assert torch.equal(compiled(z, number + seed), shapes(z, number + seed))


def test_what_the_kernels_do_not_take_is_refused():
    with pytest.raises(ValueError, match="float64; the Triton kernels take"):
        sampling.sample_pairs(Rows(unit_rows(4, 3).double().to(DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)))
