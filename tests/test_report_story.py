"""The report's first words: each finding is said where it holds, and not where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dnc_dist.report import build_report
from dnc_dist.report.story import findings
from dnc_dist.rundir.diagnosis import save_diagnosis
from dnc_dist.rundir.record import read_run
from tests.diagnosis_fixtures import make_diagnosis

CONFIG: dict[str, Any] = {
    "schedule": {"batch_size": 32},
    "division": {"num_learners": 4, "conquer_from": None},
    "evaluation": {"select_on": "last"},
}


def evaluation(epoch: int, recall: float, queries: int = 10_000) -> dict[str, Any]:
    return {"kind": "evaluation", "step": 10 * epoch, "epoch": epoch, "recall@1": recall, "num_queries": queries}


def evaluations(*recalls: float) -> list[dict[str, Any]]:
    return [evaluation(epoch, recall) for epoch, recall in enumerate(recalls)]


def training(epoch: int, **values: float) -> dict[str, Any]:
    return {"kind": "train", "step": 10 * epoch + 10, "epoch": epoch, "loss": 0.1, **values}


def division(epoch: int, sizes: list[int], **values: float) -> dict[str, Any]:
    return {"kind": "division", "step": 10 * epoch, "epoch": epoch, "sizes": sizes, "num_learners": len(sizes), **values}


def told(folder: Path, lines: list[dict[str, Any]], **division_keys: Any) -> str:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"division": CONFIG["division"] | division_keys}))
    return " ".join(f"{one.says} {one.advice}" for one in findings(read_run(folder)))


@pytest.mark.parametrize(
    ("lines", "says", "says_not"),
    [
        pytest.param([evaluation(0, 0.1), evaluation(1, 0.4)], "40.0% of 10,000 queries", "worse", id="better than untrained"),
        pytest.param([evaluation(0, 0.4), evaluation(1, 0.1)], "Training has made retrieval worse", "cannot tell", id="worse"),
        pytest.param([evaluation(0, 0.40, 50), evaluation(1, 0.42, 50)], "cannot tell the two apart", "worse", id="50"),
        pytest.param([evaluation(0, 0.40), evaluation(1, 0.42)], "before training it was so for 40.0%", "cannot tell", id="10,000"),
        pytest.param([evaluation(e, 0.1 * e) for e in range(1, 6)], "still rose", "points higher at epoch", id="ended too early"),
        pytest.param(evaluations(0.1, 0.5, 0.6, 0.6, 0.5), "10.0 points higher at epoch 2", "still rose", id="ended late"),
        pytest.param(evaluations(0.1, 0.5, 0.5, 0.501, 0.5), "50.0%", "higher at", id="noise is no fall"),
        pytest.param([division(0, [100])], "was not divided", "learners", id="one learner"),
        pytest.param([division(0, [9], groups=0), division(2, [9], groups=7)], "close classes: 7 groups", "learners", id="groups"),
        pytest.param([division(0, [9], groups=0)], "was not divided", "close classes", id="no groups"),
        pytest.param([division(0, [100]), division(1, [50, 48], left_out=2)], "among 2 learners", "left out", id="divided"),
        pytest.param([division(1, [50, 30], left_out=20)], "left out 20% of the images", "not divided", id="left out"),
        pytest.param([division(1, [5, 5]), training(1, mask_orthogonality=0.99)], "hardly differ (mean cosine 0.99)", "part", id="alike"),
        pytest.param([division(1, [5, 5]), training(1, mask_orthogonality=0.7)], "differ in part", "hardly", id="differ in part"),
        pytest.param([division(1, [5, 5]), training(1, mask_orthogonality=0.2)], "each had a subspace of its own", "hardly", id="differ"),
        pytest.param([training(0, mask_orthogonality=0.0)], "", "masks", id="masks of one learner"),
        pytest.param([training(0, anchors_without_negatives=8)], "25% of the images of a batch", "waited", id="no negatives"),
        pytest.param([training(0, anchors_without_negatives=1)], "", "negative", id="nearly all have negatives"),
        pytest.param([{"kind": "epoch", "step": 10, "epoch": 0, "share_data": 0.3}], "waited for images during 30%", "near", id="wait"),
    ],
)  # fmt: skip
def test_each_finding_where_it_holds(tmp_path: Path, lines: list[dict[str, Any]], says: str, says_not: str) -> None:
    story = told(tmp_path, lines)
    assert says in story and says_not not in story


def test_the_untrained_network_is_never_the_result(tmp_path: Path) -> None:
    """Also where the best epoch is chosen and the untrained network is better than any."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"evaluation": {"select_on": "test"}}))
    for recalls, epoch in (([0.9, 0.3, 0.2], 1), ([0.9], 0)):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations(*recalls)))
        assert read_run(tmp_path).result()["epoch"] == epoch


@pytest.mark.parametrize(
    ("twins", "pairs", "says", "says_not"),
    [
        (11, [[3, 2]], "11% of the misses are practically the same image in two classes", "between"),
        (10, [[40, 11]], "51% of the misses are between two classes", "practically"),
        (0, [[30, 10], [8, 8]], "56% of the misses are between 2 pairs of classes", "practically"),
        (0, [[25, 25]], "", "misses"),
    ],
)
def test_misses_that_a_look_at_the_images_explains(tmp_path: Path, twins: int, pairs: list[list[int]], says: str, says_not: str) -> None:
    found = make_diagnosis(
        twins=np.array([twins]),
        pair_counts=np.array(pairs),
        pair_queries=np.full((len(pairs), 2), 80),
        pair_examples=np.full((len(pairs), 3), -1),
    )
    save_diagnosis(tmp_path, found)
    story = told(tmp_path, [evaluation(0, 0.75)])
    assert says in story and says_not not in story


def test_conquering_is_asked_for_where_it_is_missing(tmp_path: Path) -> None:
    lines = [division(0, [100]), division(2, [50, 50]), *(training(epoch) for epoch in range(4))]
    assert "was never trained together" in told(tmp_path, lines)
    assert "From epoch 3 on the whole embedding was trained together" in told(tmp_path, lines, conquer_from=3)


@pytest.mark.parametrize(("recalls", "fell"), [((0.1, 0.3, 0.5, 0.4), "10.0 points"), ((0.1, 0.3, 0.5, 0.55), ""), ((0.1, 0.3, 0.5), "")])
def test_a_fall_while_conquering_is_said(tmp_path: Path, recalls: tuple[float, ...], fell: str) -> None:
    lines = [division(0, [100]), division(1, [50, 50]), *(training(epoch) for epoch in range(3)), *evaluations(*recalls)]
    story = told(tmp_path, lines, conquer_from=2)
    assert (f"recall@1 fell by {fell} while the whole embedding" in story) if fell else ("fell by" not in story)


def test_a_fall_is_no_loss_where_the_best_epoch_was_chosen(tmp_path: Path) -> None:
    told(tmp_path, evaluations(0.1, 0.5, 0.6, 0.6, 0.5))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"evaluation": {"select_on": "validation"}}))
    assert not any("higher at epoch" in one.says for one in findings(read_run(tmp_path)))


def test_the_best_evaluation_has_the_highest_recall_and_then_the_highest_map(tmp_path: Path) -> None:
    lines = [evaluation(epoch, 0.1 * epoch) for epoch in range(1, 5)]
    # A few validation classes: the first epoch whose recall@1 is 1 is not the best one yet.
    for line, recall, precision in zip(lines, (0.9, 1.0, 1.0, 1.0), (0.99, 0.7, 0.9, 10**400), strict=True):
        line |= {"validation/recall@1": recall, "validation/map@r": precision}
    told(tmp_path, lines)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"evaluation": {"select_on": "validation"}}))
    assert read_run(tmp_path).result()["epoch"] == 3


def test_the_page_begins_with_the_story(tmp_path: Path) -> None:
    told(tmp_path, [evaluation(0, 0.1), evaluation(1, 0.4), training(0)])
    page = build_report(tmp_path).read_text()
    assert page.index("What happened") < page.index("before training it was so for 10.0%") < page.index("<h2>Training")
