"""The bucket of a new cluster, on a real server."""

from __future__ import annotations

import pytest

from pipelines.seaweed import SeaweedFS
from vapo.store.bucket import main


@pytest.fixture
def reached(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> SeaweedFS:
    """The server, by the variables that a Secret gives to the Job."""
    given = seaweed.environment
    monkeypatch.setenv("MINIO_ENDPOINT", given["AWS_ENDPOINT_URL"])
    monkeypatch.setenv("MINIO_ACCESS_KEY", given["AWS_ACCESS_KEY_ID"])
    monkeypatch.setenv("MINIO_SECRET_KEY", given["AWS_SECRET_ACCESS_KEY"])
    return seaweed


def test_it_is_made_once(reached: SeaweedFS, capsys: pytest.CaptureFixture[str]) -> None:
    client = reached.client()
    assert not client.bucket_exists("vapo-new")
    assert main(["minio://vapo-new"]) == 0
    assert client.bucket_exists("vapo-new")
    assert main(["minio://vapo-new/prefix"]) == 0
    assert capsys.readouterr().out == "minio://vapo-new: made\nminio://vapo-new/prefix: is there\n"
    client.remove_bucket("vapo-new")


def test_what_is_wrong_is_one_line(
    reached: SeaweedFS, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["vapo"]) == main([]) == 2
    monkeypatch.setenv("MINIO_SECRET_KEY", "wrong")
    assert main(["minio://vapo-new"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "give one URI" in lines[0]
    assert "refused the credentials" in lines[2]
    assert "wrong" not in lines[2]
