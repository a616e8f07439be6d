"""The map over the epochs: the same images on any number of ranks, kept as a run goes on and back, comparable, chosen without a script."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from dnc_dist.base.progress import Progress
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.evaluate import evaluate_view
from dnc_dist.engine.maps import embedding_map
from dnc_dist.engine.network import build_network
from dnc_dist.processes import distributed
from dnc_dist.processes.signals import StopRequest
from dnc_dist.report import build_report
from dnc_dist.report.course import course_of, turned
from dnc_dist.rundir.diagnosis import load_diagnosis, save_diagnosis
from dnc_dist.rundir.maps import MOST_KEPT, EmbeddingMap, load_maps, save_map
from dnc_dist.rundir.record import read_run
from tests.diagnosis_fixtures import POINTS, make_diagnosis
from tests.engine_fixtures import config, damage, make_dataset
from tests.spawn import spawn


def mapped(root: Path, out: Path, step: int = 0) -> None:
    """Keep the map of an untrained network."""
    cfg = config(root, out)
    torch.manual_seed(1)
    network, data = build_network(cfg, initial_weights=True), RunData(cfg)
    assert data.test is not None
    progress = Progress(distributed.is_main())
    found = evaluate_view(network, data, data.test, cfg, with_nmi=False, stop=StopRequest(), progress=progress, epoch=0)
    one = embedding_map(data.test, found)
    if distributed.is_main():
        save_map(out, step, one)


def read_one(folder: Path, step: int = 0) -> EmbeddingMap:
    found, damaged = load_maps(folder, [step], 8, before=step + 1)
    assert not damaged
    return found[step]


def some_map(seed: int = 0, rows: np.ndarray | None = None) -> EmbeddingMap:
    rows = 2000 + np.arange(POINTS) if rows is None else rows
    points = np.random.default_rng(seed).normal(size=(len(rows), 2)).astype(np.float32)
    return EmbeddingMap(rows, points - points.mean(0), np.array([0.5, 0.2], np.float32))


def test_the_same_images_on_any_number_of_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of four ranks one has nothing to embed.
    root = make_dataset(tmp_path / "data")
    for name in ("one", "four", "few", "damaged"):
        (tmp_path / name).mkdir()
    mapped(root, tmp_path / "one")
    spawn(partial(mapped, root, tmp_path / "four"), 4)
    one, four = read_one(tmp_path / "one"), read_one(tmp_path / "four")
    assert np.array_equal(one.rows, four.rows) and len(one.rows) == 18
    assert np.array_equal(one.points, four.points) and np.array_equal(one.variance, four.variance)
    # Of a sample, an image that cannot be decoded makes room for one other: all that are left stay.
    monkeypatch.setattr("dnc_dist.engine.maps.MAPPED", 6)
    mapped(root, tmp_path / "few")
    few = read_one(tmp_path / "few").rows
    view_rows = one.rows.tolist()
    mapped(damage(root, tmp_path / "worse", [], [view_rows.index(few[0])]), tmp_path / "damaged")
    assert len(few) == 6 and set(few[1:]) < set(read_one(tmp_path / "damaged").rows.tolist())


def test_files_are_replaced_bounded_and_cut(tmp_path: Path) -> None:
    for step in (0, 10, 20, 30):
        save_map(tmp_path, step, some_map(step))
    again = some_map(99)
    save_map(tmp_path, 20, again)  # the run went back behind it, and came here again
    found, damaged = load_maps(tmp_path, [0, 10, 20, 30], 8, before=40)
    assert list(found) == [0, 10, 20] and not damaged and np.array_equal(found[20].points, again.points)
    for step in range(30, 3000, 10):
        save_map(tmp_path, step, again)
    steps = sorted(int(path.stem[5:]) for path in (tmp_path / "maps").iterdir())
    assert len(steps) == MOST_KEPT and (steps[0], steps[-1]) == (0, 2990)
    # 31 gaps of 96 in the mean; none is dropped as long as a smaller one is left, so that the largest is at most a few times that.
    assert np.diff(steps).max() <= 4 * 2990 / (MOST_KEPT - 1)
    shown = list(load_maps(tmp_path, range(0, 2990, 10), 7, before=2990)[0])
    assert len(shown) == 7 and shown[0] == 0 and np.diff([*shown, 2990]).max() <= 2 * 2990 / 7


def test_a_map_is_turned_and_mirrored_only() -> None:
    onto = some_map().points.astype(np.float64)
    for angle, mirror in ((0.0, -1), (2.0, 1), (4.0, -1)):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ np.diag([1, mirror])
        back = turned(0.5 * onto @ turn, onto)
        # Of a map half as large the size stays; float64, a handful of operations.
        assert back is not None and np.allclose(back, 0.5 * onto, atol=1e-9)
    lacking = onto.copy()
    lacking[3] = np.nan
    found = turned(lacking, onto)
    assert found is not None and np.isnan(found[3]).all() and np.allclose(found[4:], onto[4:], atol=1e-9)
    assert turned(np.full_like(onto, np.nan), onto) is None


def make_run(folder: Path) -> None:
    """Four evaluations, the last with the diagnosis; the map at step 35 is of a past that the run went back behind."""
    division = {"sizes": [50, 50], "num_learners": 2, "left_out": 0}
    lines = [
        {"step": 0, "epoch": 0, "kind": "evaluation", "recall@1": 0.125},
        {"step": 0, "epoch": 0, "kind": "division", "sizes": [100], "num_learners": 1},
        {"step": 10, "epoch": 0, "kind": "epoch"},
        {"step": 10, "epoch": 1, "kind": "evaluation", "recall@1": 0.25},
        {"step": 10, "epoch": 1, "kind": "division", **division},
        {"step": 20, "epoch": 1, "kind": "epoch"},
        {"step": 20, "epoch": 2, "kind": "evaluation", "recall@1": 0.5},
        {"step": 40, "epoch": 3, "kind": "epoch"},
        {"step": 40, "epoch": 4, "kind": "evaluation", "recall@1": 0.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(yaml.safe_dump({"division": {"conquer_from": 2}}))
    save_diagnosis(folder, make_diagnosis(map_step=np.array([40])))
    for step in (0, 10, 20, 35):
        # At step 20 one image could not be decoded, and another was taken for it.
        rows = 2000 + np.arange(POINTS) + (np.arange(POINTS) == POINTS - 1) * (step == 20)
        save_map(folder, step, some_map(step, rows))


def test_the_course_says_what_each_map_is(tmp_path: Path) -> None:
    make_run(tmp_path)
    run = read_run(tmp_path)
    assert run.diagnosis is not None
    course = course_of(run, run.diagnosis)
    told = [(stop.epoch, stop.trained, stop.recall) for stop in course]
    assert told == [(0, "untrained", 0.125), (1, "1 learner", 0.25), (2, "2 learners", 0.5), (4, "conquer", 0.75)]
    assert [int(np.isnan(stop.points).all(1).sum()) for stop in course] == [0, 0, 1, 0]
    page = build_report(tmp_path).read_text()
    assert page.count('type="radio"') == 4 and page.count('checked="checked"') == 1 and 'id="map-4" checked' in page
    assert "recall@1 12.5%" in page and "<script" not in page
    points = re.findall(r'<i style="([^"]*)"', page[page.index("Map of the embedding") :])
    # Each point has its place in every map, and one is outside of the map where it was not measured.
    assert len(points) == POINTS and all(all(f"--l{name}:" in point for name in ("", "1", "2")) for point in points)
    assert sum("--l3:" in point for point in points) == POINTS - 1


def test_damaged_and_missing_files_cost_no_report(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "maps" / "step-00000010.npz").write_bytes(b"PK none")
    (tmp_path / "maps" / "notes.txt").write_text("mine")
    np.savez(tmp_path / "maps" / "step-00000020.npz", rows=np.arange(3), points=np.full((3, 2), np.nan), variance=np.zeros(2))
    page = build_report(tmp_path).read_text()
    assert page.count('type="radio"') == 2
    assert "step-00000010.npz is damaged" in page and "step-00000020.npz is damaged" in page
    for path in (tmp_path / "maps").iterdir():
        path.unlink()
    (tmp_path / "maps").rmdir()
    page = build_report(tmp_path).read_text()
    assert 'type="radio"' not in page and "Map of the embedding" in page


def test_a_diagnosis_of_an_earlier_version_has_the_single_map(tmp_path: Path) -> None:
    make_run(tmp_path)
    with np.load(tmp_path / "diagnosis.npz") as arrays:
        earlier = {name: arrays[name] for name in arrays if name not in ("map_rows", "map_step")}
    np.savez(tmp_path / "diagnosis.npz", **earlier)
    found = load_diagnosis(tmp_path)
    assert found is not None and (found.map_rows == -1).all()
    assert 'type="radio"' not in build_report(tmp_path).read_text()
