"""A prefix in a bucket of a real server for each test, and what the server counted meanwhile."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.seaweed import BUCKET, METRICS, SeaweedFS
from vapo.store import Manifest, save_checkpoint


@dataclass
class Place:
    """A store in the bucket, a folder for the rest, and the server."""

    root: Path
    uri: str
    server: SeaweedFS

    def save(self, files: dict[str, bytes], name: str = "policy") -> Manifest:
        """A checkpoint of `files`; its manifest is root/name.json."""
        folder = self.root / f"{name}-files"
        for path, content in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return save_checkpoint(folder, self.root / f"{name}.json", store=self.uri, kind="policy", facts={})

    def keys(self) -> dict[str, int]:
        """Key below the prefix -> bytes of everything that a reader of the bucket sees."""
        prefix = self.uri.split("/", 3)[3]
        found = self.server.client().list_objects(BUCKET, f"{prefix}/", recursive=True)
        return {item.object_name.removeprefix(f"{prefix}/"): item.size for item in found}

    def counted(self, metric: str, **labels: str) -> float:
        """One of the server's counters, say `s3_bucket_traffic_received_bytes_total`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.server.ports[METRICS]}/metrics") as answer:
            lines = re.findall(rf"^SeaweedFS_{metric}{{(.*)}} (\S+)$", answer.read().decode(), re.MULTILINE)
        wanted = [f'{name}="{value}"' for name, value in {"bucket": BUCKET, **labels}.items()]
        return sum(float(value) for found, value in lines if all(label in found for label in wanted))

    def received(self) -> float:
        """Bytes of bodies that the server took."""
        return self.counted("s3_bucket_traffic_received_bytes_total")

    def sent(self) -> float:
        """Bytes of objects that the server gave."""
        return self.counted("s3_bucket_traffic_sent_bytes_total")

    def writes(self) -> float:
        """Requests that write: PUT and POST."""
        return sum(self.counted("s3_request_total", type=method) for method in ("PUT", "POST"))


def at(server: SeaweedFS, root: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A place of its own in a server's bucket; the environment leads there."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("VAPO_CACHE", raising=False)
    return Place(root, f"s3://{BUCKET}/{root.name}", server)


@pytest.fixture
def place(seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """In the server that all tests share."""
    return at(seaweed, tmp_path, monkeypatch)


@pytest.fixture
def mortal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """In a server that the test may kill."""
    server = SeaweedFS(tmp_path / "server")
    server.start()
    try:
        yield at(server, tmp_path, monkeypatch)
    finally:
        server.stop()
