"""The report on what the last evaluation left: why the model errs, what division did, the map; foreign files among it."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dnc_dist.cli import run as run_cli
from dnc_dist.report import build_report, names
from dnc_dist.report.course import course_of
from dnc_dist.report.map import map_html
from dnc_dist.report.mistakes import mistakes_html
from dnc_dist.report.subspaces import masks_chart, overlap, own_recall, subspaces_html
from dnc_dist.rundir.diagnosis import MOST, Diagnosis, load_diagnosis, save_diagnosis
from dnc_dist.rundir.maps import EmbeddingMap, save_map
from dnc_dist.rundir.record import RunRecord
from tests.diagnosis_fixtures import make_diagnosis

HOSTILE = "<script>alert(1)</script>\"' onload='x'&\\"


def write_lines(run_dir: Path) -> None:
    """The least that a run with a division leaves."""
    lines: list[dict[str, Any]] = [
        {"step": 0, "epoch": 0, "kind": "division", "sizes": [50, 50, 40, 30], "num_learners": 4, "left_out": 0},
        {"step": 9, "epoch": 0, "kind": "train", "loss": 0.5},
        {"step": 9, "epoch": 1, "kind": "evaluation", "recall@1": 0.75, "num_queries": 400},
    ]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "config.yaml").write_text(yaml.safe_dump({"data": {"root": "data"}}))


def single_map(found: Diagnosis) -> str:
    """The map of a run that has kept no others."""
    return map_html(found, course_of(RunRecord(Path()), found), [])


def page_of(run_dir: Path, found: Diagnosis | None) -> str:
    write_lines(run_dir)
    if found is not None:
        save_diagnosis(run_dir, found)
    return build_report(run_dir).read_text()


def test_a_diagnosis_comes_back(tmp_path: Path) -> None:
    assert load_diagnosis(tmp_path) is None
    for found in (make_diagnosis(), make_diagnosis(learners=0)):
        save_diagnosis(tmp_path, found)
        loaded = load_diagnosis(tmp_path)
        assert loaded is not None
        for column in fields(found):
            assert np.array_equal(getattr(loaded, column.name), getattr(found, column.name)), column.name


def test_all_of_it_is_told(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_diagnosis())
    for words in (
        "For 100 of 400 queries (25.0%) the nearest image is of another class.",
        "For 70% of these the right class is among the first five.",
        "The 2 pairs of classes that are taken for each other most often make up 20% of all misses.",
        "Most confused classes",
        "12 of 80 queries of the first found the second, 5 of 80 the other way round.",
        "Worst queries",
        "of its class: rank 300",
        "not among the neighbours that were listed",
        "Suspected wrong labels",
        "Nearly the same image in two classes",
        "nearest to 6 queries of 3 other classes, and to 1 of its own",
        "test/a class with quite a long name/03.jpg",
        "Masks of the learners",
        "What each subspace finds alone",
        "Images of each cluster",
        "Map of the embedding",
    ):
        assert words in page, words
    # Characters, and their codes where one asks for them.
    assert '<b title="A (u0041, LATIN CAPITAL LETTER A)">A</b>' in page and "Α (u0391, GREEK CAPITAL LETTER ALPHA)" in page
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page.replace("xlink:href", "href")) and "<script" not in page


def test_a_diagnosis_of_another_epoch_than_the_numbers_says_so(tmp_path: Path) -> None:
    says = "Of the network after the last epoch, 2; the numbers at the top are those of epoch 1."
    assert says not in page_of(tmp_path, make_diagnosis())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 18, "epoch": 2, "kind": "evaluation", "recall@1": 0.7, "num_queries": 400}) + "\n")
    assert says not in build_report(tmp_path).read_text()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": {"root": "/home/me/birds"}, "evaluation": {"select_on": "test"}}))
    page = build_report(tmp_path).read_text()
    assert says in page
    assert '<p class="muted">birds</p>' in page


def test_who_alone_would_have_been_right() -> None:
    alone = np.zeros((8, 4), bool)
    alone[0, [1, 3]], alone[1] = True, True
    page = mistakes_html(make_diagnosis(alone=alone, missed_alone=np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)))
    assert "Alone right: learner 1, 3 of 4." in page and "Every learner alone finds it." in page and "No learner alone finds it." in page
    words = "67% would have been right in the subspace of at least one learner alone, and 67% in that of learner 0."
    assert f"Of 3 misses, drawn at random, {words}" in page


def test_one_learner_has_no_subspaces() -> None:
    found = make_diagnosis(learners=0)
    page = mistakes_html(found)
    assert "Worst queries" in page and "learner alone" not in page and subspaces_html(found) == []


def test_no_miss_and_no_query() -> None:
    none = make_diagnosis(counts=np.array([400, 0]))
    assert "For every one of 400 queries the nearest image is of the same class." in mistakes_html(none)
    assert "a query has no one answer" in mistakes_html(make_diagnosis(counts=np.array([0, 0])))


def test_an_earlier_run_says_what_is_missing(tmp_path: Path) -> None:
    page = page_of(tmp_path, None)
    assert "Worst queries" not in page and "has left no diagnosis" in page


def test_nothing_that_was_read_is_markup(tmp_path: Path) -> None:
    found = make_diagnosis()
    hostile = {name: np.array([HOSTILE] * len(getattr(found, name))) for name in ("names", "sources", "map_names")}
    page = page_of(tmp_path, replace(found, **hostile))
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "onload='" not in page


def broken(name: str) -> dict[str, Any]:
    """Arrays of a file that no evaluation writes."""
    found = make_diagnosis()
    return {
        "a picture that is not there": {"queries": found.queries + 100},
        "a miss that is not there": {"worst": np.array([8])},
        "a negative picture": {"hubs": np.array([-1])},
        "fewer names than pictures": {"names": found.names[:3]},
        "not finite": {"masks": np.full_like(found.masks, np.nan)},
        "another type": {"images": found.images.astype(np.uint16)},
        "objects": {"names": np.array([{}] * len(found.names), dtype=object)},
        "learners that differ": {"masks": found.masks[:2]},
        "another number of counts": {"counts": np.array([1, 2, 3])},
        "a negative count": {"rank_counts": -found.rank_counts},
        "more misses than any": {"worst": np.zeros(MOST["l"] + 1, np.int64)},
        "a map without room": {"map_points": np.zeros((MOST["n"] + 1, 2), np.float32)},
        "no bars": {"distance_edges": np.zeros(0, np.float32)},
        "bars that do not ascend": {"distance_edges": np.zeros(11, np.float32)},
        "a large number": {"map_points": np.full((25, 2), 3e38, np.float32)},
        "no embedding": {"masks": np.zeros((4, 0), np.float32)},
        "empty pictures": {"map_images": np.zeros((25, 0, 0, 3), np.uint8)},
    }[name]


@pytest.mark.parametrize(
    "name",
    [
        "a picture that is not there", "a miss that is not there", "a negative picture", "fewer names than pictures", "not finite",
        "another type", "objects", "learners that differ", "another number of counts", "a negative count", "more misses than any",
        "a map without room", "no bars", "empty pictures",
        "bars that do not ascend", "a large number", "no embedding",
    ],
)  # fmt: skip
def test_a_damaged_diagnosis_is_named(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path)
    found = make_diagnosis()
    np.savez(tmp_path / "diagnosis.npz", **{column.name: getattr(found, column.name) for column in fields(found)} | broken(name))
    assert run_cli(["report", str(tmp_path)]) == 2
    assert re.search(rf"{tmp_path}/diagnosis.npz is damaged.*; delete it", capsys.readouterr().err)


@pytest.mark.parametrize(
    "change",
    [
        {"map_points": np.zeros((25, 2), np.float32)},
        {"masks": np.zeros((4, 16), np.float32)},
        {"sampled_learner": np.zeros(40, np.int64)},
        {"rank_counts": np.zeros(7, np.int64), "distance_counts": np.zeros((2, 10), np.int64)},
    ],
    ids=" ".join,
)
def test_odd_numbers_cost_no_traceback(tmp_path: Path, change: dict[str, Any]) -> None:
    save_diagnosis(tmp_path, make_diagnosis(**change))
    found = load_diagnosis(tmp_path)
    assert found is not None and mistakes_html(found) and subspaces_html(found) and single_map(found)


def test_overlap_of_masks() -> None:
    masks = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 2], [0, 0, 0, 0]], np.float32)
    expected = np.array([[1, 0.5, 0, 0], [0.5, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])
    assert np.allclose(overlap(masks), expected)


def test_recall_of_a_learners_own_queries() -> None:
    right, learner = np.array([1, 0, 1, 1], bool), np.array([0, 0, 1, 1])
    alone = np.array([[1, 0], [1, 0], [0, 0], [0, 1]], bool)
    found = make_diagnosis(learners=2, sampled_right=right, sampled_learner=learner, sampled_alone=alone)
    assert own_recall(found).tolist() == [[1.0, 0.5, 2], [0.5, 1.0, 2]]


def test_a_wide_embedding_is_drawn_in_few_columns() -> None:
    generator = np.random.default_rng(0)
    found = make_diagnosis(masks=generator.random((4, 5000)).astype(np.float32))
    assert len(masks_chart(found).svg) < 200_000


def test_the_map_names_every_point_and_loads_nothing() -> None:
    markup = single_map(make_diagnosis())
    assert markup.count("<i style=") == 25 and len(re.findall('class="[^"]*off', markup)) == int(
        make_diagnosis().map_right.size - make_diagnosis().map_right.sum()
    )
    places = [float(value) for value in re.findall(r"--l:([\d.]+)%", markup)]
    assert all(0 < place < 100 for place in places) and "url(data:image/" in markup
    assert len(places) == 25 and 'type="radio"' not in markup
    assert single_map(make_diagnosis(map_points=np.zeros((0, 2), np.float32), map_labels=np.zeros(0, int), map_right=np.zeros(0, bool),
        map_rows=np.zeros(0, int), map_names=np.zeros(0, "U1"), map_images=np.zeros((0, 8, 8, 3), np.uint8))) == ""  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shown"), [("u0041", "A"), ("u1f600", "😀"), ("u0007", "u0007"), ("u00ad", "u00ad"), ("uvula", "uvula"), ("", "")]
)
def test_names_of_characters(name: str, shown: str) -> None:
    assert names.shown(name) == shown


@pytest.mark.slow
def test_the_largest_page_stays_below_five_megabytes(tmp_path: Path) -> None:
    """As much of everything as an evaluation keeps, of pictures that compress as badly as photographs do."""
    generator = np.random.default_rng(0)

    def photographs(count: int, side: int) -> np.ndarray:
        coarse = generator.integers(0, 255, (count, side // 4, side // 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
        return np.clip(coarse + generator.normal(0, 8, coarse.shape), 0, 255).astype(np.uint8)

    pictures, misses, points = 700, 120, 1000
    found = make_diagnosis()
    many = {name: np.resize(getattr(found, name), pictures) for name in ("rows", "labels", "names", "sources")}
    numbers = generator.permutation(pictures)[: 3 * misses].reshape(3, misses)
    some = generator.integers(0, misses, (5, 12))
    found = replace(
        found,
        **many,
        images=photographs(pictures, 64),
        queries=numbers[0],
        nearest=numbers[1],
        own=numbers[2],
        **{name: np.resize(getattr(found, name), misses) for name in ("distances", "own_distances", "first_hits")},
        agreeing=np.resize(found.agreeing, (misses, 2)),
        alone=np.resize(found.alone, (misses, 4)),
        worst=some[0],
        alike=some[1],
        mislabelled=some[2],
        pair_counts=np.resize(found.pair_counts, (12, 2)),
        pair_queries=np.resize(found.pair_queries, (12, 2)),
        pair_examples=generator.integers(0, misses, (12, 4)),
        hubs=generator.integers(0, pictures, 8),
        hub_counts=np.resize(found.hub_counts, (8, 3)),
        hub_examples=generator.integers(0, misses, (8, 4)),
        montage=generator.integers(0, pictures, (4, 12)),
        map_points=generator.normal(size=(points, 2)).astype(np.float32),
        **{name: np.resize(getattr(found, name), points) for name in ("map_labels", "map_names", "map_right")},
        map_rows=np.arange(points),
        map_step=np.array([90]),
        map_images=photographs(points, 32),
    )
    write_lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        for step in range(20, 91, 10):
            file.write(json.dumps({"step": step, "epoch": step // 10, "kind": "evaluation", "recall@1": 0.75, "num_queries": 400}) + "\n")
    for step in range(20, 90, 10):
        where = generator.normal(size=(points, 2)).astype(np.float32)
        save_map(tmp_path, step, EmbeddingMap(np.arange(points), where - where.mean(0), np.array([0.5, 0.2], np.float32)))
    save_diagnosis(tmp_path, found)
    page = build_report(tmp_path).read_text()
    assert page.count('type="radio"') == 8 and len(page) < 4_000_000
