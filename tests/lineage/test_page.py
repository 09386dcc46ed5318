"""The page of a lineage holds every stage, every artifact and every edge, and needs nothing besides itself."""

from __future__ import annotations

import json
import re

from tests.lineage.conftest import Made
from vapo.lineage.graph import find_artifact, read_nodes, trace
from vapo.lineage.page import page


def html(made: Made) -> str:
    nodes = read_nodes(made.root)
    return page(trace(nodes, *find_artifact(nodes, str(made.root / "run" / "report" / "page"))))


def test_stages_artifacts_and_edges_are_drawn(made: Made) -> None:
    found = html(made)
    assert len(re.findall(r'class="stage"', found)) == 5
    assert len(re.findall(r'class="artifact"', found)) == 5
    assert len(re.findall(r'class="edge"', found)) == 6
    assert "not of this lineage" not in found


def test_every_record_is_there_to_be_shown(made: Made) -> None:
    drawn = html(made)
    (text,) = re.findall(r'<script type="application/json" id="records">(.*?)</script>', drawn, re.DOTALL)
    found = json.loads(text)
    records, shared = found["records"], found["shared"]
    sections = {record["stage"]: shared[record["shared"]["section"]] for record in records.values()}
    assert sections["ppo_update"] == {"key": "iteration--ppo-update"}
    assert len(shared) == 5 + 1 + 1 + 1  # sections, and once each libraries, host and metrics
    assert {record["stage"] for record in records.values()} == {
        *("problems", "base_model", "rollout", "ppo_update", "report"),
    }
    assert set(re.findall(r'data-record="(\w+)"', drawn)) == set(records)


def test_it_asks_for_nothing(made: Made) -> None:
    assert not re.search(r"""(src|href)\s*=|url\(|@import|https?://""", html(made))


def test_what_a_record_says_cannot_end_the_script(made: Made) -> None:
    made.write("evil/new", "x")
    made.task("evil", {"policy": "base-model/policy"}, started=9.0, purpose="</script><script>alert(1)</script>")
    nodes = read_nodes(made.root)
    found = page(trace(nodes, *find_artifact(nodes, str(made.root / "run" / "evil" / "new"))))
    assert "<script>alert" not in found
