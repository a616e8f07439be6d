"""The recipes of the benchmarks: the published values, and that what they name exists. That each file loads is in test_architecture.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dnc_dist.base import parts
from dnc_dist.config import load_config
from dnc_dist.engine.proposal import RECALL_AT

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
PUBLISHED = {name: CONFIGS / f"{name}_published.yaml" for name in ("cub200", "cars196", "sop", "inshop")} | {
    "vehicleid": CONFIGS / "vehicleid.yaml"
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name: str) -> None:
    cfg = load_config(PUBLISHED[name])
    assert (cfg.model.backbone.name, cfg.model.weights, cfg.model.embedding_dim, cfg.model.dropout) == ("resnet50", "pretrained", 512, 0.01)
    assert (cfg.model.masks.name, cfg.loss.name, cfg.loss.model_dump()["margin"], cfg.loss.model_dump()["beta"]) == (
        "learned",
        "margin",
        0.2,
        1.2,
    )
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.mask_lr_mult, cfg.division.mask_penalty) == (1e-5, 1e-4, 100, 0.01)
    assert cfg.optim.clip_gradient == 0
    assert (cfg.schedule.epochs, cfg.schedule.batch_size, cfg.schedule.decay, cfg.schedule.epoch_length) == (180, 80, "constant", "over")
    assert (cfg.division.every, cfg.division.conquer_from, cfg.division.conquer_batches) == (2, 80, "clustered")
    assert (cfg.division.backbone_frozen_epochs, cfg.division.mode) == (1, "hierarchical")
    assert cfg.division.num_learners == (4 if name in ("cub200", "cars196") else 32)


@pytest.mark.parametrize("path", sorted({*PUBLISHED.values(), *CONFIGS.glob("*_modern.yaml")}), ids=lambda path: path.stem)
def test_a_recipe_fits_its_benchmark(path: Path) -> None:
    cfg, name = load_config(path), path.stem.split("_")[0]
    assert cfg.data.root == Path("data") / name and cfg.evaluation.recall_at == tuple(RECALL_AT[name])
    assert cfg.data.protocol.name == {"inshop": "query-gallery", "vehicleid": "vehicleid-loo"}.get(name, "leave-one-out")
    assert cfg.data.protocol.name in parts.TABLE["protocol"] and cfg.division.conquer_from is not None


def test_timm_knows_the_networks_and_their_weights() -> None:
    import dnc_dist  # noqa: F401, I001 - before timm, which imports torchvision
    import timm

    for path in CONFIGS.glob("*_modern.yaml"):
        known = timm.get_pretrained_cfg(load_config(path).model.backbone.name)
        assert known is not None and known.has_weights


def test_the_page_names_recipes_that_are_there() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    named = set(re.findall(r"configs/([\w*]+\.yaml)", page))
    assert named - {"*_modern.yaml"} == {path.name for path in PUBLISHED.values()}
    assert len(list(CONFIGS.glob("*_modern.yaml"))) == len(PUBLISHED)
