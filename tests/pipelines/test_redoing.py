"""A run whose rollouts were sampled in shards is done again: in a loop where their concatenation is repeated."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
import yaml
from kfp.components import load_component_from_text

from pipelines.compiling import stages_of
from pipelines.recompiling import recompiled, tasks_in
from pipelines.redoing import redoing
from pipelines.rerunning import asked
from pipelines.workdir import RERUN, Workdir
from tests.pipelines.conftest import Undisturbed
from tests.pipelines.test_recompiling import RUN, as_left_by_a_cluster
from tests.pipelines.test_shards import files_of, loops, of_stage
from tests.running import executed, vapo
from vapo.errors import UserError
from vapo.lineage.graph import read_nodes

pytestmark = pytest.mark.slow
SHARDS = ["rollout of iteration 1, shard 1 of 2", "rollout of iteration 1, shard 2 of 2"]


@pytest.fixture(scope="module")
def place(sharded: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """The run in shards in another place, where it may be worked on."""
    workdir = tmp_path_factory.mktemp("again") / "runs"
    shutil.copytree(sharded.workdir, workdir, symlinks=True)
    return Undisturbed(workdir, sharded.done)


def again(place: Undisturbed, *arguments: str) -> tuple[Path, dict[tuple[str, str], str]]:
    """`vapo rerun` of the run: the new run's folder, and what came out of each task."""
    before = set(place.workdir.iterdir())
    done = vapo("rerun", place.folder.name, *arguments, "--workdir", place.workdir)
    assert done.returncode == 0, (done.stdout, done.stderr)
    (folder,) = set(place.workdir.iterdir()) - before
    rows = json.loads((folder / RERUN).read_text())["outputs"]
    found = {(row["task"], row["output"]): row["result"] for row in rows}
    assert len(found) == len(rows)  # no two have one name
    return folder, found


def test_what_follows_crosses_concatenations(place: Undisturbed) -> None:
    folder, found = again(place, "--stage", "rollout", "--iteration", "1", "--downstream")
    once = Counter(verification=2, advantages=1, ppo_update=1, evaluation=1, history=2, report=1)
    assert executed(folder) == Counter(rollout=4, concatenation=2) + once
    for shard in SHARDS:
        assert found[shard, "rollouts"] == "same bytes"
    timed = {key: result for key, result in found.items() if key[1] in ("metrics", "new_history")}
    assert set(timed.values()) == {"same but for times"}
    tables = {"rollouts", "rewards", "experience", "evaluation"}
    same = Counter(key[1] for key, result in found.items() if result == "same bytes")
    assert {name: same[name] for name in tables} == {"rollouts": 6, "rewards": 2, "experience": 1, "evaluation": 1}
    # The run was copied, and the manifests of its checkpoints name the store where they were.
    old, new = (record["outputs"] for record in of_stage(place.workdir, "ppo_update"))
    for name in ("new_policy", "new_critic"):
        assert files_of(old[name]) == files_of(new[name])
    verified = vapo("lineage", folder.name, "--verify", "--workdir", place.workdir)
    assert (verified.returncode, "all as recorded" in verified.stdout) == (0, True), verified.stderr


def test_a_concatenation_takes_its_shards_along(place: Undisturbed) -> None:
    folder, found = again(place, "--stage", "concatenation", "--purpose", "evaluation", "--iteration", "1")
    assert executed(folder) == Counter(rollout=2, concatenation=1)
    assert [result for (_, output), result in found.items() if output == "rollouts"] == ["same bytes"] * 3
    verified = vapo("lineage", folder.name, "--verify", "--workdir", place.workdir)
    assert verified.returncode == 0, verified.stderr


def test_a_rollout_is_all_its_shards_and_none_may_be_lost(place: Undisturbed) -> None:
    workdir = Workdir(place.workdir)
    nodes = read_nodes(workdir.artifacts)
    for stage, names in (("rollout", SHARDS), ("concatenation", [*SHARDS, "concatenation of iteration 1"])):
        _, tasks = asked(place.folder.name, workdir, nodes, stage, 1, "", downstream=False, settings=[])
        assert [task.node.name for task in tasks] == names
    with pytest.raises(UserError, match=r"^concatenation of iteration 1: the record of one of its shards is gone: "):
        redoing("vapo-tiny", tasks[1:], nodes, str, linked=False)


def test_a_cluster_gets_the_loop_too(sharded: Undisturbed, tmp_path: Path) -> None:
    store = as_left_by_a_cluster(sharded.workdir, tmp_path)
    _, ir = recompiled(*tasks_in(store, RUN), "advantages", downstream=True)
    load_component_from_text(ir)
    document = next(iter(yaml.safe_load_all(ir)))
    ((loop, items, policy),) = loops(document)
    assert (items, policy) == ([0, 1], {})
    whole = document["root"]["dag"]["tasks"]["concatenation"]["inputs"]["artifacts"]
    assert {given["taskOutputArtifact"]["producerTask"] for given in whole.values()} == {loop}
    assert (stages_of(ir)["rollout"], stages_of(ir)["concatenation"]) == (2, 1)
