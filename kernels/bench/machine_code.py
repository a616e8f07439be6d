"""What ptxas made of a kernel: registers and memory, spills, matrix instructions, and how many instructions a pair costs.

A loop of the machine code is the stretch from a label to the last jump back to it. The compiler moves blocks that it holds to be rare
behind the end, so a stretch may take in blocks of others. That is so of outer loops only: the loops counted here are the innermost
stretch around the loop over columns, and that loop.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = re.compile(r"\bH(?:MMA|GMMA)\b")
LOCAL = re.compile(r"\b(?:LDL|STL)\b")  # loads from and stores to local memory, where registers are spilled to
LABEL, INSTRUCTION = re.compile(r"(\.L_\w+):"), re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
JUMP = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")
COLUMN_LOOPS = {"_sample_kernel": MATRIX, "_largest_weight_kernel": MATRIX, "pair_loss_kernel": re.compile(r"\bLDG\b")}
"""Kernels that go through tiles of pairs, and an instruction that only their loop over blocks of columns has in an innermost loop."""


class Loop(NamedTuple):
    """Indices of its first and last instruction."""

    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first + 1

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


class Listing:
    """Instructions and loops of one kernel, from the text of nvdisasm."""

    def __init__(self, text: str) -> None:
        self.instructions: list[str] = []
        at: dict[str, int] = {}
        for line in text.splitlines():
            if label := LABEL.match(line):
                at[label[1]] = len(self.instructions)
            elif instruction := INSTRUCTION.match(line):
                self.instructions.append(instruction[1])
        ends: dict[int, int] = {}
        for number, instruction in enumerate(self.instructions):
            jump = JUMP.search(instruction)
            if jump and at.get(jump[1], number) < number:  # not the jump to itself behind the end
                ends[at[jump[1]]] = number
        self.loops = [Loop(first, last) for first, last in sorted(ends.items())]

    def count(self, pattern: re.Pattern[str], loop: Loop | None = None) -> int:
        inside = self.instructions[loop.first : loop.last + 1] if loop else self.instructions
        return sum(bool(pattern.search(instruction)) for instruction in inside)

    def inside(self, loop: Loop) -> list[Loop]:
        return [other for other in self.loops if loop.holds(other)]

    def tile_loop(self, of_columns: re.Pattern[str]) -> tuple[int, int]:
        """Instructions of one turn of the loop over tiles outside of the loops in it, and of one turn of its loop over columns.

        Raises:
            ValueError: there are no two such loops, one around the other.
        """
        innermost = [loop for loop in self.loops if not self.inside(loop) and self.count(of_columns, loop)]
        columns = max(innermost, key=lambda loop: self.count(of_columns, loop), default=None)
        around = min((loop for loop in self.loops if columns and loop.holds(columns)), key=len, default=None)
        if columns is None or around is None:
            raise ValueError(f"no loop over tiles around one over columns ({of_columns.pattern}) among {self.loops}")
        # The other loops in it take a pair into the few that are kept: how often they turn depends on the data.
        covered = {number for loop in self.inside(around) for number in range(loop.first, loop.last + 1)}
        return len(around) - len(covered), len(columns)


def _tool(name: str, cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(kernel: str, cubin: bytes, constants: dict[str, Any], warps: int) -> dict[str, int | float]:
    """What the machine code of a kernel takes.

    Args:
        constants: of its shape; of a kernel that goes through pairs, those that say how many it takes at once.

    Returns:
        ``registers`` of a thread and bytes of ``stack``, ``spills`` (instructions), ``matrix`` (instructions), and of a kernel of
        ``COLUMN_LOOPS`` the instructions of all threads together ``per_pair``, and ``per_pair_and_block`` of columns on top.
    """
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", _tool("cuobjdump", cubin, "-res-usage"))}
    listing = Listing(_tool("nvdisasm", cubin, "-c"))
    found: dict[str, int | float] = {"registers": usage["REG"], "stack": usage["STACK"]}
    found |= {"spills": listing.count(LOCAL), "matrix": listing.count(MATRIX)}
    if kernel in COLUMN_LOOPS:
        pairs = constants["PAIRS"] if "PAIRS" in constants else constants["ANCHORS"] * constants["REFERENCES"]
        outside, block = (32 * warps * instructions / pairs for instructions in listing.tile_loop(COLUMN_LOOPS[kernel]))
        found |= {"per_pair": outside, "per_pair_and_block": block}
    return found
