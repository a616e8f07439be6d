"""The report's page: everything in one HTML file, without scripts and without anything to load."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dnc_dist import __version__
from dnc_dist.gallery import Gallery
from dnc_dist.report.charts import Chart, all_curves
from dnc_dist.report.divisions import division_chart, division_table
from dnc_dist.report.gallery import confident_mistakes, query_html
from dnc_dist.report.record import RunRecord, number, read_run
from dnc_dist.report.style import CSS

NUM_QUERIES = 12


def _cards(run: RunRecord) -> Iterator[str]:
    """The result's numbers, the most important first."""
    result = run.result()
    for name in ("recall@1", "map@r", "map", "r_precision", "nmi"):
        value = number(result.get(name))
        if value is not None:
            yield f'<div class="card{" first" if name == "recall@1" else ""}"><b>{value:.2%}</b><span>{name}</span></div>'
    before = [line for line in run.of("evaluation") if line["step"] == 0 and "recall@1" in line]
    if before:
        yield f'<div class="card"><b>{float(before[0]["recall@1"]):.2%}</b><span>recall@1, untrained</span></div>'
    steps = max(int(line["step"]) for line in run.lines)
    yield f'<div class="card"><b>{float(run.epoch_ends[-1, 1]):.0f}</b><span>epochs ({steps:,} steps)</span></div>'
    seconds = sum(number(line.get("seconds")) or 0.0 for line in run.of("epoch"))
    if seconds:
        yield f'<div class="card"><b>{_duration(seconds)}</b><span>time of all epochs</span></div>'


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _header(run: RunRecord) -> str:
    result = run.result()
    model, loss, learners = (run.setting(name) for name in ("model.backbone", "loss.name", "division.num_learners"))
    words = [str(part) for part in (run.setting("data.root"), model, loss and f"{loss} loss", learners and f"{learners} learners") if part]
    counts = [
        f"{int(result[name]):,} {words_}"
        for name, words_ in (("num_queries", "queries"), ("num_gallery", "gallery images"))
        if name in result
    ]
    if number(result.get("queries_left_out")):
        counts.append(f"{int(result['queries_left_out']):,} queries without a match in the gallery left out")
    stamps = [f'<span class="stamp">{name}: {html.escape(str(result[name]))}</span>' for name in ("protocol", "list") if name in result]
    loud = run.selected_on == "test"
    stamps.append(f'<span class="stamp{" loud" if loud else ""}">selected on {html.escape(run.selected_on)}</span>')
    if result:
        stamps.append(f'<span class="stamp">numbers of epoch {result["epoch"]}</span>')
    warning = ""
    if loud:
        warning = (
            '<p class="warning"><b>Selected on test.</b> The best epoch was picked by looking at the test split, as most published numbers '
            "are; it overstates what to expect of new data. Use <code>evaluation.select_on: validation</code> for an honest number.</p>"
        )
    details = f'<p class="note" style="margin-top:6px">{html.escape(" · ".join(counts))}</p>' if counts else ""
    return (
        f'<header><h1>{html.escape(run.path.resolve().name)}</h1><p class="muted">{html.escape(" · ".join(words))}</p>{details}'
        f'<div class="stamps">{"".join(stamps)}</div>{warning}<div class="cards">{"".join(_cards(run))}</div></header>'
    )


def _chart(chart: Chart) -> str:
    words = f'<h3>{html.escape(chart.title)}</h3><p class="note">{html.escape(chart.note)}</p>'
    return f'<figure class="chart{" wide" if chart.wide else ""}">{words}<div class="scroll">{chart.svg}</div></figure>'


def _curves(run: RunRecord) -> str:
    charts = "".join(_chart(chart) for chart in all_curves(run))
    legend = ""
    if run.of("division"):
        legend = '<span><i style="border-left:2px dashed #9aa5b1;width:0"></i>the number of learners changes</span>'
    if run.conquer_from is not None:
        legend += '<span><i style="background:#fef3c7;border:1px solid #fde68a"></i>conquer: the whole embedding is trained together</span>'
    return f'<h2>Training</h2><p class="legend">{legend}</p><div class="grid">{charts}</div>' if charts else ""


def _divisions(run: RunRecord) -> str:
    chart = division_chart(run)
    if chart is None:
        return ""
    table = f'<details><summary>All divisions in numbers</summary><div class="scroll">{division_table(run)}</div></details>'
    return f'<h2>Divisions</h2><div class="grid">{_chart(chart)}</div>{table}'


def _queries(title: str, note: str, gallery: Gallery, queries: np.ndarray) -> str:
    if len(queries) == 0:
        return ""
    rows = "".join(query_html(gallery, int(query)) for query in queries)
    return f'<h3>{html.escape(title)}</h3><p class="note">{html.escape(note)}</p><div class="query-list">{rows}</div>'


def _gallery(run: RunRecord) -> str:
    gallery = run.gallery
    if gallery is None:
        return ""
    sample = np.arange(len(gallery.query_rows))
    right = int(gallery.correct()[:, 0].sum())
    note = (
        f"From a random sample of {len(sample)} queries; for {right} of them the nearest neighbour is right. "
        "Below each picture: class and distance."
    )
    mistakes = confident_mistakes(gallery)
    mistakes_note = (
        "Wrong nearest neighbours among the sampled queries, the closest first. Often two classes that really look alike, or a wrong label."
    )
    return (
        '<h2>Nearest neighbours</h2><p class="legend"><span><i style="background:var(--right)"></i>right: same class as the query</span>'
        '<span><i style="background:var(--wrong)"></i>wrong</span></p>'
        + _queries("Random queries", note, gallery, sample[:NUM_QUERIES])
        + _queries("Most confident mistakes", mistakes_note, gallery, mistakes[:NUM_QUERIES])
    )


def _settings_table(name: str, section: Any) -> str:
    items = section.items() if isinstance(section, dict) else [("", section)]
    rows = "".join(
        f"<tr><td><code>{html.escape(str(key))}</code></td><td><code>{html.escape(str(value))}</code></td></tr>" for key, value in items
    )
    return f"<section><h3>{html.escape(name)}</h3><table>{rows}</table></section>"


def _config(run: RunRecord) -> str:
    if not run.config:
        return ""
    tables = "".join(_settings_table(str(name), section) for name, section in run.config.items())
    return f'<h2>Configuration</h2><details><summary>All settings of this run</summary><div class="settings">{tables}</div></details>'


def build_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory, from whatever the run has left there so far; its path.

    Raises:
        InputError: the directory is not that of a run, or nothing has been logged yet.
    """
    run = read_run(Path(run_dir))
    body = "".join(part(run) for part in (_header, _curves, _divisions, _gallery, _config))
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(run.path.resolve().name)} · dnc-dist report</title><style>{CSS}</style></head><body><main>{body}"
        f"<footer>Written by dnc-dist {html.escape(__version__)} from {html.escape(str(run.path))}. "
        "All numbers are in <code>metrics.jsonl</code>.</footer>"
        "</main></body></html>\n"
    )
    path = run.path / "report.html"
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path
