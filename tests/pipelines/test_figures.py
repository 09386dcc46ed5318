"""The metrics of a run on a cluster: from the records that its stages leave in a real bucket, each said once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.figures import Figures
from pipelines.seaweed import BUCKET, SeaweedFS
from vapo.lineage.record import Record
from vapo.lineage.records import Records

RUN = "5f0c1f9e-2b7a-4a52-9d7e-0d5b7a3c9e11"


@pytest.fixture
def store(seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=160)


def printed(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def record(stage: str, iteration: int, ended: float, run: str = RUN, **metrics: float) -> Record:
    parameters: dict[str, Any] = {"iteration": iteration}
    if "shards" in metrics:
        parameters["shards"] = metrics.pop("shards")
    return Record(
        run=run,
        stage=stage,
        iteration=iteration,
        purpose="training" if stage in ("rollout", "verification") else "",
        seed=0,
        parameters=parameters,
        section={},
        section_sha256="0" * 64,
        inputs={},
        outputs={},
        metrics=metrics,
        started=0.0,
        ended=ended,
        seconds=2.0,
        vapo="0.1.0",
        commit="",
        image="",
        python="3.11",
        libraries={},
        host={"name": "n", "machine": "m", "cpus": 1},
    )


def test_every_metric_is_said_once_and_as_it_arrives(store: str, console: Console) -> None:
    figures, records = Figures(store, RUN, console), Records(store)
    figures.look()
    assert printed(console) == []
    records.add(record("ppo_update", 1, 3.0, entropy=0.5))
    records.add(record("verification", 1, 2.0, reward_mean=-0.25, accuracy=0.375))
    records.add(record("rollout", 1, 1.0, length_mean=20.0))
    records.add(record("rollout", 1, 0.5, length_mean=999.0, shards=2))  # a part of the one above
    records.add(record("ppo_update", 1, 3.0, "another-run", entropy=9.0))
    for _ in range(2):
        figures.look()
    (line,) = printed(console)
    assert line == "iteration 1: length 20 reward -0.25 accuracy 37.5% entropy 0.500"
    records.add(record("ppo_update", 2, 4.0, entropy=0.25))
    figures.look()
    figures.table()
    assert printed(console)[1] == "iteration 2: entropy 0.250"
    assert [line.split()[0] for line in printed(console)[2:]] == ["iteration", "1", "2"]
    assert "999" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("AWS_SECRET_ACCESS_KEY", "", "AWS_SECRET_ACCESS_KEY must be set"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "refused the credentials"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "no answer from http://127.0.0.1:9"),
    ],
)
def test_a_store_out_of_reach_is_said_once(
    store: str, console: Console, name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    figures = Figures(store, RUN, console)
    for _ in range(2):
        figures.look()
    figures.table()
    (line,) = printed(console)
    assert line.startswith(f"metrics are not shown: store {store}: ")
    assert message in line
