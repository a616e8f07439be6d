"""VehicleID's protocols against direct computations: every trial, every list, any number of ranks, and a whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dnc_dist.base import parts
from dnc_dist.base.errors import InputError, RunError
from dnc_dist.base.exact import squared_distance
from dnc_dist.base.rng import seed_for
from dnc_dist.config import load_config
from dnc_dist.processes import distributed
from dnc_dist.retrieval import Columns, Protocol, RetrievalResult, place_of_match, search, topk
from dnc_dist.retrieval import places as retrieval_places
from dnc_dist.retrieval.protocols.vehicleid_random10 import TRIALS
from tests.run_fixtures import dnc, make_dataset, metrics, without_report, write_config
from tests.spawn import spawn
from tests.vehicleid_fixtures import make_vehicleid

PROTOCOLS = ("vehicleid-loo", "vehicleid-random10")
N = 240
SOURCES = [f"image/{3 * row:07d}.jpg" for row in range(N)]


def sample(noise: float = 1.5) -> tuple[Tensor, np.ndarray, dict[str, np.ndarray]]:
    """Embeddings with some equal rows, labels with a class of one row, overlapping lists of classes."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(30, (N,), generator=random)
    x = torch.randn(30, 16, generator=random)[labels] + noise * torch.randn(N, 16, generator=random)
    x[40:60] = x[3].clone()
    labels[17] = 99
    known = labels.numpy()
    lists = {"small": known % 3 == 0, "medium": (known % 3 == 1) | (known < 5), "large": known % 7 != 2}
    return torch.nn.functional.normalize(x, dim=1), known, lists


def columns_of(labels: np.ndarray, lists: dict[str, np.ndarray], sources: list[str]) -> Columns:
    every = np.ones(len(labels), bool)
    return Columns("test", labels, every, every, lists, lambda: sources)


def evaluate_lists(
    x: Tensor, rows: Tensor, labels: np.ndarray, lists: dict[str, np.ndarray], sources: list[str], *, protocol: str
) -> dict[str, RetrievalResult]:
    built: Protocol = parts.build("protocol", protocol)
    return built.measure(x, rows, columns_of(labels, lists, sources), (1, 5))


def distances(x: Tensor) -> np.ndarray:
    return squared_distance(x[:, None].numpy(), x[None].numpy()).astype(np.float32)


def evaluated(protocol: str) -> dict[str, RetrievalResult]:
    x, labels, lists = sample()
    return evaluate_lists(x, torch.arange(N), labels, lists, SOURCES, protocol=protocol)


def test_random10_equals_a_direct_computation_trial_by_trial() -> None:
    x, labels, lists = sample()
    distance, found = distances(x), evaluated("vehicleid-random10")
    for name, inside in lists.items():
        rows = np.flatnonzero(inside)
        expected = []
        for trial in range(10):
            # Of each vehicle the image with the smallest number is searched, all others ask.
            gallery: dict[int, int] = {}
            for row in rows:
                best = gallery.get(labels[row], row)
                gallery[labels[row]] = min(row, best, key=lambda at: seed_for("vehicleid-random10", trial, SOURCES[at]))
            searched = sorted(gallery.values())
            places = []
            for row in rows:
                if row not in searched:
                    ranked = sorted(searched, key=lambda other: (distance[row, other], other))
                    places.append(1 + ranked.index(gallery[labels[row]]))
            at = np.array(places)
            expected.append([np.mean(at <= 1), np.mean(at <= 5), np.mean(1 / at)])
        result = found[name]
        for key, values in zip(("recall@1", "recall@5", "map"), np.array(expected).T, strict=True):
            np.testing.assert_allclose(result.trials[key], values, rtol=1e-12)
            assert result.metrics[key] == pytest.approx(values.mean(), rel=1e-12)
            assert result.metrics[f"{key}_std"] == pytest.approx(values.std(ddof=1), rel=1e-9)
        assert (result.num_queries, result.num_gallery) == (len(places), len(searched))
        assert len(set(result.trials["map"])) > 5  # the trials differ
        neighbours = result.sample_neighbours[result.sample_neighbours >= 0]
        assert inside[result.sample_queries].all() and inside[neighbours].all()
    assert TRIALS == 10


def test_loo_equals_brute_force() -> None:
    x, labels, lists = sample()
    found = evaluated("vehicleid-loo")
    for name, inside in lists.items():
        rows = np.flatnonzero(inside)
        distance, label = distances(x)[np.ix_(rows, rows)], labels[rows]
        np.fill_diagonal(distance, np.inf)
        same = label[:, None] == label
        np.fill_diagonal(same, False)
        asking = same.any(1)
        ranked = np.take_along_axis(same, np.lexsort((np.broadcast_to(rows, distance.shape), distance), axis=1), 1)[asking]
        for k in (1, 5):
            assert found[name].metrics[f"recall@{k}"] == pytest.approx(ranked[:, :k].any(1).mean(), rel=1e-12)
        precision = np.cumsum(ranked, 1) / np.arange(1, len(rows) + 1)
        relevant = same.sum(1)[asking]
        within = ranked & (np.arange(len(rows)) < relevant[:, None])
        assert found[name].metrics["map@r"] == pytest.approx(((precision * within).sum(1) / relevant).mean(), rel=1e-12)
        result = found[name]
        assert (result.num_queries, result.num_gallery, result.num_left_out) == (asking.sum(), len(rows), (~asking).sum())
        assert result.protocol == "vehicleid-loo"


@pytest.mark.parametrize("protocol", [*PROTOCOLS, "auto"])
def test_every_block_of_a_search_is_a_sign_of_life(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels, lists = sample()
    monkeypatch.setattr(retrieval_places, "VISITING_ELEMENTS", 512)
    monkeypatch.setattr(search, "CANDIDATES", 400)
    built: Protocol = parts.build("protocol", protocol)
    ticks: list[tuple[int, int]] = []
    built.tick = lambda done, total: ticks.append((done, total))
    built.measure(x, torch.arange(N), columns_of(labels, lists, SOURCES), (1,))
    every = sum(int(members.sum()) for members in lists.values())
    assert ticks == sorted(ticks) and {total for _, total in ticks} == {every}
    assert [done for done, _ in ticks].count(every) == 1, "the last line of progress is written once"
    assert len(ticks) > every / 32, "each block of each list"


def test_galleries_do_not_depend_on_the_order_of_rows() -> None:
    x, labels, lists = sample()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    at = order.numpy()
    shuffled = evaluate_lists(
        x[order],
        torch.arange(N),
        labels[at],
        {name: inside[at] for name, inside in lists.items()},
        [SOURCES[row] for row in at],
        protocol="vehicleid-random10",
    )
    for name, result in evaluated("vehicleid-random10").items():
        # Ties between the equal rows go by row, so only nearly the same.
        assert shuffled[name].metrics["recall@1"] == pytest.approx(result.metrics["recall@1"], abs=0.03)
        assert (shuffled[name].num_queries, shuffled[name].num_gallery) == (result.num_queries, result.num_gallery)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_undecodable_images_take_no_part(protocol: str) -> None:
    x, labels, lists = sample()
    rows = np.flatnonzero(np.arange(N) % 4 > 0)
    some = evaluate_lists(x[rows], torch.from_numpy(rows), labels, lists, SOURCES, protocol=protocol)
    inside = {name: members[rows] for name, members in lists.items()}
    sources = [SOURCES[row] for row in rows]
    alone = evaluate_lists(x[rows], torch.arange(len(rows)), labels[rows], inside, sources, protocol=protocol)
    for name, result in alone.items():
        assert some[name].metrics == result.metrics
        assert (some[name].num_queries, some[name].num_gallery) == (result.num_queries, result.num_gallery)


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-7])
def test_a_place_is_the_one_in_the_full_order(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(2)
    gallery = 1 + spread * torch.randn(150, 24, generator=random)
    gallery[30:50] = gallery[7].clone()
    queries = torch.cat([1 + spread * torch.randn(60, 24, generator=random), gallery[5:40]])
    ids = 2**40 + torch.randperm(150, generator=random)
    match = ids[torch.randint(150, (len(queries),), generator=random)]
    order = topk(queries, gallery, 150, query_ids=torch.zeros(len(queries)).long(), gallery_ids=ids, exclude_self=False).ids
    expected = 1 + (order == match[:, None]).int().argmax(1)
    assert torch.equal(place_of_match(queries, match, gallery, ids), expected)
    monkeypatch.setattr(search, "CANDIDATES", 400)
    monkeypatch.setattr(search, "WORK_ELEMENTS", 100)
    assert torch.equal(place_of_match(queries, match, gallery, ids), expected)


def on_ranks() -> list[dict[str, RetrievalResult]]:
    x, labels, lists = sample()
    world, me = distributed.world_size(), distributed.rank()
    owners = [np.arange(N) % world, np.full(N, world - 1), np.arange(N) * world // N]
    results = []
    for owner in owners:
        mine = torch.from_numpy(np.flatnonzero((owner == me) & (np.arange(N) % 11 > 0))[::-1].copy())  # some rows are nowhere
        results += [evaluate_lists(x[mine], mine, labels, lists, SOURCES, protocol=protocol) for protocol in PROTOCOLS]
    return results


def test_the_same_digits_on_two_ranks() -> None:
    alone = on_ranks()
    for rank in spawn(on_ranks, 2):
        for got, expected in zip(rank, alone, strict=True):
            assert got.keys() == expected.keys()
            for name, result in expected.items():
                for key, value in vars(result).items():
                    np.testing.assert_equal(getattr(got[name], key), value, err_msg=f"{name} {key}")


def test_errors() -> None:
    x, labels, lists = sample()
    one_each = np.isin(np.arange(N), np.unique(labels, return_index=True)[1])
    with pytest.raises(InputError, match="list small has one image per vehicle"):
        evaluate_lists(x, torch.arange(N), labels, {"small": one_each}, SOURCES, protocol="vehicleid-random10")
    x[3, 3] = float("nan")
    for protocol in PROTOCOLS:
        with pytest.raises(RunError, match="1 embeddings"):
            evaluate_lists(x, torch.arange(N), labels, lists, SOURCES, protocol=protocol)


def test_protocols_and_lists() -> None:
    every, large = np.ones(3, bool), {"large": np.ones(3, bool)}

    def chosen(name: str, lists: dict[str, np.ndarray], view: str = "test") -> Protocol:
        built: Protocol = parts.build("protocol", name)
        return built.for_data(Columns(view, np.zeros(3, np.int64), every, every, lists, lambda: []))

    assert chosen("auto", large).name == "vehicleid-loo"
    assert chosen("leave-one-out", large).name == "leave-one-out"
    for protocol in PROTOCOLS:
        assert chosen(protocol, large).name == protocol
        with pytest.raises(InputError, match=rf"{protocol} needs the lists .* data\.protocol=auto"):
            chosen(protocol, {})
        # Held-out training classes are in no list.
        assert chosen(protocol, {}, "validation").headline(["validation"]) == "validation"
        assert chosen(protocol, large).headline(["small", "medium", "large"]) == "large"


def test_the_published_recipe() -> None:
    cfg = load_config(Path(__file__).parent.parent / "configs" / "vehicleid.yaml")
    assert (cfg.model.backbone.name, cfg.model.embedding_dim, cfg.division.num_learners, cfg.division.every) == ("resnet50", 512, 32, 2)
    assert (cfg.schedule.epochs, cfg.division.conquer_from, cfg.schedule.batch_size, cfg.schedule.samples_per_class) == (180, 80, 80, 2)
    assert (cfg.optim.lr, cfg.optim.mask_lr_mult, cfg.division.mask_penalty, cfg.data.protocol.name) == (1e-5, 100, 0.01, "vehicleid-loo")


def test_a_run_from_prepare_to_evaluate(tmp_path: Path) -> None:
    make_vehicleid(tmp_path / "VehicleID_V1.0")
    assert dnc("data", "prepare", "vehicleid", "--root", "VehicleID_V1.0", "--out", "data", folder=tmp_path).code == 0
    short: dict[str, Any] = {"schedule": {"epochs": 1}, "division": {"num_learners": 1, "conquer_from": None}}
    write_config(tmp_path, tmp_path / "data", data={"protocol": "vehicleid-random10", "validation_classes": 0.4}, **short)
    result = dnc("train", "run.yaml", folder=tmp_path, before=without_report).result
    assert (result["protocol"], result["list"], result["selected_on"]) == ("vehicleid-random10", "large", "validation")
    assert result["recall@1"] > 0 and result["recall@1_std"] >= 0 and result["map"] > 0
    line = metrics(tmp_path / "runs/run", "evaluation")[-1]
    assert line["large/recall@1"] == line["recall@1"] and (line["num_queries"], line["num_gallery"]) == (21, 7)
    assert (line["small/num_queries"], line["medium/num_queries"]) == (9, 15)
    assert (line["validation/protocol"], line["validation/list"]) == ("vehicleid-random10", "validation")
    parameters = {"recall_at": [1, 2, 5], "trials": 10, "list": "large"}
    assert (line["card"]["parameters"], line["card"]["num_queries"], line["card"]["num_classes"]) == (parameters, 21, 7)
    assert line["card"]["selected_on"] == "validation" and line["validation/card"]["split"] == "validation"
    assert line["validation/card"]["parameters"]["list"] == "validation"
    answer = dnc("evaluate", "runs/run", "--protocol", "vehicleid-loo", "--json", folder=tmp_path)
    found = json.loads(answer.out)
    assert "search on test: 60/60 queries" in answer.err, "the rows of all three lists"
    assert (found["protocol"], found["list"], found["num_queries"]) == ("vehicleid-loo", "large", 28) and "recall@5" in found
    assert found["card"]["parameters"] == {"recall_at": [1, 2, 5], "list": "large"}
    last = json.loads(dnc("evaluate", "runs/run", "--checkpoint", "last", "--json", folder=tmp_path).out)
    assert (found["card"]["selected_on"], last["card"]["selected_on"]) == ("validation", "last")
    refused = dnc("evaluate", "runs/run", "--per-query", "q.csv", folder=tmp_path)
    assert refused.code == 2 and "vehicleid-random10 draws several galleries" in refused.err and not (tmp_path / "q.csv").exists()
    assert found["large/map@r"] == found["map@r"] and found["small/num_gallery"] == 12 and "nmi" in found


def test_other_data_has_no_lists(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    write_config(tmp_path, tmp_path / "data", data={"protocol": "vehicleid-loo"})
    error = dnc("train", "run.yaml", folder=tmp_path, before=without_report).error
    assert "vehicleid-loo needs the lists" in error and "data prepare vehicleid" in error
