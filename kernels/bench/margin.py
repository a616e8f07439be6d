"""Margin loss: a whole training step (project with masks, sample, loss, backward), ours and others', in time, memory and error.

    PYTHONPATH=kernels python -m bench.margin --out benchmarks/results/kernels_margin_cpu.jsonl

Rows stand in K equal runs, one a learner, with up to 4 rows a class. Masks are `soft` (all columns live) or `sliced` (D/K columns a
learner). Errors are those of loss and gradients against the float64 reference on the same pairs.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench import baselines, measure, roofline
from bench.measure import triton_module
from bench.sweep import walk
from dnc_kernels import reference
from dnc_kernels.contract import Pairs, Rows, Sampling

SIZES, CPU_SIZES = (128, 1024, 8192, 65536), (128, 512, 1024, 2048)
LEARNERS, CPU_LEARNERS, DIM = (4, 1, 32), (1, 4), 512
REFERENCE_UP_TO = 8192  # the reference walks all B² pairs in float64, and the library all classes in Python
GRAPHS_UP_TO = 1024  # where a step is bound by its launches
SEED, STEP = 7, 3

Step = Callable[[], tuple[Tensor, Tensor | None]]  # the mean loss and, where known, the sampled rows (B, 2P)


@dataclass(frozen=True)
class Case:
    """One size."""

    rows: int
    learners: int
    dim: int
    masks: str

    @property
    def per_class(self) -> int:
        return min(4, max(2, self.rows // (2 * self.learners)))  # two classes a learner at least

    @property
    def live(self) -> int:
        return self.dim // self.learners if self.masks == "sliced" else self.dim

    @property
    def positives(self) -> int:
        return self.per_class - 1


QUICK = (Case(16, 2, 32, "sliced"),)
CHOOSERS = (("race", "default_tile"), ("pair_loss", "default_tile"))
SWEPT = (Case(1024, 4, DIM, "soft"), Case(65536, 4, DIM, "soft"), Case(65536, 32, DIM, "sliced"))


class Inputs:
    """Tensors of a case; classes are distinct, so that the sampler has near and far negatives to choose from."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        random = torch.Generator(device).manual_seed(SEED)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device)

        row = torch.arange(case.rows, device=device)
        self.labels, self.learner = row // case.per_class, row * case.learners // case.rows
        self.num_classes = case.rows // case.per_class
        embeddings = 0.5 * normal(case.learners, case.dim)[self.learner] + normal(self.num_classes, case.dim)[self.labels]
        self.embeddings = embeddings.add_(0.7 * normal(case.rows, case.dim)).requires_grad_()
        columns = torch.arange(case.dim, device=device) * case.learners // case.dim
        sliced = (columns == torch.arange(case.learners, device=device)[:, None]).float()
        soft = torch.rand(case.learners, case.dim, generator=random, device=device) + 0.5
        self.masks = (sliced if case.masks == "sliced" else soft).requires_grad_()
        self.beta = torch.full((self.num_classes,), 1.2, device=device, requires_grad=True)
        self.seed, self.step = (torch.full((), number, dtype=torch.int64, device=device) for number in (SEED, STEP))

    def rows(self, z: Tensor | None = None) -> Rows:
        """The batch; without z its embeddings."""
        return Rows(self.embeddings if z is None else z, self.labels, self.learner)

    def sampling(self) -> Sampling:
        return Sampling(effective_dim=float(self.case.live), max_positives=self.case.positives, seed=self.seed, step=self.step)


def contract(module: Any, inputs: Inputs) -> Step:
    """A step of an implementation of the contract."""

    def step() -> tuple[Tensor, Tensor | None]:
        num_learners = inputs.case.learners
        out = module.margin_loss(inputs.rows(), beta=inputs.beta, masks=inputs.masks, num_learners=num_learners, sampling=inputs.sampling())
        return out.loss_sum / out.num_active.clamp(min=1), None

    return step


def eager(inputs: Inputs, *, blocks: int = 1, compiled: dict[str, Any] | None = None) -> Step:
    """The vectorised baseline, compiled with these options or not at all."""
    function: Callable[..., tuple[Tensor, Tensor]] = baselines.margin_step
    if compiled is not None:
        torch.compiler.reset()
        function = torch.compile(function, dynamic=False, **compiled)
    # A tensor, or every width would be compiled anew.
    n = torch.full((), float(inputs.case.live), device=inputs.embeddings.device)
    return lambda: function(inputs.embeddings, inputs.masks, inputs.beta, inputs.labels, inputs.learner, n, inputs.case.positives, blocks)


def library(inputs: Inputs) -> Step:
    model = baselines.MetricLearningLibrary(inputs.num_classes, inputs.embeddings.device)
    inputs.beta = model.loss.beta
    return lambda: (model(inputs.embeddings, inputs.masks, inputs.labels, inputs.case.masks == "sliced"), None)


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Step]] = {
    "triton": lambda inputs: contract(triton_module("margin", inputs.embeddings.device), inputs),
    "eager": eager,
    "eager-blocks": lambda inputs: eager(inputs, blocks=inputs.case.learners),
    "reference": lambda inputs: contract(reference, inputs),
    "pytorch-metric-learning": library,
    "compile": lambda inputs: eager(inputs, compiled={}),
    "compile-graphs": lambda inputs: eager(inputs, compiled={"mode": "reduce-overhead"}),
}


def applies(name: str, case: Case, device: torch.device) -> bool:
    """Is the implementation measured at this size? What a smaller or equal size already says is left out, to save the time."""
    if name == "eager-blocks":
        return case.learners > 1
    if name.startswith("compile"):
        where = case.masks == "soft" and device.type == "cuda"
        return where and (case.learners == 4 if name == "compile" else case.learners == 4 and case.rows <= GRAPHS_UP_TO)
    if name == "reference":
        return case.learners <= 4 and (case.rows <= REFERENCE_UP_TO or (case.learners, case.masks) == (4, "soft"))
    if name == "pytorch-metric-learning":
        return case.masks == "soft" or case.rows <= REFERENCE_UP_TO
    return True


def sampled_pairs(name: str, inputs: Inputs, others: Tensor | None) -> Pairs | None:
    """The pairs behind a step's loss, None where nobody can tell."""
    if name == "pytorch-metric-learning":
        return None
    if others is None:
        module = reference if name == "reference" else triton_module("margin", inputs.embeddings.device)
        with torch.no_grad():
            z = module.project(inputs.embeddings, inputs.learner, inputs.masks)
            return module.sample_pairs(inputs.rows(z), sampling=inputs.sampling())
    anchor = torch.arange(others.shape[0], device=others.device)[:, None].expand_as(others)
    positive = (torch.arange(others.shape[1], device=others.device) < inputs.case.positives).expand_as(others)
    return Pairs(anchor.reshape(-1), others.reshape(-1), positive.reshape(-1))


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value - expected‖ / ‖expected‖."""
    difference = (value.detach().double() - expected.detach()).norm() / expected.detach().norm().clamp_min(1e-300)
    return float(f"{float(difference):.2g}")


def errors(inputs: Inputs, pairs: Pairs, loss: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, float]:
    """Of loss and gradients, against the float64 reference on the same pairs."""
    leaves = [value.detach().double().requires_grad_() for value in (inputs.embeddings, inputs.masks, inputs.beta)]
    z = reference.project(leaves[0], inputs.learner, leaves[1])
    out = reference.margin_loss_on_pairs(inputs.rows(z), pairs, beta=leaves[2], num_learners=inputs.case.learners)
    expected = out.loss_sum / out.num_active.clamp(min=1)
    found = {"error_loss": relative_error(loss, expected)}
    for name, value, right in zip(("embeddings", "masks", "beta"), gradients, torch.autograd.grad(expected, leaves), strict=True):
        found[f"error_{name}"] = relative_error(value, right)
    return found


def draws_that_differ(inputs: Inputs, pairs: Pairs) -> float:
    """Share of all slots that the float64 reference fills with another row."""
    expected = sampled_pairs("reference", inputs, None)
    assert expected is not None
    return float(f"{float((pairs.other != expected.other).double().mean()):.3g}")


def measured(name: str, case: Case, run: measure.Run) -> dict[str, Any]:
    """Everything about one implementation at one size."""
    device = run.device
    before = measure.allocated(device)
    inputs = Inputs(case, device)
    step = IMPLEMENTATIONS[name](inputs)
    leaves = (inputs.embeddings, inputs.masks, inputs.beta)
    held: list[Any] = []

    def forward() -> None:
        held.clear()  # a compiled graph reuses the memory of what it returned
        held.extend(step())

    def backward() -> None:
        held.append(torch.autograd.grad(held[0], leaves))

    def full() -> tuple[Tensor, ...]:
        return torch.autograd.grad(step()[0], leaves)

    def first() -> None:
        forward()
        backward()

    for _ in range(3 if name.startswith("compile") else 1):  # compiles, then records a graph, then replays it
        first()
    torch.manual_seed(SEED)
    row: dict[str, Any] = {}
    known, row["peak_mb"] = measure.once(first, device, before)
    loss, others, gradients = held[0].detach().clone(), held[1], tuple(value.clone() for value in held[2])
    row["loss"] = float(f"{float(loss):.6g}")
    pairs = sampled_pairs(name, inputs, None if others is None else others.clone())
    if pairs is not None:
        row |= errors(inputs, pairs, loss, gradients)
        if name == "triton" and case.rows <= REFERENCE_UP_TO:
            row["draws_differing"] = draws_that_differ(inputs, pairs)
    held.clear()
    if known < measure.SLOW * run.seconds:
        torch.manual_seed(SEED)
        row["repeatable"] = all(torch.equal(value, again) for value, again in zip(gradients, full(), strict=True))
        row["wall_ms"] = measure.wall_ms(full, device, run.seconds / 2)
    del pairs, others, gradients, loss
    row |= measure.time_phases({"forward": forward, "backward": backward}, device, run.seconds, known=known)
    held.clear()
    if name == "triton" and device.type == "cuda" and case.rows <= GRAPHS_UP_TO:
        row["graph_ms"] = measure.graph_ms(full, device, run.seconds)
    if device.type == "cuda":
        row["floor"] = floor = roofline.margin_step(case, run.ceilings)
        row["roofline"] = round(floor["total_ms"] / row["full_ms"][0], 3)
    return row


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """The sizes, those that matter most first: soft masks and 4 learners."""
    if quick:
        yield from QUICK
        return
    sizes = SIZES if device.type == "cuda" else CPU_SIZES
    learners = LEARNERS if device.type == "cuda" else CPU_LEARNERS
    for masks, count, rows in itertools.product(("soft", "sliced"), learners, sizes):
        if masks == "soft" or count > 1:
            yield Case(rows, count, DIM, masks)


def sweep(run: measure.Run, quick: bool) -> None:
    """Tiles of the sampler and of the loss, with few anchors and with many."""
    for case in QUICK if quick else SWEPT:
        inputs = Inputs(case, run.device)
        step, leaves = IMPLEMENTATIONS["triton"](inputs), (inputs.embeddings, inputs.masks, inputs.beta)

        def full(step: Step = step, leaves: tuple[Tensor, ...] = leaves) -> Any:
            return torch.autograd.grad(step()[0], leaves)

        for name, chooser in CHOOSERS:
            walk(importlib.import_module(f"dnc_kernels.{name}"), chooser, full, run, asdict(case))


def main() -> None:
    """Run the matrix."""
    args = measure.matrix_arguments("margin", budget=185.0).parse_args()
    wanted = measure.wanted(args.only, IMPLEMENTATIONS)
    run = measure.Run("margin", args)
    if args.sweep:
        sweep(run, args.quick)
        return
    for case in cases(run.device, args.quick):
        for name in wanted:
            if applies(name, case, run.device):
                run.row({"implementation": name, **asdict(case)}, functools.partial(measured, name, case, run))


if __name__ == "__main__":
    main()
