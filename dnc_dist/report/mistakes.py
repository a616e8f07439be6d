"""Why the model errs, over all queries: the worst, the classes that are taken for each other, wrong labels, hubs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from dnc_dist.report import names
from dnc_dist.report.charts import Chart, draw
from dnc_dist.report.markup import Html, element, join
from dnc_dist.report.pictures import picture
from dnc_dist.rundir.diagnosis import Diagnosis

_RANKS = ("1", "2", "3–5", "6–10", "11–100", "later", "not listed")
_RIGHT, _WRONG = "#16a34a", "#dc2626"


def mistakes_html(found: Diagnosis) -> Html:
    """All of it but the heading."""
    queries, misses = (int(count) for count in found.counts)
    if queries == 0:
        return element(
            "p", "The protocol draws several galleries, so that a query has no one answer: single queries were not looked at.", cls="note"
        )
    if misses == 0:
        return element("p", f"For every one of {queries:,} queries the nearest image is of the same class.", cls="note")
    return join(
        [
            element("p", *_summary(found), cls="lead"),
            element("div", *(_figure(chart) for chart in _charts(found)), cls="grid large"),
            _pairs(found),
            _list(
                "Worst queries",
                "Their first image of the same class comes later than that of all others. Each with what was found, and what should "
                "have been.",
                found,
                found.worst,
            ),
            _list(
                "Suspected wrong labels",
                f"The {_nearest_looked_at(found)} nearest images all belong to one other class, and none of the query's own is near. "
                "Look whether the query's label is right.",
                found,
                found.mislabelled,
                none="None: no query stands in the midst of another class.",
            ),
            _list(
                "Nearly the same image in two classes",
                "Nearer to each other than 95% of the right pairs are: the same object under two labels, a duplicate, or classes that look "
                "alike. "
                f"At a distance of practically 0 (below 0.01) are {int(found.twins[0]):,} of all queries.",
                found,
                found.alike,
                none="None: no image is as near to one of another class as the nearest right ones are.",
            ),
            _hubs(found),
        ]
    )


def _figure(chart: Chart) -> Html:
    return element("figure", element("h3", chart.title), element("p", chart.note, cls="note"), chart.svg, cls="chart")


def _nearest_looked_at(found: Diagnosis) -> int:
    return int(found.agreeing[found.mislabelled, 1].min(initial=5)) if len(found.mislabelled) else 5


def _summary(found: Diagnosis) -> Iterable[str]:
    queries, misses = (int(count) for count in found.counts)
    ranks = found.rank_counts
    yield f"For {misses:,} of {queries:,} queries ({misses / queries:.1%}) the nearest image is of another class. "
    yield f"For {(ranks[1] + ranks[2]) / misses:.0%} of these the right class is among the first five. "
    if len(found.pair_counts):
        yield (
            f"{_of(len(found.pair_counts), 'pair')} of classes that are taken for each other most often "
            f"make up {found.pair_counts.sum() / misses:.0%} of all misses. "
        )
    if found.num_learners and len(found.missed_alone):
        alone = found.missed_alone
        looked = "all misses" if len(alone) >= misses else f"{len(alone):,} misses, drawn at random,"
        yield (
            f"Of {looked} {alone.any(1).mean():.0%} would have been right in the subspace of at least one learner alone, "
            f"and {alone.mean(0).max():.0%} in that of learner {int(alone.mean(0).argmax())}."
        )


def _of(count: int, word: str) -> str:
    return f"The one {word}" if count == 1 else f"The {count} {word}s"


def _charts(found: Diagnosis) -> list[Chart]:
    groups = len(_RANKS) if found.rank_counts[-1] else len(_RANKS) - 1
    share = found.rank_counts[:groups] / max(1, found.rank_counts.sum())

    def ranks(axes: Axes) -> None:
        axes.bar(range(groups), share, 0.72, color=[_RIGHT, *["#f59e0b"] * 2, *[_WRONG] * (groups - 3)])
        for at, value in enumerate(share):
            axes.text(at, value, f"{value:.1%}", ha="center", va="bottom", fontsize=8.5)
        axes.set_xticks(range(groups), _RANKS[:groups])
        axes.set_xlabel("rank of the first image of the same class")
        axes.set_ylim(0, 1.12 * max(float(share.max()), 1e-9))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    def distances(axes: Axes) -> None:
        right, wrong = found.distance_counts
        edges = found.distance_edges
        for values, colour, label in ((right, _RIGHT, "right"), (wrong, _WRONG, "wrong")):
            axes.stairs(values, edges, fill=True, color=colour, alpha=0.35, label=label)
            axes.stairs(values, edges, color=colour, linewidth=1.4)
        axes.set_xlabel("distance to the nearest image")
        axes.set_xlim(0, float(edges[-1]))
        axes.legend(loc="upper left", ncols=2, bbox_to_anchor=(-0.01, 1.15), borderaxespad=0.1)

    return [
        Chart("Where the right image stands", "Share of all queries by the rank of their first hit.", draw(ranks)),
        Chart(
            "How sure it is when it errs",
            "Queries by the distance to their nearest image; apart, they let a limit on the distance tell wrong answers.",
            draw(distances),
        ),
    ]


def _entry(found: Diagnosis, number: int, sign: str, kind: str, words: str) -> Html:
    """A line with a picture: what it is, class and file in full."""
    if number < 0:
        return element("div", element("span", words), cls="entry")
    name = str(found.names[number])
    return element(
        "div",
        picture(found, number, kind),
        element(
            "div",
            element("span", f"{sign} {words}".strip(), cls=f"what {kind}"),
            element("b", names.shown(name), title=names.full(name)),
            element("small", str(found.sources[number])[:300]),
        ),
        cls="entry",
    )


def _learners(found: Diagnosis, miss: int) -> str:
    """Who alone would have been right."""
    if not found.num_learners:
        return ""
    right = np.flatnonzero(found.alone[miss])
    if len(right) == 0:
        return "No learner alone finds it."
    if len(right) == found.num_learners:
        return "Every learner alone finds it."
    return f"Alone right: learner {', '.join(map(str, right[:12]))}{', …' if len(right) > 12 else ''} of {found.num_learners}."


def _miss(found: Diagnosis, miss: int) -> Html:
    """A query, what it found, and what it should have found."""
    rank = int(found.first_hits[miss])
    agreeing, looked_at = (int(count) for count in found.agreeing[miss])
    should = f"rank {rank:,}" if rank else "not among the neighbours that were listed"
    facts = f"{agreeing} of the {looked_at} nearest are of class {names.shown(str(found.names[found.nearest[miss]]))[:60]}. "
    return element(
        "div",
        _entry(found, int(found.queries[miss]), "", "query", "query"),
        _entry(found, int(found.nearest[miss]), "✗", "wrong", f"nearest, distance {found.distances[miss]:.3f}"),
        _entry(found, int(found.own[miss]), "✓", "right", f"of its class: {should}, distance {found.own_distances[miss]:.3f}"),
        element("p", facts, _learners(found, miss), cls="note"),
        cls="miss",
    )


def _list(title: str, note: str, found: Diagnosis, misses: np.ndarray, none: str = "") -> Html:
    if len(misses) == 0:
        return join([element("h3", title), element("p", none, cls="note")]) if none else Html()
    rows = [_miss(found, int(miss)) for miss in misses]
    return join([element("h3", title), element("p", note, cls="note"), element("div", *rows, cls="misses")])


def _pairs(found: Diagnosis) -> Html:
    if len(found.pair_counts) == 0:
        return Html()
    cards = []
    for (there, back), (of_a, of_b), examples in zip(
        found.pair_counts.tolist(), found.pair_queries.tolist(), found.pair_examples, strict=True
    ):
        shown = examples[examples >= 0]
        if len(shown) == 0:
            continue
        a, b = (str(found.names[column[shown[0]]]) for column in (found.queries, found.nearest))
        sides = [
            element("span", picture(found, int(found.queries[miss]), "query"), picture(found, int(found.nearest[miss]), "wrong"), cls="two")
            for miss in shown
        ]
        cards.append(
            element(
                "div",
                element("p", *_class(a), " ↔ ", *_class(b)),
                element("p", f"{there} of {of_a} queries of the first found the second, {back} of {of_b} the other way round.", cls="note"),
                element("div", *sides, cls="sides"),
                cls="miss",
            )
        )
    note = (
        "Left the query, right beside it its nearest image. Where a few pairs make up many misses, look at their labels, or find more "
        "images of them."
    )
    return join([element("h3", "Most confused classes"), element("p", note, cls="note"), element("div", *cards, cls="misses")])


def _class(name: str) -> Iterable[Html]:
    """The name of a class, and its code where a character stands for it: two characters may look the same."""
    short = names.shown(name)
    yield element("b", short, title=names.full(name))
    if short != name:
        yield element("small", f" {name[:60]}")


def _hubs(found: Diagnosis) -> Html:
    title = element("h3", "Hubs")
    if len(found.hubs) == 0:
        return join([title, element("p", "None: no image is the nearest one of three or more queries of other classes.", cls="note")])
    cards = []
    for hub, (wrong, classes, right), examples in zip(found.hubs.tolist(), found.hub_counts.tolist(), found.hub_examples, strict=True):
        words = f"nearest to {wrong} queries of {_classes(classes)}, and to {right} of its own"
        drawn = [picture(found, int(found.queries[miss]), "query") for miss in examples[examples >= 0]]
        cards.append(element("div", _entry(found, hub, "", "wrong", words), element("div", *drawn, cls="sides"), cls="miss"))
    note = (
        "Images that are the nearest of many queries of other classes; on average an image is nearest to one. Below each some of those "
        "queries."
    )
    return join([title, element("p", note, cls="note"), element("div", *cards, cls="misses")])


def _classes(count: int) -> str:
    return "another class" if count == 1 else f"{count} other classes"
