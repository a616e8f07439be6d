"""Whole runs as a user starts them: characters on two processes with everything that is left of it, and every way to train on one."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dnc_dist import __version__
from dnc_dist.rundir.diagnosis import load_diagnosis
from tests.run_fixtures import (
    Done,
    divisions,
    dnc,
    draw_folder,
    glyphs_on_two_processes,
    make_dataset,
    metrics,
    without_report,
    write_config,
)
from tests.wandb_records import read_finished_run


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done, Done]:
    return glyphs_on_two_processes(tmp_path_factory)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset."""
    folder = tmp_path_factory.mktemp("ways")
    make_dataset(folder)
    return folder


def test_characters_are_prepared(launched: tuple[Path, Done, Done]) -> None:
    place, prepared, _ = launched
    assert prepared.code == 0 and "60 characters" in prepared.out and "written to glyphs" in prepared.out
    again = dnc("data", "prepare", "glyphs", "--classes", "60", "--image-size", "16", "--out", "glyphs", folder=place)
    assert again.code == 0 and "nothing to do" in again.out
    inspected = dnc("data", "inspect", "glyphs", "--out", "sheet.png", folder=place)
    assert inspected.code == 0 and (place / "sheet.png").stat().st_size > 1000


def test_a_launch_leaves_a_complete_run(launched: tuple[Path, Done, Done]) -> None:
    place, _, done = launched
    run = place / "runs" / "run"
    result = done.result
    assert {"run", "epoch", "samples_seen", "recall@1", "map@r", "nmi", "protocol", "selected_on"} <= result.keys()
    assert result["run"] == "runs/run" and result["epoch"] == 4 and result["selected_on"] == "last"
    assert result["protocol"] == "leave-one-out" and result["recall@1"] > result["untrained_recall@1"]
    assert "2 process(es), ZeRO 1" in done.out and "report: runs/run/report.html" in done.out
    assert "Warning" not in done.err and "Traceback" not in done.err
    assert "WARNING" not in done.out + done.err  # as DeepSpeed's log has it
    assert all(f"epoch {epoch}: 8/8 steps" in done.err for epoch in range(4))

    assert {"config.yaml", "metrics.jsonl", "checkpoints", "divisions", "report.html", "wandb", "log.txt"} <= {
        path.name for path in run.iterdir()
    }
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["division"]["num_learners"] == 4 and resolved["run"] == {"dir": str(place / "runs"), "name": "run", "seed": 0}
    shown = read_finished_run(run)
    assert len(shown.files) == 1 and shown.kinds() == [(line["kind"], line["step"]) for line in metrics(run)]
    assert sum("learners/masks" in row for row in shown.rows) == sum("mistakes/confusions" in row for row in shown.rows) == 1
    assert "rank 0: epoch 3: 4 learner(s)" in (run / "log.txt").read_text()
    page = (run / "report.html").read_text()
    assert "<svg" in page or "data:image/png" in page
    assert 'src="http' not in page and "<link" not in page
    assert "Why it errs" in page and "Map of the embedding" in page
    found = load_diagnosis(run)
    assert found is not None and found.num_learners == 4 and 1 - found.counts[1] / found.counts[0] == pytest.approx(result["recall@1"])
    # Rank 1 holds its own part of the optimizer state.
    latest = (run / "checkpoints" / "latest").read_text()
    assert len(list((run / "checkpoints" / latest).glob("zero_pp_rank_*_optim_states.pt"))) == 2


def test_what_was_logged(launched: tuple[Path, Done, Done]) -> None:
    place, _, done = launched
    run = place / "runs" / "run"
    steps = metrics(run, "train")
    assert [line["step"] for line in steps] == list(range(1, 33))
    assert {"loss", "active_pairs", "anchors_without_negatives", "images_per_second", "share_data", "lr"} <= steps[0].keys()
    assert {"mask_orthogonality", "mask_sparsity"} <= steps[16].keys() and steps[16]["mask_orthogonality"] > 0
    made = metrics(run, "division")
    assert [line["num_learners"] for line in made] == [1, 2, 4, 4] and [line["epoch"] for line in made] == [0, 1, 2, 3]
    assert all({"matched_share", "nmi_to_previous", "left_out", "rejoined"} <= line.keys() for line in made)
    for line, division in zip(made, divisions(run).values(), strict=True):
        learner_of = np.array(division["learner_of"])
        assert np.bincount(learner_of[learner_of >= 0], minlength=line["num_learners"]).tolist() == line["sizes"]
        assert (learner_of < 0).sum() == line["left_out"]
    # A learner a step, and in the conquer phase one loss for the whole embedding.
    learners = [{int(name.split("/")[1]) for name in line if name.startswith("learner_loss/")} for line in steps]
    assert all(len(found) == 1 for found in learners) and set().union(*learners[16:24]) == {0, 1, 2, 3}
    assert set().union(*learners[24:]) == {0} and all(line["lr/masks"] == 0 for line in steps[24:])
    evaluations = metrics(run, "evaluation")
    assert [line["epoch"] for line in evaluations] == [0, 1, 2, 3, 4]
    assert all("nmi" not in line for line in evaluations[:-1]) and evaluations[-1]["nmi"] == done.result["nmi"]
    ends = metrics(run, "epoch")
    assert [line["samples_seen"] for line in ends][-1] == done.result["samples_seen"]
    assert all({"share_divide", "share_evaluate", "share_data", "memory_mb", "undecodable_images"} <= line.keys() for line in ends)


def test_evaluate_on_other_data(launched: tuple[Path, Done, Done], place: Path) -> None:
    folder, _, _ = launched
    found = json.loads(dnc("evaluate", "runs/run", place / "data", "--json", folder=folder).out)
    # Eight test classes of six images, which the run never saw; it was trained on another number of classes.
    assert (found["num_queries"], found["card"]["num_classes"]) == (48, 8)
    assert found["card"]["data_hash"] == json.loads((place / "data/manifest.json").read_text())["content_hash"]
    assert found["card"]["checkpoint"] == f"step-{32:08d}"
    (folder / "folder.csv").mkdir()
    for arguments, message in (
        (["--per-query", "q.parquet"], "the table is written as CSV"),
        (["--per-query", "nowhere/q.csv"], "nowhere is no folder"),
        (["--per-query", "folder.csv"], "folder.csv is a folder"),
    ):
        assert message in dnc("evaluate", "runs/run", *arguments, folder=folder).error


def test_evaluate_and_report_find_what_the_run_found(launched: tuple[Path, Done, Done]) -> None:
    place, _, done = launched
    found = dnc("evaluate", "runs/run", "--per-query", "one.csv", "--json", folder=place)
    assert found.code == 0 and len(found.out.splitlines()) == 1
    values = json.loads(found.out)
    assert {name: values[name] for name in ("recall@1", "map@r", "nmi")} == {
        name: done.result[name] for name in ("recall@1", "map@r", "nmi")
    }
    # Two processes trained and measured, one measures again: the same numbers stand on the same things.
    lines = metrics(place / "runs/run", "evaluation")
    card = values["card"]
    assert card == lines[-1]["card"]
    assert {"protocol", "num_queries", "num_gallery", "queries_left_out", "checkpoint", "epoch", "selected_on"} <= card.keys()
    assert all(card[name] == values[name] for name in values.keys() & card.keys())
    manifest = json.loads((place / "glyphs/manifest.json").read_text())
    assert (card["data_hash"], card["split"]) == (manifest["content_hash"], "test")
    assert (card["num_queries"], card["num_classes"]) == (manifest["splits"]["test"]["rows"], manifest["splits"]["test"]["classes"])
    assert (card["dimension"], card["seed"], card["parameters"]) == (16, 0, {"recall_at": [1, 2]})
    assert (card["epoch"], card["selected_on"], card["version"]) == (4, "last", __version__) and (
        place / "runs/run/checkpoints" / card["checkpoint"]
    ).is_dir()
    assert lines[0]["card"] == card | {"epoch": 0, "checkpoint": None}
    # Two processes measure: the same digits, and the same table of queries.
    two = dnc("evaluate", "runs/run", "--nproc", "2", "--per-query", "two.csv", "--json", folder=place)
    assert two.code == 0 and json.loads(two.out) == values
    assert (place / "one.csv").read_bytes() == (place / "two.csv").read_bytes()
    with (place / "one.csv").open(newline="") as file:
        queries = list(csv.DictReader(file))
    assert len(queries) == card["num_queries"] and len({query["key"] for query in queries}) == len(queries)
    assert np.mean([query["rank"] == "1" for query in queries]) == pytest.approx(values["recall@1"], abs=1e-12)
    assert all((query["rank"] == "1") == (query["class"] == query["nearest_class"]) for query in queries)
    # Each is written to six decimals.
    assert np.mean([float(query["ap"]) for query in queries]) == pytest.approx(values["map@r"], abs=1e-6)
    assert all(query["key"] != query["nearest_key"] and -1 <= float(query["similarity"]) <= 1 for query in queries)
    compared = json.loads(dnc("compare", "runs/run", "--json", folder=place).out)
    assert compared["groups"][0]["metrics"]["recall@1"] == {"mean": done.result["recall@1"], "std": None, "n": 1}
    assert compared["groups"][0]["runs"][0]["finished"] and compared["groups"][0]["runs"][0]["card"] == card
    page = place / "runs" / "run" / "report.html"
    page.unlink()
    written = dnc("report", "runs/run", folder=place)
    assert (written.code, written.out) == (0, "runs/run/report.html\n") and page.stat().st_size > 10_000


def run_of(place: Path, name: str, *, epochs: int = 3, **sections: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """A short training of the dataset in ``place`` on one process: its directory and its RESULT."""
    defaults: dict[str, dict[str, Any]] = {"schedule": {"epochs": epochs}, "division": {"conquer_from": None}}
    write_config(place, place / "data", name, **(defaults | sections))
    return place / "runs" / name, dnc("train", f"{name}.yaml", folder=place, before=without_report).result


def levels(run: Path) -> list[int]:
    return [line["num_learners"] for line in metrics(run, "division")]


def test_an_open_metric_learning_table_trains(tmp_path: Path) -> None:
    pictures = draw_folder(tmp_path / "pictures", {f"a{n}": 4 for n in range(6)}, {f"b{n}": 4 for n in range(3)})
    with (pictures / "df.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["label", "path", "split", "is_query", "is_gallery", "category"])
        for path in sorted(pictures.glob("*/*/*.png")):
            split, name = path.parts[-3], path.parts[-2]
            first = path.stem == "0"
            roles = ["", ""] if split == "train" else [str(first), str(not first)]
            table.writerow(
                [int(name[1:]) + 10 * (name[0] == "b"), path.relative_to(pictures), split.replace("test", "validation"), *roles, "x"]
            )
    assert dnc("data", "prepare", "csv", "--root", "pictures/df.csv", "--out", "data", folder=tmp_path).code == 0
    run, result = run_of(tmp_path, "oml", epochs=1, division={"num_learners": 1, "conquer_from": None})
    assert result["protocol"] == "query-gallery" and result["samples_seen"] > 0
    line = metrics(run, "evaluation")[-1]
    assert (line["num_queries"], line["num_gallery"]) == (3, 9)


def test_proxy_anchor_trains(place: Path) -> None:
    run, result = run_of(place, "proxy", loss={"name": "proxy_anchor"}, optim={"lr": 0.003, "loss_lr_mult": 100})
    losses = [line["loss"] for line in metrics(run, "train")]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) and result["recall@1"] > 0.9
    assert levels(run) == [1, 2, 4]


def test_flat_division_with_sliced_masks(place: Path) -> None:
    run, result = run_of(
        place, "sliced", epochs=4, model={"masks": "sliced"}, division={"mode": "flat", "num_learners": 2, "conquer_from": 3}
    )
    assert levels(run) == [2, 2, 2, 2] and result["recall@1"] > 0.9
    assert all("learner_loss/1" not in line for line in metrics(run, "train")[-8:])


@pytest.mark.parametrize("start", ["previous", "k-means++"])
def test_where_k_means_starts(start: str, place: Path) -> None:
    run, _ = run_of(place, f"start-{start[0]}", division={"num_learners": 2, "start": start, "conquer_from": None})
    assert levels(run) == [1, 2, 2]
    assert metrics(run, "division")[2]["trials"] == 1 and metrics(run, "division")[2]["matched_share"] > 0.5


def test_two_learners_share_a_step(place: Path) -> None:
    run, _ = run_of(place, "shared", division={"learners_per_step": 2, "conquer_from": None})
    learners = [sum(name.startswith("learner_loss/") for name in line) for line in metrics(run, "train")]
    assert learners[:8] == [1] * 8 and learners[8:] == [2] * 16


@pytest.mark.parametrize(("batches", "expected"), [("clustered", [1, 2, 2, 2]), ("whole", [1, 2, 1])])
def test_conquer_batches(batches: str, expected: list[int], place: Path) -> None:
    run, _ = run_of(place, f"conquer-{batches}", epochs=4, division={"num_learners": 2, "conquer_from": 2, "conquer_batches": batches})
    assert levels(run) == expected
    steps = metrics(run, "train")
    assert all(line["lr/masks"] == 0 and "mask_orthogonality" not in line for line in steps if line["epoch"] >= 2)
    assert all(line["lr/masks"] > 0 for line in steps if line["epoch"] < 2)


def test_length_of_an_epoch(place: Path) -> None:
    lengths = {}
    for length in ("dataset", "over"):
        run, _ = run_of(
            place, length, epochs=2, schedule={"epochs": 2, "epoch_length": length}, division={"num_learners": 2, "conquer_from": None}
        )
        lengths[length] = sum(line["epoch"] == 1 for line in metrics(run, "train"))
        sizes = metrics(run, "division")[1]["sizes"]
    assert sizes[0] != sizes[1] and lengths["dataset"] < lengths["over"]


def test_a_frozen_backbone_stays_as_it_is(place: Path) -> None:
    run, _ = run_of(
        place,
        "frozen",
        epochs=2,
        division={"num_learners": 1, "every": 2, "backbone_frozen_epochs": 1, "conquer_from": None},
        checkpoint={"keep": 9, "every_steps": 4},
    )
    weights = [
        torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)["module"]
        for folder in sorted((run / "checkpoints").glob("step-*"))
    ]
    moved = [
        [
            any(
                not torch.equal(before[name], after[name])
                for name in before
                if name.startswith(part) and "running" not in name and "num_" not in name
            )
            for part in ("backbone.", "head.")
        ]
        for before, after in pairwise(weights)
    ]
    assert moved == [[False, True], [True, True], [True, True]]
