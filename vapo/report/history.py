"""The history stage: one growing table of every stage's metrics, handed from iteration to iteration."""

from __future__ import annotations

import json
from pathlib import Path

from vapo import recipe
from vapo.errors import UserError
from vapo.schemas import HISTORY
from vapo.tables import read_table, write_table


def history(
    section: recipe.Section,
    *,
    new_history: Path,
    iteration: int,
    purpose: str,
    previous: Path | None = None,
    **metrics: Path,
) -> dict[str, float]:
    """Append metrics files to the previous HISTORY (or start one); returns the new rows for the Kubeflow UI.

    Args:
        purpose: "training", or what these rollouts were sampled for: then they stand as, say, "evaluation/rollout".
        metrics: a stage's name -> its metrics as JSON.
    """
    del section  # this stage has no settings
    rows = read_table(previous, HISTORY).to_pylist() if previous else []
    found = {}
    for stage in sorted(metrics):
        shown = name_in_history(stage, purpose)
        for name, value in _read(metrics[stage]).items():
            rows.append({"iteration": iteration, "stage": shown, "name": name, "value": value})
            found[f"{shown}/{name}"] = value
    write_table(new_history, HISTORY, {name: [row[name] for row in rows] for name in HISTORY.names})
    return found


def name_in_history(stage: str, purpose: str) -> str:
    """The name that a stage has in HISTORY: rollouts for other purposes than training say which."""
    return f"{purpose}/{stage}" if purpose not in ("", "training") and stage in ("rollout", "verification") else stage


def _read(path: Path) -> dict[str, float]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a stage's metrics as JSON: {error}") from None
    return {str(name): float(value) for name, value in found.items()}
