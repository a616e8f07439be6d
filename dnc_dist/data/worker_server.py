"""Imported by the server process that loader workers are forked from, and by nothing else: what they need, and deafness to signals."""

from __future__ import annotations

import dnc_dist.data.stream  # noqa: F401
from dnc_dist.data.workers import leave_signals

leave_signals()
