"""Bytes and messages of the model of scaling against those that are counted on 2 and 4 ranks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.engine_step import EngineStep
from benchmarks.scaling_model import Workload, division_bytes, evaluation_bytes, gradient_bytes, lloyd_bytes, messages, step_bytes
from dnc_dist.clustering import DivisionRules, KMeansOptions, divide, spread_features
from dnc_dist.clustering.centroids import SAMPLE_ROWS_PER_CENTROID
from dnc_dist.clustering.sums import EXPONENTS
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective
from dnc_dist.processes import distributed
from dnc_dist.retrieval import evaluate
from tests.engine_fixtures import config, division_by_hand, make_dataset
from tests.spawn import spawn


class Counted(NamedTuple):
    """Bytes that one rank received."""

    steps: dict[tuple[str, int], dict[str, int]]
    division: dict[str, int]
    evaluation: dict[str, int]
    zero: dict[int, dict[str, float]]
    messages: dict[int, dict[str, int]]


DIM, LEARNERS, ROWS, FEATURES = 16, 2, 4000, 8
QUERIES, GALLERY, PER_CLASS = 400, 1600, 20


def _difference(call: Any) -> dict[str, int]:
    before = distributed.traffic()
    call()
    after = distributed.traffic()
    return {kind: after[kind] - before[kind] for kind in before}


def _cfg(root: str, loss: str = "margin", together: int = 1, zero: int = 1) -> Any:
    return config(
        Path(root),
        Path("/nowhere/run"),
        loss={"name": loss},
        model={"batch_norm": "frozen"},
        division={"num_learners": LEARNERS, "learners_per_step": together},
        engine={"zero": zero},
    )


def _one_step(root: str, loss: str, together: int) -> dict[str, int]:
    cfg = _cfg(root, loss, together)
    data = RunData(cfg)
    group = distributed.rank_groups(together).get(together)
    schedule = data.schedule(division_by_hand(data.train.labels, LEARNERS), 0, conquer=False)
    batch = next(data.train_batches(schedule, first_step=0, skip=0, group=group))
    # The bound of this step, which is balanced; that of the epoch counts steps that are filled up.
    batch = batch._replace(max_positives=2)
    objective = build_objective(cfg, data.train.num_classes).train()
    return _difference(lambda: objective(batch, Phase(0, LEARNERS, False, False))[0].backward())


def _divide() -> None:
    """A flat division, and the gather of who could be decoded that comes before it."""
    start, stop = distributed.local_range(ROWS)
    centres = np.random.default_rng(1).standard_normal((LEARNERS, FEATURES))
    features = centres[np.arange(ROWS) % LEARNERS] + 0.01 * np.random.default_rng(0).standard_normal((ROWS, FEATURES))
    distributed.gather_rows(torch.ones(stop - start, dtype=torch.bool))
    labels = np.arange(ROWS) % (10 * LEARNERS)
    spread = spread_features(torch.from_numpy(features[start:stop]).float(), start, ROWS, replicated_rows=0)
    divide(spread, labels, DivisionRules(LEARNERS, mode="flat", kmeans=KMeansOptions(1)), epoch=0)


def _evaluate() -> None:
    total = QUERIES + GALLERY
    labels, asks = np.arange(total) // 25, np.arange(total) % 5 == 0
    start, stop = distributed.local_range(total)
    x = torch.randn(total, DIM, generator=torch.Generator().manual_seed(0))[start:stop]
    evaluate(x, torch.arange(start, stop), labels, asks, ~asks, protocol="query-gallery", sample=0)


def _deepspeed(root: str) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, int]]]:
    """By ZeRO stage: trainable parameters and their groups, and the bytes that a rank receives in a ring for what one step hands to
    collectives; how many collectives a step has, in the forward pass and after it."""
    counted, world = {"gradients": 0.0, "parameters": 0.0}, distributed.world_size()
    calls: Counter[str] = Counter()
    all_reduce, all_gather, gather_of_loss = dist.all_reduce, dist.all_gather_into_tensor, distributed._all_gather_single

    def count_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted["gradients"] += 2 * (world - 1) / world * tensor.nbytes
        calls["reduce"] += 1
        return all_reduce(tensor, *args, **kwargs)

    def count_gather(output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted["parameters"] += (world - 1) / world * output_tensor.nbytes
        calls["gather"] += 1
        return all_gather(output_tensor, *args, **kwargs)

    def count_gather_of_loss(*args: Any, **kwargs: Any) -> Any:
        calls["gather"] += 1
        return gather_of_loss(*args, **kwargs)

    # DeepSpeed takes them from here when its first engine is made, in a process that ends soon.
    dist.all_reduce, dist.all_gather_into_tensor, distributed._all_gather_single = count_reduce, count_gather, count_gather_of_loss
    sizes: dict[int, dict[str, float]] = {}
    sent: dict[int, dict[str, int]] = {}
    for zero in (0, 1, 2):
        cfg = _cfg(root, zero=zero)
        data = RunData(cfg)
        schedule = data.schedule(division_by_hand(data.train.labels, LEARNERS), 0, conquer=False)
        whole = EngineStep(cfg, data.train.num_classes, lr=1e-3)
        batch = next(data.train_batches(schedule, first_step=0, skip=0))
        calls.clear()
        # The bound of this step, which is balanced; that of the epoch counts steps that are filled up.
        loss = whole.forward(batch._replace(max_positives=2), 0)
        sent[zero] = {"gathers": calls["gather"], "stats": calls["reduce"]}
        counted.update(gradients=0.0, parameters=0.0)
        calls.clear()
        whole.engine.backward(loss)
        whole.update()
        sent[zero] |= {"gradients and norms": calls["reduce"], "parameters": calls["gather"]}
        groups = whole.engine.optimizer.param_groups
        size = sum(parameter.numel() for parameter in whole.objective.parameters() if parameter.requires_grad)
        sizes[zero] = counted | {"size": size, "groups": len(groups)}
    return sizes, sent


def _count(root: str) -> Counted:
    steps = {(loss, m): _one_step(root, loss, m) for loss in ("margin", "proxy_anchor") for m in (1, 2)}
    zero, sent = _deepspeed(root) if distributed.world_size() == 2 else ({}, {})
    return Counted(steps, _difference(_divide), _difference(_evaluate), zero, sent)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_dataset(tmp_path_factory.mktemp("scaling")))


@pytest.fixture(scope="module", params=[2, 4])
def counted(request: pytest.FixtureRequest, root: str) -> list[Counted]:
    return spawn(_count, request.param, root)


def test_the_bytes_of_a_step_are_those_that_are_counted(counted: list[Counted]) -> None:
    world = len(counted)
    for rank in counted:
        for (loss, together), found in rank.steps.items():
            work = Workload(dim=DIM, learners=LEARNERS, samples_per_class=3, loss=loss, learners_per_step=together)
            assert found == step_bytes(work, world, 24 // world), (loss, together)


def test_the_bytes_of_a_division_are_those_that_are_counted(counted: list[Counted]) -> None:
    world = len(counted)
    sample = SAMPLE_ROWS_PER_CENTROID * LEARNERS
    sizes = division_bytes(Workload(images=ROWS, learners=LEARNERS), FEATURES) | {"sample": sample * (4 * FEATURES + 8), "ids": 2 * ROWS}
    # Two Lloyd steps (the last one finds that no row moves or that it may not go on), the means at the end, and a few numbers; before
    # k-means, means and objective the ranks agree on a power of two.
    sums = 2 * lloyd_bytes(LEARNERS, FEATURES) + 8 * LEARNERS * FEATURES + 3 * 8 * EXPONENTS
    # A row is in the sample by chance: six standard deviations of their number.
    chance = 6 * sample**0.5 * (4 * FEATURES + 8)
    for rank in counted:
        # Beside them the ranks tell each other in a few numbers whether their features can be used.
        assert abs(rank.division["gather"] - (world - 1) * (sizes["sample"] + sizes["ids"]) // world) < 100 + chance
        assert 0 <= rank.division["reduce"] - 2 * (world - 1) * sums // world < 500


def test_the_bytes_of_an_evaluation_are_those_that_are_counted(counted: list[Counted]) -> None:
    world = len(counted)
    sizes = evaluation_bytes(Workload(queries=QUERIES, gallery=GALLERY, dim=DIM, relevant=PER_CLASS))
    for rank in counted:
        gathered = sizes["queries"] + sizes["found"] + sizes["values"]
        assert 0 <= rank.evaluation["gather"] - (world - 1) * gathered // world < 500
        assert 0 <= rank.evaluation["reduce"] - 2 * (world - 1) * sizes["presence"] // world < 1000


@pytest.mark.parametrize("counted", [2], indirect=True)
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_the_bytes_of_deepspeed_are_those_that_it_hands_to_collectives(counted: list[Counted], zero: int) -> None:
    for rank in counted:
        found = dict(rank.zero[zero])
        groups = int(found.pop("groups"))
        expected = gradient_bytes(Workload(zero=zero), int(found.pop("size")), 2)
        assert found == pytest.approx(expected, rel=0.01, abs=100)
        sent = messages(Workload(zero=zero), groups)
        sent["gradients and norms"] = sent.pop("gradients") + sent.pop("norms")
        assert rank.messages[zero] == sent
