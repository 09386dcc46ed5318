"""For all tests: hypothesis draws the same examples every time, and small tensors stay on one thread."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch starts; threads make models this small ten times slower

# A shell that starts this in the background has SIGINT ignored, and every process of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("vapo", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("vapo")
