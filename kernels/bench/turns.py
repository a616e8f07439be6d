"""How much longer the reference's training step takes than the eager baseline's, on the CPU: both steps in turns, in one process.

    PYTHONPATH=kernels python -m bench.turns --out benchmarks/results/kernels_turns_cpu.jsonl

`bench.margin` times one implementation after the other, seconds apart, and a machine that others use changes its speed meanwhile. Here
neighbouring calls share what the machine does just then. A step is forward and backward, the sizes are those of `bench.margin`.

Large sizes come first. After them the C library keeps the memory of a step, as it does in a training; in a new process it takes it
from the operating system at every step anew, and a small batch then waits for memory as long as it computes.
"""

from __future__ import annotations

import functools
import statistics
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from bench import margin, measure, table
from bench.measure import quantiles

COMPARED = ("eager", "reference")
WARMUPS = 5


def gradients(inputs: margin.Inputs, step: margin.Step) -> tuple[Tensor, ...]:
    """Forward and backward."""
    return torch.autograd.grad(step()[0], (inputs.embeddings, inputs.masks, inputs.beta))


def measured(case: margin.Case, run: measure.Run) -> dict[str, Any]:
    """Milliseconds of both steps, the ratio of their medians, and [median, 20 %, 80 %] of the ratios of the turns."""
    inputs = margin.Inputs(case, run.device)
    steps = {name: functools.partial(gradients, inputs, margin.IMPLEMENTATIONS[name](inputs)) for name in COMPARED}
    warm = measure.milliseconds_in_turns(steps, run.device, WARMUPS)
    known = sum(values[-1] for values in warm.values()) / 1e3
    eager, reference = measure.milliseconds_in_turns(steps, run.device, measure.num_calls(known, run.seconds)).values()
    return {
        "eager_ms": quantiles(eager),
        "reference_ms": quantiles(reference),
        "ratio": round(statistics.median(reference) / statistics.median(eager), 3),
        "turn_ratios": quantiles([one / other for one, other in zip(reference, eager, strict=True)]),
        "calls": len(eager),
    }


def main() -> None:
    """Run all sizes and print their table."""
    parser = measure.arguments("turns", budget=120.0, seconds=4.0)
    parser.set_defaults(device="cpu")  # elsewhere the reference is no step that anybody trains with
    args = parser.parse_args()
    run = measure.Run("turns", args)
    cases = sorted(margin.cases(run.device, args.quick), key=lambda case: case.rows, reverse=True)
    rows = [run.row({"implementation": "turns", **asdict(case)}, functools.partial(measured, case, run)) for case in cases]
    print(f"\n{table.device_table('turns', [row | run.machine for row in rows])}")


if __name__ == "__main__":
    main()
