"""Each published benchmark in miniature, from its archive's layout to a result: prepare, two epochs on two processes, its protocol."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmark_fixtures import TREES
from tests.run_fixtures import dnc, end_ranks, metrics, start_ranks, without_report, write_config

# Protocol, queries and gallery that `auto` finds in the data: 3 test classes of 4 images, in-shop half of them queries.
EXPECTED = dict.fromkeys(TREES, ("leave-one-out", 12, 12)) | {"inshop": ("query-gallery", 6, 6)}


# The second layout of a benchmark differs in its reader only.
@pytest.mark.parametrize("layout", [pytest.param(name, marks=pytest.mark.slow if name == "cars196_devkit" else ()) for name in TREES])
def test_a_run_from_the_archive_to_its_protocol(layout: str, tmp_path: Path) -> None:
    reader, make = TREES[layout]
    make(tmp_path / "archive")
    prepared = dnc("data", "prepare", reader, "--root", "archive", "--out", "data", "--counts", "any", folder=tmp_path)
    assert prepared.code == 0, prepared
    write_config(
        tmp_path,
        Path("data"),
        division={"num_learners": 2, "conquer_from": None},
        schedule={"epochs": 2, "batch_size": 8, "samples_per_class": 2},
        evaluation={"nmi": "never"},
    )
    result = end_ranks(start_ranks(["train", "run.yaml"], tmp_path, 2, before=without_report)).result
    run = tmp_path / "runs/run"
    evaluation = metrics(run, "evaluation")[-1]
    assert (evaluation["protocol"], evaluation["num_queries"], evaluation["num_gallery"]) == EXPECTED[layout]
    assert (result["epoch"], result["protocol"]) == (2, EXPECTED[layout][0]) and 0 <= result["recall@1"] <= 1
    assert [line["num_learners"] for line in metrics(run, "division")] == [1, 2]
    # The checkpoint, on one process, is what two processes measured.
    found = json.loads(dnc("evaluate", "runs/run", "--json", folder=tmp_path).out)
    assert {name: found[name] for name in ("recall@1", "map@r")} == {name: result[name] for name in ("recall@1", "map@r")}
