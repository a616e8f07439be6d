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

from dnc_dist.base.errors import InputError
from dnc_dist.cli import run as run_cli
from dnc_dist.report import build_report, gallery_image
from dnc_dist.report.gallery import confident_mistakes
from dnc_dist.rundir.gallery import PictureGallery, load_gallery, save_gallery
from dnc_dist.rundir.record import POINTS, Thinned, read_run
from tests.spawn import spawn

EPOCHS, STEPS = 10, 20


def _gallery() -> PictureGallery:
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

    return PictureGallery(
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
    assert page.count("<svg") == 1 and "What division did" not in page
    # One learner has no lineage.
    for sizes, charts in (([4], 0), ([2, 2], 1)):
        line = {"step": 0, "epoch": 0, "kind": "division", "sizes": sizes, "num_learners": len(sizes)}
        (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        assert build_report(tmp_path).read_text().count("<svg") == charts


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


def write_metrics(run_dir: Path, *lines: Any) -> Path:
    """Lines of ``metrics.jsonl``: objects, or text as it is."""
    path = run_dir / "metrics.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def train_line(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "epoch": 0, "kind": "train", "loss": 0.5, **values}


HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' onload='x'&$\\frac$"


def test_nothing_that_was_read_is_markup(tmp_path: Path) -> None:
    run_dir = tmp_path / "<script>run<"
    write_run(run_dir)
    config = {HOSTILE: {HOSTILE: HOSTILE}, "data": {"root": HOSTILE}, "model": {"backbone": HOSTILE}, "loss": {"name": [HOSTILE]}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config | {"evaluation": {"select_on": HOSTILE}}, width=1000))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()[:-1]]
    lines += [
        train_line(300, **{f"lr/{HOSTILE}": 1.0, "learner_loss/<b>": 2.0, HOSTILE: 3.0}),
        {"step": 301, "epoch": 9, "kind": "evaluation", "recall@1": 0.5, "protocol": HOSTILE, "list": [HOSTILE], "recall@<b>": 1.0},
        {"step": 301, "epoch": "<script>", "kind": "evaluation", "recall@1": 0.5},
        {"step": 301, "epoch": 9, "kind": "division", "sizes": [HOSTILE], "num_learners": HOSTILE},
    ]
    write_metrics(run_dir, *lines)
    gallery = _gallery()
    save_gallery(run_dir, PictureGallery(**{**vars(gallery), "class_names": dict.fromkeys(range(6), HOSTILE)}))
    page = build_report(run_dir).read_text()
    structure = _Structure()
    structure.feed(page)
    assert not structure.open
    for tag, attributes in structure.seen:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        assert tag != "img" or str(attributes["src"]).startswith("data:image/")
    policy = next(attributes["content"] for tag, attributes in structure.seen if attributes.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; ") and "script" not in policy
    assert page.index("Content-Security-Policy") < page.index("<style")
    assert "&lt;script&gt;alert(1)" in page and "1 lines of it are none of a run and are left out." in page


@pytest.mark.parametrize(
    "line",
    [
        "[]", "null", "3", '"x"', "{}", "{", "", "\x00", "[" * 10_000, '{"step": 1}', "NaN", "\ufeff{}",
        '{"step": 1e400, "epoch": 0, "kind": "train"}',
        '{"step": "1", "epoch": 0, "kind": "train"}',
        '{"step": true, "epoch": 0, "kind": "train"}',
        '{"step": -1, "epoch": 0, "kind": "train"}',
        '{"step": 1, "epoch": 1e9, "kind": "train"}',
        '{"step": 1, "epoch": 99999999999, "kind": "train"}',
        '{"step": 1, "epoch": 0, "kind": ["train"]}',
        '{"step": ' + "9" * 5000 + ', "epoch": 0, "kind": "train"}',
        '{"step": 1, "epoch": 0, "kind": "train", "a": "\\ud800"}',
    ],
)  # fmt: skip
def test_lines_that_no_run_writes_are_counted(tmp_path: Path, line: str) -> None:
    write_metrics(tmp_path, train_line(1), line, train_line(2))
    run = read_run(tmp_path)
    assert run.passed_over == 1 and len(run.series("train", "loss")) == 2


ODD = [None, True, [], {}, [1], "x", "NaN", "1e9", -5, 1e300, 10**300, float("nan"), float("inf"), "$x$", {"a": {"b": []}}]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_values_that_are_none_cost_no_traceback(tmp_path: Path, value: Any) -> None:
    evaluation = {"recall@1": value, "map@r": value, "nmi": value, "num_queries": value, "queries_left_out": value, "protocol": value}
    division = {
        "sizes": value,
        "num_learners": value,
        "left_out": value,
        "matched_share": value,
        "nmi_to_previous": value,
        "seconds": value,
    }
    lines: list[Any] = [
        {"step": 0, "epoch": 0, "kind": "evaluation", **evaluation},
        {"step": 0, "epoch": 0, "kind": "division", **division},
        {"step": 0, "epoch": 0, "kind": "division", **division, "sizes": [3, 4]},
        {"step": 1, "epoch": 0, "kind": "epoch", "seconds": value, "share_data": value, "share_divide": 0.5},
        train_line(1, **{"learner_loss/0": 1.0, "learner_loss/1": value, "learner_loss/x": 2.0, "lr/a": value}),
        {"step": 1, "epoch": 1, "kind": value, "a": 1},
        {"step": 1, "epoch": 1, "kind": "evaluation", **evaluation, "recall@1": 0.5},
    ]
    write_metrics(tmp_path, *lines)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"division": {"conquer_from": value}, "evaluation": value, "model": [value]}))
    assert run_cli(["report", str(tmp_path)]) == 0


def test_many_points_become_few_that_show_the_same(tmp_path: Path) -> None:
    points = Thinned()
    for step in range(100_000):
        points.add(step, float(step))
    steps, values = points.points()
    assert POINTS <= len(steps) <= 2 * POINTS + 1 and np.allclose(steps, values) and (np.diff(steps) > 0).all()
    # Every value counts once: their mean is that of all, up to the rest of a run that is not full yet.
    assert values[:-1].mean() == pytest.approx(49_999.5, rel=1e-3)
    few = Thinned()
    for step in range(5):
        few.add(step, 2.0 * step)
    assert few.points()[1].tolist() == [0, 2, 4, 6, 8]


@pytest.mark.slow
def test_more_of_everything_than_can_be_drawn(tmp_path: Path) -> None:
    names = {f"name{number}": 1.0 for number in range(3000)} | {f"learner_loss/{number}": 1.0 for number in range(40)}
    lines: list[Any] = [train_line(1, **names)]
    for epoch in range(1200):
        lines.append({"step": epoch, "epoch": epoch, "kind": "division", "sizes": [5] * 500, "num_learners": 1 + epoch % 2})
        lines.append({"step": epoch + 1, "epoch": epoch, "kind": "epoch", "share_data": 0.1})
    write_metrics(tmp_path, *lines, {"step": 1, "epoch": 0, "kind": "division", "sizes": [1] * 5000})
    page = build_report(tmp_path).read_text()
    assert len(page) < 20_000_000
    assert len(read_run(tmp_path).curves["train"]) <= 2000


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    write_metrics(tmp_path, train_line(1))
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "report.html.part").symlink_to("precious")
    (tmp_path / "report.html").symlink_to("precious")
    build_report(tmp_path)
    assert (tmp_path / "precious").read_text() == "mine" and not (tmp_path / "report.html").is_symlink()


def break_gallery(path: Path, name: str) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    arrays |= {
        "shapes": {"distances": arrays["distances"][:, :3]},
        "type": {"query_images": arrays["query_images"].astype(np.uint16)},
        "objects": {"names": np.array([{}] * len(arrays["names"]), dtype=object)},
        "characters": {"names": np.frombuffer(b"\xff\xff\xff\x7f" * len(arrays["names"]), dtype="U1")},
        "empty": {key: value[:, :0] for key, value in arrays.items() if key.startswith("neighbour") or key == "distances"},
        "labels": {"name_labels": arrays["name_labels"] + (1 << 60), "query_labels": arrays["query_labels"] - (1 << 60)},
        "surrogates": {"names": np.array(["\udce9"] * len(arrays["names"]))},
        "nan": {"distances": np.full_like(arrays["distances"], np.nan)},
    }[name]
    np.savez(path, **arrays)


@pytest.mark.parametrize("name", ["shapes", "type", "objects", "characters", "empty", "labels", "surrogates", "nan"])
def test_an_odd_gallery(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, train_line(1))
    save_gallery(tmp_path, _gallery())
    break_gallery(tmp_path / "gallery.npz", name)
    code = run_cli(["report", str(tmp_path)])
    assert code == (0 if name in ("labels", "surrogates", "nan") else 2)
    assert code == 0 or f"{tmp_path}/gallery.npz is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["a: [1", "a: &a [*a]", "a: 1\na: 2", "!!python/object/apply:os.system [x]", "\x00", "[" * 5000])
def test_an_odd_configuration(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, train_line(1))
    (tmp_path / "config.yaml").write_text(content)
    assert run_cli(["report", str(tmp_path)]) == 2
    assert re.search(rf"error: {tmp_path}/config.yaml.*; delete it, `dnc-dist report` works without\n", capsys.readouterr().err)


def test_metrics_that_are_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert run_cli(["report", str(tmp_path)]) == 2
    assert "is no regular file" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").rmdir()
    write_metrics(tmp_path, "junk", "junk")
    assert run_cli(["report", str(tmp_path)]) == 2
    assert "has no line yet (2 lines are none of a run)" in capsys.readouterr().err


def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_metrics(tmp_path, train_line(1))
    (tmp_path / "report.html").mkdir()
    assert run_cli(["report", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "report.html: Is a directory; check the path" in err and "Traceback" not in err


def _report_in_little_memory(run_dir: str) -> float:
    import resource

    assert run_cli(["report", run_dir]) == 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.slow
def test_two_million_lines_in_less_than_a_gigabyte(tmp_path: Path) -> None:
    values = ", ".join(f'"name{number}": 0.{number}' for number in range(15))
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(2_000_000):
            file.write(f'{{"step": {step}, "epoch": {step // 10_000}, "kind": "train", "loss": 0.5, {values}}}\n')
    (peak,) = spawn(_report_in_little_memory, 1, str(tmp_path), timeout=600)
    assert peak < 1000
