"""What a step receives from other ranks: counted bytes, against what the loss needs to send."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective
from dnc_dist.processes import distributed
from tests.engine_fixtures import config, division_by_hand, make_dataset
from tests.spawn import spawn

DIM, SAMPLES_PER_CLASS, BATCH, WORLD = 64, 3, 24, 4
# Of every row: z in float32; label, learner and row number in int64; the drawn pairs, as many negatives as positives, in int32.
ROW_BYTES = 4 * DIM + 3 * 8 + 2 * (SAMPLES_PER_CLASS - 1) * 4


class Traffic(NamedTuple):
    """Bytes that one rank received in a forward pass, and in its backward pass."""

    forward: dict[str, int]
    backward: dict[str, int]


def _of_a_step(root: str, loss: str, learners_per_step: int) -> Traffic:
    division = {"num_learners": 2, "learners_per_step": learners_per_step}
    cfg = config(
        Path(root),
        Path("/nowhere/run"),
        loss={"name": loss},
        model={"embedding_dim": DIM, "batch_norm": "frozen"},
        division=division,
        schedule={"batch_size": BATCH, "samples_per_class": SAMPLES_PER_CLASS},
    )
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    schedule = data.schedule(division_by_hand(data.train.labels, 2), 0, conquer=False)
    group = distributed.rank_groups(learners_per_step).get(learners_per_step)
    batch = next(data.train_batches(schedule, first_step=0, skip=0, group=group))
    # The bound of this step, which is balanced; that of the epoch counts steps that are filled up.
    batch = batch._replace(max_positives=SAMPLES_PER_CLASS - 1)
    start = distributed.traffic()
    loss_value, _ = objective(batch, Phase(0, 2, False, False))
    middle = distributed.traffic()
    loss_value.backward()
    end = distributed.traffic()
    return Traffic({kind: middle[kind] - start[kind] for kind in start}, {kind: end[kind] - middle[kind] for kind in start})


def _steps(root: str) -> dict[tuple[str, int], Traffic]:
    return {(loss, m): _of_a_step(root, loss, m) for loss in ("margin", "supcon", "proxy_anchor") for m in (1, 2)}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, int], Traffic]]:
    root = str(make_dataset(tmp_path_factory.mktemp("traffic")))
    return spawn(_steps, WORLD, root)


def test_the_margin_loss_gathers_rows_and_drawn_pairs_and_its_backward_nothing(steps: list[dict[tuple[str, int], Traffic]]) -> None:
    for rank in steps:
        assert rank["margin", 1].forward["gather"] == (WORLD - 1) * (BATCH // WORLD) * ROW_BYTES
        assert rank["margin", 1].backward == {"gather": 0, "reduce": 0}
        # Gradients of all gathered rows, summed over ranks, would have been this much.
        dense = 2 * (WORLD - 1) * BATCH * 4 * DIM // WORLD
        drawn = (WORLD - 1) * (BATCH // WORLD) * 2 * (SAMPLES_PER_CLASS - 1) * 4
        assert drawn * 20 < dense


def test_a_loss_of_all_pairs_gathers_rows_and_its_backward_adds_up_their_gradients(steps: list[dict[tuple[str, int], Traffic]]) -> None:
    for rank in steps:
        assert rank["supcon", 1].forward["gather"] == (WORLD - 1) * (BATCH // WORLD) * (4 * DIM + 3 * 8)
        assert rank["supcon", 1].backward == {"gather": 0, "reduce": 2 * (WORLD - 1) * BATCH * 4 * DIM // WORLD}


@pytest.mark.parametrize("loss", ["margin", "supcon", "proxy_anchor"])
def test_a_learner_is_gathered_inside_its_group_only(steps: list[dict[tuple[str, int], Traffic]], loss: str) -> None:
    for rank in steps:
        whole, group = rank[loss, 1].forward["gather"], rank[loss, 2].forward["gather"]
        assert group == whole // (WORLD - 1)  # one other rank instead of three, with as many rows each
        assert rank[loss, 2].backward["gather"] == 0


def test_the_sums_of_a_step_are_small(steps: list[dict[tuple[str, int], Traffic]]) -> None:
    assert max(traffic.forward["reduce"] for rank in steps for traffic in rank.values()) < 500


def test_one_rank_receives_nothing(tmp_path: Path) -> None:
    assert _of_a_step(str(make_dataset(tmp_path)), "margin", 1) == Traffic({"gather": 0, "reduce": 0}, {"gather": 0, "reduce": 0})
