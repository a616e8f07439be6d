"""What division did: the learners' masks and how much they overlap, what each subspace finds alone, and who is in each cluster."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from dnc_dist.report.charts import Chart, draw, learner_colour
from dnc_dist.report.markup import Html, element, join
from dnc_dist.report.pictures import picture
from dnc_dist.rundir.diagnosis import Diagnosis

_MOST_COLUMNS = 1024
_MOST_NUMBERS = 12
"""Beyond so many learners the numbers in the cells would overlap."""
_BLUE = (0x25 / 255, 0x63 / 255, 0xEB / 255)


def masks_chart(found: Diagnosis) -> Chart:
    """The masks (k, D) as a heat map: a line for each learner, coordinates grouped by who uses them most."""
    masks, learners = found.masks, found.num_learners
    order = np.lexsort((-masks.max(0), masks.argmax(0)))
    values = masks[:, order]
    # Neighbours become one where there are more columns than a page has pixels.
    groups = np.array_split(np.arange(values.shape[1]), min(_MOST_COLUMNS, values.shape[1]))
    values = np.stack([values[:, group].mean(1) for group in groups], axis=1) if groups else values

    def paint(axes: Axes) -> None:
        _image(axes, values, 0.0, float(values.max(initial=0)) or 1.0)
        axes.set_yticks(range(learners) if learners <= 32 else range(0, learners, learners // 16))
        axes.set_ylabel("learner")
        axes.set_xlabel(f"the {masks.shape[1]:,} coordinates of the embedding, grouped by the learner that uses them most")
        axes.set_xticks([])

    return Chart(
        "Masks of the learners",
        "The stronger the colour, the more a learner uses a coordinate. Masks that all look the same are no subspaces.",
        draw(paint, width=11.6, height=min(5.0, 1.1 + 0.24 * learners)),
        wide=True,
    )


def overlap(masks: np.ndarray) -> np.ndarray:
    """(k, k) cosines between masks (k, D); 0 with a mask of zeros."""
    length = np.linalg.norm(masks, axis=1, keepdims=True)
    rows = masks / np.where(length > 0, length, 1)
    return rows @ rows.T


def overlap_chart(found: Diagnosis) -> Chart:
    """The cosines between masks as a heat map."""
    cosine, learners = overlap(found.masks), found.num_learners

    def paint(axes: Axes) -> None:
        _image(axes, cosine, 0.0, 1.0)
        axes.set_aspect("equal")
        ticks = range(learners) if learners <= 32 else range(0, learners, learners // 16)
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.set_xlabel("learner")
        axes.set_ylabel("learner")
        if learners <= _MOST_NUMBERS:
            for (row, column), value in np.ndenumerate(cosine):
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)

    return Chart(
        "How much the masks overlap", "Cosine between two masks: 0, no coordinate in common; 1, the same subspace.", draw(paint, height=3.2)
    )


def _image(axes: Axes, values: np.ndarray, low: float, high: float) -> None:
    """Values as more or less of one colour over the page's own, so that they can be read on a dark page, too."""
    pixels = np.empty((*values.shape, 4))
    pixels[..., :3] = _BLUE
    pixels[..., 3] = 0.85 * np.clip((values - low) / (high - low), 0, 1)
    axes.imshow(pixels, aspect="auto", interpolation="nearest")
    axes.grid(visible=False)


def recall_chart(found: Diagnosis) -> Chart | None:
    """recall@1 of the sampled queries: in the whole embedding, in each learner's subspace alone, and there of its own queries."""
    if len(found.sampled_right) == 0:
        return None
    learners = found.num_learners
    every, own = found.sampled_alone.mean(0), own_recall(found)[:, 0]
    whole = found.sampled_right.mean()

    def paint(axes: Axes) -> None:
        at = np.arange(learners)
        axes.bar(at - 0.2, every, 0.38, color=[learner_colour(learner, learners) for learner in range(learners)], alpha=0.45)
        axes.bar(at + 0.2, np.nan_to_num(own), 0.38, color=[learner_colour(learner, learners) for learner in range(learners)])
        axes.axhline(whole, color="#7b8794", linestyle=(0, (4, 3)), linewidth=1.2)
        axes.set_xticks(at if learners <= 32 else range(0, learners, learners // 16))
        axes.set_xlabel("learner")
        axes.set_ylim(0, 1.15 * max(whole, float(every.max()), float(np.nan_to_num(own).max())) or 1.0)
        axes.set_ylabel("recall@1")

    note = (
        f"Of {len(found.sampled_right):,} queries, drawn at random. Pale: of all of them; full: of those that lie nearest to the learner's "
        f"training images; dashed: the whole embedding, {whole:.1%}."
    )
    return Chart("What each subspace finds alone", note, draw(paint, height=3.2))


def own_recall(found: Diagnosis) -> np.ndarray:
    """(k, 3) of the queries that lie nearest to a learner's images: recall@1 in its subspace, in the whole embedding, their number."""
    table = np.full((found.num_learners, 3), np.nan)
    for learner in range(found.num_learners):
        own = found.sampled_learner == learner
        table[learner, 2] = own.sum()
        if own.any():
            table[learner, :2] = found.sampled_alone[own, learner].mean(), found.sampled_right[own].mean()
    return table


def learners_table(found: Diagnosis) -> Html:
    """The numbers of every learner."""
    heads = ["learner", "images", "classes", "mostly here", "of an image's class", "alone, all queries"]
    heads += ["its queries", "alone, its queries", "whole, its queries", "misses it gets right"]
    own = own_recall(found)
    rows = []
    for learner in range(found.num_learners):
        images, classes, main, share = found.clusters[learner].tolist()
        cells = [str(learner), f"{images:,.0f}", f"{classes:,.0f}", f"{main:,.0f}", f"{share:.0%}"]
        alone, whole, asked = own[learner].tolist()
        cells.append(_share(found.sampled_alone[:, learner]))
        cells += [f"{asked:,.0f}", "" if np.isnan(alone) else f"{alone:.1%}", "" if np.isnan(whole) else f"{whole:.1%}"]
        cells.append(_share(found.missed_alone[:, learner]))
        rows.append(element("tr", *(element("td", cell) for cell in cells)))
    head = element("tr", *(element("th", name) for name in heads))
    return element("table", element("thead", head), element("tbody", *rows), cls="numbers")


def _share(right: np.ndarray) -> str:
    return f"{right.mean():.1%}" if len(right) else ""


def montage_html(found: Diagnosis) -> Html:
    """Some training images of each cluster."""
    rows = []
    for learner, line in enumerate(found.montage):
        images, classes, _, share = found.clusters[learner].tolist()
        red, green, blue, _ = (round(255 * part) for part in learner_colour(learner, found.num_learners))
        head = element(
            "p",
            element("i", style=f"background:rgb({red},{green},{blue})"),
            element("b", f"learner {learner}"),
            f" {images:,.0f} images of {classes:,.0f} classes; of an image's class {share:.0%} lie here.",
        )
        pictures = [picture(found, int(number)) for number in line if number >= 0]
        rows.append(element("div", head, element("div", *pictures, cls="sides"), cls="cluster"))
    return element("div", *rows, cls="query-list clusters")


def subspaces_html(found: Diagnosis) -> list[Html]:
    """Charts, montage and numbers, for the page; nothing where the training set was never divided."""
    if not found.num_learners:
        return []
    charts = [masks_chart(found), overlap_chart(found), recall_chart(found)]
    note = (
        "Images and classes are those of the training set at the last division that had several learners. Mostly here: classes of which "
        "this learner has the most images. Of an image's class: the share that lies in the same cluster, mean over its images. "
        f"Recall is recall@1 of {len(found.sampled_right):,} queries against the whole gallery; a query belongs to the learner whose "
        f"training images (a sample of them) lie nearest in the mean. Misses: of {len(found.missed_alone):,} drawn at random."
    )
    figures = [
        element(
            "figure",
            element("h3", chart.title),
            element("p", chart.note, cls="note"),
            element("div", chart.svg, cls="scroll"),
            cls="chart wide" if chart.wide else "chart",
        )
        for chart in charts
        if chart is not None
    ]
    numbers = element("summary", "All learners in numbers"), element("p", note, cls="note")
    return [
        element("div", *figures, cls="grid large"),
        join([element("h3", "Images of each cluster"), montage_html(found)]),
        element("details", *numbers, element("div", learners_table(found), cls="scroll")),
    ]
