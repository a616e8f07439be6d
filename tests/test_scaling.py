"""The model of scaling: its arithmetic against hand-made tables, and the command."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.scaling import predict, read_measured, read_network, show
from benchmarks.scaling_check import fit_network
from benchmarks.scaling_measure import workload
from benchmarks.scaling_model import (
    Measured,
    Network,
    StepTimes,
    Workload,
    division_bytes,
    expected_slowest,
    lloyd_bytes,
    step,
    step_bytes,
)
from dnc_dist.config import parse_tree

ROOT = Path(__file__).resolve().parent.parent
MICRO = 1e-6
STEP = StepTimes(
    parameters=25_000_000,
    groups=4,
    steps=[(32, 0.027), (128, 0.087)],
    loss=[(128, 128 * times, 0.4e-3 + 1e-10 * 128 * 128 * times) for times in (1, 4, 16)],
    optimizer=1e-3,
    engine=2e-3,
    engine_update=1e-3,
    jitter=[0.98, 1.0, 1.0, 1.1],
)
GPU = Measured(
    device="an invented GPU",
    features=2048,
    step=STEP,
    images_per_second=4000,
    decoded_per_second=400,
    lloyd_row=2e-9,
    first_centroids=4.0,
    bookkeeping_row=3e-7,
    search_pair=1e-9,
)


@pytest.mark.parametrize(
    ("k", "dim", "microseconds"),
    [
        (4, 512, (12, 42, 62, 82)),
        (32, 512, (12, 43, 63, 83)),
        (32, 2048, (13, 44, 64, 84)),
        (1000, 512, (20, 60, 81, 101)),
        (1000, 2048, (44, 114, 138, 159)),
    ],
)
def test_sums_take_what_the_communication_model_says(k: int, dim: int, microseconds: tuple[int, ...]) -> None:
    size = 4 * k * dim + 8 * k + 8  # float32 sums, as the model's table has them; ours are float64
    assert [Network().all_reduce(size, ranks) / MICRO for ranks in (8, 64, 256, 1024)] == pytest.approx(microseconds, abs=0.7)


@pytest.mark.parametrize(
    ("ranks", "rows", "microseconds"),
    [(8, 128, 8), (64, 128, 41), (256, 128, 120), (1024, 128, 410), (64, 1024, 180), (1024, 1024, 3000)],
)
def test_gathers_take_what_the_communication_model_says(ranks: int, rows: int, microseconds: float) -> None:
    total = ranks * rows * 2 * 512  # bfloat16; ours is float32
    assert Network().all_gather(total, ranks) / MICRO == pytest.approx(microseconds, rel=0.03)
    if (ranks, rows) == (1024, 128):
        assert Network(ring=True, ring_hop_latency=0).all_gather(total, ranks) == pytest.approx(3.0e-3, rel=0.02)


def test_an_iteration_sums_66_kilobytes_in_float32_and_twice_that_in_float64() -> None:
    assert lloyd_bytes(32, 512) == 8 * (32 * 512 + 32 + 2) == pytest.approx(2 * 66e3, rel=0.01)
    few, many = (division_bytes(Workload(images=images), 512) for images in (10**6, 10**8))
    assert few["iteration"] == many["iteration"] and few["sample"] == many["sample"]
    assert many["ids"] == 100 * few["ids"]
    replicated = division_bytes(Workload(images=100_000), 512)
    assert replicated["features"] == 100_000 * 4 * 512 and replicated["iteration"] == 0


def test_a_learner_is_gathered_in_its_group() -> None:
    whole, group = (step_bytes(Workload(learners_per_step=m), 64, 128)["gather"] for m in (1, 32))
    assert whole == 63 * group
    # Ranks that cannot be divided among the learners gather everything.
    assert step_bytes(Workload(learners_per_step=3), 64, 128)["gather"] == whole


def test_more_ranks_never_make_a_rank_more_efficient_and_one_alone_sends_nothing() -> None:
    # The step of the optimizer is divided among ranks, which makes many more efficient than one.
    for prediction in predict(Workload(), replace(GPU, step=replace(STEP, optimizer=0.0), decoded_per_second=1000), Network()):
        efficiency = [prediction.efficiency(ranks) for ranks in prediction.seconds]
        assert efficiency[0] == 1 and (np.diff(efficiency) <= 1e-9).all(), prediction.name
    alone = step(Workload(), GPU, Network(), 1, 128)
    assert all(alone[phase] == 0 for phase in ("engine", "gathers", "stats", "gradients", "stragglers", "input"))
    assert sum(alone.values()) == pytest.approx(0.087, rel=1e-6)  # as measured


def test_a_better_network_never_takes_longer() -> None:
    slow, fast = Network(), Network(nic=90e9, nvlink=900e9, hop_latency=5e-6, node_latency=6e-6, storage=None)
    for before, after in zip(predict(Workload(), GPU, slow), predict(Workload(), GPU, fast), strict=True):
        assert all(sum(after.seconds[w].values()) <= sum(before.seconds[w].values()) for w in before.seconds)


@pytest.mark.parametrize(
    ("phase", "measured", "network"),
    [
        ("input", replace(GPU, decoded_per_second=50), Network(storage=None)),
        ("input", GPU, Network(storage=1e9)),
        ("gathers", GPU, Network(nic=1e8, storage=None)),
        ("gradients", replace(GPU, step=replace(STEP, parameters=2 * 10**9, optimizer=0)), Network(storage=None)),
        (
            "loss",
            replace(GPU, step=replace(STEP, loss=[(128, 128 * times, 1e-6 * 128 * times) for times in (1, 4, 16)])),
            Network(storage=None),
        ),
    ],
)
def test_the_first_bottleneck_is_named(phase: str, measured: Measured, network: Network) -> None:
    work = Workload(zero=0 if phase == "gradients" else 1, dim=4096 if phase == "gathers" else 512)
    measured = replace(measured, step=replace(STEP, parameters=1000)) if phase == "gathers" else measured
    first = predict(work, measured, network)[0].first()
    assert first is not None and first[1] == phase and first[2] >= 0.1


def test_what_the_phases_lose_is_the_efficiency_that_is_missing() -> None:
    for prediction in predict(Workload(), GPU, Network()):
        for ranks, phases in prediction.seconds.items():
            missing = 1 - prediction.efficiency(ranks)
            name, lost = prediction.bottleneck(ranks)
            assert missing / len(phases) - 1e-12 <= lost <= phases[name] / sum(phases.values())
    strong = predict(Workload(), GPU, Network())[1].first()
    assert strong is not None and strong[1] == "launches"  # on few rows, what does not depend on them


def test_a_step_takes_what_was_measured_also_where_a_line_does_not() -> None:
    curved = replace(STEP, steps=[(32, 0.027), (64, 0.060), (128, 0.087)])
    for rows, seconds in curved.steps:
        found = step(Workload(), replace(GPU, step=curved), Network(storage=None), 1, int(rows))
        assert sum(found[phase] for phase in ("rows", "launches", "loss", "optimizer")) == pytest.approx(seconds, rel=1e-6)
    few, many = (sum(curved.step_costs(rows)) for rows in (1, 1024))
    assert 0 < few < 0.027 and many == pytest.approx(8 * 0.087, rel=0.2)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_slowest_of_several_ranks_is_the_mean_over_all_draws(ranks: int) -> None:
    seconds = [1.3, 0.9, 1.0, 1.0, 2.0]
    every = [max(draws) for draws in itertools.product(seconds, repeat=ranks)]
    assert expected_slowest(seconds, ranks) == pytest.approx(sum(every) / len(every))


def test_ranks_wait_for_the_slowest_and_more_of_them_longer() -> None:
    waiting = [STEP.waiting(ranks) for ranks in (1, 2, 8, 10**6)]
    assert waiting[0] == 0 and waiting == sorted(waiting)
    assert waiting[-1] == pytest.approx(1.1 - sum(STEP.jitter) / 4)  # the slowest that was measured, over the mean
    found = step(Workload(), GPU, Network(), 8, 8 * 128)
    computing = sum(found[phase] for phase in ("rows", "launches", "loss", "optimizer", "engine"))
    assert found["engine"] == pytest.approx(1e-3 + 1e-3 / 8)  # what ZeRO divides, and what it does not
    assert step(Workload(zero=0), GPU, Network(), 8, 8 * 128)["engine"] == STEP.engine
    assert found["stragglers"] == pytest.approx(STEP.waiting(8) * computing)


def test_a_network_is_found_again_in_what_it_takes() -> None:
    network = Network(gpus_per_node=4, nvlink=2e9, node_latency=3e-4, storage=None)
    sizes = (1 << 10, 1 << 20, 1 << 24)
    taken = [("all-reduce", size, network.all_reduce(size, 4)) for size in sizes]
    taken += [("all-gather", size, network.all_gather(size, 4)) for size in sizes]
    found = fit_network(taken, 4)
    assert (found.nvlink, found.node_latency) == pytest.approx((2e9, 3e-4))
    assert (found.gpus_per_node, found.storage) == (4, None)


@pytest.mark.parametrize(("wanted", "gpus", "loaders"), [(3, 2, 3), (0, 2, 0), ("auto", 0, 1), ("auto", 2, 5), ("auto", 12, 1)])
def test_loaders_are_those_of_the_configuration(wanted: int | str, gpus: int, loaders: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("benchmarks.scaling_measure.usable_cores", lambda: frozenset(range(12)))
    monkeypatch.setattr("benchmarks.scaling_measure.quota", lambda: None)
    assert workload(parse_tree({"data": {"root": ".", "workers": wanted}}, "test")).loader_workers == loaders


def test_without_a_loader_the_training_process_decodes() -> None:
    inline, ahead = (step(Workload(loader_workers=n), GPU, Network(storage=None), 1, 128)["input"] for n in (0, 1))
    assert inline == pytest.approx(128 / 400) and ahead == pytest.approx(128 / 400 - 0.087)


def test_the_command_measures_and_predicts(tmp_path: Path) -> None:
    network = tmp_path / "network.yaml"
    network.write_text("{nic: 25e9, gpus_per_node: 4, storage: null}")
    command = [sys.executable, "-m", "benchmarks.scaling", "--measured", str(tmp_path / "measured.json"), "--network", str(network)]
    sizes = ["--rows", "8", "16", "--calls", "1", "--steps", "3", "--size", "512", "--images", "5000"]
    quick = ["--measure", "configs/quickstart.yaml", *sizes]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *quick, "--json"], cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)
    assert {"measured", "assumed", "counted", "modelled"} < set(answer)
    assert answer["assumed"]["network"]["nic"] == 25e9
    work = answer["assumed"]["workload"]
    assert (work["dim"], work["learners"], work["batch"], work["images"]) == (128, 4, 32, 5000)  # three from the configuration
    assert list(answer["modelled"][0]["seconds"]) == ["1", "8", "16", "32", "64", "128", "256", "512", "1024"]
    assert all(seconds >= 0 for table in answer["modelled"] for phases in table["seconds"].values() for seconds in phases.values())
    assert all(name in answer["come_from"] for table in answer["modelled"] for name in table["seconds"]["8"])
    for name in ("images_per_second", "decoded_per_second", "bookkeeping_row", "first_centroids"):
        assert answer["measured"][name] > 0, name
    assert answer["measured"]["step"]["optimizer"] > 0 and len(answer["measured"]["step"]["jitter"]) == 3
    (measured, work), assumed = read_measured(tmp_path / "measured.json"), read_network(network)
    shown = show(work, measured, assumed, predict(work, measured, assumed))
    assert "Everything below is modelled" in shown and shown.count("first bottleneck: ") == 4


@pytest.mark.slow
def test_the_check_predicts_and_then_measures(tmp_path: Path) -> None:
    out = tmp_path / "scaling.jsonl"
    command = [sys.executable, "-m", "benchmarks.scaling_check", "configs/quickstart.yaml", "--steps", "2", "--rounds", "1"]
    sizes = ["--set", "schedule.batch_size=16", "--set", "data.image_size=16", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.index("predicted, strong") < done.stdout.index("weak scaling") < done.stdout.index("strong scaling")
    line = json.loads(out.read_text())
    assert line["problem"]["rows"] == 16 and line["network"]["node_latency"] > 0
    for arm in ("weak", "strong"):
        assert sum(line["predicted"][arm].values()) > 0
        taken = line["measured"][f"ranks, {arm}"]
        assert taken["total"] > taken["collectives of the engine"] > 0 and taken["collectives of the loss"] > 0
        assert line["measured"][f"one, {arm}"]["collectives of the engine"] == 0  # one process sends nothing


def test_an_unknown_word_in_the_network_is_named(tmp_path: Path) -> None:
    path = tmp_path / "network.yaml"
    path.write_text("nics: 45e9")
    with pytest.raises(SystemExit, match=r"unknown nics; allowed are .*nic"):
        read_network(path)
