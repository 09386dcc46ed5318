"""Which image a stage runs in on a cluster: the recipe's, else its kind's in components/images/references.toml."""

import tomllib
from pathlib import Path

from vapo.recipe import Recipe

REFERENCES = Path(__file__).resolve().parent.parent / "components" / "images" / "references.toml"
KINDS = {"base_model": "train", "value_pretraining": "train", "ppo_update": "train", "rollout": "rollout"}


def image_of(stage: str, recipe: Recipe) -> str:
    """The image of a stage: `resources.<stage>.image`, else `runtime.image`, else its kind's.

    The critic's values are computed in the image for training where advantages have an accelerator.
    """
    asked = getattr(recipe.resources, stage)
    kind = "train" if stage == "advantages" and asked.accelerators else KINDS.get(stage, "cpu")
    reference: str = asked.image or recipe.runtime.image or references()[kind]
    return reference


def references() -> dict[str, str]:
    """The image of every kind: cpu, train, rollout."""
    found: dict[str, str] = tomllib.loads(REFERENCES.read_text(encoding="utf-8"))["images"]
    return found
