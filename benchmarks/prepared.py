"""What programs that build a data set do with what they have read: write it, describe it, and end as `dnc-dist data prepare` does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from dnc_dist.base.errors import InputError, RunError, exit_code
from dnc_dist.base.progress import Progress
from dnc_dist.data.index import open_index
from dnc_dist.data.readers import Reading
from dnc_dist.data.shards import write_shards
from dnc_dist.data.summary import describe


def prepare(read: Callable[[Progress], Reading], out: Path, *, seed: int, force: bool) -> None:
    """Write a data set to a folder, and print what is in it.

    Args:
        read: lists its samples.
        out: the folder.
        seed: of the order of classes in the shards.
        force: replace a data set that is there.

    Raises:
        SystemExit: an error was printed; its exit code.
    """
    progress = Progress(True)
    try:
        reading = read(progress)
        for note in reading.notes:
            print(note)
        written = write_shards(reading, out, seed=seed, force=force, progress=progress.counter("images", "img"), say=print)
        print(describe(open_index(out)))
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(exit_code(error)) from None
    print(f"written to {out}" if written else f"{out} already holds this very data set; nothing to do")
