"""The benchmark commands run on tiny sizes and say what they must; the tables are made from their rows."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from bench import baselines, measure, roofline, sweep, table, turns
from bench import kmeans as kmeans_bench
from bench import margin as margin_bench
from dnc_kernels import reference

ROOT = Path(__file__).resolve().parent.parent

NOT_HERE = {
    "flash-kmeans needs a GPU",
    "flash-kmeans is not installed",
    "FAISS is not installed",
    "pytorch-metric-learning is not installed",
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """The JSON lines of both commands, which run side by side."""
    out = tmp_path_factory.mktemp("bench")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "1"}
    commands = {
        family: [sys.executable, "-m", f"bench.{family}", "--quick", "--device", "cpu", "--out", f"{out}/{family}.jsonl"]
        for family in ("margin", "kmeans")
    }
    running = {
        family: subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for family, command in commands.items()
    }
    try:
        for family, process in running.items():
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, f"{family}:\n{errors[-3000:]}"
    finally:
        for process in running.values():
            process.kill()
    return {family: [json.loads(line) for line in (out / f"{family}.jsonl").read_text().splitlines()] for family in running}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["margin", "kmeans"])
def test_every_row_ran_or_says_why_not(rows, family):
    for row in rows[family]:
        assert row["outcome"] == "ok" or row["outcome"].removeprefix("not run: ") in NOT_HERE, row
        assert row["commit"] and row["versions"]["torch"] and row["time"] and row["device"]
    assert {"ceilings", "triton", "eager", "reference"} <= {row["implementation"] for row in rows[family]}


@pytest.mark.slow
def test_margin_rows_record_time_and_error(rows):
    for row in rows["margin"][1:]:
        if row["outcome"] != "ok":
            continue
        median, low, high = row["full_ms"]
        assert 0 < low <= median <= high
        assert {"forward_ms", "backward_ms", "loss"} <= set(row) and row.get("repeatable", True)
        if row["implementation"] != "pytorch-metric-learning":
            assert max(row[f"error_{name}"] for name in ("loss", "embeddings", "masks", "beta")) < 1e-5
        if row["implementation"] == "triton":
            assert row["draws_differing"] < 0.05
        else:
            assert row["wall_ms"] > 0 and row["spread"] >= 0 and row["repeatable"]


@pytest.mark.slow
def test_kmeans_rows_agree_on_the_objective(rows):
    ran = [row for row in rows["kmeans"][1:] if row["outcome"] == "ok"]
    assert [row["objective"] for row in ran] == pytest.approx([ran[0]["objective"]] * len(ran), rel=1e-5)
    [ours] = [row for row in ran if row["implementation"] == "triton"]
    assert ours["rows_assigned_elsewhere"] < 0.01 and ours["error_sums"] < 1e-5 and ours["counts_exact"] and ours["repeatable"]


def test_the_baseline_draws_what_the_reference_draws():
    """The same positives, and negatives from the same distribution: each candidate as often as by the reference, over many draws."""
    inputs = margin_bench.Inputs(margin_bench.Case(32, 2, 16, "sliced"), torch.device("cpu"))
    z = reference.project(inputs.embeddings, inputs.learner, inputs.masks).detach()
    sampling = inputs.sampling()
    expected = torch.zeros(32, 32)
    for step in range(200):
        others = reference.sample_pairs(inputs.rows(z), sampling=replace(sampling, step=step)).other.view(32, -1)
        expected.scatter_add_(1, others[:, 3:].clamp_min(0), (others[:, 3:] >= 0).float())
    torch.manual_seed(0)
    for blocks in (1, 2):
        found = torch.zeros(32, 32)
        for _ in range(200):
            drawn, key = baselines.negatives(z, inputs.labels, inputs.learner, 3, 8.0, blocks)
            found.scatter_add_(1, drawn, (key > -torch.inf).float())
        assert torch.equal(found.sum(1), expected.sum(1))
        assert (found - expected).abs().max() < 5 * 10  # five standard deviations of a count of up to 200 draws
    known = baselines.positives(inputs.labels, inputs.learner, 3)
    assert torch.equal(known.sort(1).values, others[:, :3].sort(1).values)


def test_roofline_of_the_documented_sizes():
    """The H200 ceilings of `kernels/README.md`: 4.3 TB/s, 790 TFLOP/s, 3.35e13 instructions a second, 60 MB of cache."""
    ceilings = {"copy": 4.3e12, "matrix": 7.9e14, "scalar": 3.35e13, "cache": 6e7}
    floor = roofline.margin_step(margin_bench.Case(65536, 1, 512, "soft"), ceilings)
    assert floor["scalar_ms"] == pytest.approx(9.6, rel=0.01) and floor["matrix_ms"] == pytest.approx(16.7, rel=0.01)
    assert floor["bound"] == "matrix" and floor["total_ms"] == pytest.approx(16.7 + floor["backward_ms"], rel=0.01)
    floor = roofline.lloyd_step(10_000_000, 512, 32, "bfloat16", ceilings)
    assert floor["bound"] == "memory" and floor["total_ms"] == pytest.approx(2.38, rel=0.01)
    assert roofline.lloyd_step(10_000_000, 512, 1000, "bfloat16", ceilings)["total_ms"] == pytest.approx(13, rel=0.01)


@pytest.mark.slow
def test_tables_stand_between_their_markers(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    text = "before\n<!-- results:margin -->\nold\n<!-- results:end -->\nafter\n"
    assert "No results yet." in table.filled(text)
    for row in rows["margin"]:
        row = row | {"interpreted": False, "full_ms": [1.234, 1.0, 1.5]}
        with (tmp_path / "kernels_margin_test.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    filled = table.filled(text)
    assert filled.startswith("before\n<!-- results:margin -->\n**") and filled.endswith("<!-- results:end -->\nafter\n")
    assert "old" not in filled and "| sliced | 2 | 16 | 32 | 1.23 |" in filled
    assert table.filled(filled) == filled


def test_steps_in_turns_are_compared_turn_by_turn(tmp_path, monkeypatch, capsys):
    out = tmp_path / "kernels_turns_test.jsonl"
    monkeypatch.setattr(sys, "argv", ["bench.turns", "--quick", "--out", str(out)])
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    turns.main()
    printed = capsys.readouterr().out
    _, row = (json.loads(line) for line in out.read_text().splitlines())
    assert row["outcome"] == "ok" and row["calls"] >= measure.FEWEST
    assert row["ratio"] == pytest.approx(row["reference_ms"][0] / row["eager_ms"][0], rel=1e-4, abs=6e-4)  # rounded
    median, low, high = row["turn_ratios"]
    assert 0 < low <= median <= high
    row |= {"interpreted": False, "eager_ms": [2.0, 1.9, 2.1], "reference_ms": [2.5, 2.4, 2.6]}
    row |= {"ratio": 1.25, "turn_ratios": [1.24, 1.2, 1.3]}
    late = row | {"rows": 32, "outcome": "no time left in the budget"}
    out.write_text(f"{json.dumps(row)}\n{json.dumps(late)}\n")
    filled = table.filled("<!-- results:turns -->\n<!-- results:end -->\n")
    assert "| sliced | 2 | 16 | 32 | 2 | 2.5 | 1.25 | 1.20 to 1.30 |" in filled
    assert "| sliced | 2 | 32 | 32 |  |  | not measured |  |" in filled
    heading = next(line for line in filled.splitlines() if line.startswith("| masks"))
    assert heading in printed


def test_the_readme_shows_the_results_files():
    text = table.README.read_text(encoding="utf-8")
    assert table.filled(text) == text, "run `PYTHONPATH=kernels python -m bench.table`"


def test_a_sweep_walks_to_the_best_tile_past_those_that_fail_or_are_wrong(tmp_path, monkeypatch):
    class Tile(NamedTuple):
        rows: int
        num_stages: int

    module = ModuleType("dnc_kernels.fake")
    module.default_tile = lambda num_rows: Tile(16, 2)

    def time_phases(phases, device, seconds):
        phases["step"]()
        tile = module.default_tile(5)
        return {"full_ms": [abs(tile.rows - 64) + tile.num_stages] * 3}

    def step():
        tile = module.default_tile(5)
        if tile.rows > 64:
            raise ValueError("too large")
        return (torch.full((3,), 2.0 if tile.num_stages > 1 else 3.0),)  # one stage is fast and wrong

    args = argparse.Namespace(out=tmp_path / "rows", device="cpu", budget=60.0, quick=True, seconds=0.0)
    run = measure.Run("margin", args)
    monkeypatch.setattr(measure, "time_phases", time_phases)
    sweep.walk(module, "default_tile", step, run, {})
    lines = [json.loads(line) for line in args.out.read_text().splitlines()]
    assert lines[-1]["outcome"] == "best" and lines[-1]["tile"] == {"rows": 64, "num_stages": 2}
    outcomes = {line["outcome"] for line in lines}
    assert {"failed: ValueError: too large", "failed: ValueError: another result than with the default tile"} <= outcomes
    assert module.default_tile(5) == Tile(16, 2)


@pytest.mark.parametrize(("module", "chooser"), [*margin_bench.CHOOSERS, *kmeans_bench.CHOOSERS])
def test_the_sweeps_name_functions_that_choose_tiles(module, chooser):
    assert callable(getattr(import_module(f"dnc_kernels.{module}"), chooser))
