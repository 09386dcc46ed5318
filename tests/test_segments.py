"""What one run of a chain writes down for the next, and how the next checks it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pipelines.seaweed import SeaweedFS
from tests.store.conftest import Place, at
from vapo.errors import UserError
from vapo.lineage.record import read_record
from vapo.segments import key_of, read_handed_over
from vapo.stage import run
from vapo.store import sha256_of


@dataclass
class Artifact:
    path: str
    uri: str
    metadata: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def place(seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return at(seaweed, tmp_path, monkeypatch)


def made(folder: Path, name: str, text: str, **metadata: str) -> Artifact:
    path = folder / name
    path.write_text(text)
    return Artifact(str(path), f"s3://bucket/run/{name}", metadata)


def hand_off(folder: Path, store: str, chain: str = "c", segment: int = 1) -> tuple[Artifact, dict[str, Artifact]]:
    inputs = {name: made(folder, name, name, record=f"of {name}") for name in ("policy", "history", "prompts")}
    for artifact in inputs.values():
        artifact.metadata["sha256"] = sha256_of(Path(artifact.path))
    (folder / "hand-off").mkdir()
    target = Artifact(str(folder / "hand-off" / "handed_over"), "s3://bucket/run/handed_over")
    parameters = {"store": store, "chain": chain, "segment": segment, "segments": 3, "stopped": False}
    run(
        "hand_off",
        section="",
        parameters=parameters,
        inputs={**inputs, "critic": None},
        outputs={"handed_over": target},
    )
    return target, inputs


def test_handed_over_is_where_everything_lies_and_what_it_is(tmp_path: Path) -> None:
    target, inputs = hand_off(tmp_path, str(tmp_path / "store"))
    assert json.loads(Path(target.path).read_text()) == {
        "chain": "c",
        "segment": 1,
        "segments": 3,
        "stopped": False,
        "artifacts": {
            name: {"uri": f"s3://bucket/run/{name}", "sha256": found.metadata["sha256"], "record": f"of {name}"}
            for name, found in inputs.items()
        },
    }
    assert target.metadata["sha256"] == sha256_of(Path(target.path))
    assert not (tmp_path / "store").exists()


def test_a_bucket_has_it_under_the_name_of_chain_and_segment(place: Place, tmp_path: Path) -> None:
    assert read_handed_over(place.uri, "abc", 2) is None
    target, _ = hand_off(tmp_path, place.uri, "abc", 2)
    assert read_handed_over(place.uri, "abc", 2) == json.loads(Path(target.path).read_text())
    assert read_handed_over(place.uri, "abd", 2) is None
    assert set(place.keys()) == {key_of("abc", 2)}


def take_over(folder: Path, known: dict[str, dict[str, str]]) -> Artifact:
    """A policy that comes from an importer, without metadata."""
    policy = made(folder, "policy", "weights")
    (folder / "take-over").mkdir()
    target = Artifact(str(folder / "take-over" / "new_policy"), "s3://bucket/second/new_policy")
    text = json.dumps(known)
    run("take_over", section="", parameters={}, known=text, inputs={"policy": policy}, outputs={"new_policy": target})
    return target


def test_taken_over_is_a_copy_that_knows_where_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("weights")
    digest = sha256_of(tmp_path / "w")
    target = take_over(tmp_path, {"policy": {"sha256": digest, "record": "of its maker"}})
    assert Path(target.path).read_text() == "weights"
    assert target.metadata["sha256"] == digest
    source = read_record(tmp_path / "take-over" / "record.json").inputs["policy"]
    assert (source.sha256, source.record, source.uri) == (digest, "of its maker", "s3://bucket/run/policy")


def test_what_is_not_what_was_handed_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"input policy: .*was changed since it was written \(sha256 expected 0000"):
        take_over(tmp_path, {"policy": {"sha256": "0" * 64, "record": ""}})
    assert not (tmp_path / "take-over" / "new_policy").exists()
