"""From an artifact back to the prompts: which stages led to it, and what is known of where it lies."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.lineage.conftest import Made
from vapo.errors import UserError
from vapo.lineage.graph import dump, find_artifact, node_at, read_nodes, trace
from vapo.lineage.text import lines


def names(made: Made, what: str) -> list[str]:
    nodes = read_nodes(made.root)
    return [node.name for node in trace(nodes, *find_artifact(nodes, what)).nodes]


def test_everything_that_led_to_it_comes_once_and_after_what_it_led_to(made: Made) -> None:
    assert names(made, str(made.root / "run" / "report" / "page")) == [
        "report",
        "ppo_update of iteration 1",
        "rollout of iteration 1",
        "base_model",
        "problems",
    ]


def test_an_artifact_in_the_middle_has_what_came_before(made: Made) -> None:
    assert names(made, str(made.root / "run" / "base-model" / "policy")) == ["base_model", "problems"]
    assert names(made, str(made.root / "run" / "base-model")) == ["base_model", "problems"]


def test_an_artifact_is_found_by_the_beginning_of_its_digest(made: Made) -> None:
    digest = node_at(made.root / "run" / "base-model").record.outputs["policy"].sha256
    assert names(made, digest) == names(made, digest[:6]) == ["base_model", "problems"]


@pytest.mark.parametrize("what", ["12345", "ffffffffffff", "nonsense"])
def test_what_is_no_artifact_is_refused(made: Made, what: str) -> None:
    with pytest.raises(UserError, match=f"{what}.*at least 6"):
        find_artifact(read_nodes(made.root), what)


def test_a_file_that_the_record_does_not_name_is_refused(made: Made) -> None:
    stray = made.write("report/stray", "")
    with pytest.raises(UserError, match=r"stray: its record names no such output: there are \['page'\]"):
        find_artifact([], str(stray))


def test_a_chain_longer_than_pythons_stack_is_followed(made: Made) -> None:
    before = "base-model/policy"
    for number in range(1500):
        made.write(f"iteration-{number}--step/new", str(number))
        made.task(f"iteration-{number}--step", {"policy": before}, started=10.0 + number, iteration=number)
        before = f"iteration-{number}--step/new"
    assert len(names(made, str(made.root / "run" / before))) == 1502


def test_an_input_whose_maker_left_no_record_is_told(made: Made) -> None:
    shutil.rmtree(made.root / "run" / "problems")
    nodes = read_nodes(made.root)
    graph = trace(nodes, *find_artifact(nodes, str(made.root / "run" / "report" / "page")))
    assert len(graph.nodes) == 4
    assert len(graph.unknown) == 2
    assert all("problems/prompts" in line for line in graph.unknown)


def test_moved_artifacts_are_found_where_their_records_are(made: Made) -> None:
    moved = made.root.parent / "elsewhere"
    shutil.move(made.root, moved)
    node = node_at(moved / "run" / "report")
    assert node.path_of("page") == moved / "run" / "report" / "page"


def test_json_holds_the_records_and_the_edges(made: Made) -> None:
    nodes = read_nodes(made.root)
    found = json.loads(dump(trace(nodes, *find_artifact(nodes, str(made.root / "run" / "report" / "page")))))
    records = {record["digest"]: record for record in found["records"]}
    assert len(records) == 5
    assert len(found["edges"]) == 6
    for edge in found["edges"]:
        made_by = records[edge["from"]]
        assert edge["sha256"] in {output["sha256"] for output in made_by["outputs"].values()}
        assert edge["input"] in records[edge["to"]]["inputs"]
    assert found["artifact"] == "page"


def test_lines_say_who_made_each_input(made: Made) -> None:
    nodes = read_nodes(made.root)
    text = "\n".join(lines(trace(nodes, *find_artifact(nodes, str(made.root / "run" / "report" / "page")))))
    assert "from 2 ppo_update of iteration 1" in text
    assert "from 5 problems" in text
    assert "seed 3" in text
    assert "image@sha256:01" in text
    assert "1970-01-01 00:00:04 UTC, 0.5 s" in text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}'])
def test_a_record_that_cannot_be_read_is_named(made: Made, content: str) -> None:
    path = made.root / "run" / "report" / "record.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"cannot read the record .*report/record\.json"):
        read_nodes(made.root)
