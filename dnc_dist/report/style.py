"""The look of the report: light or dark as the reader's system is, one column on a phone, a grid on a screen, A4 on paper."""

from __future__ import annotations

from dnc_dist.rundir.record import MOST_MAPS

_STYLES = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #616e7c; --line: #e4e7eb; --axes: #cbd2d9; --card: #fff; --page: #f5f7fa;
  --blue: #2563eb; --right: #16a34a; --wrong: #dc2626; --conquer: #fef3c7; --stamp: #e0e7ff; --stamp-ink: #3730a3; --warning: #fef2f2;
  --followed: #9333ea; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --muted: #9fb0c3; --line: #33404f; --axes: #52606d;
  --card: #1c2530; --page: #12181f; --blue: #7aa7ff; --right: #4ade80; --wrong: #f87171; --conquer: #423a1d; --stamp: #2b3566;
  --stamp-ink: #c7d2fe; --warning: #3b1d1d; --followed: #c084fc; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0; }
p { margin: 0; }
.muted, .note { color: var(--muted); }
.note { font-size: 13px; }
.stamps { margin: 14px 0 0; display: flex; flex-wrap: wrap; gap: 8px; }
.stamp { border-radius: 999px; padding: 3px 12px; font-size: 13px; background: var(--stamp); color: var(--stamp-ink); }
.stamp.loud { background: var(--wrong); color: #fff; font-weight: 700; text-transform: uppercase; letter-spacing: .04em; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin-top: 20px; }
.card, .chart, .query-list, details, .warning { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 12px 16px; }
.card b { display: block; font-size: 24px; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: 13px; }
.card.first b { color: var(--blue); }
.warning { border-color: #fca5a5; background: var(--warning); padding: 12px 16px; margin-top: 16px; }
.story { margin: 0; padding: 14px 20px 14px 36px; background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.story li { padding: 3px 0; }
.advice { display: block; color: var(--muted); font-size: 14px; }
.advice::before { content: "→ "; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: 14px; }
.grid.large { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
details .grid { margin-top: 12px; }
.chart { padding: 14px 16px 10px; margin: 0; min-width: 0; }
.chart.wide { grid-column: 1 / -1; }
.chart svg { width: 100%; height: auto; display: block; margin-top: 8px; }
.scroll { overflow-x: auto; }
.chart.wide svg { min-width: 640px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 13px; color: var(--muted); margin-bottom: 12px; }
.legend i { display: inline-block; width: 14px; height: 12px; margin-right: 6px; vertical-align: -1px; }
.query-list { padding: 6px 16px; margin: 10px 0 24px; }
.query-row { display: flex; gap: 10px; padding: 12px 0; overflow-x: auto; border-top: 1px solid var(--line); }
.query-row:first-child { border-top: 0; }
.tile { margin: 0; flex: 0 0 80px; width: 80px; font-size: 12px; line-height: 1.3; }
.tile img { width: 80px; height: 80px; display: block; border-radius: 8px; border: 4px solid var(--line); object-fit: cover; }
.tile.query { flex-basis: 100px; width: 100px; margin-right: 10px; }
.tile.query img { width: 96px; height: 96px; border: 1px solid #9aa5b1; }
.tile.right img { border-color: var(--right); }
.tile.wrong img { border-color: var(--wrong); }
.tile span { display: block; margin-top: 4px; overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
.tile small { color: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
.tile.right small { color: var(--right); }
.tile.wrong small { color: var(--wrong); }
.lead { max-width: 75em; margin: 0 0 16px; }
h2 ~ h3 { margin-top: 26px; }
.misses { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 285px), 1fr)); gap: 12px; margin-top: 10px; }
.miss { padding: 10px 14px; background: var(--card); border: 1px solid var(--line); border-radius: 12px; min-width: 0; }
.miss .note { margin-top: 6px; }
.miss p small { color: var(--muted); }
.entry { display: flex; gap: 10px; padding: 4px 0; font-size: 13px; line-height: 1.3; }
.entry > div { min-width: 0; overflow-wrap: anywhere; align-self: center; }
.entry b { font-size: 15px; }
.entry b, .entry small, .entry span { display: block; }
.entry small, .what { color: var(--muted); font-size: 12px; }
.what.right { color: var(--right); }
.what.wrong { color: var(--wrong); }
.miss img { width: 64px; height: 64px; flex: none; border-radius: 8px; border: 3px solid var(--line); object-fit: cover; display: block; }
.miss img.right { border-color: var(--right); }
.miss img.wrong { border-color: var(--wrong); }
.sides { display: flex; flex-wrap: wrap; gap: 6px 12px; margin-top: 6px; }
.sides img { width: 52px; height: 52px; }
.two { display: flex; gap: 2px; }
.grid + .grid { margin-top: 14px; }
.chart + h3, .grid + h3 { margin-top: 20px; }
.clusters .cluster { padding: 8px 0; border-top: 1px solid var(--line); font-size: 13px; }
.clusters .cluster:first-child { border-top: 0; }
.clusters p > i { display: inline-block; width: 14px; height: 12px; margin-right: 8px; border-radius: 3px; vertical-align: -1px; }
.clusters img { border-radius: 6px; display: block; }
.map { position: relative; height: min(60vw, 620px); background: var(--card); border: 1px solid var(--line); border-radius: 12px;
  margin-top: 12px; overflow: hidden; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.map label { display: contents; }
.map input { display: none; }
.map i { position: absolute; left: var(--l); top: var(--t); width: 7px; height: 7px; margin: -3px 0 0 -3px; border-radius: 50%;
  background: var(--dot); --dot: var(--blue); --big: var(--b, 0); z-index: var(--big); cursor: pointer; }
.map i.off { --dot: var(--wrong); }
.map i::before { content: ""; position: absolute; left: calc(3.5px - var(--side) / 2); top: calc(3.5px - var(--side) / 2);
  width: var(--side); height: var(--side); border-radius: 5px; background: var(--sheet) var(--x) var(--y);
  outline: 2px solid var(--dot); transform: scale(var(--big)); }
.map label:hover i, .map input:checked ~ i { --dot: var(--followed); z-index: 2; }
.map label:hover i::before, .map input:checked ~ i::before { transform: scale(1); }
.map label i:hover { z-index: 3; }
.map label i:hover::before { transform: scale(2); }
.course > input { position: absolute; opacity: 0; pointer-events: none; }
.course { position: relative; }
.stops { display: flex; margin-top: 14px; font-size: 13px; line-height: 1.35; }
.stops label { flex: 1 1 0; min-width: 0; position: relative; padding: 24px 2px 0; text-align: center; cursor: pointer;
  color: var(--muted); }
.stops label::before { content: ""; position: absolute; top: 8px; left: 0; right: 0; height: 3px; background: var(--axes); }
.stops label:first-child::before { left: 50%; }
.stops label:last-child::before { right: 50%; }
.stops label::after { content: ""; position: absolute; top: 2px; left: calc(50% - 8px); width: 15px; height: 15px; border-radius: 50%;
  background: var(--card); border: 3px solid var(--axes); }
.stops label:hover::after { border-color: var(--blue); }
.stops b { font-weight: 600; }
.stops small { font-size: 12px; }
.stops em { font-style: normal; }
.stops span { display: block; }
@media (prefers-reduced-motion: no-preference) { .map i { transition: left .6s, top .6s; } .map i::before { transition: transform .3s; } }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
td, th { padding: 5px 12px 5px 0; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
th { color: var(--muted); font-weight: 500; border-top: 0; }
.numbers td, .numbers th { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
details { padding: 12px 16px; margin-top: 12px; }
summary { cursor: pointer; font-weight: 600; }
details table { margin-top: 10px; }
.settings { columns: 340px; column-gap: 32px; margin-top: 10px; }
.settings section { break-inside: avoid; margin-bottom: 14px; }
.settings td { width: 50%; overflow-wrap: anywhere; }
code { font: 12.5px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { margin-top: 40px; color: var(--muted); font-size: 13px; }
@page { size: A4; margin: 12mm; }
@media print {
  body { background: #fff; font-size: 12px; }
  main { padding: 0; max-width: none; }
  h2 { margin-top: 20px; break-after: avoid; }
  .chart, .card, .query-row, .story li, .miss { break-inside: avoid; }
  .grid.large { grid-template-columns: 1fr 1fr; }
  .misses { grid-template-columns: repeat(4, 1fr); gap: 6px; }
  .miss { padding: 6px 8px; }
  .tile, .tile.query { flex-basis: 54px; width: 54px; }
  .tile img, .tile.query img { width: 54px; height: 54px; border-width: 3px; }
  .query-row { padding: 6px 0; }
  .miss img { width: 40px; height: 40px; border-width: 2px; }
  .sides img { width: 34px; height: 34px; }
  .entry { gap: 6px; font-size: 10px; }
  .entry small, .what, .note { font-size: 10px; }
  h3, h3 + .note, .lead { break-after: avoid; }
  .cluster { break-inside: avoid; }
  .scroll, .query-row { overflow: hidden; }
  .chart.wide svg { min-width: 0; }
  .map { height: 95mm; }
  .stops { display: none; }
}
@media (max-width: 600px) { main { padding: 18px 12px 40px; } h1 { font-size: 21px; } .cards { grid-template-columns: 1fr 1fr; }
  .query-row { flex-wrap: wrap; }
  .map label:not(:hover) input:not(:checked) ~ i::before { transform: scale(0); }
  .stops em, .stops small { display: none; }
  .map { height: 90vw; } }
"""


def _choice_of_map() -> str:
    """Styles that show the chosen map on a screen; on paper, and where there is no choice, what they do not touch: the last map."""
    rules = []
    for n in range(1, MOST_MAPS + 1):
        chosen = f".course > input:nth-of-type({n})"
        label = f"~ .stops label:nth-of-type({n})"
        rules.append(
            f"""@media screen {{ {chosen}:not(:last-of-type):checked ~ .map i {{
  left: var(--l{n}, -99%); top: var(--t{n}, 0); --big: var(--b{n}, 0); }} }}
{chosen}:checked {label} {{ color: var(--ink); }}
{chosen}:checked {label}::after {{ background: var(--blue); border-color: var(--blue); }}
{chosen}:focus-visible {label} {{ outline: 2px solid var(--blue); border-radius: 8px; }}
@media (max-width: 600px) {{ {chosen}:checked {label} {{ flex: 0 0 112px; }}
  {chosen}:checked {label} :is(em, small) {{ display: revert; font-style: normal; }} }}
"""
        )
    return "".join(rules)


CSS = _STYLES + _choice_of_map()
