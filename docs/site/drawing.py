"""Draws docs/divide_and_conquer.svg: ``python docs/site/drawing.py``. It has a ground of its own, so that it can be read on any page."""

from __future__ import annotations

import math
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent / "divide_and_conquer.svg"
COLOURS = ("#2f7ed8", "#e0852b", "#2ca05a", "#a64ca6")
CELLS = 5  # coordinates of the embedding that a learner has
STYLE = """
text { font: 15px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2933; }
.title { font-size: 19px; font-weight: 700; } .small { font-size: 13px; fill: #52606d; }
.ground { fill: #f7f8fb; stroke: #d9dfe7; } .card { fill: #ffffff; stroke: #c8d1dc; }
.line { stroke: #52606d; stroke-width: 2; fill: none; }
.tip { fill: #52606d; } .empty { fill: #e8ecf1; }
@media (prefers-color-scheme: dark) {
text { fill: #e4e7eb; } .small { fill: #a9b7c6; } .ground { fill: #171c23; stroke: #33404f; } .card { fill: #202832; stroke: #445264; }
.line { stroke: #a9b7c6; } .tip { fill: #a9b7c6; } .empty { fill: #34404e; }
}"""


def mark(x: float, y: float, shape: int, colour: str) -> str:
    """An image: its shape is its class."""
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    if shape == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    return f'<path d="M{x:.1f} {y - 5.5:.1f}l5.2 9.2h-10.4z" fill="{colour}"/>'


def cluster(x: float, y: float, radius: float, count: int, colour: str) -> str:
    """Images of three classes that look alike, on a spiral that fills a circle evenly."""
    golden = math.pi * (3 - math.sqrt(5))
    marks = []
    for at in range(count):
        distance = radius * math.sqrt((at + 0.5) / count)
        marks.append(mark(x + distance * math.cos(at * golden), y + distance * math.sin(at * golden), at % 3, colour))
    return "".join(marks)


def embedding(x: float, y: float, own: int | None) -> str:
    """The coordinates of an embedding; those that are trained have a colour."""
    cells = []
    for at in range(CELLS * len(COLOURS)):
        learner = at // CELLS
        kind = f'fill="{COLOURS[learner]}"' if own in (None, learner) else 'class="empty"'
        cells.append(f'<rect x="{x + 9 * at}" y="{y}" width="7.5" height="18" rx="1.5" {kind}/>')
    return "".join(cells)


def arrow(path: str, x: float, y: float, turn: float = 0) -> str:
    """A line with a tip at (x, y)."""
    return f'<path class="line" d="{path}"/><path class="tip" d="M0 0l-10 -5.5v11z" transform="translate({x} {y}) rotate({turn})"/>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Lines of text, centred at x."""
    lines = "".join(f'<tspan x="{x}" dy="{0 if at == 0 else 19}">{line}</tspan>' for at, line in enumerate(words.split("\n")))
    return f'<text x="{x}" y="{y}" text-anchor="middle" class="{kind}">{lines}</text>'


def drawing() -> str:
    """The whole picture."""
    parts = ['<rect class="ground" x="1" y="1" width="938" height="388" rx="14"/>']
    parts += [
        f'<rect class="card" x="{x}" y="60" width="{width}" height="220" rx="10"/>' for x, width in ((24, 240), (316, 308), (676, 240))
    ]
    parts += [text(x, 40, title, "title") for x, title in ((144, "Divide"), (470, "Learners"), (796, "Conquer"))]
    for colour, (x, y) in zip(COLOURS, ((88, 118), (198, 122), (92, 222), (200, 220)), strict=True):
        parts.append(f'<circle cx="{x}" cy="{y}" r="47" fill="{colour}" opacity="0.13"/>{cluster(x, y, 37, 17, colour)}')
    for at, colour in enumerate(COLOURS):
        y = 92 + 52 * at
        parts.append(f'<circle cx="352" cy="{y}" r="21" fill="{colour}" opacity="0.13"/>{cluster(352, y, 15, 6, colour)}')
        parts += [arrow(f"M380 {y}h32", 420, y), embedding(430, y - 9, at)]
    parts.append('<circle class="empty" cx="796" cy="112" r="40"/>')
    mixed = cluster(796, 112, 33, 20, "{}").split("{}")
    parts.append("".join(piece + COLOURS[at % len(COLOURS)] for at, piece in enumerate(mixed[:-1])) + mixed[-1])
    parts += [arrow("M796 160v28", 796, 198, 90), embedding(706, 208, None), text(796, 256, "used for search", "small")]
    parts += [arrow("M270 170h32", 310, 170), arrow("M630 170h32", 670, 170)]
    parts.append(arrow("M470 350v16h-326v-14", 144, 344, -90))
    parts.append(text(307, 359, "every few epochs, with twice as many learners", "small"))
    captions = (
        (144, "k-means cuts the training set\ninto clusters of images that look alike"),
        (796, "at the end the whole\nembedding is trained together"),
    )
    parts += [text(x, 304, words, "small") for x, words in captions]
    parts.append(text(470, 304, "each trains on its own cluster,\nthrough a mask (here: fixed masks)", "small"))
    parts.append(text(796, 359, "colour: cluster, shape: class", "small"))
    label = "Divide the training set into clusters, train a learner with a mask on each, then train the whole embedding together."
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 390" role="img" aria-label="{label}">'
    return f"{head}<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"


if __name__ == "__main__":
    OUT.write_text(drawing(), encoding="utf-8")
