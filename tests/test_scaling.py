"""The model of scaling: its arithmetic against hand-made tables, its bytes against counted ones, and the command."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist

from benchmarks.engine_step import EngineStep
from benchmarks.scaling import predict, read_measured, read_network, show
from benchmarks.scaling_check import fit_network
from benchmarks.scaling_measure import workload
from benchmarks.scaling_model import (
    Measured,
    Network,
    StepTimes,
    Workload,
    division_bytes,
    evaluation_bytes,
    expected_slowest,
    gradient_bytes,
    lloyd_bytes,
    messages,
    step,
    step_bytes,
)
from dnc_dist.clustering import DivisionRules, KMeansOptions, divide, spread_features
from dnc_dist.clustering.centroids import SAMPLE_ROWS_PER_CENTROID
from dnc_dist.clustering.sums import EXPONENTS
from dnc_dist.config import parse_tree
from dnc_dist.engine.dataset import RunData
from dnc_dist.engine.plan import Phase
from dnc_dist.engine.setup import build_objective
from dnc_dist.processes import distributed
from dnc_dist.retrieval import evaluate
from tests.engine_fixtures import config, division_by_hand, make_dataset
from tests.spawn import spawn

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


class Counted(NamedTuple):
    """Bytes that one rank received."""

    steps: dict[tuple[str, int], dict[str, int]]
    division: dict[str, int]
    evaluation: dict[str, int]
    zero: dict[int, dict[str, float]]
    messages: dict[int, dict[str, int]]


DIM, LEARNERS, ROWS, FEATURES = 16, 2, 4000, 8
QUERIES, GALLERY, PER_CLASS = 400, 1600, 20


def _difference(call: Any) -> dict[str, int]:
    before = distributed.traffic()
    call()
    after = distributed.traffic()
    return {kind: after[kind] - before[kind] for kind in before}


def _cfg(root: str, loss: str = "margin", together: int = 1, zero: int = 1) -> Any:
    return config(
        Path(root),
        Path("/nowhere/run"),
        loss={"name": loss},
        model={"batch_norm": "frozen"},
        division={"num_learners": LEARNERS, "learners_per_step": together},
        engine={"zero": zero},
    )


def _one_step(root: str, loss: str, together: int) -> dict[str, int]:
    cfg = _cfg(root, loss, together)
    data = RunData(cfg)
    group = distributed.rank_groups(together).get(together)
    schedule = data.schedule(division_by_hand(data.train.labels, LEARNERS), 0, conquer=False)
    batch = next(data.train_batches(schedule, first_step=0, skip=0, group=group))
    # The bound of this step, which is balanced; that of the epoch counts steps that are filled up.
    batch = batch._replace(max_positives=2)
    objective = build_objective(cfg, data.train.num_classes).train()
    return _difference(lambda: objective(batch, Phase(0, LEARNERS, False, False))[0].backward())


def _divide() -> None:
    """A flat division, and the gather of who could be decoded that comes before it."""
    start, stop = distributed.local_range(ROWS)
    centres = np.random.default_rng(1).standard_normal((LEARNERS, FEATURES))
    features = centres[np.arange(ROWS) % LEARNERS] + 0.01 * np.random.default_rng(0).standard_normal((ROWS, FEATURES))
    distributed.gather_rows(torch.ones(stop - start, dtype=torch.bool))
    labels = np.arange(ROWS) % (10 * LEARNERS)
    spread = spread_features(torch.from_numpy(features[start:stop]).float(), start, ROWS, replicated_rows=0)
    divide(spread, labels, DivisionRules(LEARNERS, mode="flat", kmeans=KMeansOptions(1)), epoch=0)


def _evaluate() -> None:
    total = QUERIES + GALLERY
    labels, asks = np.arange(total) // 25, np.arange(total) % 5 == 0
    start, stop = distributed.local_range(total)
    x = torch.randn(total, DIM, generator=torch.Generator().manual_seed(0))[start:stop]
    evaluate(x, torch.arange(start, stop), labels, asks, ~asks, protocol="query-gallery", sample=0)


def _deepspeed(root: str) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, int]]]:
    """By ZeRO stage: trainable parameters and their groups, and the bytes that a rank receives in a ring for what one step hands to
    collectives; how many collectives a step has, in the forward pass and after it."""
    counted, world = {"gradients": 0.0, "parameters": 0.0}, distributed.world_size()
    calls: Counter[str] = Counter()
    all_reduce, all_gather, gather_of_loss = dist.all_reduce, dist.all_gather_into_tensor, distributed._all_gather_single

    def count_reduce(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted["gradients"] += 2 * (world - 1) / world * tensor.nbytes
        calls["reduce"] += 1
        return all_reduce(tensor, *args, **kwargs)

    def count_gather(output_tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counted["parameters"] += (world - 1) / world * output_tensor.nbytes
        calls["gather"] += 1
        return all_gather(output_tensor, *args, **kwargs)

    def count_gather_of_loss(*args: Any, **kwargs: Any) -> Any:
        calls["gather"] += 1
        return gather_of_loss(*args, **kwargs)

    # DeepSpeed takes them from here when its first engine is made, in a process that ends soon.
    dist.all_reduce, dist.all_gather_into_tensor, distributed._all_gather_single = count_reduce, count_gather, count_gather_of_loss
    sizes: dict[int, dict[str, float]] = {}
    sent: dict[int, dict[str, int]] = {}
    for zero in (0, 1, 2):
        cfg = _cfg(root, zero=zero)
        data = RunData(cfg)
        schedule = data.schedule(division_by_hand(data.train.labels, LEARNERS), 0, conquer=False)
        whole = EngineStep(cfg, data.train.num_classes, lr=1e-3)
        batch = next(data.train_batches(schedule, first_step=0, skip=0))
        calls.clear()
        # The bound of this step, which is balanced; that of the epoch counts steps that are filled up.
        loss = whole.forward(batch._replace(max_positives=2), 0)
        sent[zero] = {"gathers": calls["gather"], "stats": calls["reduce"]}
        counted.update(gradients=0.0, parameters=0.0)
        calls.clear()
        whole.engine.backward(loss)
        whole.update()
        sent[zero] |= {"gradients and norms": calls["reduce"], "parameters": calls["gather"]}
        groups = whole.engine.optimizer.param_groups
        size = sum(parameter.numel() for parameter in whole.objective.parameters() if parameter.requires_grad)
        sizes[zero] = counted | {"size": size, "groups": len(groups)}
    return sizes, sent


def _count(root: str) -> Counted:
    steps = {(loss, m): _one_step(root, loss, m) for loss in ("margin", "proxy_anchor") for m in (1, 2)}
    zero, sent = _deepspeed(root) if distributed.world_size() == 2 else ({}, {})
    return Counted(steps, _difference(_divide), _difference(_evaluate), zero, sent)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_dataset(tmp_path_factory.mktemp("scaling")))


@pytest.fixture(scope="module", params=[2, 4])
def counted(request: pytest.FixtureRequest, root: str) -> list[Counted]:
    return spawn(_count, request.param, root)


def test_the_bytes_of_a_step_are_those_that_are_counted(counted: list[Counted]) -> None:
    world = len(counted)
    for rank in counted:
        for (loss, together), found in rank.steps.items():
            work = Workload(dim=DIM, learners=LEARNERS, samples_per_class=3, loss=loss, learners_per_step=together)
            assert found == step_bytes(work, world, 24 // world), (loss, together)


def test_the_bytes_of_a_division_are_those_that_are_counted(counted: list[Counted]) -> None:
    world = len(counted)
    sample = SAMPLE_ROWS_PER_CENTROID * LEARNERS
    sizes = division_bytes(Workload(images=ROWS, learners=LEARNERS), FEATURES) | {"sample": sample * (4 * FEATURES + 8), "ids": 2 * ROWS}
    # Two Lloyd steps (the last one finds that no row moves or that it may not go on), the means at the end, and a few numbers; before
    # k-means, means and objective the ranks agree on a power of two.
    sums = 2 * lloyd_bytes(LEARNERS, FEATURES) + 8 * LEARNERS * FEATURES + 3 * 8 * EXPONENTS
    # A row is in the sample by chance: six standard deviations of their number.
    chance = 6 * sample**0.5 * (4 * FEATURES + 8)
    for rank in counted:
        # Beside them the ranks tell each other in a few numbers whether their features can be used.
        assert abs(rank.division["gather"] - (world - 1) * (sizes["sample"] + sizes["ids"]) // world) < 100 + chance
        assert 0 <= rank.division["reduce"] - 2 * (world - 1) * sums // world < 500


def test_the_bytes_of_an_evaluation_are_those_that_are_counted(counted: list[Counted]) -> None:
    world = len(counted)
    sizes = evaluation_bytes(Workload(queries=QUERIES, gallery=GALLERY, dim=DIM, relevant=PER_CLASS))
    for rank in counted:
        gathered = sizes["queries"] + sizes["found"] + sizes["values"]
        assert 0 <= rank.evaluation["gather"] - (world - 1) * gathered // world < 500
        assert 0 <= rank.evaluation["reduce"] - 2 * (world - 1) * sizes["presence"] // world < 1000


@pytest.mark.parametrize("counted", [2], indirect=True)
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_the_bytes_of_deepspeed_are_those_that_it_hands_to_collectives(counted: list[Counted], zero: int) -> None:
    for rank in counted:
        found = dict(rank.zero[zero])
        groups = int(found.pop("groups"))
        expected = gradient_bytes(Workload(zero=zero), int(found.pop("size")), 2)
        assert found == pytest.approx(expected, rel=0.01, abs=100)
        sent = messages(Workload(zero=zero), groups)
        sent["gradients and norms"] = sent.pop("gradients") + sent.pop("norms")
        assert rank.messages[zero] == sent


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
