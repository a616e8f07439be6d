"""Write the tables of kernels/README.md from the results files: `PYTHONPATH=kernels python -m bench.table`.

A family's tables stand between `<!-- results:FAMILY -->` and `<!-- results:end -->`, one for every device of
benchmarks/results/kernels_FAMILY_*.jsonl. Of several rows about one size and implementation the last one counts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from bench import kmeans, margin
from bench.measure import ROOT

README, RESULTS = ROOT / "kernels" / "README.md", ROOT / "benchmarks" / "results"
SIZE = {
    "margin": {"masks": "masks", "learners": "K", "rows": "B", "dim": "D"},
    "kmeans": {"dtype": "x", "dim": "D", "rows": "N", "centroids": "K"},
}
SIZE["turns"] = SIZE["margin"]
MASKS = {"soft": 0, "sliced": 1}  # their order
IMPLEMENTATIONS = {"margin": list(margin.IMPLEMENTATIONS), "kmeans": list(kmeans.IMPLEMENTATIONS), "turns": []}  # a row of turns is of two
TIME = {"margin": "full_ms", "kmeans": "iteration_ms"}
SHORT = {"out of memory": "out of memory", "no time left in the budget": "not measured"}


def milliseconds(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def cell(row: dict[str, Any] | None, family: str) -> str:
    """Median milliseconds, or in short why there are none."""
    if row is None:
        return ""
    if row["outcome"] != "ok":
        return SHORT.get(row["outcome"], row["outcome"].split(":")[0])
    return milliseconds(row[TIME[family]][0])


def ours(row: dict[str, Any] | None, family: str) -> dict[str, str]:
    """What only the Triton implementation is asked about."""
    if row is None or row["outcome"] != "ok":
        return {}
    found = {"triton MB": row.get("peak_mb"), "roofline": row.get("roofline")}
    if family == "margin":
        found["triton in a graph"] = row["graph_ms"][0] if "graph_ms" in row else None
    else:
        found["of copy bandwidth"] = row.get("copy_bandwidth")
    percent = ("roofline", "of copy bandwidth")
    return {name: f"{100 * value:.0f} %" if name in percent else milliseconds(value) for name, value in found.items() if value is not None}


def in_turns(row: dict[str, Any] | None) -> dict[str, str]:
    """Both steps of a row of `bench.turns` and how they compare, or in short why there is nothing."""
    if row is None:
        return {}
    if row["outcome"] != "ok":
        return {"reference / eager": SHORT.get(row["outcome"], row["outcome"].split(":")[0])}
    _, low, high = row["turn_ratios"]
    found = {"eager": milliseconds(row["eager_ms"][0]), "reference": milliseconds(row["reference_ms"][0])}
    return found | {"reference / eager": f"{row['ratio']:.2f}", "20 to 80 % of the turns": f"{low:.2f} to {high:.2f}"}


def device_table(family: str, rows: list[dict[str, Any]]) -> str:
    """The table of one device: a line a size, a column an implementation."""
    present = {row["implementation"] for row in rows if not row["outcome"].startswith("not run")}
    ran = [name for name in IMPLEMENTATIONS[family] if name in present]
    sizes = dict.fromkeys(tuple(row[name] for name in SIZE[family]) for row in rows if "rows" in row)
    table = []
    for size in sorted(sizes, key=lambda size: [MASKS.get(value, value) for value in size]):
        at = {row["implementation"]: row for row in rows if tuple(row.get(name) for name in SIZE[family]) == size}
        line = dict(zip(SIZE[family].values(), map(str, size), strict=True)) | {name: cell(at.get(name), family) for name in ran}
        eager = at.get("eager", {})
        line |= ours(at.get("triton"), family) | ({"eager MB": milliseconds(eager["peak_mb"])} if eager.get("peak_mb") else {})
        table.append(line | in_turns(at.get("turns")))
    columns = list(dict.fromkeys(name for line in table for name in line))
    last = rows[-1]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items() if number)
    lines = [
        f"**{last['device']}** ({last['threads']} threads of {last['cores']} cores; {versions}; commit {last['commit']}), milliseconds:",
        "",
    ]
    lines += [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    lines += [f"| {' | '.join(line.get(name, '') for name in columns)} |" for line in table]
    return "\n".join(lines)


def family_tables(family: str, rows: Iterable[dict[str, Any]]) -> str:
    """The tables of all devices."""
    latest: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if not row["interpreted"] and row["implementation"] != "sweep":
            latest[(row["device"], row["implementation"], *(row.get(name) for name in SIZE[family]))] = row
    devices = dict.fromkeys(row["device"] for row in latest.values())
    return "\n\n".join(device_table(family, [row for row in latest.values() if row["device"] == device]) for device in devices)


def replaced(text: str, name: str, table: str) -> str:
    """The text with this table between its markers, or as it is where it has no such markers."""
    before, start, rest = text.partition(f"<!-- results:{name} -->\n")
    if not start:
        return text
    _, end, after = rest.partition("<!-- results:end -->")
    return f"{before}{start}{table}\n{end}{after}"


def filled(text: str) -> str:
    """The README with its tables as the results files have them."""
    for family in SIZE:
        files = sorted(RESULTS.glob(f"kernels_{family}_*.jsonl"))
        rows = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        table = family_tables(family, rows) or "No results yet."
        text = replaced(text, family, table)
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
