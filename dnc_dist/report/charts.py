"""The report's curves as SVG: axes in epochs, divisions as thin lines, the conquer phase shaded."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from dnc_dist.report.markup import Html
from dnc_dist.rundir.record import RunRecord, Series, number

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
AXES, GAPS = "#cbd2d9", "#ffffff"
MOST_DIVISIONS = 200
"""Beyond it, their lines would cover a chart."""
_MOST_SEGMENTS = 5_000
_MOST_BARS = 400
PALETTE = ["#2563eb", "#ea580c", "#0d9488", "#9333ea", "#ca8a04", "#db2777"]
CONQUER = "#fef3c7"
_THEMED = {INK: "--ink", MUTED: "--muted", GRID: "--line", AXES: "--axes", GAPS: "--card", CONQUER: "--conquer"}
"""Colours that the page chooses, as it may be dark."""
_LEARNERS = LinearSegmentedColormap.from_list("learners", ["#1d4ed8", "#0891b2", "#10b981", "#ca8a04", "#f97316", "#dc2626", "#a21caf"])

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "text.parse_math": False,
    "svg.hashsalt": "dnc-dist",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": AXES,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Chart:
    """A drawn chart with the words that go with it."""

    title: str
    note: str
    svg: Html
    wide: bool = False
    main: bool = False
    """Of those that tell most."""


def learner_colour(learner: int, num_learners: int) -> tuple[float, float, float, float]:
    """The colour of a learner: that of its place among all, so that children have shades of their parent's colour."""
    return _LEARNERS((learner + 0.5) / num_learners)


def draw(paint: Callable[[Axes], None], *, width: float = 5.6, height: float = 2.9) -> Html:
    """An SVG of one pair of axes that ``paint`` fills."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    for colour, variable in _THEMED.items():
        text = text.replace(colour, f"var({variable})")
    return Html(text[text.index("<svg") :])


def _frame(axes: Axes, run: RunRecord) -> None:
    """The x axis in epochs, the divisions and the conquer phase."""
    end = max(float(run.epoch_ends[-1, 1]), 1.0)
    axes.set_xlim(0, end)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    learners, changes = 0.0, []
    for line in run.of("division"):
        if (now := number(line.get("num_learners"))) is not None and now != learners:
            learners = now
            changes.append(run.position(line["step"]))
    if len(changes) <= MOST_DIVISIONS:
        for change in changes:
            axes.axvline(change, color="#9aa5b1", linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
    if run.conquer_from is not None:
        axes.axvspan(run.conquer_from, end, color=CONQUER, zorder=0, linewidth=0)


def _smooth(series: Series, window: int) -> Series:
    """Running mean over about ``window`` points, at their mean positions."""
    if window < 2 or len(series) < 2 * window:
        return series
    kernel = np.ones(window) / window
    return Series(np.convolve(series.x, kernel, "valid"), np.convolve(series.y, kernel, "valid"))


def _line(axes: Axes, series: Series, label: str | None, colour: object, *, smooth: bool = False, width: float = 1.8) -> None:
    marker = "o" if len(series) <= 30 and width > 1.5 and not smooth else None
    if smooth and len(series) >= 40:
        axes.plot(series.x, series.y, color=colour, linewidth=0.6, alpha=0.25)
        series = _smooth(series, max(2, len(series) // 60))
    axes.plot(series.x, series.y, label=label, color=colour, linewidth=width, marker=marker, markersize=3.2, solid_capstyle="round")


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1 or (labels and not labels[0].startswith("_")):
        axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=min(4, len(labels)),
            borderaxespad=0.1,
            handlelength=1.4,
            columnspacing=1.4,
        )


def curves(
    run: RunRecord,
    title: str,
    note: str,
    kind: str,
    names: dict[str, str],
    *,
    percent: bool = False,
    zero: bool = False,
    smooth: bool = False,
    main: bool = False,
) -> Chart | None:
    """A chart of several quantities of one kind of line; None if the run has none of them.

    Args:
        names: name in ``metrics.jsonl`` -> words in the legend.
    """
    found = {label: series for name, label in names.items() if len(series := run.series(kind, name))}
    if not found:
        return None

    def paint(axes: Axes) -> None:
        _frame(axes, run)
        for (label, series), colour in zip(found.items(), PALETTE * len(found), strict=False):
            _line(axes, series, label, colour, smooth=smooth)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        if zero:
            axes.set_ylim(0, 1.08 * max(float(series.y.max()) for series in found.values()) or 1.0)
        _legend(axes)

    return Chart(title, note, draw(paint), main=main)


def learner_losses(run: RunRecord) -> Chart | None:
    """The loss of every learner; curves begin anew at each division, with the colours of the division chart."""
    names = [name for name in run.names("train", "learner_loss/") if name.rsplit("/", 1)[1].isdecimal()]
    if len(names) < 2:
        return None
    starts = [(run.position(line["step"]), int(number(line.get("num_learners")) or len(names))) for line in run.of("division")]
    starts = starts[-max(1, _MOST_SEGMENTS // len(names)) :] or [(0.0, len(names))]
    ends = [start for start, _ in starts[1:]] + [float("inf")]

    def paint(axes: Axes) -> None:
        _frame(axes, run)
        for name in names:
            learner, series = int(name.rsplit("/", 1)[1]), run.series("train", name)
            for (start, num_learners), end in zip(starts, ends, strict=True):
                inside = (series.x > start) & (series.x <= end)
                if inside.any() and learner < num_learners:
                    _line(axes, Series(series.x[inside], series.y[inside]), None, learner_colour(learner, num_learners), width=1.2)

    return Chart("Loss of each learner", "Colours as in the divisions below; curves begin anew at every division.", draw(paint))


def shares(run: RunRecord) -> Chart | None:
    """Where the time of each epoch went, stacked."""
    parts = {"share_data": "waiting for data", "share_divide": "dividing", "share_evaluate": "evaluating"}
    lines = [line for line in run.of("epoch") if any(name in line for name in parts)]
    if not lines:
        return None
    every = -(-len(lines) // _MOST_BARS)
    lines = lines[::every]

    def paint(axes: Axes) -> None:
        _frame(axes, run)
        x = np.array([line["epoch"] + 0.5 for line in lines])
        bottom = np.zeros(len(x))
        for (name, label), colour in zip(parts.items(), ["#ea580c", "#2563eb", "#0d9488"], strict=True):
            values = np.array([number(line.get(name)) or 0.0 for line in lines])
            axes.bar(x, values, 0.82 * every, bottom, label=label, color=colour, linewidth=0, in_layout=False)
            bottom += values
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylim(0, max(0.05, min(1.0, bottom.max() * 1.15)))
        _legend(axes)

    return Chart("Time not spent training", "Share of each epoch's seconds; the rest is training steps.", draw(paint))


def all_curves(run: RunRecord) -> list[Chart]:
    """Every chart that the run has values for."""
    recall = [name for name in run.names("evaluation", "recall@")][:1]
    retrieval = {name: name for name in [*recall, "map@r"]} | {"validation/recall@1": "recall@1, validation"}
    if len(run.series("evaluation", "nmi")) > 1:
        retrieval["nmi"] = "nmi"
    rates = {name: name.removeprefix("lr/") for name in run.names("train", "lr/")} or {"lr": "embedding"}
    pairs = {"active_pairs": "active pairs", "anchors_without_negatives": "anchors without negatives"}
    masks = {"mask_orthogonality": "mean cosine between masks", "mask_sparsity": "share of switched-off coordinates"}
    charts = [
        curves(run, "Retrieval", "On the test split, higher is better.", "evaluation", retrieval, percent=True, main=True),
        curves(
            run,
            "Loss",
            "Mean over the pairs (or rows) of a step, without the mask penalty.",
            "train",
            {"loss": "loss"},
            zero=True,
            smooth=True,
            main=True,
        ),
        learner_losses(run),
        curves(run, "Pairs", "Per step; anchors without negatives should stay near 0.", "train", pairs, zero=True, smooth=True),
        curves(run, "Masks", "Learners become specialists as the cosine falls.", "train", masks, zero=True),
        curves(run, "Distillation", "What learners still teach the whole embedding.", "train", {"distillation": "divergence"}, zero=True),
        curves(run, "Learning rates", "0 while a group waits.", "train", rates, zero=True),
        curves(
            run, "Images per second", "Training steps, all processes.", "train", {"images_per_second": "images/s"}, zero=True, smooth=True
        ),
        shares(run),
        curves(run, "Memory", "Peak of rank 0, in MB.", "epoch", {"memory_mb": "MB"}, zero=True),
    ]
    return [chart for chart in charts if chart is not None]
