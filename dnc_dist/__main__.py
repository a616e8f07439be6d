"""``python -m dnc_dist``: what the launcher starts, with the launcher's own Python."""

from __future__ import annotations

from dnc_dist.cli import main

if __name__ == "__main__":
    main()
