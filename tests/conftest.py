"""For all tests: hypothesis draws the same examples every time, small tensors stay on one thread, a real S3 server."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from pipelines.seaweed import SeaweedFS, serving

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch starts; threads make models this small ten times slower

# A shell that starts this in the background has SIGINT ignored, and every process of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("vapo", derandomize=True, deadline=None, max_examples=50, database=None)
settings.load_profile("vapo")


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """A SeaweedFS of its own on loopback, started for the first test that asks for it."""
    with serving(tmp_path_factory.mktemp("seaweed")) as server:
        yield server
