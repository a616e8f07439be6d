"""The same pixels, the same division and the same metrics, digit for digit, on 1, 2 and 4 processes; also with images that are broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from dnc_dist.clustering.division import Division
from dnc_dist.config import RunConfig
from dnc_dist.data.index import open_index
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.evaluate import evaluate_view
from dnc_dist.engine.extract import extract
from dnc_dist.engine.next_division import next_division, places_to_look_at
from dnc_dist.engine.objective import DncObjective
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective
from dnc_dist.engine.state import TrainState
from dnc_dist.processes import distributed
from dnc_dist.processes.signals import StopRequest
from tests.engine_fixtures import CLASSES, PER_CLASS, config, damage, division_by_hand, make_dataset, silent
from tests.spawn import spawn

AUGMENTS = ("none", "light", "standard", "color", "geom", "geom_color")
# Whole blocks per shard, or blocks of 4 of a shard's 6 rows; with 4 processes and 3 test shards of one block, one process has none.
BLOCKS = (128, 4)
WAYS: tuple[tuple[str, str, str, int | None], ...] = (
    ("hierarchical", "features", "groups", None),
    ("hierarchical", "features", "groups", 2),
    ("hierarchical", "features", "learner", None),
    ("flat", "embeddings", "learner", None),
)
TIMES = 4
BROKEN_TRAIN, BROKEN_TEST = (0, 7, 8, 50), (2,)


class Result(NamedTuple):
    """What must not depend on the number of processes; ``failed`` are the keys that each process reports."""

    pixels: dict[str, Tensor]
    divisions: dict[str, dict[str, Any]]
    metrics: dict[str, dict[str, Any]]
    embeddings: Tensor
    failed: dict[str, list[str]]


def _pixels(cfg: RunConfig) -> Tensor:
    """What enters the backbone in the steps of an epoch, in the order of the global batches."""
    data = RunData(cfg)
    objective = build_objective(cfg, data.train.num_classes).train()
    seen: list[Tensor] = []
    objective.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().contiguous()))
    schedule = data.schedule(division_by_hand(data.train.labels, 2), 0, conquer=False)
    steps = []
    for number, batch in enumerate(data.train_batches(schedule, first_step=40, skip=0)):
        objective(batch, Phase(40 + number, 2, conquer=False, backbone_frozen=True))
        steps.append(distributed.gather_rows(seen[-1][batch.rows >= 0]))
    assert len({len(step) for step in steps}) == 1
    return torch.stack(steps)


def _divide(objective: DncObjective, data: RunData, cfg: RunConfig, times: int) -> tuple[Division, list[str]]:
    state = TrainState()
    failed: list[str] = []
    for epoch in range(times):
        state.epoch = epoch
        state.division, failed = next_division(objective, data, cfg, state, stop=StopRequest(), progress=silent())
    assert state.division is not None
    return state.division, failed


def _everything(roots: dict[str, str], place: str) -> Result:
    run = Path(place) / "run"
    pixels = {kind: _pixels(config(Path(roots["whole"]), run, data={"augment": kind})) for kind in AUGMENTS}
    pixels["broken"] = _pixels(config(Path(roots["broken"]), run, data={"augment": "color"}))
    divisions, metrics, failed = {}, {}, {}
    for name, root in roots.items():
        for block in BLOCKS:
            for mode, on, batches, looked_at in WAYS if block == BLOCKS[1] else WAYS[2:]:
                start = "previous" if block == BLOCKS[0] else "k-means++"
                changes: dict[str, dict[str, Any]] = {
                    "division": {"mode": mode, "cluster_on": on, "start": start, "batches": batches, "images_per_class": looked_at},
                    "evaluation": {"batch_size": block},
                }
                cfg = config(Path(root), run, **changes)
                data = RunData(cfg)
                objective = build_objective(cfg, data.train.num_classes)
                division, broken = _divide(objective, data, cfg, times=TIMES)
                divisions[f"{name}, blocks of {block}, {mode}, {batches}, {looked_at}"] = division.state_dict()
            assert data.test is not None
            found = evaluate_view(objective, data, data.test, cfg, with_nmi=True, stop=StopRequest(), progress=silent(), epoch=0)
            sample = {"queries": found.retrieval.sample_queries, "neighbours": found.retrieval.sample_neighbours}
            metrics[f"{name}, blocks of {block}"] = found.metrics | {key: value.tolist() for key, value in sample.items()}
        failed[name] = broken + found.failed
    train = extract(
        objective, objective.embeddings, data.sequential(data.train), name="", num_rows=72, stop=StopRequest(), progress=silent()
    )
    assert len(train.values) == len(train.valid)
    return Result(pixels, divisions, metrics, distributed.gather_rows(train.values), failed)


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("division")
    whole = make_dataset(place / "dataset")
    return {"whole": str(whole), "broken": str(damage(whole, place / "broken", train=BROKEN_TRAIN, test=BROKEN_TEST))}


@pytest.fixture(scope="module")
def results(roots: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Result]]:
    """By number of processes, of each of them."""
    place = str(tmp_path_factory.mktemp("runs"))
    return {world: spawn(_everything, world, roots, place) for world in (1, 2, 4)}


def same(left: Any, right: Any) -> bool:
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right


def test_images_that_cannot_be_decoded_are_zeros_whatever_the_network_makes_of_them(roots: dict[str, str], tmp_path: Path) -> None:
    data = RunData(cfg := config(Path(roots["broken"]), tmp_path / "run"))
    network = build_objective(cfg, data.train.num_classes)
    found = extract(
        network,
        lambda images: torch.full((len(images), 16), float("nan")),
        data.sequential(data.train),
        name="",
        num_rows=len(data.train),
        stop=StopRequest(),
        progress=silent(),
    )
    data.close()
    assert int((~found.valid).sum()) == len(BROKEN_TRAIN)
    assert (found.values[~found.valid] == 0).all() and found.values[found.valid].isnan().all()


@pytest.mark.parametrize("kind", [*AUGMENTS, "broken"])
@pytest.mark.parametrize("world", [2, 4])
def test_same_augmented_pixels(results: dict[int, list[Result]], world: int, kind: str) -> None:
    alone = results[1][0].pixels[kind]
    assert alone.shape == (3, 24, 3, 16, 16)
    for rank in results[world]:
        assert torch.equal(rank.pixels[kind], alone)
    if kind != "none":
        assert not torch.equal(alone, results[1][0].pixels["none"])


@pytest.mark.parametrize("world", [2, 4])
def test_same_division(results: dict[int, list[Result]], world: int) -> None:
    for name, alone in results[1][0].divisions.items():
        for rank in results[world]:
            differ = [key for key, value in alone.items() if not same(rank.divisions[name][key], value)]
            assert not differ, (name, differ)


def left_out_by_hand(name: str, roots: dict[str, str]) -> list[int]:
    """Places of the broken images that the pass of the last division met; in order."""
    if "broken" not in name:
        return []
    cfg = config(Path(roots["broken"]), Path("run"), division={"batches": "groups", "images_per_class": 2 if name.endswith("2") else None})
    met = places_to_look_at(np.repeat(np.arange(CLASSES), PER_CLASS), cfg, epoch=TIMES - 1)
    return [place for place in BROKEN_TRAIN if place in met]


def test_division_is_one_to_be_compared(roots: dict[str, str], results: dict[int, list[Result]]) -> None:
    for name, state in results[1][0].divisions.items():
        division = Division.from_state(state)
        assert division.num_learners == 4 and division.sizes.min() >= 4, name
        assert division.centroids.shape == (4, 256 if "hierarchical" in name else 16)
        assert set(division.learner_of[division.learner_of >= 0]) == {0, 1, 2, 3}
        if "groups" in name:
            assert np.flatnonzero(division.learner_of < 0).tolist() == left_out_by_hand(name, roots) and division.groups.size


def test_some_images_of_each_class_are_looked_at_others_each_time() -> None:
    labels = np.repeat(np.arange(40), np.arange(1, 41))
    cfg = config(Path("data"), Path("run"), division={"batches": "groups", "images_per_class": 3})
    passes = [places_to_look_at(labels, cfg, epoch=epoch) for epoch in (0, 2, 2)]
    for places in passes:
        assert (np.diff(places) > 0).all()
        assert (np.bincount(labels[places]) == np.minimum(np.arange(1, 41), 3)).all()
    assert not np.array_equal(passes[0], passes[1]) and np.array_equal(passes[1], passes[2])
    # With `learner`, too: what `init` proposes can be compared with it by changing that key alone.
    for all_of_them in ({"batches": "groups"}, {"batches": "learner", "images_per_class": 3}):
        everything = config(Path("data"), Path("run"), division=all_of_them)
        assert np.array_equal(places_to_look_at(labels, everything, epoch=0), np.arange(len(labels)))


@pytest.mark.parametrize("world", [2, 4])
def test_same_metrics_to_the_last_digit(results: dict[int, list[Result]], world: int) -> None:
    for rank in results[world]:
        assert rank.metrics == results[1][0].metrics
        assert torch.equal(rank.embeddings, results[1][0].embeddings)
    values = results[1][0].metrics["whole, blocks of 4"]
    assert 0 < values["map@r"] < 1 and 0 < values["nmi"] <= 1 and values["num_queries"] == 18


@pytest.mark.parametrize("world", [1, 2, 4])
def test_broken_images_are_left_out_and_named_once(roots: dict[str, str], results: dict[int, list[Result]], world: int) -> None:
    index = open_index(roots["broken"])
    rows = {name: index.view(name).rows for name in ("train", "test")}
    expected = [index.key(int(rows[name][at])) for name, places in (("train", BROKEN_TRAIN), ("test", BROKEN_TEST)) for at in places]
    assert sorted(key for rank in results[world] for key in rank.failed["broken"]) == sorted(expected)
    assert not any(rank.failed["whole"] for rank in results[world])
    for name, state in results[world][0].divisions.items():
        if "broken" in name:
            learner_of = state["learner_of"].numpy()
            assert len(learner_of) == 72
            assert (learner_of[left_out_by_hand(name, roots)] == -1).all()
            assert np.count_nonzero(learner_of < 0) == state["left_out"]
    metrics = results[world][0].metrics["broken, blocks of 128"]
    assert metrics["num_queries"] == metrics["num_gallery"] == 3 * PER_CLASS - 1
