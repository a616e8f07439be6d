"""A configuration for the data at hand: the values that follow from it, the file, and a training with it."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from dnc_dist import cli
from dnc_dist.base.errors import InputError
from dnc_dist.clustering.division import check_num_learners
from dnc_dist.config import RunConfig, load_config
from dnc_dist.data.index import open_index, train_view
from dnc_dist.data.readers import read
from dnc_dist.data.rows import ShardReader
from dnc_dist.data.shards import write_shards
from dnc_dist.engine.proposal import Facts, as_yaml, facts_of, propose
from tests.engine_fixtures import make_dataset
from tests.run_fixtures import dnc, draw_folder, metrics, without_report

SOP = Facts(59551, 11318, 11318, 5.0, 450, False, "leave-one-out", 60502, "sop")
CUB = Facts(5864, 100, 100, 60.0, 375, False, "leave-one-out", 5924, "cub200")
INSHOP = Facts(25882, 3997, 3985, 6.0, 256, False, "query-gallery", 12612, "inshop")


def proposed(folder: Path, facts: Facts) -> RunConfig:
    path = folder / "proposed.yaml"
    path.write_text(as_yaml(folder / "data", facts, propose(folder / "data", facts)))
    return load_config(path)


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        # Where published values exist, they are met: 32 learners, 180 epochs, batch 80, 1e-5, the k of the tables.
        (SOP, {"learners": 32, "epochs": 54, "batch": (80, 4), "side": 224, "lr": 1e-5, "recall_at": (1, 10, 100, 1000)}),
        (CUB, {"learners": 4, "epochs": 180, "batch": (80, 4), "side": 224, "lr": 1e-5, "recall_at": (1, 2, 4, 8)}),
        (INSHOP, {"learners": 32, "epochs": 124, "batch": (80, 4), "side": 224, "lr": 1e-5, "recall_at": (1, 10, 20, 30, 40, 50)}),
        # 20 classes of 3 images: a batch has all of them, and nothing is left to divide.
        (
            Facts(60, 20, 20, 3.0, 100, False, "leave-one-out", 6, "folder"),
            {"learners": 1, "epochs": 180, "batch": (40, 2), "side": 96, "lr": 1e-5, "recall_at": (1, 2, 4)},
        ),
        (
            Facts(9109, 350, 350, 26.0, 32, True, "leave-one-out", 9174, "glyphs"),
            {"learners": 4, "epochs": 20, "batch": (32, 4), "side": 32, "lr": 1e-3, "recall_at": (1, 2, 4, 8)},
        ),
    ],
    ids=["sop", "cub200", "inshop", "few", "small"],
)
def test_values_follow_from_the_data(facts: Facts, expected: dict[str, Any], tmp_path: Path) -> None:
    cfg = proposed(tmp_path, facts)
    found = {
        "learners": cfg.division.num_learners,
        "epochs": cfg.schedule.epochs,
        "batch": (cfg.schedule.batch_size, cfg.schedule.samples_per_class),
        "side": cfg.data.image_size,
        "lr": cfg.optim.lr,
        "recall_at": cfg.evaluation.recall_at,
    }
    assert found == expected
    # Close classes in a batch won from scratch, and lost with pretrained weights (docs/results.md).
    assert cfg.division.batches == ("groups" if facts.side <= 64 else "learner")
    assert cfg.division.images_per_class == (3 if facts.side <= 64 else None)
    assert (cfg.division.conquer_from is None) == (cfg.division.num_learners == 1)
    assert cfg.data.validation_classes == (0.1 if facts.classes >= 50 and not facts.has_validation else 0)


@pytest.mark.parametrize("classes", [2, 3, 7, 20, 49, 50, 90, 400, 5000])
@pytest.mark.parametrize("per_class", [2, 3, 30])
@pytest.mark.parametrize("side", [8, 64, 65, 900])
def test_every_proposal_can_be_trained(classes: int, per_class: int, side: int, tmp_path: Path) -> None:
    facts = Facts(classes * per_class, classes, classes, per_class, side, False, None, 0, "csv")
    cfg = proposed(tmp_path, facts)
    held_out = round(cfg.data.validation_classes * classes)
    # Every learner can fill a batch with different classes, and is within what a division allows.
    in_batch = cfg.schedule.batch_size // cfg.schedule.samples_per_class
    assert cfg.division.num_learners == 1 or (classes - held_out) // cfg.division.num_learners >= in_batch
    assert (cfg.division.batches == "groups") == (side <= 64 and classes - held_out >= 4 * in_batch)
    check_num_learners([label for label in range(classes - held_out) for _ in range(2)], cfg.division.num_learners)  # type: ignore[arg-type]
    assert cfg.data.protocol.name == "auto"


def test_a_file_with_a_reason_for_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    root = make_dataset(tmp_path)
    assert cli.run(["init", "data"]) == 0
    assert "dnc-dist launch data.yaml" in capsys.readouterr().out
    text = (tmp_path / "data.yaml").read_text()
    lines = text.splitlines()
    assert lines[0] == "# For 72 training images of 12 classes in data." and max(map(len, lines)) <= 140
    values = [at for at, line in enumerate(lines) if line.startswith("  ") and not line.strip().startswith("#")]
    assert len(values) > 12 and all(lines[at - 1].startswith("  # ") and len(lines[at - 1]) > 10 for at in values)
    cfg = load_config("data.yaml")
    assert (cfg.data.root, cfg.data.image_size, cfg.data.protocol.name) == (Path("data"), 16, "leave-one-out")
    check_num_learners(train_view(open_index(root), cfg.data.validation_classes).labels, cfg.division.num_learners)
    # Never overwritten, whatever it holds.
    (tmp_path / "data.yaml").write_text("mine")
    assert cli.run(["init", "data"]) == 2 and "data.yaml is there already" in capsys.readouterr().err
    assert (tmp_path / "data.yaml").read_text() == "mine"
    assert cli.run(["init", "nowhere"]) == 2 and "holds no prepared data set" in capsys.readouterr().err
    done = dnc("init", "data", "--out", "other.yaml", folder=tmp_path)
    assert done.code == 0 and (tmp_path / "other.yaml").read_text() == text
    changes = ["--set", "schedule.epochs=2", "--set", "tracker.kind=jsonl", "--set", "data.workers=0"]
    result = dnc("train", "other.yaml", *changes, folder=tmp_path, before=without_report).result
    assert result["epoch"] == 2 and "untrained_recall@1" in result and len(metrics(tmp_path / "runs/other", "evaluation")) == 2


def test_a_file_that_could_not_be_written_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the next try would find it there."""
    monkeypatch.chdir(tmp_path)
    make_dataset(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert cli.run(["init", "data"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in capsys.readouterr().err and not (tmp_path / "data.yaml").exists()
    # What begins with a dash is told with a folder, as it would be an option else.
    assert cli.run(["init", "data", "--out", "./-mine.yaml"]) == 0
    assert "`dnc-dist launch ./-mine.yaml`" in capsys.readouterr().out
    os.symlink("data", bad := os.fsdecode(b"bad\xff"))
    assert cli.run(["init", bad]) == 2
    assert "no UTF-8 cannot stand in a configuration" in capsys.readouterr().err


def test_a_shard_that_cannot_be_read_is_not_said_to_hold_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(reader: ShardReader, row: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error", "a shard")

    monkeypatch.setattr(ShardReader, "read", fail)
    with pytest.raises(OSError, match="Input/output error"):
        facts_of(open_index(make_dataset(tmp_path)))


def test_data_that_cannot_be_trained_on(tmp_path: Path) -> None:
    write_shards(read("folder", draw_folder(tmp_path / "pictures", {"a": 3, "b": 1}, {"c": 2})), tmp_path / "data")
    with pytest.raises(InputError, match=r"1 training class\(es\) with at least two images"):
        facts_of(open_index(tmp_path / "data"))
