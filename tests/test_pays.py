"""The script that runs declared matrices: what it refuses, which runs follow from a matrix, what is recorded once, and its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import pays_table
from benchmarks.pays import is_recorded, run_matrix, select
from benchmarks.pays_matrix import load_matrix, plan_runs
from benchmarks.record import recorded_lines
from dnc_dist.base.errors import InputError
from tests.engine_fixtures import make_dataset

ROOT = Path(__file__).resolve().parent.parent
WORDS = "it is expected to win by a point at small batches"
TINY: dict[str, Any] = {
    "data": {"image_size": 16, "crop": 1.0, "augment": "none", "workers": 0},
    "model": {"backbone": "conv4", "weights": "none", "embedding_dim": 16},
    "division": {"num_learners": 1, "backbone_frozen_epochs": 0},
    "schedule": {"epochs": 2, "batch_size": 8, "samples_per_class": 2},
    "evaluation": {"nmi": "never", "recall_at": [1]},
}


def declare(folder: Path, **changes: Any) -> Path:
    """A matrix of two arms, one of them with an axis of its own, and its configuration."""
    (folder / "base.yaml").write_text(yaml.safe_dump(TINY | {"data": TINY["data"] | {"root": "nowhere"}}))
    matrix = {
        "name": "tiny",
        "question": "does it pay to divide eight classes?",
        "prediction": WORDS,
        "config": str(folder / "base.yaml"),
        "set": {"data.validation_classes": 0.5},
        "data": {"small": {"data.root": str(folder / "data")}},
        "axes": {
            "batch": {"key": "schedule.batch_size", "values": [8, 16]},
            "K": {"key": "division.num_learners", "values": [2]},
        },
        "arms": {"one learner": {"axes": ["batch"]}, "divided": {"axes": ["batch", "K"], "set": {"division.every": 1}}},
        "seeds": [0, 1],
    }
    path = folder / "matrix.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (matrix | changes).items() if value is not None}, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": None}, "prediction: Field required; write what you expect, and why, before anything is run"),
        ({"prediction": "it wins"}, "prediction: String should have at least 20 characters; write what you expect"),
        ({"set": {}}, "holds nothing out to choose on"),
        ({"arms": {"a": {"axes": []}, "b": {"axes": ["share"]}}}, "has the axes"),
        ({"arms": {"a": {"axes": []}, "b": {"axes": [], "set": {"schedule.epochs": 9}}}}, "changes schedule.epochs"),
        ({"arms": {"a": {"axes": []}, "b": {"axes": [], "set": {"evaluation.test": True}}}}, "changes evaluation.test"),
        ({"arms": {"a": {"axes": []}, "b": {"axes": [], "set": {"division.learners": 2}}}}, "division.learners: unknown key"),
        ({"arms": {"a": {"axes": ["batch"]}, "b": {"axes": [], "set": {"schedule.batch_size": 16}}}}, "'batch' with 16"),
        ({"final": ["three learners"]}, "final names"),
    ],
)
def test_a_matrix_that_would_prove_nothing_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        plan_runs(load_matrix(declare(tmp_path, **changes)))


def test_the_runs_of_a_matrix(tmp_path: Path) -> None:
    matrix = load_matrix(declare(tmp_path, final=["one learner"], final_seeds=[7]))
    runs = plan_runs(matrix)
    assert [(run.seed, run.arm, run.point) for run in runs[:4]] == [
        (0, "one learner", {"batch": 8}),
        (0, "one learner", {"batch": 16}),
        (0, "divided", {"batch": 8, "K": 2}),
        (0, "divided", {"batch": 16, "K": 2}),
    ]
    assert len(runs) == 8 and len({run.name for run in runs}) == 8
    # Nothing is measured on test classes but what was declared final; that trains on all the others, once with each final seed.
    assert {(run.cfg.evaluation.test, run.cfg.data.validation_classes) for run in runs} == {(False, 0.5)}
    finals = plan_runs(matrix, final=True)
    assert [(run.arm, run.seed, run.cfg.evaluation.test, run.cfg.data.validation_classes) for run in finals] == [
        ("one learner", 7, True, 0.0)
    ] * 2
    with pytest.raises(InputError, match="declares"):
        plan_runs(matrix, final=True, arms=["divided"])
    assert [run.arm for run in plan_runs(matrix, arms=["divided"])] == ["divided"] * 4


def test_a_part_of_a_matrix(tmp_path: Path) -> None:
    runs = plan_runs(load_matrix(declare(tmp_path)))
    # Runs without the axis stay: `one learner` is what the others are compared with.
    assert [(run.arm, run.point) for run in select(runs, ["K=2", "batch=8"], ["small"]) if run.seed == 0] == [
        ("one learner", {"batch": 8}),
        ("divided", {"batch": 8, "K": 2}),
    ]
    assert select(runs, ["batch=8", "batch=16"], None) == runs
    for at, data in ((["bach=8"], None), (["batch=9"], None), ([], ["large"])):
        with pytest.raises(InputError, match="there are K=2, batch=16, batch=8, data \\['small'\\]"):
            select(runs, at, data)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "matrices").glob("[a-e]_*.yaml")), ids=lambda path: path.stem)
def test_the_declared_matrices_can_be_run(path: Path) -> None:
    matrix = load_matrix(path)
    runs = plan_runs(matrix.model_copy(update={"seeds": matrix.seeds[:1]}))
    assert len({run.digest for run in runs}) == len(runs)
    for data in {run.data for run in runs}:
        assert len({run.cfg.schedule.epochs for run in runs if run.data == data}) == 1


def test_a_run_is_recorded_once_and_never_measured_on_test_images(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    axes = {"batch": {"key": "schedule.batch_size", "values": [8]}, "K": {"key": "division.num_learners", "values": [2]}}
    matrix = load_matrix(declare(tmp_path, seeds=[0], axes=axes))
    runs, out = plan_runs(matrix), tmp_path / "pays.jsonl"
    # What an attempt left that was killed does not count.
    (tmp_path / "runs" / runs[0].name).mkdir(parents=True)
    run_matrix(matrix, runs[:1], out, tmp_path / "runs", jobs=1, processes=1, nice=0)
    lines = recorded_lines(out)
    assert [is_recorded(run, lines) for run in runs] == [True, False]
    line = lines[0]
    assert line["split"] == "validation" and 0 <= line["recall@1"] <= 100 and set(line["by_epoch"]) == {"1", "2"}
    assert line["cpu_seconds"] > 0 and line["samples_seen"] > 0 and line["digest"] == runs[0].cfg.digest() and line["commit"]
    logged = [json.loads(text) for text in (tmp_path / "runs" / runs[0].name / "metrics.jsonl").read_text().splitlines()]
    assert not any("recall@1" in entry for entry in logged) and any("validation/recall@1" in entry for entry in logged)
    run_matrix(matrix, runs[:1], out, tmp_path / "runs", jobs=1, processes=1, nice=0)
    assert recorded_lines(out) == lines


def _line(arm: str, point: dict[str, Any], seed: int, recall: float, seen: int = 1000) -> dict[str, Any]:
    place = {"matrix": "m", "arm": arm, "data": "d", "split": "validation", "point": point, "seed": seed}
    return place | {"recall@1": recall, "samples_seen": seen, "cpu_seconds": 60.0, "commit": "abc"}


def test_differences_are_taken_with_the_same_seed_and_point(tmp_path: Path) -> None:
    lines = [_line("one", {"batch": batch}, seed, 40.0 + seed) for batch in (16, 32) for seed in (0, 1)]
    lines += [_line("many", {"batch": batch, "K": 4}, seed, 41.0 + 3 * seed) for batch in (16, 32) for seed in (0, 1)]
    rows = pays_table.rows_of(lines)
    assert [(row.arm, row.point, row.gains) for row in rows if row.arm == "many"] == [
        ("many", {"batch": batch, "K": 4}, {0: 1.0, 1: 3.0}) for batch in (16, 32)
    ]
    text = pays_table.tables(lines)
    # 41 and 44: mean 42.5, deviation 3/√2; differences 1 and 3: mean 2, deviation √2.
    assert "| many | 32 | 4 | 2 | 42.50 ± 2.12 | +2.00 ± 1.41 | 2 of 2 | 60 |" in text
    for along in ("batch", "K", "arm"):
        pays_table.plot(lines, along, tmp_path / f"{along}.svg")
        assert "<svg" in (tmp_path / f"{along}.svg").read_text()
    with pytest.raises(InputError, match="varies along 'share'"):
        pays_table.plot(lines, "share", tmp_path / "share.svg")


def test_an_arm_without_an_axis_is_compared_at_its_first_value() -> None:
    lines = [_line("one", {"batch": batch}, 0, recall) for batch, recall in ((32, 40.0), (16, 30.0))]
    rows = pays_table.rows_of([*lines, _line("some", {"share": 0.5}, 0, 42.0)])
    assert rows[-1].gains == {0: 2.0}


def test_what_a_plot_shows() -> None:
    lines = [_line("one", {"batch": batch}, seed, recall + seed) for batch, recall in ((32, 40.0), (16, 30.0)) for seed in (0, 1)]
    lines += [_line("many", {"batch": 16, "K": 4}, seed, 35.0 + 3 * seed) for seed in (0, 1)] + [_line("some", {"share": 0.5}, 0, 42.0)]
    rows = pays_table.rows_of(lines)
    assert pays_table.curves(rows, "batch") == {"one": {32: [40.0, 41.0], 16: [30.0, 31.0]}, "many (K 4)": {16: [35.0, 38.0]}}
    assert pays_table.curves(rows, "share") == {"one": {None: [40.0, 41.0]}, "some": {0.5: [42.0]}}
    assert pays_table.curves(rows, "arm") == {"batch 16, K 4": {"many": [5.0, 7.0]}, "share 0.5": {"some": [2.0]}}


def test_arms_that_saw_other_numbers_of_images_are_not_compared() -> None:
    lines = [_line("one", {}, 0, 40.0), _line("many", {}, 0, 41.0, seen=1030)]
    with pytest.raises(InputError, match="only runs with the same number are compared"):
        pays_table.rows_of(lines)
