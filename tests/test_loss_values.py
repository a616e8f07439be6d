"""Every loss against pytorch-metric-learning or loops, in float64; and what a batch without pairs gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_metric_learning import distances, losses, miners, reducers
from torch import Tensor, nn
from torch.nn.functional import normalize

from dnc_dist.base import parts
from dnc_dist.base.parts import TABLE
from dnc_dist.loss.base import Loss, StepRows
from dnc_dist.loss.pairwise import ReferencesLoss
from tests.rounding import EXACT

CLASSES, DIM = 7, 6
LABELS = torch.tensor([0, 3, 3, 6, 0, 6, 3, 0, 6, 1, 1, 1])
Peer = Callable[[Tensor, Tensor], Tensor]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name: str, **options: Any) -> Loss:
    torch.manual_seed(1)
    return parts.build("loss", {"name": name, **options}, num_classes=CLASSES, embedding_dim=DIM).double()


def step(embeddings: Tensor, labels: Tensor, learner: Tensor | None = None, masks: Tensor | None = None) -> StepRows:
    """All rows of a step on one rank."""
    count = len(labels)
    learner = torch.zeros(count, dtype=torch.int64) if learner is None else learner
    return StepRows(
        embeddings if masks is not None else normalize(embeddings),
        masks,
        labels,
        learner,
        row_ids=torch.arange(count) * 3,
        num_learners=1 if masks is None else len(masks),
        seed=0,
        step=0,
        rows_of_ranks=[count],
    )


def with_miner(miner: Any, loss: Any) -> Peer:
    return lambda x, labels: loss(x, labels, miner(x, labels))


def per_anchor(loss: Any) -> Peer:
    return lambda x, labels: loss(x, labels) / len(labels)


def circle(m: float, gamma: float) -> Peer:
    peer = losses.CircleLoss(m=m, gamma=gamma)
    peer.soft_plus = nn.Softplus(threshold=500)  # beyond its threshold it leaves something out
    return peer


def sorted_by_label(peer: Peer) -> Peer:
    """The peer wants the rows of a class to stand together, and computes in the default dtype."""

    def value(x: Tensor, labels: Tensor) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return peer(x[labels.argsort(stable=True)], labels.sort(stable=True).values)
        finally:
            torch.set_default_dtype(torch.float32)

    return value


SQUARED, COSINE, SUM = distances.LpDistance(power=2), distances.CosineSimilarity(), reducers.SumReducer()
# Ours with these options, and what must equal it: with the reducer that the peer has by default, else with the one that is named.
PEERS: dict[str, tuple[dict[str, Any], Peer]] = {
    "triplet": (
        {"margin": 0.3},
        with_miner(
            miners.TripletMarginMiner(margin=0.3, type_of_triplets="semihard", distance=SQUARED),
            losses.TripletMarginLoss(margin=0.3, distance=SQUARED),
        ),
    ),
    "triplet, all": ({"margin": 0.3, "triplets": "all"}, losses.TripletMarginLoss(margin=0.3, distance=SQUARED)),
    "contrastive": ({"margin": 0.1}, per_anchor(losses.ContrastiveLoss(pos_margin=1, neg_margin=0.1, distance=COSINE, reducer=SUM))),
    "n_pairs": ({"scale": 9.0}, losses.NTXentLoss(temperature=1 / 9)),
    "multi_similarity": (
        {"alpha": 3.0, "beta": 40.0, "boundary": 0.4, "epsilon": 0.05},
        with_miner(miners.MultiSimilarityMiner(epsilon=0.05), losses.MultiSimilarityLoss(alpha=3, beta=40, base=0.4)),
    ),
    "multi_similarity, all": ({"epsilon": None}, losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)),
    "supcon": ({"temperature": 0.2}, losses.SupConLoss(temperature=0.2)),
    "circle": ({"margin": 0.3, "scale": 30.0}, circle(0.3, 30)),
    "smooth_ap": ({"temperature": 0.05}, sorted_by_label(losses.SmoothAPLoss(temperature=0.05))),
}


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=EXACT * float(right.abs().max()))


BATCHES = {"even": LABELS, "uneven": torch.tensor([0, 3, 3, 6, 0, 6, 3, 0, 6, 3, 1, 1])}
# Of smooth_ap, the peer mistakes the number of classes for that of rows in a class: they must be equal.
SQUARE = LABELS[:9]


COMPARED = [(case, batch) for case in PEERS for batch in BATCHES if case != "smooth_ap"] + [("smooth_ap", "square")]


@pytest.mark.parametrize(("case", "batch"), COMPARED)
def test_a_loss_of_pairs_equals_the_peer_with_gradient(case: str, batch: str) -> None:
    options, peer = PEERS[case]
    labels = BATCHES.get(batch, SQUARE)
    x = random(len(labels), DIM).requires_grad_()
    value, stats = make(case.partition(",")[0], **options).of_step(step(x, labels))
    expected = peer(x, labels)
    assert expected > 0
    assert_same([value, stats["loss"], torch.autograd.grad(value, x)[0]], [expected, expected, torch.autograd.grad(expected, x)[0]])


@pytest.mark.parametrize("case", PEERS)
def test_masked_learners_are_averaged(case: str) -> None:
    options, peer = PEERS[case]
    labels = torch.tensor([0, 0, 1, 4, 0, 0, 1, 4]) if case == "smooth_ap" else torch.tensor([0, 0, 1, 1, 0, 2, 0, 0, 6, 1, 1, 2, 0])
    learner = torch.arange(len(labels)) % 2
    x, masks = random(len(labels), DIM).requires_grad_(), random(3, DIM, seed=4).abs().requires_grad_()
    value, stats = make(case.partition(",")[0], **options).of_step(step(x, labels, 2 * learner, masks))
    terms = [peer(x[learner == a] * masks[2 * a].relu(), labels[learner == a]) for a in (0, 1)]
    expected = torch.stack(terms).mean()
    assert min(terms) > 0
    assert_same([value, *torch.autograd.grad(value, [x, masks])], [expected, *torch.autograd.grad(expected, [x, masks])])
    assert stats["learner_loss"].isnan().tolist() == [False, True, False]


def test_smooth_ap_equals_the_loops() -> None:
    labels, temperature = BATCHES["uneven"], 0.1
    x = random(len(labels), DIM)
    z = normalize(x)
    value, _ = make("smooth_ap", temperature=temperature).of_step(step(x, labels))

    def ahead(q: int, j: int, i: int) -> float:
        return 1 / (1 + np.exp(-float(z[q] @ z[j] - z[q] @ z[i]) / temperature))

    terms = []
    for q in range(len(z)):
        own = [i for i in range(len(z)) if labels[i] == labels[q]]
        precision = [
            (1 + sum(ahead(q, j, i) for j in own if j != i)) / (1 + sum(ahead(q, k, i) for k in range(len(z)) if k != i)) for i in own
        ]
        terms.append(1 - np.mean(precision))
    assert float(value) == pytest.approx(np.mean(terms), rel=EXACT)


@pytest.mark.parametrize("masked", [False, True])
def test_arcface_equals_the_peer_with_gradients(masked: bool) -> None:
    ours, peer = make("arcface", margin=0.4, scale=20.0), losses.ArcFaceLoss(CLASSES, DIM, margin=np.degrees(0.4), scale=20).double()
    x, weights = random(len(LABELS), DIM).requires_grad_(), ours.weights
    mask = random(1, DIM, seed=3) if masked else None
    value, _ = ours.of_step(step(x, LABELS, masks=mask))
    through = 1 if mask is None else mask.relu()
    # The peer has its weights in columns, as a parameter of its own: the chain rule by hand.
    with torch.no_grad():
        peer.W.copy_((weights * through).T)
    expected = peer(x * through, LABELS)
    (by_x, by_weights), (of_x, of_peer) = torch.autograd.grad(value, [x, weights]), torch.autograd.grad(expected, [x, peer.W])
    assert_same([value, by_x, by_weights], [expected, of_x, of_peer.T * through])


def test_arcface_is_finite_where_rows_are_their_weights() -> None:
    ours = make("arcface")
    x = torch.cat([ours.weights.detach()[:3], -ours.weights.detach()[:3]]).requires_grad_()
    value, _ = ours.of_step(step(x, torch.tensor([0, 1, 2, 0, 1, 2])))
    assert value.isfinite() and all(grad.isfinite().all() for grad in torch.autograd.grad(value, [x, ours.weights]))


@pytest.mark.parametrize("masked", [False, True])
def test_soft_triple_equals_the_peer_with_gradients(masked: bool) -> None:
    ours = make("soft_triple", centres=3, scale=12.0, gamma=0.2, margin=0.05, merge=0.0)
    peer = losses.SoftTripleLoss(CLASSES, DIM, centers_per_class=3, la=12, gamma=0.2, margin=0.05).double()
    x, centres = random(len(LABELS), DIM).requires_grad_(), ours.centres
    mask = random(1, DIM, seed=3) if masked else None
    through = 1 if mask is None else mask.relu()
    with torch.no_grad():
        peer.fc.copy_((centres * through).T)
    value, expected = ours.of_step(step(x, LABELS, masks=mask))[0], peer(x * through, LABELS)
    (by_x, by_centres), (of_x, of_peer) = torch.autograd.grad(value, [x, centres]), torch.autograd.grad(expected, [x, peer.fc])
    assert_same([value, by_x, by_centres], [expected, of_x, of_peer.T * through])
    # And the term that draws centres together, by loops.
    merging = make("soft_triple", centres=3, scale=12.0, gamma=0.2, margin=0.05, merge=0.3)
    unit = normalize(merging.centres * through).view(CLASSES, 3, DIM)
    distance = sum((unit[c, s] - unit[c, t]).norm() for c in range(CLASSES) for s in range(3) for t in range(s))
    found = merging.of_step(step(x, LABELS, masks=mask))[0]
    assert_same([found], [value + 0.3 * distance / (CLASSES * 3 * 2)])


EXAMPLES = [(name, options) for name in TABLE["loss"] for options in parts.load("loss", name).examples]
FEW: dict[str, tuple[list[int], list[int]]] = {
    "one row": ([2], [0]),
    "one class": ([1, 1, 1], [0, 0, 0]),
    "no class twice": ([0, 1, 2, 3], [0, 0, 0, 0]),
    "no row in a learner": ([0, 0, 1], [-1, -1, -1]),
    "some rows in no learner": ([0, 0, 1, 1, 4], [0, 0, -1, 0, -1]),
    "learners without negatives and without positives": ([0, 0, 1, 2], [0, 0, 1, 1]),
}


@pytest.mark.parametrize("few", FEW)
@pytest.mark.parametrize(("name", "options"), EXAMPLES, ids=lambda value: str(value))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_few_rows_stay_finite(name: str, options: dict[str, Any], few: str, dtype: torch.dtype) -> None:
    labels, learner = (torch.tensor(values) for values in FEW[few])
    loss = make(name, **options).to(dtype)
    x, masks = random(len(labels), DIM).to(dtype).requires_grad_(), random(2, DIM, seed=4).to(dtype).requires_grad_()
    value, stats = loss.of_step(step(x, labels, learner, masks))
    wanted = [x, masks, *loss.parameters()]
    gradients = torch.autograd.grad(value, wanted, allow_unused=True)
    assert value.isfinite() and stats["loss"].isfinite()
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
    if few == "no row in a learner":
        assert value == 0 and not any(gradient.any() for gradient in gradients if gradient is not None)
    elif isinstance(loss, ReferencesLoss) and few in ("one row", "no class twice"):
        pulls = [] if name in ("contrastive", "multi_similarity") and few == "no class twice" else [value]  # negatives alone push
        assert all(pull == 0 for pull in pulls)


@pytest.mark.parametrize(("name", "options"), EXAMPLES, ids=lambda value: str(value))
def test_equal_rows_and_opposite_rows_stay_finite(name: str, options: dict[str, Any]) -> None:
    row = random(1, DIM).float()
    x = torch.cat([row, row, row, -row, -row, row]).requires_grad_()
    loss = make(name, **options).float()
    value, _ = loss.of_step(step(x, torch.tensor([0, 0, 1, 1, 2, 2])))
    assert value.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()
