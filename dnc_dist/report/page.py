"""The report's page: everything in one HTML file, without scripts and without anything to load."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dnc_dist import __version__
from dnc_dist.base.files import write_text
from dnc_dist.report.charts import Chart, all_curves
from dnc_dist.report.course import course_of
from dnc_dist.report.divisions import division_chart, division_table
from dnc_dist.report.gallery import confident_mistakes, query_html
from dnc_dist.report.map import map_html
from dnc_dist.report.markup import Html, element, join
from dnc_dist.report.mistakes import mistakes_html
from dnc_dist.report.story import story_html
from dnc_dist.report.style import CSS
from dnc_dist.report.subspaces import subspaces_html
from dnc_dist.rundir import METRICS_FILE, REPORT_FILE
from dnc_dist.rundir.gallery import PictureGallery
from dnc_dist.rundir.record import RunRecord, number, read_run

NUM_QUERIES = 12
# Whatever the page holds, a browser runs and loads nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def _card(value: str, words: str, kind: str = "card") -> Html:
    return element("div", element("b", value), element("span", words), cls=kind)


def _cards(run: RunRecord) -> Iterator[Html]:
    """The result's numbers, the most important first."""
    result = run.result()
    for name in ("recall@1", "map@r", "map", "r_precision", "nmi"):
        value = number(result.get(name))
        if value is not None:
            yield _card(f"{value:.2%}", name, "card first" if name == "recall@1" else "card")
    untrained = [value for line in run.of("evaluation") if line["step"] == 0 and (value := number(line.get("recall@1"))) is not None]
    if untrained:
        yield _card(f"{untrained[0]:.2%}", "recall@1, untrained")
    yield _card(f"{float(run.epoch_ends[-1, 1]):.0f}", f"epochs ({run.last_step:,} steps)")
    seconds = sum(number(line.get("seconds")) or 0.0 for line in run.of("epoch"))
    if seconds:
        yield _card(_duration(seconds), "time of all epochs")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _header(run: RunRecord) -> Html:
    result = run.result()
    model, loss, learners = (run.setting(name) for name in ("model.backbone", "loss.name", "division.num_learners"))
    # Its name is enough here; the whole path is among the settings.
    data = Path(str(run.setting("data.root") or "")).name
    words = [
        str(part)
        for part in (data, model, loss and f"{loss} loss", learners and f"{learners} learner{'s' if learners != 1 else ''}")
        if part
    ]
    counts = [
        f"{value:,.0f} {words_}"
        for name, words_ in (
            ("num_queries", "queries"),
            ("num_gallery", "gallery images"),
            ("queries_left_out", "queries without a match in the gallery left out"),
        )
        if (value := number(result.get(name))) is not None and (value or name != "queries_left_out")
    ]
    loud = run.selected_on == "test"
    stamps = [element("span", f"{name}: {result[name]}", cls="stamp") for name in ("protocol", "list") if name in result]
    stamps.append(element("span", f"selected on {run.selected_on}", cls="stamp loud" if loud else "stamp"))
    if result:
        stamps.append(element("span", f"numbers of epoch {result['epoch']}", cls="stamp"))
    warning = element(
        "p",
        element("b", "Selected on test."),
        " The best epoch was picked by looking at the test split, as most published numbers are; it overstates what to expect of new "
        "data. Use ",
        element("code", "evaluation.select_on: validation"),
        " for an honest number.",
        cls="warning",
    )
    return element(
        "header",
        element("h1", run.path.resolve().name),
        element("p", " · ".join(words), cls="muted"),
        element("p", " · ".join(counts), cls="note", style="margin-top:6px") if counts else "",
        element("div", *stamps, cls="stamps"),
        warning if loud else "",
        element("div", *_cards(run), cls="cards"),
    )


def _chart(chart: Chart) -> Html:
    words = element("h3", chart.title), element("p", chart.note, cls="note")
    return element("figure", *words, element("div", chart.svg, cls="scroll"), cls="chart wide" if chart.wide else "chart")


def _curves(run: RunRecord) -> Html:
    charts = all_curves(run)
    legend = []
    if run.of("division"):
        line = element("i", style="border-left:2px dashed #9aa5b1;width:0")
        legend.append(element("span", line, "the number of learners changes"))
    if run.conquer_from is not None:
        box = element("i", style="background:var(--conquer);border:1px solid #eab308")
        legend.append(element("span", box, "conquer: the whole embedding is trained together"))
    if not charts:
        return Html()
    large = [_chart(chart) for chart in charts if chart.main]
    small = [_chart(chart) for chart in charts if not chart.main]
    parts = [element("h2", "Training"), element("p", *legend, cls="legend"), element("div", *large, cls="grid large")]
    if small:
        names = ", ".join(chart.title[0].lower() + chart.title[1:] for chart in charts if not chart.main)
        parts.append(element("details", element("summary", f"More curves: {names}"), element("div", *small, cls="grid")))
    return join(parts)


def _divisions(run: RunRecord) -> Html:
    chart = division_chart(run)
    if chart is None:
        return Html()
    numbers = element("summary", "All divisions in numbers"), element("div", division_table(run), cls="scroll")
    learners = subspaces_html(run.diagnosis) if run.diagnosis is not None else []
    parts = [element("h2", "What division did"), element("div", _chart(chart), cls="grid"), *learners, element("details", *numbers)]
    return join(parts)


def _map(run: RunRecord) -> Html:
    return Html() if run.diagnosis is None else map_html(run.diagnosis, course_of(run, run.diagnosis), run.damaged_maps)


def _queries(title: str, note: str, gallery: PictureGallery, queries: np.ndarray) -> Html:
    if len(queries) == 0:
        return Html()
    rows = [query_html(gallery, int(query)) for query in queries]
    return join([element("h3", title), element("p", note, cls="note"), element("div", *rows, cls="query-list")])


def _of_the_last_epoch(run: RunRecord) -> Html:
    """What is drawn from the last evaluation says so where the numbers at the top are those of an earlier one."""
    epochs = [line["epoch"] for line in run.of("evaluation")]
    if not epochs or run.result().get("epoch", epochs[-1]) == epochs[-1]:
        return Html()
    return element(
        "p",
        f"Of the network after the last epoch, {epochs[-1]}; the numbers at the top are those of epoch {run.result()['epoch']}.",
        cls="note",
    )


def _mistakes(run: RunRecord) -> Html:
    if run.diagnosis is not None:
        return join([element("h2", "Why it errs"), _of_the_last_epoch(run), mistakes_html(run.diagnosis)])
    if not run.result():
        return Html()
    words = "This run has left no diagnosis of all its queries: its last evaluation is still to come, or it was made by an earlier version."
    return join([element("h2", "Why it errs"), element("p", words, cls="note")])


def _gallery(run: RunRecord) -> Html:
    gallery = run.gallery
    if gallery is None:
        return Html()
    sample = np.arange(len(gallery.query_rows))
    right = int(gallery.correct()[:, 0].sum())
    note = (
        f"From a random sample of {len(sample)} queries; for {right} of them the nearest neighbour is right. "
        "Below each picture: class and distance."
    )
    # A diagnosis looks at all queries.
    mistakes = confident_mistakes(gallery) if run.diagnosis is None else sample[:0]
    mistakes_note = (
        "Wrong nearest neighbours among the sampled queries, the closest first. Often two classes that really look alike, or a wrong label."
    )
    legend = (
        element("span", element("i", style="background:var(--right)"), "right: same class as the query"),
        element("span", element("i", style="background:var(--wrong)"), "wrong"),
    )
    return join(
        [
            element("h2", "Nearest neighbours"),
            _of_the_last_epoch(run),
            element("p", *legend, cls="legend"),
            _queries("Random queries", note, gallery, sample[:NUM_QUERIES]),
            _queries("Most confident mistakes", mistakes_note, gallery, mistakes[:NUM_QUERIES]),
        ]
    )


def _settings_table(name: str, section: Any) -> Html:
    items = section.items() if isinstance(section, dict) else [("", section)]
    rows = [element("tr", element("td", element("code", str(key))), element("td", element("code", str(value)))) for key, value in items]
    return element("section", element("h3", name), element("table", *rows))


def _config(run: RunRecord) -> Html:
    if not run.config:
        return Html()
    tables = [_settings_table(str(name), section) for name, section in run.config.items()]
    settings = element("summary", "All settings of this run"), element("div", *tables, cls="settings")
    return join([element("h2", "Configuration"), element("details", *settings)])


def _footer(run: RunRecord) -> Html:
    passed_over = f" {run.passed_over:,} lines of it are none of a run and are left out." if run.passed_over else ""
    words = f"Written by dnc-dist {__version__} from {run.path}. All numbers are in "
    return element("footer", words, element("code", METRICS_FILE), ".", passed_over)


def build_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory, from whatever the run has left there so far; its path.

    Raises:
        InputError: the directory is not that of a run, or nothing has been logged yet.
        OSError: the page cannot be written.
    """
    run = read_run(Path(run_dir))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{run.path.resolve().name} · dnc-dist report"),
        element("style", Html(CSS)),
    )
    parts = [part(run) for part in (_header, story_html, _curves, _divisions, _mistakes, _map, _gallery, _config, _footer)]
    page = element("html", head, element("body", element("main", *parts)), lang="en")
    path = run.path / REPORT_FILE
    write_text(path, f"<!doctype html>{page}\n")
    return path
