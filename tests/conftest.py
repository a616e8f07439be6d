"""What all tests share."""

from __future__ import annotations

import signal

# A shell starts background jobs with SIGINT ignored, and children inherit that; the tests of Ctrl-C need its default.
signal.signal(signal.SIGINT, signal.default_int_handler)
