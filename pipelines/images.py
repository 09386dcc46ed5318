"""Which image a stage runs in on a cluster: the recipe's, else its kind's in components/images/references.toml."""

import tomllib
from pathlib import Path

from vapo.recipe import Recipe

REFERENCES = Path(__file__).resolve().parent.parent / "components" / "images" / "references.toml"
KINDS = {"base_model": "train", "value_pretraining": "train", "ppo_update": "train", "rollout": "rollout"}


def image_of(stage: str, recipe: Recipe) -> str:
    """The image of a stage: `resources.<stage>.image`, else `runtime.image`, else its kind's."""
    reference: str = recipe.resources.of(stage).image or recipe.runtime.image or references()[kind_of(stage, recipe)]
    return reference


def kind_of(stage: str, recipe: Recipe) -> str:
    """Which kind of image a stage runs in: the critic's values are computed in the one for training where advantages
    have an accelerator.
    """
    return "train" if stage == "advantages" and recipe.resources.of(stage).accelerators else KINDS.get(stage, "cpu")


def references() -> dict[str, str]:
    """The image of every kind: cpu, train, rollout."""
    found: dict[str, str] = tomllib.loads(REFERENCES.read_text(encoding="utf-8"))["images"]
    return found
