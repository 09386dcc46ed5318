"""What was changed, lost or made from what changed is named, and nothing else is."""

from __future__ import annotations

import json

import pytest

from tests.lineage.conftest import Made
from vapo.lineage.graph import Graph, find_artifact, read_nodes, trace
from vapo.lineage.verify import verify
from vapo.store import sha256_of


def graph(made: Made) -> Graph:
    nodes = read_nodes(made.root)
    return trace(nodes, *find_artifact(nodes, str(made.root / "run" / "report" / "page")))


def test_what_is_as_it_was_recorded_passes(made: Made) -> None:
    checked: list[str] = []
    assert verify(graph(made), checked.append) == []
    assert checked == ["problems", "base_model", "rollout of iteration 1", "ppo_update of iteration 1", "report"]


def test_a_changed_table_and_all_made_from_it_are_named(made: Made) -> None:
    found = graph(made)
    made.write("iteration--rollout/rollouts", "tampered")
    wrong = verify(found)
    assert len(wrong) == 3
    assert "rollout of iteration 1: rollouts was changed" in wrong[0]
    assert wrong[1] == "ppo_update of iteration 1: made from rollouts, which changed since or are missing"
    assert wrong[2] == "report: made from policy, which changed since or are missing"


def test_a_missing_artifact_is_named(made: Made) -> None:
    found = graph(made)
    (made.root / "run" / "report" / "page").unlink()
    (line,) = verify(found)
    assert line.startswith("report: page is missing")


@pytest.mark.parametrize("content", [None, "other weights"])
def test_a_checkpoints_file_in_the_store_is_checked_too(made: Made, content: str | None) -> None:
    found = graph(made)
    manifest = json.loads((made.root / "run" / "iteration--ppo-update" / "new_policy").read_text())
    digest = next(f["sha256"] for f in manifest["files"] if f["path"] == "model.safetensors")
    stored = made.store / "objects" / digest[:2] / digest
    stored.unlink()
    if content is not None:
        stored.write_text(content)
    wrong = verify(found)
    assert len(wrong) == 2
    assert wrong[0].startswith("ppo_update of iteration 1: new_policy: policy checkpoint")
    assert "model.safetensors" in wrong[0]
    assert wrong[1].startswith("report: made from policy")


def test_a_changed_record_is_seen_by_who_names_it(made: Made) -> None:
    """Its digest is another one then: what was made from it has no maker any more."""
    path = made.root / "run" / "problems" / "record.json"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))
    wrong = verify(graph(made))
    assert len(wrong) == 2
    assert all(line.startswith("no record of who made") for line in wrong)


def test_a_record_changed_while_it_is_checked_is_named(made: Made) -> None:
    found = graph(made)
    path = made.root / "run" / "problems" / "record.json"
    path.write_text(path.read_text() + "\n")
    assert any(line.startswith("problems: its record") for line in verify(found))
    path.unlink()
    assert any("is missing" in line for line in verify(found))


def test_verifying_writes_nothing(made: Made) -> None:
    before = {path: sha256_of(path) for path in made.root.parent.rglob("*") if path.is_file()}
    verify(graph(made))
    assert {path: sha256_of(path) for path in made.root.parent.rglob("*") if path.is_file()} == before
