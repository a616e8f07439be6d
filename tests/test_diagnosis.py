"""What the last evaluation keeps for the report: true to all queries, and the same on any number of ranks."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from dnc_dist.base.errors import Stopped
from dnc_dist.base.progress import Progress
from dnc_dist.data.index import open_index
from dnc_dist.engine.clusters import last_division
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.diagnose import diagnose
from dnc_dist.engine.evaluate import Evaluation, evaluate_view
from dnc_dist.engine.maps import embedding_map
from dnc_dist.engine.network import build_network
from dnc_dist.engine.state import TrainState
from dnc_dist.processes import distributed
from dnc_dist.processes.signals import StopRequest
from dnc_dist.rundir.diagnosis import Diagnosis, load_diagnosis
from tests.engine_fixtures import config, damage, division_by_hand, make_dataset
from tests.spawn import spawn

LEARNERS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("diagnosis"))


def diagnosed(
    root: Path, out: Path, *, learners: int = LEARNERS, masks: str = "fixed", stopped: bool = False, answered: bool = True
) -> Evaluation:
    """Evaluate an untrained network on the test split, and leave the diagnosis in a folder."""
    cfg = config(root, out, model={"masks": masks}, division={"num_learners": learners})
    torch.manual_seed(1)
    network = build_network(cfg, initial_weights=True)
    data, stop = RunData(cfg), StopRequest()
    assert data.test is not None
    progress = Progress(distributed.is_main())
    found = evaluate_view(network, data, data.test, cfg, with_nmi=False, stop=stop, progress=progress, epoch=0)
    if not answered:
        found = replace(found, retrieval=replace(found.retrieval, queries=None))
    stop.requested = stopped
    state = TrainState(epoch=3, division=division_by_hand(data.train.labels, learners))
    mapped = embedding_map(data.test, found)
    diagnose(network, data, data.test, found, mapped, out, state, stop=stop, progress=progress)
    return found


def loaded(folder: Path) -> Diagnosis:
    found = load_diagnosis(folder)
    assert found is not None
    return found


def test_it_says_what_every_query_found(root: Path, tmp_path: Path) -> None:
    measured = diagnosed(root, tmp_path).retrieval
    found, index = loaded(tmp_path), open_index(root)
    assert measured.queries is not None
    queries, misses = found.counts
    assert queries == measured.num_queries and 1 - misses / queries == pytest.approx(measured.metrics["recall@1"])
    assert found.rank_counts.sum() == queries == found.distance_counts.sum() and found.rank_counts[0] == queries - misses
    assert misses > 0, "the data was made so that an untrained network errs"
    # Every picture is the row that it says.
    assert np.array_equal(found.labels, index.columns["label"][found.rows])
    assert [index.class_names[label] for label in found.labels] == found.names.tolist()
    assert all(name in source for name, source in zip(found.names, found.sources, strict=True))
    assert len(np.unique(found.rows)) == len(found.rows)
    # Every miss is one, and the image of its class is of its class.
    classes = found.labels
    assert (classes[found.queries] != classes[found.nearest]).all() and (classes[found.queries] == classes[found.own]).all()
    assert (found.distances <= found.own_distances).all()
    asked = dict(zip(index.view("test").rows[measured.queries.rows].tolist(), range(queries), strict=True))
    at = [asked[row] for row in found.rows[found.queries].tolist()]
    assert np.array_equal(index.view("test").rows[measured.queries.nearest[at]], found.rows[found.nearest])
    assert np.array_equal(measured.queries.first_hit[at], found.first_hits)
    assert found.pair_counts.sum() <= misses and (found.agreeing[:, 0] >= 1).all()
    # All queries are fewer than a sample, so that it holds them all.
    assert found.sampled_right.mean() == pytest.approx(measured.metrics["recall@1"]) and len(found.missed_alone) == misses
    assert found.masks.shape == (LEARNERS, 16) and found.masks.sum() == 16
    assert found.clusters[:, 0].tolist() == [18] * LEARNERS and found.clusters[:, 3].tolist() == [1] * LEARNERS
    assert len(found.map_points) == queries and found.map_right.mean() == pytest.approx(measured.metrics["recall@1"])


def test_it_is_the_same_on_any_number_of_ranks(root: Path, tmp_path: Path) -> None:
    # Of four ranks one has nothing to embed.
    one, four = tmp_path / "one", tmp_path / "four"
    one.mkdir()
    four.mkdir()
    diagnosed(root, one, masks="learned")
    spawn(partial(_on_a_rank, root, four), 4)
    for column in fields(Diagnosis):
        assert np.array_equal(getattr(loaded(one), column.name), getattr(loaded(four), column.name)), column.name


def _on_a_rank(root: Path, out: Path) -> None:
    diagnosed(root, out, masks="learned")


def test_masks_that_are_all_ones_find_what_the_whole_embedding_finds(root: Path, tmp_path: Path) -> None:
    diagnosed(root, tmp_path, masks="learned")
    found = loaded(tmp_path)
    assert np.array_equal(found.sampled_alone, np.repeat(found.sampled_right[:, None], LEARNERS, 1)) and not found.alone.any()


def test_one_learner_has_no_subspaces(root: Path, tmp_path: Path) -> None:
    diagnosed(root, tmp_path, learners=1)
    found = loaded(tmp_path)
    assert found.num_learners == 0 and found.counts[0] == 18 and len(found.queries) > 0 and len(found.sampled_right) == 0


@pytest.mark.parametrize("answered", [True, False], ids=["", "no one answer"])
def test_an_image_that_cannot_be_decoded_takes_no_part(root: Path, tmp_path: Path, answered: bool) -> None:
    """Also of a protocol that draws galleries, whose queries have no one answer: it leaves masks and map."""
    (tmp_path / "out").mkdir()
    diagnosed(damage(root, tmp_path / "damaged", [], [0, 7]), tmp_path / "out", answered=answered)
    found = loaded(tmp_path / "out")
    assert found.counts[0] == (16 if answered else 0) and len(found.map_points) == 16 and found.num_learners == LEARNERS
    assert (len(found.queries) > 0) == answered and len(found.sampled_right) == found.counts[0]


def test_a_stop_request_leaves_nothing(root: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="during epoch 3: diagnosis"):
        diagnosed(root, tmp_path, stopped=True)
    assert load_diagnosis(tmp_path) is None


def test_the_last_division_with_several_learners_counts(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(12), 6)
    assert last_division(None, tmp_path) is None
    (tmp_path / "divisions").mkdir()
    for epoch, level in ((0, 1), (2, 2), (10, 4), (9999, 3), (10000, 1)):
        division_by_hand(labels, level).save(tmp_path / "divisions" / f"epoch-{epoch:04d}.npz")
    found = last_division(division_by_hand(labels, 1), tmp_path)
    assert found is not None and found.num_learners == 3
    now = division_by_hand(labels, 2)
    assert last_division(now, tmp_path) is now
