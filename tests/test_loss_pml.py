"""The losses and miners of pytorch-metric-learning by name: what they compute, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pytorch_metric_learning import losses, reducers, regularizers
from torch.nn.functional import normalize

from dnc_dist.base.errors import InputError
from dnc_dist.loss.pml import _classes
from tests.test_loss_values import DIM, LABELS, SQUARED, assert_same, make, random, step


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "MultiSimilarityLoss", "loss_options": {"alpha": 3}, "miner": "MultiSimilarityMiner", "miner_options": {"epsilon": 0.2}},
        {"loss": "CosFaceLoss", "loss_options": {"scale": 16}},
        {"loss": "SubCenterArcFaceLoss", "loss_options": {"sub_centers": 2}},
        {"loss": "MarginLoss", "loss_options": {"learn_beta": True, "beta": 1.1}},
    ],
    ids=lambda options: options["loss"],
)
def test_any_loss_and_miner_of_the_library(options: dict[str, Any]) -> None:
    ours, x = make("pml", **options), random(len(LABELS), DIM).requires_grad_()
    value, _ = ours.of_step(step(x, LABELS))
    z = normalize(x)
    expected = ours.loss(z, LABELS, None if ours.miner is None else ours.miner(z, LABELS)).sum()
    assert_same([value, torch.autograd.grad(value, x)[0]], [expected, torch.autograd.grad(expected, x)[0]])
    parameters = list(ours.parameters())
    assert all(parameter.dim() > 0 for parameter in parameters)  # DeepSpeed cannot broadcast others
    ours.of_step(step(x, LABELS))[0].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters)


def test_distance_reducer_and_regularizer_of_the_library() -> None:
    options = {
        "margin": 0.3,
        "distance": {"name": "LpDistance", "power": 2},
        "reducer": "MeanReducer",
        "embedding_regularizer": "LpRegularizer",
    }
    x = random(len(LABELS), DIM)
    found, _ = make("pml", loss="TripletMarginLoss", loss_options=options).of_step(step(x, LABELS))
    peer = losses.TripletMarginLoss(
        margin=0.3, distance=SQUARED, reducer=reducers.MeanReducer(), embedding_regularizer=regularizers.LpRegularizer()
    )
    assert_same([found], [peer(normalize(x), LABELS)])
    # It has no parameters; that it is tried once changes no number that is drawn later.
    make("pml", loss="TripletMarginLoss", loss_options={"triplets_per_anchor": 5})
    found = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(found, torch.rand(3))


def test_every_loss_and_miner_of_the_library_computes() -> None:
    needs = {"RankedListLoss": {"margin": 0.4, "Tn": 10.0}}
    for loss in _classes("loss"):
        value, _ = make("pml", loss=loss, loss_options=needs.get(loss, {})).float().of_step(step(random(len(LABELS), DIM).float(), LABELS))
        assert value > 0, loss
    for miner in _classes("miner"):
        value, _ = make("pml", loss="ContrastiveLoss", miner=miner).of_step(step(random(len(LABELS), DIM), LABELS))
        assert value > 0, miner


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "MultiSimilarityLos"}, "loss.loss='MultiSimilarityLos' is no loss .* did you mean MultiSimilarityLoss?"),
        ({"loss": "CircleLoss", "miner": "MultiSimilarityMinr"}, "did you mean MultiSimilarityMiner?"),
        ({"loss": "CircleLoss", "loss_options": {"gama": 3}}, "loss.loss_options.gama is no option of CircleLoss; did you mean gamma?"),
        ({"loss": "CircleLoss", "miner": "AngularMiner", "miner_options": {"angel": 3}}, "did you mean angle?"),
        ({"loss": "CrossBatchMemory"}, "is no loss of"),
        ({"loss": "DynamicSoftMarginLoss"}, "is no loss of"),  # remembers past batches in what no checkpoint holds
        ({"loss": "RankedListLoss"}, "loss.loss_options={} is refused by RankedListLoss"),
        (
            {"loss": "CircleLoss", "loss_options": {"distance": "CosineSimilarit"}},
            "loss.loss_options.distance='CosineSimilarit' is no distance",
        ),
        ({"loss": "CircleLoss", "loss_options": {"reducer": 3}}, "loss.loss_options.reducer=3 must be the name of a reducer"),
        (
            {"loss": "CircleLoss", "loss_options": {"distance": {"name": "LpDistance", "pwer": 2}}},
            "loss.loss_options.distance.pwer is no option of LpDistance; did you mean power?",
        ),
        (
            {"loss": "TripletMarginLoss", "loss_options": {"margin": "wide"}},
            "cannot compute loss.loss=TripletMarginLoss, loss.loss_options={'margin': 'wide'}: TypeError",
        ),
        ({"loss": "PNPLoss", "miner": "MultiSimilarityMiner"}, "cannot compute loss.loss=PNPLoss, loss.miner=MultiSimilarityMiner"),
        ({"loss": "ArcFaceLoss", "loss_options": {"num_classes": 3}}, "cannot compute loss.loss=ArcFaceLoss"),
        ({}, "loss: missing; the loss pml needs it"),
    ],
)
def test_wrong_names_of_the_library_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make("pml", **options)
