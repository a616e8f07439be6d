"""A training step keeps a GPU busy: nothing in it waits for the device, and no part launches more than docs/step.md says."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dnc_dist.loss.base import StepRows
from dnc_dist.loss.whole_batch import _places_of_learners
from dnc_dist.model.batch_norm import GlobalBatchNorm2d
from dnc_dist.processes import distributed
from dnc_dist.processes.transfer import Later, to_device, to_host
from tests.engine_fixtures import config, damage, make_dataset
from tests.simulated_device import DEVICE, Device, DeviceTensor
from tests.step_counts import Asked, held, last_steps

PAGE = Path(__file__).resolve().parent.parent / "docs" / "step.md"
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "margin, one learner": (1, "triton", {"division": {"num_learners": 1}}),
    "margin, divided": (4, "triton", {}),
    "margin, conquering": (4, "triton", {"division": {"mode": "flat", "conquer_from": 0}}),
    "margin, plain torch": (4, "reference", {}),
    "margin, dropout, colours": (4, "reference", {"model": {"dropout": 0.5}, "data": {"augment": "color"}}),
    "triplet, 2 learners a step": (4, "reference", {"loss": {"name": "triplet"}, "division": {"learners_per_step": 2}}),
    "multi_similarity": (4, "reference", {"loss": {"name": "multi_similarity"}}),
    "proxy_anchor, 2 learners a step": (4, "reference", {"loss": {"name": "proxy_anchor"}, "division": {"learners_per_step": 2}}),
    "soft_triple, conquering": (4, "reference", {"loss": {"name": "soft_triple"}, "division": {"mode": "flat", "conquer_from": 0}}),
}
"""Name -> learners, kernels, changes of the configuration."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("steps"))


def run(root: Path, place: Path, name: str, simulated: Device | None) -> tuple[Asked, list[float]]:
    level, _, changes = CASES[name]
    sections = {"schedule": {"batch_size": 12, "samples_per_class": 3}, "engine": {"precision": "fp32"}, "tracker": {"log_every": 100}}
    tree = {key: sections.get(key, {}) | changes.get(key, {}) for key in {*sections, *changes}}
    return last_steps(config(root, place / "runs" / "here", **tree), level, simulated)


def limits() -> dict[str, dict[str, int]]:
    """Case -> part -> launches, from the table of the page."""
    lines = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    (parts,) = [parts for name, *parts in lines if name == "step"]
    return {name: dict(zip(parts, map(int, numbers), strict=True)) for name, *numbers in lines if name in CASES}


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing_and_launches_no_more_than_the_page_says(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("DNC_KERNELS", CASES[name][1])
    with Device() as simulated:
        found, losses = run(root, tmp_path, name, simulated)
    assert [wait for wait in found.waits if wait[0] != "log"] == []
    counts, allowed = found.by_part(), limits()[name]
    assert counts.keys() == allowed.keys()
    assert {part: count for part, count in counts.items() if count > allowed[part]} == {}
    assert counts["forward"] and counts["loss"] and counts["backward"] and counts["optimizer"]
    if CASES[name][1] == "reference":  # the same operators in the same order: the simulation computes what the CPU does
        assert losses[0] == run(root, tmp_path / "cpu", name, None)[1][0]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_images_that_cannot_be_decoded_are_not_waited_for(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNC_KERNELS", "reference")
    broken = damage(root, tmp_path / "broken", train=range(0, 72, 3))
    with Device() as simulated:
        found, _ = run(broken, tmp_path, "proxy_anchor, 2 learners a step", simulated)
    assert found.launches["forward"]["index_select"] > 0  # statistics of the decoded rows alone
    assert [wait for wait in found.waits if wait[0] != "log"] == []


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_only_to_count_the_positives_in_a_memory_a_step_waits(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNC_KERNELS", "reference")
    monkeypatch.setitem(CASES, "memory", (4, "reference", {"loss": {"name": "margin", "memory": 48}}))
    with Device() as simulated:
        found, _ = run(root, tmp_path, "memory", simulated)
    waits = [(what, where.partition(":")[0]) for part, what, where in found.waits if part != "log"]
    assert waits == [(what, "dnc_dist/loss/drawn.py") for what in ("index by a mask", "_unique2", "_local_scalar_dense")]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
def test_a_line_of_the_log_waits_a_few_times_however_much_it_shows(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DNC_KERNELS", "reference")
    with Device() as simulated:
        found, _ = run(root, tmp_path, "margin, plain torch", simulated)
    # The statistics (one copy for each of two dtypes), the gradients of all steps, the parameters.
    assert [what for part, what, _ in found.waits if part == "log"] == 3 * ["copy to the host"] + ["_local_scalar_dense"]


def test_only_several_ranks_wait_to_know_whose_rows_they_have() -> None:
    learner = torch.tensor([2, -1, 0, 2])
    with Device() as simulated:
        there, z = to_device(learner, DEVICE), torch.zeros(4, 3, device=DEVICE)
        columns = {"labels": there, "learner": there, "row_ids": there}
        rows = StepRows(z, None, **columns, num_learners=4, seed=0, step=0, rows_of_ranks=[4], learner_on_host=learner)
        known = _places_of_learners(rows, there)
        assert simulated.waits == []
        asked = _places_of_learners(StepRows(z, None, **columns, num_learners=4, seed=0, step=0, rows_of_ranks=[4]), there)
        assert [what for _, what, _ in simulated.waits] == ["copy to the host"]
        for found in (known, asked):
            assert {a: places.tolist() for a, places in found.items()} == {0: [2], 2: [0, 3]}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_layer_of_global_batch_norm_on_several_processes(monkeypatch: pytest.MonkeyPatch, layout: torch.memory_format) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)  # and this one has all rows
    random = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(6, 4, 3, 5, generator=random).contiguous(memory_format=layout) for _ in range(2))

    def run(place: torch.device) -> list[Tensor]:
        layer = GlobalBatchNorm2d(nn.BatchNorm2d(4)).to(place)
        rows, pulled = to_device(x, place).requires_grad_(), to_device(grad, place)
        with counting("forward"):
            y = layer(rows)
        with counting("backward"):
            gradients = torch.autograd.grad(y, [rows, *layer.parameters()], pulled)
        return [y.detach(), *gradients, *layer.buffers()]

    counting: Callable[[str], AbstractContextManager[Any]] = nullcontext
    expected = run(torch.device("cpu"))
    with Device() as simulated:
        counting = simulated.counting
        found = run(DEVICE)
    assert [wait for wait in simulated.waits if wait[0] != "elsewhere"] == []
    (counted,) = re.findall(r"a layer takes (\d+) launches in the forward and (\d+) in the backward", PAGE.read_text())
    print({part: dict(simulated.launches[part]) for part in ("forward", "backward")})
    assert [sum(simulated.launches[part].values()) for part in ("forward", "backward")] == [*map(int, counted)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(held(one), other, rtol=1e-5, atol=1e-5)  # numbers of size 1, and sums of a few


def test_a_value_that_is_read_later_waits_for_what_was_asked_before_it() -> None:
    with Device() as simulated:
        value = Later(torch.full((), 3, device=DEVICE))
        torch.ones(5, device=DEVICE).add_(1).mul_(2)
        assert int(value.read()) == 3
        assert simulated.late_reads == [3] and simulated.waits == []
    assert int(Later(torch.tensor(4)).read()) == 4


def test_tensors_come_to_the_host_together() -> None:
    values = [torch.tensor(1.5, dtype=torch.float64), torch.arange(3), torch.tensor(2.5), torch.ones(2, 2), torch.tensor(0.5)]
    with Device() as simulated:
        there = [values[0], *(to_device(value, DEVICE) for value in values[1:])]
        assert all(isinstance(value, DeviceTensor) for value in there[1:])
        found = to_host(there)
        assert len(simulated.waits) == 2  # int64 and float32
    assert all(torch.equal(one, other) and one.shape == other.shape for one, other in zip(found, values, strict=True))


def test_the_simulation_sees_every_kind_of_wait() -> None:
    """What it is trusted to find in a step, it finds here."""
    with Device() as simulated:
        x, order = torch.arange(4.0, device=DEVICE), torch.tensor([1, 0])
        for wait in (
            lambda: float(x.sum()),
            lambda: bool((x > 1).any()),
            lambda: x[x > 1],
            lambda: x[order],
            lambda: x.nonzero(),
            lambda: x.unique(),
            lambda: torch.equal(x, x),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: order.to(DEVICE),
            lambda: order.to(DEVICE, non_blocking=True),
            lambda: torch.tensor([1.0], device=DEVICE),
            lambda: x.new_tensor([1.0]),
            lambda: x.copy_(torch.zeros(4)),
        ):
            simulated.forget()
            wait()
            assert len(simulated.waits) == 1, simulated.waits
        simulated.forget()
        torch.where(x > 0, x, 1.0).masked_fill_(x > 2, 3.0).view(2, 2)[0].add(x.new_full((), 2)).clamp(min=1).to("cpu", non_blocking=True)
        to_device(order, DEVICE)
        assert simulated.waits == []
        with pytest.raises(RuntimeError, match="on the device and on the CPU"):
            x + torch.zeros(4)
