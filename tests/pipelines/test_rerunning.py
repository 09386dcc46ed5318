"""`vapo rerun`, `vapo compare` and `vapo gc` on a real run: what is done again, what differs, what may go."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.collecting import collect
from pipelines.rerunning import rerun
from pipelines.workdir import RERUN, Workdir, locked
from tests.pipelines.conftest import Undisturbed
from tests.running import assert_refused, counts, executed, records, sha256, snapshot, vapo
from vapo.errors import UserError
from vapo.lineage.graph import read_nodes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The undisturbed run in another place, where it may be worked on."""
    workdir = tmp_path_factory.mktemp("again") / "runs"
    shutil.copytree(undisturbed.workdir, workdir, symlinks=True)
    return Undisturbed(workdir, undisturbed.done)


def again(place: Undisturbed, *arguments: str) -> Path:
    """`vapo rerun` of the run; the new run's folder."""
    before = {path.name for path in place.workdir.iterdir()}
    done = vapo("rerun", place.folder.name, *arguments, "--workdir", place.workdir, "--cold")
    assert done.returncode == 0, (done.stdout, done.stderr)
    (made,) = {path.name for path in place.workdir.iterdir()} - before
    return place.workdir / made


def results(folder: Path) -> dict[tuple[str, str], str]:
    outputs = json.loads((folder / RERUN).read_text())["outputs"]
    return {(row["task"], row["output"]): row["result"] for row in outputs}


@pytest.fixture(scope="module")
def same(place: Undisturbed) -> Path:
    """The advantages again, just as they were."""
    untouched = snapshot(place.workdir / place.folder.name, place.workdir / ".vapo" / "artifacts")
    folder = again(place, "--stage", "advantages")
    now = snapshot(place.workdir / place.folder.name, place.workdir / ".vapo" / "artifacts")
    assert untouched.items() <= now.items()
    return folder


@pytest.fixture(scope="module")
def other(place: Undisturbed) -> Path:
    """The advantages again, under another alpha."""
    return again(place, "--stage", "advantages", "--iteration", "1", "--set", "advantages.alpha=0.5")


@pytest.fixture(scope="module")
def onwards(place: Undisturbed) -> Path:
    """The last evaluation and all that follows from it."""
    return again(place, "--stage", "evaluation", "--iteration", "1", "--downstream")


# Rerun


def test_a_stage_that_is_executed_anew_gives_the_same_bytes(place: Undisturbed, same: Path) -> None:
    assert same.name == f"{place.folder.name}-rerun-1"
    assert executed(same) == Counter(advantages=1)
    task = "advantages of iteration 1"
    assert results(same) == {(task, "experience"): "same bytes", (task, "metrics"): "same but for times"}


def test_the_new_record_names_the_old_ones(place: Undisturbed, same: Path) -> None:
    of_stage = [
        r for r in records(place.workdir).values() if r["stage"] == "advantages" and r["section"]["alpha"] < 0.1
    ]
    first, second = sorted(of_stage, key=lambda record: record["started"])
    named = [{name: (s["record"], s["sha256"]) for name, s in record["inputs"].items()} for record in (first, second)]
    assert named[0] == named[1]
    done = vapo("lineage", same.name, "--workdir", place.workdir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"experience {second['outputs']['experience']['sha256'][:12]}: 8 stages led to it")


def test_all_that_follows_ends_with_the_report(place: Undisturbed, onwards: Path) -> None:
    assert executed(onwards) == Counter(evaluation=1, history=1, report=1)
    found = results(onwards)
    assert found["evaluation of iteration 1", "evaluation"] == "same bytes"
    assert found["history (evaluation) of iteration 1", "new_history"] == "same but for times"
    done = vapo("lineage", onwards.name, "--verify", "--workdir", place.workdir)
    assert done.returncode == 0, done.stderr
    assert "21 stages" in done.stdout
    assert (onwards / "report.html").is_file()


def test_a_rerun_can_be_rerun_and_what_was_interrupted_resumed(place: Undisturbed, onwards: Path) -> None:
    second = again(Undisturbed(place.workdir, place.done), "--stage", "report")
    facts = json.loads((second / RERUN).read_text())
    del facts["outputs"]
    (second / RERUN).write_text(json.dumps(facts))  # as if it had been killed before it could say what came out
    (second / "report.html").unlink()
    done = vapo("run", "--resume", "--workdir", place.workdir, "--cold")
    assert done.returncode == 0, done.stderr
    assert counts(done.stdout) == (0, 1)
    assert (second / "report.html").is_file()
    assert results(second)
    third = vapo("rerun", onwards.name, "--stage", "history", "--workdir", place.workdir, "--cold")
    assert third.returncode == 0, third.stderr
    assert (place.workdir / f"{onwards.name}-rerun-1" / RERUN).is_file()


def try_to(place: Undisturbed, run: str = "", stage: str = "advantages", **given: Any) -> str:
    """What a rerun that is refused says; nothing is left of it."""
    before = snapshot(place.workdir)
    console = Console(file=io.StringIO())
    with pytest.raises(UserError) as told:
        rerun(run or place.folder.name, Workdir(place.workdir), console, stage, **given)
    assert snapshot(place.workdir) == before
    return str(told.value)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"run": "nobody"}, ["no run 'nobody'", "there are", "tiny-"]),
        ({"stage": "advantage"}, ["problems", "advantages", "report"]),
        ({"iteration": 7}, ["--iteration 7", "iteration 1"]),
        ({"settings": ["rollout.samples=3"]}, ["rollout.samples=3: it is for rollout", "done again is advantages"]),
        ({"settings": ["advantages.alpha=0.05"]}, ["has that already"]),
        ({"settings": ["advantages.alfa=1"]}, ["did you mean 'alpha'"]),
        ({"settings": ["iterations=2"]}, ["which tasks there are", "vapo run"]),
    ],
)
def test_what_is_not_there_is_said(place: Undisturbed, given: dict[str, Any], parts: list[str]) -> None:
    message = try_to(place, **given)
    for part in parts:
        assert part in message


def test_a_digest_that_differs_stops_it_before_it_starts(place: Undisturbed) -> None:
    nodes = {node.name: node for node in read_nodes(Workdir(place.workdir).artifacts)}
    rewards = nodes["verification of iteration 1"].path_of("rewards")
    critic = nodes["value_pretraining"].path_of("critic")
    before = rewards.read_bytes()
    rewards.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    message = try_to(place)
    rewards.unlink()
    missing = try_to(place)
    rewards.write_bytes(before)
    assert message.startswith(f"rewards of verification of iteration 1: {rewards} was changed")
    assert missing.startswith(f"rewards of verification of iteration 1: {rewards} is missing")
    manifest = json.loads(critic.read_text())
    lost = manifest["files"][0]
    stored = Path(manifest["store"]) / "objects" / lost["sha256"][:2] / lost["sha256"]
    aside = stored.rename(stored.with_name("aside"))
    try:
        assert f"{lost['path']} is missing from the store" in try_to(place)
    finally:
        aside.rename(stored)


# Compare


def test_another_alpha_changes_the_advantages_and_nothing_else(place: Undisturbed, other: Path) -> None:
    done = vapo("compare", place.folder.name, other.name, "--json", "--workdir", place.workdir)
    found = json.loads(done.stdout)
    assert found["settings"] == {"advantages.alpha": [0.05, 0.5]}
    artifacts = {(a["stage"], a["iteration"], a["output"]): a for a in found["artifacts"]}
    assert artifacts.keys() == {("advantages", 1, "experience"), ("advantages", 1, "metrics")}  # what it did again
    experience = artifacts["advantages", 1, "experience"]
    assert experience["results"] == ["differs"]
    (difference,) = experience["differences"]
    assert difference["rows"] == [32, 32]
    columns = {column["name"]: column for column in difference["columns"]}
    equal = {name for name, column in columns.items() if not column["rows"]}
    assert equal == {"rollout_id", "trained", "values", "value_targets"}
    assert 0 < columns["advantages"]["mean"] <= columns["advantages"]["largest"]
    assert columns["advantages"]["differing"] > 100
    metrics = {(m["stage"], m["name"]): m for m in found["metrics"]}
    assert metrics["advantages", "value_mean"]["differences"] == [0.0]
    assert metrics["advantages", "lambda_policy_mean"]["differences"][0] > 0


def test_a_comparison_reads_well(place: Undisturbed, other: Path, same: Path, onwards: Path) -> None:
    done = vapo("compare", place.folder.name, other.name, same.name, onwards.name, "--workdir", place.workdir)
    assert done.returncode == 0, done.stderr
    assert "advantages.alpha" in done.stdout
    assert (
        f"experience of advantages of iteration 1 in {other.name}: 32 rows; equal: rollout_id, trained" in done.stdout
    )
    assert f"held-out accuracy of {onwards.name} after iteration 1: " in done.stdout


def test_comparing_what_is_not_there(place: Undisturbed) -> None:
    name = place.folder.name
    assert_refused(vapo("compare", name, "--workdir", place.workdir), "two runs", name)
    assert_refused(vapo("compare", name, "nobody", "--workdir", place.workdir), "nobody", name)


# Garbage collection


def collected(workdir: Path, **given: Any) -> tuple[dict[str, tuple[int, int]], str]:
    """By kind: (what stays, what goes); and what was said."""
    console = Console(file=io.StringIO(), width=160)
    kinds = collect(Workdir(workdir), console, **given)
    return {kind.name: (kind.stays, len(kind.goes)) for kind in kinds}, console.file.getvalue()


def test_what_runs_refer_to_stays_and_the_rest_goes(
    undisturbed: Undisturbed, tmp_path: Path, same: Path, other: Path
) -> None:
    workdir = tmp_path / "runs"
    shutil.copytree(undisturbed.workdir, workdir, symlinks=True)
    assert len(list(workdir.glob("tiny-*"))) >= 1
    shutil.copytree(same.parent, workdir, symlinks=True, dirs_exist_ok=True)  # two reruns besides
    place, name = Workdir(workdir), undisturbed.folder.name
    tasks = list(place.artifacts.glob("*/*"))
    (tasks[0].parent / "killed").mkdir()  # a task that never ended
    (tasks[0].parent / "killed" / "rollouts").write_bytes(b"some")
    (place.partial / "rollout-0123456789abcdef").mkdir(parents=True)
    for folder in workdir.glob("tiny-*"):
        if folder.name not in (name, same.name, other.name):
            shutil.rmtree(folder)
    before = snapshot(workdir)
    found, said = collected(workdir)
    assert snapshot(workdir) == before  # nothing but a list
    assert "--delete would free" in said
    assert found["tasks' artifacts"][1] >= 1
    collected(workdir, delete=True)
    assert not (tasks[0].parent / "killed").exists()
    assert not list(place.partial.iterdir())
    assert collected(workdir)[0]["objects"][1] == 0
    done = vapo("lineage", name, "--verify", "--workdir", workdir)
    assert done.returncode == 0, done.stderr

    # The first run is let go of: what led to its reruns stays, its own later stages go.
    shutil.rmtree(workdir / name)
    collected(workdir, delete=True)
    left = Counter(record["stage"] for record in records(workdir).values())
    assert left == Counter(problems=1, base_model=1, rollout=2, verification=2, value_pretraining=1, advantages=2)
    assert set(place.artifacts.glob("*/*")) == set(records(workdir))
    served = {
        Path(value["uri"]).name for entry in place.cache.glob("*") for value in json.loads(entry.read_text()).values()
    }
    assert "page" not in served
    kept_objects = list((place.store / "objects").glob("*/*"))
    assert kept_objects
    collected(workdir, delete=True, keep=[other.name])
    assert Counter(r["stage"] for r in records(workdir).values())["advantages"] == 1
    collected(workdir, delete=True, keep=["none"])
    for folder in (place.artifacts, place.cache, place.store / "objects"):
        assert not [path for path in folder.rglob("*") if path.is_file()]
    assert (workdir / other.name / RERUN).is_file()  # a run's folder is a person's


def test_a_run_to_keep_must_be_there_and_known(place: Undisturbed, same: Path) -> None:
    with pytest.raises(UserError, match=r"--keep nobody: no such run .*tiny-"):
        collected(place.workdir, keep=["nobody"])
    (folder,) = [node.folder for node in read_nodes(Workdir(place.workdir).artifacts) if node.name == "problems"]
    before = (folder / "record.json").read_bytes()
    (folder / "record.json").write_bytes(before + b" ")
    try:
        with pytest.raises(UserError, match=r"is gone or was changed"):
            collected(place.workdir, delete=True)
    finally:
        (folder / "record.json").write_bytes(before)
    assert sha256(folder / "record.json")


def test_fresh_waits_for_other_runs(place: Undisturbed) -> None:
    with (
        locked(place.workdir / place.folder.name),
        pytest.raises(UserError, match=r"--fresh: run tiny-.* by process \d+"),
    ):
        Workdir(place.workdir).forget()
    assert list(Workdir(place.workdir).cache.iterdir())
