"""The report's first words: what the run reached, what dividing did in it, and what to try next; one sentence for each finding."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from math import sqrt
from typing import NamedTuple

import numpy as np

from dnc_dist.report.markup import Html, element, join
from dnc_dist.rundir.record import Line, RunRecord, number

ERRORS = 2.0
"""Two recalls differ if they are so many standard errors apart: less than one of twenty equal ones does by chance."""
_ALIKE, _DIFFERENT = 0.95, 0.5
"""Masks whose mean cosine is above the first hardly differ; below the second, learners have subspaces of their own."""
_MANY = 0.1
"""The share of images left out, of misses between equal images, of anchors without negatives, or of time spent waiting, that is worth
a word."""

_MOST = 0.5
"""The share of misses between a few pairs of classes that is worth a word."""


class Finding(NamedTuple):
    """A sentence about the run, and what to do about it if there is something."""

    says: str
    advice: str = ""


class _Recall(NamedTuple):
    epoch: int
    value: float
    queries: float

    def points_over(self, other: _Recall) -> float:
        """How much higher this recall is, in points; 0 where the number of queries cannot tell the two apart."""
        mean = (self.value + other.value) / 2
        error = sqrt(max(0.0, 2 * mean * (1 - mean)) / max(1.0, self.queries))
        difference = self.value - other.value
        return 100 * difference if abs(difference) > ERRORS * error else 0.0


def findings(run: RunRecord) -> list[Finding]:
    """What there is to say, the most important first; empty where nothing has been measured."""
    return list(chain(_result(run), _course(run), _misses(run), _division(run), _groups(run), _masks(run), _batches(run), _time(run)))


def story_html(run: RunRecord) -> Html:
    """The findings as a list, with advice set apart; nothing without any."""
    found = findings(run)
    if not found:
        return Html()
    items = [element("li", one.says, element("span", one.advice, cls="advice") if one.advice else "") for one in found]
    return join([element("h2", "What happened"), element("ul", *items, cls="story")])


def _recalls(run: RunRecord) -> list[_Recall]:
    """Those of the test split, in the order of the epochs."""
    found = []
    for line in run.of("evaluation"):
        value, queries = number(line.get("recall@1")), number(line.get("num_queries"))
        if value is not None and 0 <= value <= 1:
            found.append(_Recall(line["epoch"], value, queries if queries is not None and queries > 0 else 1.0))
    return found


def _result(run: RunRecord) -> Iterator[Finding]:
    final, recalls = number(run.result().get("recall@1")), _recalls(run)
    if final is None or not recalls:
        return
    queries = recalls[-1].queries
    says = f"For {final:.1%} of {queries:,.0f} queries the nearest image is of the same class"
    untrained = recalls[0] if recalls[0].epoch == 0 and len(recalls) > 1 else None
    if untrained is None:
        yield Finding(f"{says}.")
        return
    gain = _Recall(-1, final, queries).points_over(untrained)
    before = f"before training it was so for {untrained.value:.1%}"
    if gain > 0:
        yield Finding(f"{says}; {before}.")
    elif gain < 0:
        yield Finding(f"{says}; {before}. Training has made retrieval worse.", "Lower optim.lr, or train fewer epochs.")
    else:
        advice = "Train longer (schedule.epochs), raise optim.lr, or begin with pretrained weights (model.weights)."
        yield Finding(f"{says}; {before}. So many queries cannot tell the two apart.", advice)


def _course(run: RunRecord) -> Iterator[Finding]:
    """Whether training ended too early or too late, by the last quarter of the evaluations."""
    trained = [recall for recall in _recalls(run) if recall.epoch > 0]
    if len(trained) < 4:
        return
    last, best = trained[-1], max(trained, key=lambda recall: recall.value)
    earlier = trained[-1 - max(1, len(trained) // 4)]
    if run.selected_on == "last" and (lost := best.points_over(last)) > 0:
        advice = (
            "Choose the epoch on held-out classes (data.validation_classes with evaluation.select_on: validation), or train fewer epochs."
        )
        yield Finding(f"recall@1 was {lost:.1f} points higher at epoch {best.epoch} than at the end.", advice)
    elif (gained := last.points_over(earlier)) > 0:
        says = f"recall@1 still rose when training ended: by {gained:.1f} points from epoch {earlier.epoch} to {last.epoch}."
        yield Finding(says, "Train longer (schedule.epochs).")


def _misses(run: RunRecord) -> Iterator[Finding]:
    """Whether a look at the images may help more than training does."""
    found = run.diagnosis
    if found is None or found.counts[1] == 0:
        return
    misses = float(found.counts[1])
    if (twins := int(found.twins[0])) > _MANY * misses:
        says = f"{twins / misses:.0%} of the misses are practically the same image in two classes."
        yield Finding(says, "Look at them below: one label of each two may be wrong, or the image is there twice.")
    if len(found.pair_counts) and (share := float(found.pair_counts.sum()) / misses) > _MOST:
        pairs = len(found.pair_counts)
        says = f"{share:.0%} of the misses are between {'two classes' if pairs == 1 else f'{pairs} pairs of classes'}."
        yield Finding(says, "Look at them below: their labels may overlap, or they need more images.")


def _division(run: RunRecord) -> Iterator[Finding]:
    divided = [line for line in run.of("division") if len(line.get("sizes", ())) > 1]
    if not divided:
        if run.of("division"):
            yield Finding("The training set was not divided: one learner had all images.")
        return
    last = divided[-1]
    counts = list(dict.fromkeys(len(line["sizes"]) for line in divided))
    says = f"From epoch {divided[0]['epoch']} the training set was divided among {' → '.join(map(str, counts))} learners."
    share = number(last.get("matched_share"))
    if share is not None and len(divided) > 1:
        says += f" At the last division {share:.0%} of the images kept their learner."
    if run.conquer_from is not None:
        says += f" From epoch {run.conquer_from:.0f} on the whole embedding was trained together."
        yield Finding(says)
        yield from _conquered(run, run.conquer_from)
    else:
        yield Finding(
            f"{says} The whole embedding was never trained together.",
            "Search compares whole embeddings: let training end with some epochs of it (division.conquer_from).",
        )
    yield from _left_out(last)


def _groups(run: RunRecord) -> Iterator[Finding]:
    """Whether batches were made of close classes."""
    groups = [groups for line in run.of("division") if (groups := number(line.get("groups")))]
    if groups:
        yield Finding(
            f"Batches were made of close classes: {groups[-1]:.0f} groups at the last division.",
            "Where many classes have two names this teaches that one thing is two. What it gains: a run with division.batches: learner.",
        )


def _conquered(run: RunRecord, conquer_from: float) -> Iterator[Finding]:
    """Whether recall fell since the whole embedding is trained together; an evaluation counts the epochs that were done."""
    trained = [recall for recall in _recalls(run) if recall.epoch > 0]
    before, last = [recall for recall in trained if recall.epoch <= conquer_from], trained[-1:]
    if before and last[0].epoch > conquer_from and (lost := before[-1].points_over(last[0])) > 0:
        yield Finding(
            f"recall@1 fell by {lost:.1f} points while the whole embedding was trained together.",
            "Lower division.distill if it is set; else try division.conquer_batches: whole, or more epochs of it (schedule.epochs).",
        )


def _left_out(division: Line) -> Iterator[Finding]:
    left_out = number(division.get("left_out")) or 0.0
    share = left_out / max(1.0, left_out + sum(division["sizes"]))
    if share > _MANY:
        says = f"The last division left out {share:.0%} of the images, which have no second one of their class in their cluster."
        yield Finding(says, "Fewer learners (division.num_learners) leave out fewer.")


def _masks(run: RunRecord) -> Iterator[Finding]:
    cosines = run.series("train", "mask_orthogonality").y
    if not len(cosines) or not any(len(line.get("sizes", ())) > 1 for line in run.of("division")):
        return
    cosine = float(cosines[-1])
    if cosine > _ALIKE:
        yield Finding(
            f"The learners' masks hardly differ (mean cosine {cosine:.2f}): dividing chose which images met in a batch, "
            "but learners had no subspaces of their own.",
            "No harm: subspaces that differ (model.masks.split_scale below 1, or model.masks: fixed) found less in our runs. "
            "What dividing gains at all: a run with division.num_learners: 1.",
        )
    elif cosine > _DIFFERENT:
        yield Finding(f"The learners' masks differ in part (mean cosine {cosine:.2f}).")
    else:
        yield Finding(f"The learners' masks differ (mean cosine {cosine:.2f}): each had a subspace of its own.")


def _batches(run: RunRecord) -> Iterator[Finding]:
    alone, size = run.series("train", "anchors_without_negatives").y, number(run.setting("schedule.batch_size"))
    if len(alone) and size and (share := float(alone[-max(1, len(alone) // 4) :].mean()) / size) > _MANY:
        says = f"At the end {share:.0%} of the images of a batch found no negative that was near enough."
        yield Finding(says, "Larger batches (schedule.batch_size) or past ones (loss.memory) hold more negatives.")


def _time(run: RunRecord) -> Iterator[Finding]:
    waits = [value for line in run.of("epoch") if (value := number(line.get("share_data"))) is not None]
    if waits and (share := float(np.median(waits))) > _MANY:
        yield Finding(f"Training waited for images during {share:.0%} of its time.", "More loader processes (data.workers) may help.")
