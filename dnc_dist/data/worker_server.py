"""Imported by the server process that loader workers are forked from, and by nothing else: what they need, and deafness to signals."""

from __future__ import annotations

from dnc_dist.data.workers import leave_signals

# First: the imports take seconds, in which signals come, too.
leave_signals()

import dnc_dist.data.stream  # noqa: E402, F401
