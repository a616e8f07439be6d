"""What compiled kernels take: the committed tables, and how machine code is read. Nothing is compiled here."""

from __future__ import annotations

import re

import pytest

from bench.machine_code import MATRIX, Listing
from bench.resources import launched_kernels, problems, tables
from bench.table import README, replaced

# The loop over tiles .L_x_1 holds one over columns, .L_x_2, and one that takes pairs in, .L_x_3; .L_x_9 is the trap behind the end.
CODE = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/               @P1 BRA `(.L_x_4) ;
.L_x_2:
        /*0030*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_2) ;
.L_x_4:
        /*0050*/                   MUFU.LG2 R6, R7 ;
        /*0060*/                   FADD R6, R6, R5 ;
.L_x_3:
        /*0070*/                   SHFL.BFLY PT, R2, R1, 0x1, 0x1f ;
        /*0080*/                   STL [R1+0x4], R2 ;
        /*0090*/               @P2 BRA `(.L_x_3) ;
        /*00a0*/               @P3 BRA `(.L_x_1) ;
        /*00b0*/                   EXIT ;
.L_x_9:
        /*00c0*/                   BRA `(.L_x_9);
"""


def report() -> dict:
    """Of compilations that never were."""
    line = {"module": "m", "case": "small", "registers": 64, "spills": 0, "stack": 0, "shared": 1024, "matrix": 8}
    shapes = {"pair_loss_kernel": {"PAIRS": 4, "COLUMNS": 512}}
    other = {"ANCHORS": 16, "REFERENCES": 64, "WIDTH": 64, "FLOORS": False}
    kernels = [
        {**line, "kernel": name, "architecture": architecture, "variant": shapes.get(name, other) | {"warps": 4}}
        | {"per_pair": 80.0, "per_pair_and_block": 3.0}
        for name in launched_kernels()
        for architecture in (80, 90)
    ]
    return {"triton": "3.0", "kernels": kernels}


def in_readme(found: dict) -> str:
    return replaced("<!-- results:resources -->\n<!-- results:end -->\n", "resources", tables(found))


def test_the_readme_has_every_kernel_within_the_limits():
    text = README.read_text(encoding="utf-8")
    assert problems(text) == [], "run `PYTHONPATH=kernels python -m bench.resources`"
    assert re.search(r"<!-- results:resources -->\n\*\*Triton \d", text)


def test_a_missing_kernel_and_a_broken_limit_are_told():
    found = report()
    assert problems(in_readme(found)) == []
    gone = found["kernels"].pop()
    [spilling, greedy] = found["kernels"][:2]
    spilling["spills"], greedy["shared"] = 3, 1 << 20
    told = problems(in_readme(found))
    assert f"{gone['kernel']} for {gone['architecture']} has no line" in told or any("has no line" in line for line in told)
    assert f"{spilling['kernel']} for {spilling['architecture']}: 3 spills" in told
    assert f"{greedy['kernel']} for {greedy['architecture']}: {1 << 20} shared" in told


def test_the_most_that_a_variant_takes_is_shown():
    found = report()
    variant = found["kernels"][0] | {"registers": 200, "case": "wide"}
    text = "\n".join(tables({"triton": "3.0", "kernels": [*found["kernels"], variant]}).splitlines())
    assert f"| `{variant['kernel']}` | {variant['architecture'] / 10} | 2 | 200 | 0 | 0 | 1024 | 8 |" in text


def test_loops_spills_and_matrix_instructions_are_found_in_machine_code():
    listing = Listing(CODE)
    assert [len(loop) for loop in listing.loops] == [10, 2, 3]
    assert listing.tile_loop(MATRIX) == (5, 2)
    assert listing.count(MATRIX) == 1


def test_code_without_a_loop_over_tiles_is_no_number():
    straight = "\n".join(line for line in CODE.splitlines() if "BRA" not in line)
    with pytest.raises(ValueError, match="no loop over tiles"):
        Listing(straight).tile_loop(MATRIX)
