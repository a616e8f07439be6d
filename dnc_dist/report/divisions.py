"""How the training set was divided, over the epochs: who has how many rows, who descends from whom, how stable it is."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from dnc_dist.report.charts import INK, MOST_DIVISIONS, MUTED, Chart, draw, learner_colour
from dnc_dist.report.markup import Html, element
from dnc_dist.rundir.record import Line, RunRecord, number

LEFT_OUT = "#d5dae0"
_BAR = 0.56
_MOST_BARS = 3_000
_MOST_ROWS = 1000


def _divisions(run: RunRecord, most_learners: int = 0) -> list[Line]:
    """Those whose sizes are known; every 2nd, 3rd, ... if they are more than can be shown."""
    lines = [line for line in run.of("division") if "sizes" in line]
    most = _MOST_ROWS if not most_learners else max(1, min(MOST_DIVISIONS, _MOST_BARS // most_learners))
    return lines[:: -(-len(lines) // most)] if lines else []


def _edges(line: Line) -> np.ndarray:
    """(k + 2,) borders of the bar: learners from 0 up, then the left-out rows, as shares of all rows."""
    parts = np.array([*line["sizes"], number(line.get("left_out")) or 0.0], dtype=float)
    return np.concatenate([[0.0], np.cumsum(parts)]) / max(parts.sum(), 1.0)


def _paint_bars(axes: Axes, lines: list[Line]) -> None:
    for at, line in enumerate(lines):
        edges, learners = _edges(line), len(line["sizes"])
        for learner in range(learners):
            colour, height = learner_colour(learner, learners), edges[learner + 1] - edges[learner]
            axes.bar(at, height, _BAR, edges[learner], color=colour, edgecolor="white", linewidth=0.7, in_layout=False)
            if height > 0.07 and len(lines) <= 16:
                axes.text(
                    at, edges[learner] + height / 2, f"{line['sizes'][learner]:,}", ha="center", va="center", color="white", fontsize=7.5
                )
        axes.bar(at, edges[-1] - edges[-2], _BAR, edges[-2], color=LEFT_OUT, edgecolor="white", linewidth=0.7, in_layout=False)
        if at:
            _paint_descent(axes, at, _edges(lines[at - 1]), len(lines[at - 1]["sizes"]), edges, learners)


def _paint_descent(axes: Axes, at: int, before: np.ndarray, parents: int, after: np.ndarray, learners: int) -> None:
    """Ribbons from every learner to its children (2c and 2c + 1), or to itself where nothing was split."""
    if parents == 0 or learners % parents:
        return
    children = learners // parents
    for parent in range(parents):
        low, high = after[parent * children], after[(parent + 1) * children]
        x = [at - 1 + _BAR / 2, at - _BAR / 2]
        axes.fill_between(
            x, [before[parent], low], [before[parent + 1], high], color=learner_colour(parent, parents), alpha=0.16, linewidth=0
        )


def _words_below(line: Line) -> str:
    learners = len(line["sizes"])
    return f"epoch {line['epoch']}\n{learners} {'learner' if learners == 1 else 'learners'}"


def division_chart(run: RunRecord) -> Chart | None:
    """Stacked bars of cluster sizes over divisions, with ribbons from parents to children; None if there was never a second learner."""
    most = max((len(line["sizes"]) for line in run.of("division") if "sizes" in line), default=0)
    if most < 2:
        return None
    lines = _divisions(run, most)

    def paint(axes: Axes) -> None:
        _paint_bars(axes, lines)
        for at, line in enumerate(lines):
            share, nmi = number(line.get("matched_share")), number(line.get("nmi_to_previous"))
            words = [f"{share:.0%} kept" if share is not None else "", f"NMI {nmi:.2f}" if nmi is not None else ""]
            if at and len(lines) <= 24:
                axes.text(
                    at,
                    1.02,
                    "\n".join(word for word in words if word),
                    ha="center",
                    va="bottom",
                    fontsize=7.5,
                    color=MUTED,
                    linespacing=1.4,
                )
        every = max(1, len(lines) // 20)
        axes.set_xticks(range(0, len(lines), every), [_words_below(line) for line in lines[::every]], color=INK)
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlim(-0.6, max(len(lines), 3) - 0.4)
        axes.set_ylim(0, 1.13)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set_ylabel("share of training rows")

    note = (
        "Learners from bottom to top, rows in each; grey: left out (no second row of the class in the cluster). Ribbons lead from a "
        "learner to its children, in shades of its colour. Above: share of rows that kept their learner; NMI with the previous division."
    )
    return Chart("Cluster sizes and lineage", note, draw(paint, width=11.6, height=4.0), wide=True)


def division_table(run: RunRecord) -> Html:
    """The numbers behind the chart, as an HTML table; empty without a division."""
    lines = _divisions(run)
    if not lines:
        return Html()
    head = ("epoch", "learners", "smallest", "largest", "left out", "rejoined", "kept", "NMI to previous", "seconds")
    rows = []
    for line in lines:
        share, nmi, seconds = (number(line.get(name)) for name in ("matched_share", "nmi_to_previous", "seconds"))
        first = line is lines[0]
        cells = [
            str(line["epoch"]),
            str(len(line["sizes"])),
            f"{min(line['sizes']):,}",
            f"{max(line['sizes']):,}",
            *(f"{int(value):,}" if (value := number(line.get(name))) is not None else "" for name in ("left_out", "rejoined")),
            "" if share is None or first else f"{share:.1%}",
            "" if nmi is None or first else f"{nmi:.3f}",
            "" if seconds is None else f"{seconds:.1f}",
        ]
        rows.append(element("tr", *(element("td", cell) for cell in cells)))
    heads = element("tr", *(element("th", name) for name in head))
    return element("table", element("thead", heads), element("tbody", *rows), cls="numbers")
