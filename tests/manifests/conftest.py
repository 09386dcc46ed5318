"""A copy of manifests/ that a test may break, and the tools that CI has."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from manifests.render import ROOT

pytest.importorskip("kubernetes_validate")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """manifests/, to be changed."""
    return Path(shutil.copytree(ROOT, tmp_path / "manifests", ignore=shutil.ignore_patterns("*.py", "__pycache__")))
