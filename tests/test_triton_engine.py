"""Training on the Triton kernels: one and two processes take the steps of the reference, and a run says what it runs on."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dnc_dist.doctor import parity
from dnc_dist.doctor.harness import errors_of
from dnc_dist.processes import distributed
from tests.engine_fixtures import config, kept, make_dataset
from tests.rounding import share_of_course
from tests.run_fixtures import divisions, dnc, metrics, on_a_smooth_network, without_report, write_config
from tests.run_fixtures import make_dataset as make_run_dataset
from tests.spawn import spawn
from tests.test_engine_parity import CASES, case_outcome

NAMES = [
    "margin, beta per class; global batch norm; 2 of 4 learners",
    "margin, scalar beta; frozen batch norm; conquer, clustered",
    "margin; 3 rows",
    "margin; sliced masks",
    "margin; no active pair",
    "margin; published sampling",
]
WORLDS = (1, 2)


def _steps(root: str, place: str, kernels: str) -> dict[str, dict[str, float]]:
    """Errors of every step in fp32 relative to the reference in float64, which it leaves at ``place`` (on rank 0)."""
    os.environ["DNC_KERNELS"] = kernels
    errors: dict[str, Any] = {}
    for number, name in enumerate(NAMES):
        cfg = config(Path(root), Path(place) / "run", **CASES[name].changes)
        if kernels == "reference":
            torch.save(tuple(case_outcome(CASES[name], cfg, torch.float64)), f"{place}/{number}.pt")
        found = case_outcome(CASES[name], cfg, torch.float32)
        if distributed.is_main():
            errors[name] = errors_of(found, kept(Path(place) / f"{number}.pt"))
    return errors


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[str, float]]]:
    """By number of processes those of Triton; 0: those of the reference."""
    place = tmp_path_factory.mktemp("triton")
    root = str(make_dataset(place / "dataset"))
    (reference,) = spawn(_steps, 1, root, str(place), "reference")
    return {0: reference} | {world: spawn(_steps, world, root, str(place), "triton")[0] for world in WORLDS}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", WORLDS)
def test_a_step_equals_that_of_the_reference(errors: dict[int, dict[str, dict[str, float]]], world: int, name: str) -> None:
    allowed = parity.limit(max(errors[0][name].values()))
    assert {key: error for key, error in errors[world][name].items() if not error < allowed} == {}


@pytest.mark.slow
def test_a_run_says_which_kernels_it_uses_and_learns_the_same(tmp_path: Path) -> None:
    root = make_run_dataset(tmp_path, classes=8)
    losses = {}
    for kernels, backend in (("reference", "faiss"), ("triton", "triton")):
        division = {"conquer_from": None, "num_learners": 2, "kmeans_backend": backend}
        write_config(tmp_path, root, kernels, schedule={"epochs": 2}, division=division)
        before = partial(on_a_smooth_network, without_report)
        done = dnc("train", f"{kernels}.yaml", folder=tmp_path, env={"DNC_KERNELS": kernels}, before=before)
        assert done.code == 0, done.err
        said = done.out + done.err
        assert said.count(f"dnc_kernels: {kernels} implementation") == said.count(f"k-means by {backend}") == 1
        losses[kernels] = [line["loss"] for line in metrics(tmp_path / "runs" / kernels, "train")]
    done = dnc("train", "reference.yaml", "--set", "run.name=neighbour", folder=tmp_path, before=partial(before, neighbour=True))
    assert done.code == 0, done.err
    neighbour = [line["loss"] for line in metrics(tmp_path / "runs" / "neighbour", "train")]
    learners = [[made["learner_of"] for made in divisions(tmp_path / "runs" / name).values()] for name in (*losses, "neighbour")]
    assert learners[0] == learners[1] or learners[0] != learners[2]
    assert max(learners[0][-1]) == 1
    assert len(losses["triton"]) == 8 and share_of_course(losses["triton"], losses["reference"], neighbour) < 1


def test_kernels_that_cannot_run_here_are_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton runs on this machine")
    write_config(tmp_path, make_run_dataset(tmp_path, classes=4))
    done = dnc("train", "run.yaml", folder=tmp_path, env={"DNC_KERNELS": "triton", "TRITON_INTERPRET": "0"})
    assert "DNC_KERNELS=triton cannot run on cpu" in done.error
    done = dnc("train", "run.yaml", "--set", "division.kmeans_backend=triton", folder=tmp_path)
    assert "division.kmeans_backend=triton does not run on device cpu" in done.error and not (tmp_path / "runs").exists()
