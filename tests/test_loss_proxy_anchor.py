"""Proxy-Anchor loss against pytorch-metric-learning, with masks, and at the edges."""

from __future__ import annotations

import pytest
import torch
from pytorch_metric_learning import losses
from torch import Tensor
from torch.nn.functional import normalize

from dnc_dist.loss.proxy_anchor import ProxyAnchorLoss


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(num_classes: int = 7, dim: int = 6) -> tuple[ProxyAnchorLoss, losses.ProxyAnchorLoss]:
    options = ProxyAnchorLoss.Options(margin=0.15, scale=20.0)
    ours = ProxyAnchorLoss(options, num_classes=num_classes, embedding_dim=dim).double()
    peer = losses.ProxyAnchorLoss(num_classes, dim, margin=0.15, alpha=20).double()
    with torch.no_grad():
        ours.proxies.copy_(random(num_classes, dim, seed=5))
        peer.proxies.copy_(ours.proxies)
    return ours, peer


def test_equals_the_peer_with_gradients():
    ours, peer = both()
    labels = torch.tensor([0, 0, 1, 3, 3, 3, 6, 1])  # classes 2, 4 and 5 are not in the batch
    x, y = random(8, 6).requires_grad_(), random(8, 6).requires_grad_()
    value, expected = ours(normalize(x), labels), peer(y, labels)
    value.backward()
    expected.backward()
    assert float(value) == pytest.approx(float(expected), rel=1e-10)
    assert torch.allclose(x.grad, y.grad, rtol=1e-9, atol=1e-12)
    assert torch.allclose(ours.proxies.grad, peer.proxies.grad, rtol=1e-9, atol=1e-12)


def test_a_mask_projects_the_proxies():
    ours, peer = both()
    mask, labels = random(6, seed=3), torch.arange(8) % 4
    z = normalize(random(8, 6) * mask.relu())
    with torch.no_grad():
        peer.proxies.mul_(mask.relu())
    assert float(ours(z, labels, mask)) == pytest.approx(float(peer(z, labels)), rel=1e-10)
    mask.requires_grad_()
    ours(z, labels, mask).backward()
    assert bool(torch.isfinite(mask.grad).all()) and bool(mask.grad.any())


def test_gradcheck():
    ours, _ = both(4, 3)
    labels, mask = torch.tensor([0, 0, 2]), random(3, seed=2).abs().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, m: ours(z, labels, m), (normalize(random(3, 3)).requires_grad_(), mask))


@pytest.mark.parametrize("labels", [[], [2], [1, 1, 1], [-1, -1]])
def test_few_rows_stay_finite(labels):
    ours, _ = both()
    z = normalize(random(len(labels), 6)).requires_grad_()
    ours(z, torch.tensor(labels, dtype=torch.int64)).backward()
    assert bool(torch.isfinite(z.grad).all()) and bool(torch.isfinite(ours.proxies.grad).all())


def test_rows_without_label_count_nowhere():
    ours, _ = both()
    z, labels = normalize(random(5, 6)), torch.tensor([0, 1, -1, 1, 2])
    kept = labels >= 0
    assert float(ours(z, labels)) == pytest.approx(float(ours(z[kept], labels[kept])), rel=1e-12)


def test_a_label_without_proxy_is_refused():
    ours, _ = both()
    with pytest.raises(ValueError, match="labels contains 7; allowed are 0 to 6"):
        ours(normalize(random(1, 6)), torch.tensor([7]))
