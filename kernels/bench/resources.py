"""Write the tables of what compiled kernels take into kernels/README.md: `PYTHONPATH=kernels python -m bench.resources [--workers 2]`.

Needs no GPU, and some minutes: every default configuration is compiled for every architecture (`bench.compiled`). The tables name the
version of Triton, whose compiler the numbers are of.
"""

from __future__ import annotations

import ast
import re
from typing import Any

from bench.compiled import ARCHITECTURES, compile_all, workers_option
from bench.machine_code import COLUMN_LOOPS
from bench.measure import ROOT
from bench.table import README, replaced

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program can have
DIM = 512  # of the sum over column blocks
PAIR_CASES = ("small", "medium", "large", "floors, small", "floors, medium", "floors, large")  # the others differ in details only
MOST = ("registers", "spills", "stack", "shared", "matrix")
LIMITS = {"spills": 0, "stack": 0}


def launched_kernels() -> set[str]:
    """Names of the jitted functions that some module of the package launches as `name[grid](...)`."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "kernels" / "dnc_kernels").glob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    jitted = {
        node.name for node in nodes if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    return jitted & {func.value.id for func in calls if isinstance(func, ast.Subscript) and isinstance(func.value, ast.Name)}


def kernels_table(kernels: list[dict[str, Any]]) -> list[str]:
    """A line for every kernel and architecture, with the most that one of its variants takes."""
    lines = ["| kernel | compute capability | variants | registers | spills | stack | shared bytes | matrix instructions |"]
    lines.append("|" + " --- |" * 8)
    names = dict.fromkeys((line["module"], line["kernel"]) for line in sorted(kernels, key=lambda line: (line["module"], line["kernel"])))
    for (module, name), architecture in ((name, architecture) for name in names for architecture in ARCHITECTURES):
        variants = [line for line in kernels if (line["module"], line["kernel"], line["architecture"]) == (module, name, architecture)]
        most = [str(max(line[column] for line in variants)) for column in MOST] if variants else [""] * len(MOST)
        lines.append(f"| `{name}` | {architecture / 10} | {len(variants)} | {' | '.join(most)} |")
    return lines


def pairs_table(kernels: list[dict[str, Any]]) -> list[str]:
    """Instructions for each pair, of the kernels that go through pairs."""
    lines = ["| kernel | compute capability | case | tile | a pair | a block of columns on top | a pair at D = 512 |"]
    lines.append("|" + " --- |" * 7)
    counted = [line for line in kernels if line["kernel"] in COLUMN_LOOPS and line["case"] in PAIR_CASES]
    for line in sorted(counted, key=lambda line: (line["kernel"], line["architecture"], PAIR_CASES.index(line["case"]))):
        variant, outside, block = line["variant"], line["per_pair"], line["per_pair_and_block"]
        if variant.get("FLOORS"):
            continue
        columns = variant.get("COLUMNS") or variant["WIDTH"]
        pairs = f"{variant['PAIRS']} pairs" if "PAIRS" in variant else f"{variant['ANCHORS']} x {variant['REFERENCES']}"
        tile = f"{pairs}, {columns} columns, {variant['warps']} warps"
        numbers = f"{outside:.0f} | {block:.1f} | {outside + block * DIM / columns:.0f}"
        lines.append(f"| `{line['kernel']}` | {line['architecture'] / 10} | {line['case']} | {tile} | {numbers} |")
    return lines


def tables(report: dict[str, Any]) -> str:
    """Both tables."""
    heading = f"**Triton {report['triton']}**, every default configuration; of several variants the most that one takes:"
    between = "Instructions of all threads together for each pair of a tile, the cases of `bench.compiled`:"
    return "\n".join([heading, "", *kernels_table(report["kernels"]), "", between, "", *pairs_table(report["kernels"])])


def problems(text: str) -> list[str]:
    """What the tables of the README lack or break: a kernel without a line, a limit."""
    section = text.partition("<!-- results:resources -->")[2].partition("<!-- results:end -->")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\d+\.\d) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", section, re.MULTILINE)
    table = {(name, round(10 * float(capability))): dict(zip(MOST, map(int, most), strict=True)) for name, capability, _, *most in rows}
    expected = {(name, architecture) for name in launched_kernels() for architecture in ARCHITECTURES}
    found = [f"{name} for {architecture} has no line" for name, architecture in sorted(expected - table.keys())]
    found += [f"{name} for {architecture} is no kernel" for name, architecture in sorted(table.keys() - expected)]
    for (name, architecture), most in table.items():
        limits = LIMITS | {"shared": SHARED_LIMIT[architecture], "registers": 255}
        found += [f"{name} for {architecture}: {most[what]} {what}" for what, limit in limits.items() if most[what] > limit]
    counted = set(re.findall(r"^\| `(\w+)` \| \d+\.\d \| [a-z]", section, re.MULTILINE))
    return found + [f"{name}: no instructions are counted" for name in sorted(COLUMN_LOOPS.keys() - counted)]


if __name__ == "__main__":
    report = compile_all(workers_option((__doc__ or "").split("\n")[0]))
    README.write_text(replaced(README.read_text(encoding="utf-8"), "resources", tables(report)), encoding="utf-8")
