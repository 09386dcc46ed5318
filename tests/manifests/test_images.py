"""Our images under their published names, wherever kustomize finds them; and whom they run as."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from manifests.check import faults
from manifests.images import WRITTEN, component
from manifests.pod_security import containers_of, pods_of
from manifests.render import ROOT, rendered
from pipelines.images import references

DIGEST = f"sha256:{'0123456789abcdef' * 4}"


def test_what_is_written_is_what_is_published() -> None:
    assert WRITTEN.read_text(encoding="utf-8") == component(references())


def test_a_published_image_reaches_every_pod(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Job, a Pod and a TrainingRuntime, which is no kind that kustomize knows."""
    published = {"cpu": f"registry:5000/team/vapo-cpu@{DIGEST}", "train": "registry:5000/team/vapo-train:1.2"}
    (copy / "components/images/kustomization.yaml").write_text(component(published))
    monkeypatch.setattr("manifests.references.references", lambda: published)
    found = set()
    for folder, alone in ((copy / "overlays/trainer", True), (copy / "files", False)):
        objects = rendered(folder)
        assert list(faults(objects, alone=alone)) == []
        found |= {c["image"] for thing in objects for pod in pods_of(thing) for c in containers_of(pod["spec"])}
    assert set(published.values()) <= found
    monkeypatch.undo()
    assert any("make manifests" in fault for fault in faults(objects, alone=False))


def test_volumes_belong_to_the_images_group() -> None:
    containerfile = ROOT.parent / "components/images/Containerfile"
    if not containerfile.is_file():
        pytest.skip("no Containerfile here")
    users = re.findall(r"^USER (\d+):(\d+)$", containerfile.read_text(encoding="utf-8"), re.MULTILINE)
    assert users
    (pod,) = rendered(ROOT / "files")
    assert {int(group) for _, group in users} == {pod["spec"]["securityContext"]["fsGroup"]}
