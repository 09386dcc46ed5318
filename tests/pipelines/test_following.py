"""What a person sees of a run on a cluster, from the states and tasks that the server tells of; and how it ends."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from pipelines import following
from pipelines.attending import attend, retry_and_show, stop_and_tell
from pipelines.cluster import Cluster, NoAnswer, connect
from pipelines.following import Following, Seen, clock
from pipelines.runs import find_run
from pipelines.submitting import Order, submit
from tests.pipelines.kfp_server import Fault, KfpServer, tasks
from vapo.errors import StageFailed, UserError
from vapo.recipe import Recipe, load_recipe

OUT_OF_REACH = (
    "metrics are not shown: store s3://bucket/prefix: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set in the "
    "environment"
)
FAILS = [
    ("PENDING", []),
    ("RUNNING", tasks(("problems", "SUCCEEDED"), ("base-model", "RUNNING"))),
    (
        "FAILED",
        tasks(
            ("problems", "SUCCEEDED"), ("base-model", "SUCCEEDED"), ("iteration-001", "FAILED"), ("rollout", "FAILED")
        ),
    ),
]
SUCCEEDS = [
    *FAILS[:2],
    (
        "RUNNING",
        tasks(
            ("problems", "SUCCEEDED"), ("base-model", "SUCCEEDED"), ("iteration-001", "RUNNING"), ("rollout", "RUNNING")
        ),
    ),
    (
        "SUCCEEDED",
        tasks(
            ("problems", "SUCCEEDED"),
            ("base-model", "SUCCEEDED"),
            ("iteration-001", "SUCCEEDED"),
            ("rollout", "SUCCEEDED"),
        ),
    ),
]


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tiny", ["runtime.store=s3://bucket/prefix"])


@pytest.fixture
def cluster(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):  # the store is out of reach, as from most desks
        monkeypatch.delenv(name, raising=False)
    return connect(kfp.url)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=160)


def printed(console: Console) -> str:
    return console.file.getvalue()


def test_a_run_that_succeeds(kfp: KfpServer, cluster: Cluster, recipe: Recipe, console: Console) -> None:
    kfp.scenario = SUCCEEDS
    attend(cluster, submit(recipe, cluster, Order(), name="tiny-1").run, console, 0.01)
    assert printed(console).splitlines() == [
        OUT_OF_REACH,
        "run tiny-1: pending",
        "problems: succeeded in 4:00",
        "run tiny-1: running",
        "base-model: succeeded in 4:00",
        "iteration-001: succeeded in 4:00",
        "run tiny-1: succeeded",
    ]


def test_a_run_that_fails_says_where_and_how_to_go_on(
    kfp: KfpServer, cluster: Cluster, recipe: Recipe, console: Console
) -> None:
    """The stage is named, not the sub-pipelines that fail with it."""
    kfp.scenario = FAILS
    run = submit(recipe, cluster, Order(), name="tiny-1").run
    with pytest.raises(StageFailed) as error:
        attend(cluster, run, console, 0.01)
    assert str(error.value) == (
        f"run tiny-1 failed in rollout: logs at {kfp.url}/#/runs/details/{run.run_id}; 'vapo retry {run.run_id} "
        f"--host {kfp.url}' goes on from what is complete"
    )
    assert "rollout: failed in 4:00" in printed(console)


def test_a_run_that_was_stopped(kfp: KfpServer, cluster: Cluster, recipe: Recipe, console: Console) -> None:
    run = submit(recipe, cluster, Order(), name="tiny-1").run
    stop_and_tell(cluster, run.run_id, console)
    with pytest.raises(StageFailed, match="run tiny-1 was stopped"):
        attend(cluster, run, console, 0.01)
    stop_and_tell(cluster, run.run_id, console)
    assert "artifacts, checkpoints and cache of its finished tasks stay" in printed(console)
    assert printed(console).endswith("run tiny-1 had ended before: canceled\n")


def test_a_network_that_fails_for_a_while(
    kfp: KfpServer, cluster: Cluster, recipe: Recipe, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More often than one request is tried again: the run goes on, and so do we, and say it once."""
    monkeypatch.setattr(following, "EVERY", 0.01)
    run = submit(recipe, cluster, Order()).run
    kfp.faults += [Fault("GET", f"runs/{run.run_id}") for _ in range(20)]
    attend(cluster, run, console, 0.01)
    assert not kfp.faults
    assert printed(console).count("the run goes on, and we ask again") == 1
    monkeypatch.setattr(following, "PATIENCE", 0.0)
    run = submit(recipe, cluster, Order()).run
    kfp.faults += [Fault("GET", f"runs/{run.run_id}") for _ in range(20)]
    with pytest.raises(NoAnswer):
        attend(cluster, run, console, 0.01)


def test_what_is_shown_live(kfp: KfpServer, cluster: Cluster, recipe: Recipe, console: Console) -> None:
    kfp.scenario = SUCCEEDS[2:]
    run = submit(recipe, cluster, Order(), name="tiny-1").run
    shown = Following(console, "tiny-1", {"problems": 1, "base_model": 1, "rollout": 3})
    shown.look(find_run(cluster, run.run_id))
    console.print(shown)
    lines = printed(console).splitlines()[-3:]
    assert "tiny-1  running  2/5 tasks" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["iteration-001", "rollout"]
    assert lines[2].endswith("0/3 done")


@pytest.mark.parametrize(
    ("name", "told", "stage"),
    [
        ("iteration-003", True, ""),
        ("iteration-03-of-10", True, ""),
        ("iterations-011-020", True, ""),
        ("block-2", True, ""),
        ("evaluation-000", True, "evaluation"),
        ("value-pretraining", True, "value_pretraining"),
        ("ppo-update-2", False, "ppo_update"),
        ("base-model", True, "base_model"),
        ("rollout-driver", False, ""),
        ("executor", False, ""),
        ("root", False, ""),
    ],
)
def test_tasks_by_the_names_that_servers_give_them(name: str, told: bool, stage: str) -> None:
    task = Seen(name, "RUNNING", 0.0, 0.0)
    assert (task.told, task.stage) == (told, stage)


def test_retry(kfp: KfpServer, cluster: Cluster, recipe: Recipe, console: Console) -> None:
    kfp.scenario = FAILS
    run = submit(recipe, cluster, Order(), name="tiny-1").run
    with pytest.raises(UserError, match="run 'tiny-1' is PENDING: only one that failed or was stopped"):
        retry_and_show(cluster, "tiny-1", console, None)
    with pytest.raises(StageFailed):
        attend(cluster, run, console, 0.01)
    kfp.scenario = SUCCEEDS
    retry_and_show(cluster, "tiny-1", console, 0.01)
    assert list(kfp.runs) == [run.run_id]
    assert printed(console).endswith("run tiny-1: succeeded\n")


@pytest.mark.parametrize("done", [True, False])
def test_a_retry_whose_answer_does_not_come(
    kfp: KfpServer, cluster: Cluster, recipe: Recipe, console: Console, done: bool
) -> None:
    kfp.scenario = [("FAILED", [])]
    run = submit(recipe, cluster, Order(), name="tiny-1").run
    find_run(cluster, run.run_id)
    kfp.scenario = [("RUNNING", [])]
    kfp.faults.append(Fault("POST", ":retry", done=done))
    if done:
        retry_and_show(cluster, run.run_id, console, None)
    else:
        with pytest.raises(NoAnswer):
            retry_and_show(cluster, run.run_id, console, None)
    assert kfp.count("run_service_retry_run") == done


# Which run


def test_which_run_is_meant(kfp: KfpServer, cluster: Cluster, recipe: Recipe) -> None:
    first, second = (submit(recipe, cluster, Order(), name=name).run for name in ("tiny-1", "tiny-12"))
    for what, meant in (
        (first.run_id, first),
        (first.run_id[:9], first),
        ("tiny-1", first),
        ("tiny-12", second),
    ):
        assert find_run(cluster, what).run_id == meant.run_id
    with pytest.raises(UserError, match=r"run 'tiny' means 2 runs: tiny-12 \(.{8}, \w+\), tiny-1 \("):
        find_run(cluster, "tiny")
    with pytest.raises(UserError, match=r"there is no run 'nope' on http.*: the latest are tiny-12 \("):
        find_run(cluster, "nope")
    with pytest.raises(UserError, match="there is no run '00000000-0000-4000-8000-000000000000'"):
        find_run(cluster, "00000000-0000-4000-8000-000000000000")


def test_a_run_among_many(kfp: KfpServer, cluster: Cluster, recipe: Recipe) -> None:
    """It is looked for beyond the first page."""
    run = submit(recipe, cluster, Order(), name="tiny-old").run
    for number in range(150):
        twin = dict(kfp.runs[run.run_id], run_id=str(number), display_name=f"other-{number}", created_at=kfp.now())
        kfp.runs[twin["run_id"]] = twin
    assert find_run(cluster, "tiny-old").run_id == run.run_id
    with pytest.raises(UserError, match=r"run 'other' means 150 runs: .* and others"):
        find_run(cluster, "other")


def test_no_runs(cluster: Cluster) -> None:
    with pytest.raises(UserError, match="there are none"):
        find_run(cluster, "tiny")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (187, "3:07"), (7387, "2:03:07"), (-1, "0:00")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
