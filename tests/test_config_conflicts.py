"""Keys of a configuration that have to fit together: what is refused, in which words, and what follows from the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from dnc_dist.config import dump_config, load_config
from tests.config_fixtures import message, write


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, "data: {root: images}\n")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["division.num_learners=3"],
            "division.num_learners=3 must be a power of two when division.mode=hierarchical; use 2, 4, 8 ... or division.mode=flat",
        ),
        (
            ["division.conquer_from=4"],
            "division.conquer_from=4 comes before all 4 learners exist (with division.every=2 that is epoch 4); use 5 or more",
        ),
        (
            ["model.masks=sliced"],
            "model.masks=sliced needs division.mode=flat (got hierarchical): a slice cannot be split; "
            "set division.mode=flat or model.masks=fixed",
        ),
        (
            ["model.masks=sliced", "division.mode=flat", "division.num_learners=32", "model.embedding_dim=100"],
            "model.embedding_dim=100 cannot be split among division.num_learners=32 sliced learners; use a multiple of 32",
        ),
        (
            ["model.masks=fixed", "model.embedding_dim=126"],
            "model.embedding_dim=126 cannot be halved down to division.num_learners=4 fixed masks; use a multiple of 4",
        ),
        (
            ["model.masks.split_scale=0.5", "division.mode=flat", "division.num_learners=3"],
            "model.masks.split_scale=0.5 halves the coordinates at every split, so division.num_learners=3 must be a power of two; "
            "use 2, 4, 8 ..., or model.masks.split_scale=1",
        ),
        (
            ["division.distill_teacher=frozen"],
            "division.distill_teacher=frozen has no effect with division.distill=0; set a weight, for example 1",
        ),
        (
            ["division.distill=1", "optim.mask_lr_mult=0"],
            "division.distill=1 has no effect: with model.masks.split_scale=1 and optim.mask_lr_mult=0 every learner's subspace is the "
            "whole embedding; lower the one, raise the other, or set division.distill=0",
        ),
        (
            ["division.distill=1", "division.num_learners=1"],
            "division.distill=1 lets the learners teach the whole embedding, but there is one learner, which is the whole embedding; "
            "set division.num_learners to 2 or more, or distill=0",
        ),
        (
            ["division.distill=1", "division.conquer_from=null"],
            "division.distill=1 lets the learners teach the whole embedding while it is trained together, but with "
            "division.conquer_from=null and schedule.epochs=180 it never is; set conquer_from to an epoch after 4 and "
            "schedule.epochs above it, or distill=0",
        ),
        (
            ["division.distill=1", "division.conquer_batches=whole"],
            "division.distill=1 lets the learners teach the whole embedding, each in its own cluster, but division.conquer_batches=whole "
            "gives batches of all clusters; use division.conquer_batches=clustered, or distill=0",
        ),
        (
            ["division.distill=1", "division.hard_from=90"],
            "division.distill=1 lets the learners teach the whole embedding, each in its own cluster, but division.hard_share=1 and "
            "hard_from=90 bring batches of the whole set after epoch 80, where that begins; use 1 and at most 80, or distill=0",
        ),
        (
            ["engine.compile=true", "engine.grad_cache_chunks=2"],
            "engine.grad_cache_chunks=2 computes a batch twice with the same random numbers, which engine.compile=true may draw in another "
            "order the second time; set one of them to its default",
        ),
        (
            ["division.learners_per_step=5"],
            "division.learners_per_step=5 is more than division.num_learners=4; use at most 4",
        ),
        (
            ["schedule.batch_size=30"],
            "schedule.batch_size=30 is not divisible by schedule.samples_per_class=4 times division.learners_per_step=1; "
            "use a multiple of 4",
        ),
        (
            ["schedule.batch_size=4"],
            "schedule.batch_size=4 gives every learner one class per step, so there are no negatives; use at least 8",
        ),
        (
            ["division.backbone_frozen_epochs=2"],
            "division.backbone_frozen_epochs=2 must be less than division.every=2, or the backbone never learns",
        ),
        (
            ["division.conquer_from=180"],
            "division.conquer_from=180 is not below schedule.epochs=180; use a smaller epoch, auto, or null for no conquer phase",
        ),
        (
            ["division.skip_nearest=2"],
            "division.skip_nearest=2 is of groups, and division.batches=learner makes none; use groups or neighbours",
        ),
        (
            ["division.batches=groups", "data.access=stream"],
            "data.access=stream makes batches of what is in memory: division.batches=learner, hard_share=1 and hard_from=0 only, not "
            "groups, 1 and 0; use these, or data.access=indexed",
        ),
        (
            ["division.hard_share=0.5", "division.learners_per_step=2"],
            "division.hard_share=0.5 and hard_from=0 bring batches of the whole set, which can give two learners of a step the same image; "
            "use division.learners_per_step=1 instead of 2, or 1 and 0",
        ),
        (
            ["division.hard_from=80", "division.conquer_batches=whole"],
            "division.hard_from=80 is after the last such batch; use less than 80, or division.hard_share=0 for none",
        ),
        (["schedule.warmup=180"], "schedule.warmup=180.0 must be less than schedule.epochs=180"),
        (["loss.cutoff=1.5"], "loss: cutoff=1.5 must be below nonzero_loss_cutoff=1.4"),
    ],
)
def test_sections_that_do_not_fit_together(minimal: Path, overrides: list[str], expected: str) -> None:
    assert message(minimal, *overrides) == f"{minimal}: 1 problem(s)\n  {expected}"


def test_two_conflicts_are_both_reported(minimal: Path) -> None:
    text = message(minimal, "division.num_learners=3", "schedule.batch_size=30")
    assert text.startswith(f"{minimal}: 2 problem(s)\n  division.num_learners=3") and "\n  schedule.batch_size=30" in text


def test_classes_of_a_group(minimal: Path) -> None:
    groups = "division.batches=groups"
    assert load_config(minimal, [groups, "schedule.batch_size=64"]).group_classes == 16
    assert load_config(minimal, [groups, "schedule.batch_size=64", "division.learners_per_step=2"]).group_classes == 8
    assert load_config(minimal, [groups, "division.group_classes=6"]).group_classes == 6
    for wrong in ("1", "few"):
        assert "division.group_classes: must be a number from 2 on, or auto" in message(minimal, groups, f"division.group_classes={wrong}")


def test_the_first_epoch_to_conquer_is_allowed(minimal: Path) -> None:
    assert load_config(minimal, ["division.conquer_from=5"]).division.conquer_from == 5
    assert load_config(minimal, ["division.num_learners=1", "division.conquer_from=0"]).division.num_learners == 1


@pytest.mark.parametrize(
    ("epochs", "every", "learners", "mode", "expected"),
    [
        (180, 2, 32, "hierarchical", 80),  # as published
        (180, 2, 4, "hierarchical", 80),
        (12, 2, 4, "hierarchical", 6),
        (12, 4, 4, "hierarchical", 11),  # four learners exist from epoch 8 on, and their period ends with the training
        (6, 2, 4, "hierarchical", 5),
        (5, 2, 4, "hierarchical", None),  # refused as a number, too: epoch 5 would be the first
        (1, 1, 4, "hierarchical", None),
        (30, 2, 1, "hierarchical", None),
        (9, 2, 8, "flat", 4),
        (2, 2, 8, "flat", 1),
    ],
)
def test_the_epoch_to_conquer_follows_from_the_others(
    epochs: int, every: int, learners: int, mode: str, expected: int | None, minimal: Path
) -> None:
    keys = {"schedule.epochs": epochs, "division.every": every, "division.num_learners": learners, "division.mode": mode}
    overrides = [*(f"{key}={value}" for key, value in keys.items()), "division.backbone_frozen_epochs=0"]
    cfg = load_config(minimal, overrides)
    assert cfg.division.conquer_from == cfg.division.conquer_epoch == expected
    # What is written into the run directory says the same, and may be given as it is.
    assert load_config(minimal, [*overrides, f"division.conquer_from={'null' if expected is None else expected}"]) == cfg
    assert f"conquer_from: {'null' if expected is None else expected}\n" in dump_config(cfg)


def test_an_explicit_null_is_never(minimal: Path) -> None:
    assert load_config(minimal).division.conquer_from == 80
    assert load_config(minimal, ["division.conquer_from=null"]).division.conquer_from is None


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "[3]"])
def test_an_epoch_to_conquer_that_is_none(value: str, minimal: Path) -> None:
    expected = "division.conquer_from: must be an epoch from 0 on, auto, or null for never"
    assert expected in message(minimal, f"division.conquer_from={value}")
