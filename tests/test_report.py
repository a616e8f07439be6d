"""The report of a run: complete, self-contained, and content with whatever is there."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from dnc_dist.cli import run as run_cli
from dnc_dist.errors import InputError
from dnc_dist.gallery import Gallery, load_gallery, save_gallery
from dnc_dist.report import build_report, gallery_image
from dnc_dist.report.gallery import confident_mistakes

EPOCHS, STEPS = 10, 20


def _gallery() -> Gallery:
    """Discs of a hue per class; every third query has a wrong neighbour somewhere."""
    generator = np.random.default_rng(0)
    query_labels = generator.integers(0, 6, 16)
    neighbour_labels = np.where(generator.random((16, 10)) < 0.75, query_labels[:, None], generator.integers(0, 6, (16, 10)))
    neighbour_rows = generator.integers(0, 500, (16, 10))
    neighbour_rows[3, 8:], neighbour_labels[3, 8:] = -1, -1

    def picture(label: int) -> np.ndarray:
        y, x = np.mgrid[:64, :64] - generator.integers(24, 40, 2)[:, None, None]
        colour = np.array([[220, 60, 60], [60, 160, 80], [60, 90, 200], [230, 180, 40], [150, 70, 180], [60, 180, 190]])[label]
        return np.where(((x**2 + y**2) < (12 + 2 * label) ** 2)[..., None], colour, 240).astype(np.uint8)

    return Gallery(
        query_rows=np.arange(16),
        neighbour_rows=neighbour_rows,
        query_labels=query_labels,
        neighbour_labels=neighbour_labels,
        distances=np.sort(generator.random((16, 10)).astype(np.float32), 1),
        class_names=dict(enumerate(["red", "green <b>", "blue", "yellow", "violet", "a class with quite a long name"])),
        query_images=np.stack([picture(label) for label in query_labels]),
        neighbour_images=np.stack([[picture(max(label, 0)) for label in row] for row in neighbour_labels]),
    )


def write_run(run_dir: Path, *, select_on: str = "auto") -> None:
    """A run as the engine leaves it: 1, 2, 4 learners, conquer from epoch 7."""
    generator = np.random.default_rng(1)
    lines: list[dict[str, Any]] = [{"step": 0, "epoch": 0, "kind": "evaluation", "recall@1": 0.31, "map@r": 0.05}]
    sizes = {0: [4000], 2: [2300, 1650], 4: [1200, 1050, 900, 790], 6: [1190, 1070, 880, 800], 8: [1180, 1075, 880, 805]}
    for epoch in range(EPOCHS):
        step = epoch * STEPS
        if epoch in sizes:
            found, matched = sizes[epoch], 1.0 if epoch < 2 else 0.7 + epoch / 40
            line = {"sizes": found, "num_learners": len(found), "left_out": 4000 - sum(found), "rejoined": 3, "matched_share": matched}
            lines.append({"step": step, "epoch": epoch, "kind": "division", "nmi_to_previous": matched - 0.1, "seconds": 1.5, **line})
        learners = len(sizes[max(first for first in sizes if first <= epoch)])
        for at in range(1, STEPS + 1, 2):
            progress = epoch + at / STEPS
            loss = 0.3 * np.exp(-progress / 5) + 0.02 * generator.random()
            values = {
                "loss": loss,
                "active_pairs": 500 * loss,
                "anchors_without_negatives": int(generator.integers(0, 3)),
                "lr/backbone": 1e-3 * (epoch % 2),
            }
            values |= {f"learner_loss/{a}": loss * (0.8 + 0.1 * a) for a in range(learners)}
            values |= {
                "lr/embedding": 1e-3,
                "images_per_second": 900 + 50 * generator.random(),
                "mask_orthogonality": np.exp(-progress / 9),
                "mask_sparsity": 0.02 * progress,
            }
            lines.append({"step": step + at, "epoch": epoch, "kind": "train", **values})
        recall = 0.31 + 0.5 * (1 - np.exp(-(epoch + 1) / 3))
        metrics = {
            "recall@1": recall,
            "recall@2": recall + 0.05,
            "map@r": recall / 2,
            "protocol": "leave-one-out",
            "num_queries": 900,
            "num_gallery": 900,
        }
        lines.append({"step": step + STEPS, "epoch": epoch + 1, "kind": "evaluation", **metrics})
        shares = {
            "share_data": 0.04,
            "share_divide": 0.15 if epoch in sizes else 0,
            "share_evaluate": 0.08,
            "memory_mb": 700 + epoch,
            "seconds": 21.0,
        }
        lines.append({"step": step + STEPS, "epoch": epoch, "kind": "epoch", **shares})
    lines[-2]["nmi"] = 0.77
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9')
    config = {
        "run": {"dir": "runs"},
        "data": {"root": "data/discs"},
        "model": {"backbone": "conv4", "embedding_dim": 128},
        "loss": {"name": "margin"},
    }
    config |= {"division": {"num_learners": 4, "every": 2, "conquer_from": 7}, "evaluation": {"select_on": select_on}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))


class _Structure(HTMLParser):
    """Counts elements and checks that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_of_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = tmp_path / "discs <4>"
    write_run(run_dir)
    save_gallery(run_dir, _gallery())
    assert run_cli(["report", str(run_dir)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == run_dir / "report.html"
    page = path.read_text()
    structure = _Structure()
    structure.feed(page)
    assert not structure.open
    tags = [tag for tag, _ in structure.seen]
    assert tags.count("svg") == 10 and "script" not in tags and "link" not in tags
    sources = [attributes["src"] for tag, attributes in structure.seen if tag == "img"]
    assert sources and all((source or "").startswith("data:image/") for source in sources)
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", page.replace("xlink:href", "href"))
    for words in (
        "79.22%",
        "selected on last",
        "leave-one-out",
        "79.22%",
        "31.00%",
        "green &lt;b&gt;",
        "discs &lt;4&gt;",
        "Most confident mistakes",
        "77.00%",
    ):
        assert words in page, words
    assert len(page) < 2_000_000


def test_selection_on_test_is_stamped_loudly(tmp_path: Path) -> None:
    write_run(tmp_path, select_on="test")
    page = build_report(tmp_path).read_text()
    assert '<span class="stamp loud">selected on test</span>' in page and "<b>Selected on test.</b>" in page


def test_report_shows_what_is_there(tmp_path: Path) -> None:
    lines = [{"step": 1, "epoch": 0, "kind": "train", "loss": "NaN"}, {"step": 2, "epoch": 0, "kind": "train", "loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = build_report(tmp_path).read_text()
    assert page.count("<svg") == 1 and "Divisions" not in page
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "epoch": 0, "kind": "division", "sizes": [4], "num_learners": 1}) + "\n")
    assert build_report(tmp_path).read_text().count("<svg") == 1


def test_wrong_directories_are_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["report", str(tmp_path)]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
    with pytest.raises(InputError, match="is no directory"):
        build_report(tmp_path / "nowhere")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no line yet"):
        build_report(tmp_path)


def test_gallery_comes_back_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert load_gallery(tmp_path) is None
    gallery = _gallery()
    save_gallery(tmp_path, gallery)
    loaded = load_gallery(tmp_path)
    assert loaded is not None
    assert np.array_equal(loaded.neighbour_images, gallery.neighbour_images) and np.array_equal(loaded.correct(), gallery.correct())
    assert [loaded.name(label) for label in gallery.query_labels] == [gallery.name(label) for label in gallery.query_labels]
    mistakes = confident_mistakes(loaded)
    assert not loaded.correct()[mistakes, 0].any() and (np.diff(loaded.distances[mistakes, 0]) >= 0).all()
    (tmp_path / "gallery.npz").write_bytes((tmp_path / "gallery.npz").read_bytes()[:200])
    with pytest.raises(InputError, match=r"gallery\.npz is damaged"):
        load_gallery(tmp_path)


def test_gallery_image_frames_right_and_wrong() -> None:
    gallery = _gallery()
    picture = np.array(Image.open(io.BytesIO(gallery_image(gallery, queries=4, neighbours=10, side=64))))
    colours = {tuple(colour) for colour in picture.reshape(-1, 3)}
    assert {(0x16, 0xA3, 0x4A), (0xDC, 0x26, 0x26)} <= colours
    assert picture.shape[1] > 11 * 64 and picture.shape[0] > 4 * 64
