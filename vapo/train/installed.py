"""Whether what [train] asks for is installed, asked before any work starts; imports nothing of it."""

from __future__ import annotations

from importlib.util import find_spec

from vapo import recipe
from vapo.errors import UserError


def check_installed(train: recipe.Train) -> None:
    """Refuse a setting whose library is not there.

    Raises:
        UserError: DeepSpeed or peft is wanting; says how it is installed.
    """
    if train.engine == "deepspeed" and find_spec("deepspeed") is None:
        raise UserError(
            "train.engine 'deepspeed': it is not installed: DS_BUILD_OPS=0 pip install --no-build-isolation "
            "'vapo[deepspeed]', after torch, or set train.engine to 'torch'"
        )
    if train.lora_rank and find_spec("peft") is None:
        raise UserError(
            f"train.lora_rank {train.lora_rank}: peft is not installed: pip install 'vapo[lora]', or set it to 0"
        )
