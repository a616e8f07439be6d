"""The checks one after the other on all ranks; rank 0 shows what they found."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, TextIO

from dnc_dist.base.errors import InputError
from dnc_dist.config import RunConfig
from dnc_dist.doctor.table import Check, Section, as_json, failures, render
from dnc_dist.processes import distributed

# What compares ranks with each other.
OF_SEVERAL = ("network", "parity")
_NEEDS_RANKS = (
    "needs two workers or more: --nproc 2; on a machine with one GPU, CUDA_VISIBLE_DEVICES='' dnc-dist doctor --nproc 2 uses the CPU"
)


class Wanted(NamedTuple):
    """How much the checks look at."""

    of_config: bool
    """Whether a configuration was given; if not, what they are given as one holds defaults."""
    decode_all: bool
    """Whether data decodes every image, not a sample."""
    all_losses: bool
    """Whether parity looks at every loss of the table."""


def run_checks(names: Sequence[str], cfg: RunConfig, wanted: Wanted, *, json: bool) -> list[str]:
    """Collective. Run the checks and show the results on stdout.

    Args:
        names: of the checks, in order.
        cfg: the configuration that they are about.
        wanted: how much they look at.
        json: show one JSON object at the end, not a table after each check.

    Returns:
        What failed, as "check: row".

    Raises:
        InputError: the only check compares ranks, and there is one.
    """
    world = distributed.world_size()
    if world == 1 and len(names) == 1 and names[0] in OF_SEVERAL:
        raise InputError(f"doctor {names[0]} {_NEEDS_RANKS}")
    sections: list[Section] = []
    with _own_stdout() as out:
        for name in names:
            sections.append(_run(name, cfg, wanted))
            if distributed.is_main() and not json:
                out.write(f"{render(sections[-1])}\n")
                out.flush()
            if sections[-1].final:
                break
        if distributed.is_main() and json:
            out.write(f"{as_json(sections, world)}\n")
    return failures(sections)


@contextmanager
def _own_stdout() -> Iterator[TextIO]:
    """The real stdout, for results alone: whatever libraries print meanwhile goes to stderr."""
    sys.stdout.flush()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as real:
        os.dup2(2, 1)
        try:
            yield real
        finally:
            sys.stdout.flush()
            os.dup2(real.fileno(), 1)


def _run(name: str, cfg: RunConfig, wanted: Wanted) -> Section:
    """Collective. One check, the same on all ranks. Imported now: the environment comes first, and may lack what the others need."""
    if name in OF_SEVERAL and distributed.world_size() == 1:
        return Section(name, "not checked", [Check("workers", "1", "warning", _NEEDS_RANKS)], {})
    if name == "env":
        from dnc_dist.doctor.env import check_env

        return check_env(cfg)
    if name == "data":
        from dnc_dist.doctor.data import check_data

        return check_data(cfg, decode_all=wanted.decode_all)
    if name == "network":
        from dnc_dist.doctor.network import check_network

        return check_network()
    from dnc_dist.doctor.parity import check_parity
    from dnc_dist.doctor.settings import plan_of_config, plan_of_table

    if wanted.of_config:
        return check_parity(plan_of_config(cfg))
    return check_parity(*plan_of_table("all" if wanted.all_losses else "default"))
