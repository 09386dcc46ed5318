"""`vapo lineage` on a real run: back to the prompts and the seed, and every digest recomputed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.pipelines.conftest import Undisturbed
from tests.running import ROOT, assert_refused, records, sha256, vapo

pytestmark = pytest.mark.slow


def lineage(undisturbed: Undisturbed, *arguments: str | Path) -> str:
    done = vapo("lineage", *arguments, "--workdir", undisturbed.workdir)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_runs_page_leads_back_to_every_task(undisturbed: Undisturbed) -> None:
    found = json.loads(lineage(undisturbed, undisturbed.folder.name, "--json"))
    stages = Counter(record["stage"] for record in found["records"])
    assert stages["problems"] == stages["base_model"] == stages["value_pretraining"] == stages["report"] == 1
    assert stages["rollout"] == 4
    assert found["unknown"] == []
    assert found["sha256"] == sha256(undisturbed.folder / "report.html")
    assert {record["image"] for record in found["records"]} == {found["records"][0]["image"]} != {""}
    assert len({record["commit"] for record in found["records"]}) == 1
    assert all(record["host"]["cpus"] for record in found["records"])
    assert bool(found["records"][0]["commit"]) == (ROOT / ".git").exists()


def test_the_records_name_one_another(undisturbed: Undisturbed) -> None:
    digests = {sha256(folder / "record.json") for folder in records(undisturbed.workdir)}
    for record in records(undisturbed.workdir).values():
        assert {source["record"] for source in record["inputs"].values()} <= digests


def test_a_policy_has_what_led_to_it_and_no_more(undisturbed: Undisturbed) -> None:
    found = json.loads(lineage(undisturbed, undisturbed.folder.name, "--iteration", "1", "--json"))
    stages = Counter(record["stage"] for record in found["records"])
    assert stages == Counter(
        ppo_update=1, advantages=1, rollout=2, verification=2, value_pretraining=1, base_model=1, problems=1
    )
    assert found["artifact"] == "new_policy"
    text = lineage(undisturbed, found["sha256"][:12])
    assert text.startswith(f"new_policy {found['sha256'][:12]}: 9 stages led to it")
    assert "seed 0" in text


def test_every_digest_is_as_recorded_until_a_byte_changes(undisturbed: Undisturbed) -> None:
    (undisturbed.workdir / ".vapo" / "server").mkdir()  # of a run that never got its server: it is not needed
    assert "all as recorded" in lineage(undisturbed, undisturbed.folder.name, "--verify")
    assert not list((undisturbed.workdir / ".vapo" / "server").iterdir())
    (folder,) = (f for f, r in records(undisturbed.workdir).items() if r["stage"] == "advantages")
    before = (folder / "experience").read_bytes()
    (folder / "experience").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        done = vapo("lineage", undisturbed.folder.name, "--verify", "--workdir", undisturbed.workdir)
    finally:
        (folder / "experience").write_bytes(before)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert lines[0].startswith("advantages of iteration 1: experience was changed")
    assert any(line.startswith("ppo_update of iteration 1: made from experience") for line in lines)
    assert lines[-1].startswith("error: ")


def test_the_page_is_written(undisturbed: Undisturbed, tmp_path: Path) -> None:
    lineage(undisturbed, undisturbed.folder.name, "--html", tmp_path / "lineage.html")
    assert (tmp_path / "lineage.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-run"], "no run"),
        (["no-such-run", "--iteration", "1"], "there are ['tiny-"),
        (["{run}", "--iteration", "9"], "policies after iterations [0, 1]"),
    ],
)
def test_what_is_not_there_is_said(undisturbed: Undisturbed, arguments: list[str], message: str) -> None:
    named = [text.format(run=undisturbed.folder.name) for text in arguments]
    assert_refused(vapo("lineage", *named, "--workdir", undisturbed.workdir), message)
