"""Whether a recipe's rollout engine is installed: asked before any work starts, and again where the engine starts."""

from __future__ import annotations

from importlib.util import find_spec

from vapo import recipe
from vapo.errors import UserError


def check_installed(section: recipe.Rollout) -> None:
    """Refuse an engine that this Python does not have; imports nothing of it.

    Raises:
        UserError: it is not installed; says how it is installed.
    """
    if section.engine == "vllm" and find_spec("vllm") is None:
        raise UserError(
            "rollout.engine is 'vllm', which is not installed: pip install 'vapo[vllm]' (GPU), make setup-dev in a "
            "clone (no GPU), or set rollout.engine to 'cpu'"
        )
