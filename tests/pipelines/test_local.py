"""The tiny recipe through the real `vapo run`: what it leaves, what the cache serves, what a crash costs."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.conftest import Disturbed, Undisturbed
from tests.running import (
    SECRET,
    TINY,
    assert_one_line,
    assert_refused,
    counts,
    events,
    executed,
    folder_of,
    is_manifest,
    marked,
    products,
    records,
    running,
    sha256,
    snapshot,
    table_name,
    vapo,
)
from vapo import __version__
from vapo.recipe import Recipe, load_recipe, read_resolved
from vapo.schemas import EXPERIENCE, HISTORY, PRETRAINING, REWARDS, ROLLOUTS
from vapo.stage import STAGES
from vapo.tables import read_table

pytestmark = pytest.mark.slow
TASKS = Counter(
    problems=1,
    base_model=1,
    rollout=4,
    verification=4,
    value_pretraining=1,
    advantages=1,
    ppo_update=1,
    evaluation=2,
    history=5,
    report=1,
)
WITHOUT_CRITIC = ("--set", "advantages.estimator=group_normalised", "--set", "value_pretraining.max_steps=0")
AFTER_PPO_UPDATE = Counter(ppo_update=1, history=2, rollout=1, verification=1, evaluation=1, report=1)
FILES = {
    *("recipe.json", "pipeline.yaml", "log.txt", "worker.txt", "records.txt", "report.html", "lineage.html"),
    *("tensorboard", "lock"),
}


def history_of(undisturbed: Undisturbed) -> list[dict[str, Any]]:
    """The longest HISTORY: the last one that a task of the run made."""
    tables = [folder / "new_history" for folder, r in records(undisturbed.workdir).items() if r["stage"] == "history"]
    return max((read_table(path, HISTORY).to_pylist() for path in tables), key=len)


# What a run leaves


def test_run_ends_well_and_says_where_its_report_is(undisturbed: Undisturbed) -> None:
    assert undisturbed.done.returncode == 0
    assert undisturbed.done.stderr == ""
    assert counts(undisturbed.done.stdout) == (sum(TASKS.values()), 0)
    assert executed(undisturbed.folder) == TASKS
    assert {path.name for path in undisturbed.folder.iterdir()} == FILES
    assert undisturbed.folder.parent == undisturbed.workdir


def test_every_landmark_is_one_line(undisturbed: Undisturbed) -> None:
    lines = undisturbed.done.stdout.splitlines()
    begun = [f"run {undisturbed.folder.name}: {sum(TASKS.values())} tasks", "problems: ", "base_model: "]
    rest = ["evaluation after iteration 0: ", "value_pretraining: ", "iteration 1: ", "evaluation after iteration 1: "]
    for line, start in zip(lines, begun + rest, strict=False):
        assert line.startswith(start), lines
    assert "\x1b" not in undisturbed.done.stdout


def test_events_of_every_task_reach_the_log(undisturbed: Undisturbed) -> None:
    told = events(undisturbed.folder)
    assert Counter(e["stage"] for e in told if e["vapo"] == "start") == TASKS
    assert Counter(e["vapo"] for e in told)["error"] == 0
    for event in told:
        if event["vapo"] == "progress":
            assert 0 < event["done"] <= event["total"]


def test_report_needs_nothing_from_the_network(undisturbed: Undisturbed) -> None:
    page = (undisturbed.folder / "report.html").read_text()
    assert page[:15].lower() == "<!doctype html>"
    assert "VAPO" in page
    elements = re.findall(r"<(?:script|link|img|iframe|source|video|audio|object|embed)\b[^>]*>", page)
    for element in elements:
        assert not re.search(r"""\b(src|href|data)\s*=\s*["']?\s*(https?:)?//""", element), element
    assert not re.search(r"""@import|url\(\s*["']?(https?:)?//""", page)


def test_report_shows_how_the_critic_was_pretrained(undisturbed: Undisturbed) -> None:
    """All rewards of the tiny run are equal: its explained variance is undefined, and there is no curve of it."""
    measured = read_table(made_by(undisturbed.workdir, "value_pretraining") / "pretraining", PRETRAINING).to_pylist()
    assert {row["rows"] for row in measured} == {"mini-batch", "held-out"}
    assert all(math.isnan(row["explained_variance"]) for row in measured)
    page = (undisturbed.folder / "report.html").read_text()
    assert "Value-pretraining: value loss" in page
    assert "Value-pretraining: explained variance" not in page


def test_tensorboard_reads_the_history(undisturbed: Undisturbed) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util import tensor_util

    files = list((undisturbed.folder / "tensorboard").glob("events.out.tfevents.*"))
    assert len(files) == 1
    found = sorted(
        (value.tag, event.step, float(tensor_util.make_ndarray(value.tensor)))
        for event in EventFileLoader(str(files[0])).Load()
        for value in event.summary.value
    )
    rows = history_of(undisturbed)
    wanted = sorted((f"{row['stage']}/{row['name']}", row["iteration"], _float32(row["value"])) for row in rows)
    assert len(found) > 50
    assert found == wanted


def _float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def test_recipe_is_written_down_whole(undisturbed: Undisturbed) -> None:
    path = undisturbed.folder / "recipe.json"
    assert read_resolved(path) == load_recipe("tiny", ["runtime.threads=1"])
    data = json.loads(path.read_text())
    assert set(data) == set(Recipe.model_fields)
    assert data["ppo_update"]["clip_high"] == 0.28  # a default, not in the file
    assert data["rollout"]["prompts"] == 8  # from the file
    assert data["runtime"]["threads"] == 1  # from --set


def test_history_holds_every_metric_of_every_task_once(undisturbed: Undisturbed) -> None:
    wanted: Counter[tuple[str, float]] = Counter()
    for folder, record in records(undisturbed.workdir).items():
        if record["stage"] != "history" and "metrics" in record["outputs"]:
            metrics = json.loads((folder / "metrics").read_text())
            assert {name: metrics[name] for name in record["metrics"]} == record["metrics"]
            wanted.update((f"{record['stage']}/{name}", value) for name, value in metrics.items())
    rows = history_of(undisturbed)
    assert wanted == Counter((f"{row['stage'].split('/')[-1]}/{row['name']}", row["value"]) for row in rows)
    keys = [(row["iteration"], row["stage"], row["name"]) for row in rows]
    assert len(set(keys)) == len(keys)
    where = {(row["iteration"], row["stage"]) for row in rows}
    before = {"problems", "base_model", "value_pretraining", "value_pretraining/rollout"}
    assert before | {"value_pretraining/verification"} <= {stage for iteration, stage in where if iteration == 0}
    training = {"rollout", "verification", "advantages", "ppo_update"}
    assert training == {s for _, s in where} - {s for i, s in where if i == 0}
    for iteration in (0, 1):
        assert {(iteration, "evaluation"), (iteration, "evaluation/rollout")} <= where
    values = {(row["iteration"], row["stage"], row["name"]): row["value"] for row in rows}
    assert values[0, "evaluation/rollout", "responses"] == 16 * 2
    assert values[0, "value_pretraining/rollout", "responses"] == 8 * 2
    assert values[1, "rollout", "responses"] == 8 * 4
    assert values[1, "ppo_update", "steps"] == 2


# Lineage


def test_every_task_leaves_a_record_that_is_true(undisturbed: Undisturbed) -> None:
    found = records(undisturbed.workdir)
    assert Counter(record["stage"] for record in found.values()) == TASKS
    tasks = {path.parent for path in (undisturbed.workdir / ".vapo" / "artifacts").glob("*/*/executor_output.json")}
    assert tasks == set(found)
    for folder, record in found.items():
        beside = {path.name for path in folder.iterdir()} - {"record.json", "executor_output.json"}
        assert beside == set(record["outputs"])
        for name, facts in record["outputs"].items():
            assert Path(facts["path"]) == folder / name
            assert facts["sha256"] == sha256(folder / name)
            assert facts["bytes"] == (folder / name).stat().st_size
        for name, facts in record["inputs"].items():
            assert facts["sha256"] == sha256(Path(facts["path"])), name
        assert record["vapo"] == __version__
        assert {"kfp", "numpy", "pyarrow", "torch", "transformers"} <= set(record["libraries"])
        assert record["seconds"] >= 0
        assert record["started"] > 1.7e9


def test_lineage_leads_back_to_the_problems(undisturbed: Undisturbed) -> None:
    found = records(undisturbed.workdir)
    ancestors: set[str] = set()
    pending = [next(record for record in found.values() if record["stage"] == "report")]
    while pending:
        record = pending.pop()
        ancestors.add(record["stage"])
        pending.extend(found[Path(facts["path"]).parent] for facts in record["inputs"].values())
    of_clusters = {"concatenation", "hand_off", "take_over", "next_segment"}  # shards and chains of runs
    assert ancestors == set(STAGES) - of_clusters


def test_records_hold_the_settings_that_were_used(undisturbed: Undisturbed) -> None:
    recipe = load_recipe("tiny", ["runtime.threads=1"])
    rollouts = Counter()
    for record in records(undisturbed.workdir).values():
        if record["stage"] == "rollout":
            rollouts[json.dumps(record["section"], sort_keys=True)] += 1
        elif record["stage"] == "history":
            assert record["section"] == {}
        else:
            assert record["section"] == getattr(recipe, record["stage"]).model_dump(mode="json")
        if "seed" in record["parameters"]:
            assert record["parameters"]["seed"] == recipe.seed
    sections = (recipe.rollout, recipe.rollout_for_value_pretraining())
    wanted = Counter(json.dumps(s.model_dump(mode="json"), sort_keys=True) for s in sections)
    wanted[json.dumps(recipe.rollout_for_evaluation().model_dump(mode="json"), sort_keys=True)] = 2
    assert rollouts == wanted


def test_nothing_writes_a_secret_down(undisturbed: Undisturbed) -> None:
    files = [path for path in undisturbed.workdir.rglob("*") if path.is_file()]
    assert len(files) > 100
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_artifacts_are_what_their_names_say(undisturbed: Undisturbed) -> None:
    kinds = Counter()
    for folder, record in records(undisturbed.workdir).items():
        for name in record["outputs"]:
            if name in ("metrics", "page", "lineage"):
                continue
            kinds["manifest" if is_manifest(folder / name) else table_name(folder / name)] += 1
    tables = {"PROMPTS": 2, "EXAMPLES": 1, "ROLLOUTS": 4, "REWARDS": 4, "EXPERIENCE": 1, "EVALUATION": 2, "HISTORY": 5}
    assert kinds == {"manifest": 4, "PRETRAINING": 1, **tables}


# The cache


def test_same_run_again_executes_nothing_and_touches_nothing(undisturbed: Undisturbed) -> None:
    shared = (undisturbed.workdir / ".vapo" / "artifacts", undisturbed.workdir / ".vapo" / "store")
    before = snapshot(*shared)
    report = sha256(undisturbed.folder / "report.html")
    again = vapo("run", *TINY, "--workdir", undisturbed.workdir)
    assert again.returncode == 0, again.stderr
    assert counts(again.stdout) == (0, sum(TASKS.values()))
    assert snapshot(*shared) == before
    assert folder_of(again.stdout) == undisturbed.folder
    assert sha256(undisturbed.folder / "report.html") == report


def test_a_run_that_draws_again_is_served_from_the_cache_as_well(tmp_path: Path) -> None:
    """Its iteration holds several tasks of one component, which kfp's compiler names otherwise in every process."""
    grader = tmp_path / "some.py"
    grader.write_text("def grade(response, truth):\n    return sum(map(ord, response)) % 2 == 0\n")
    drawing = ["rollout.draws=3", "advantages.keep_groups=12", "verification.grader=custom"]
    settings = [part for setting in (*drawing, f"verification.custom={grader}:grade") for part in ("--set", setting)]
    first = vapo("run", *TINY, "--workdir", tmp_path, *settings)
    assert first.returncode == 0, first.stderr
    tasks = TASKS + Counter(rollout=2, verification=2, history=2)
    assert executed(folder_of(first.stdout)) == tasks
    again = vapo("run", *TINY, "--workdir", tmp_path, *settings)
    assert again.returncode == 0, again.stderr
    assert counts(again.stdout) == (0, sum(tasks.values()))


def test_changed_clip_redoes_only_the_update_and_what_follows(undisturbed: Undisturbed) -> None:
    changed = vapo("run", *TINY, "--workdir", undisturbed.workdir, "--set", "ppo_update.clip_high=0.3")
    assert changed.returncode == 0, changed.stderr
    assert folder_of(changed.stdout) != undisturbed.folder
    assert executed(folder_of(changed.stdout)) == AFTER_PPO_UPDATE
    redone = sum(AFTER_PPO_UPDATE.values())
    assert counts(changed.stdout) == (redone, sum(TASKS.values()) - redone)
    table = re.findall(r"^ (\w+) +(\d+) +[\d.]+ s", changed.stdout, re.MULTILINE)
    assert {stage: int(tasks) for stage, tasks in table} == AFTER_PPO_UPDATE


def test_changed_report_redoes_only_the_report(undisturbed: Undisturbed) -> None:
    name = undisturbed.folder.name
    changed = vapo("report", name, "--workdir", undisturbed.workdir, "--set", "report.samples=3")
    assert changed.returncode == 0, changed.stderr
    assert executed(folder_of(changed.stdout)) == Counter(report=1)
    assert counts(changed.stdout) == (1, sum(TASKS.values()) - 1)


def names_of(made: set[tuple[str, int, str, str, str]]) -> set[tuple[str, int, str, str]]:
    """Products without their identities."""
    return {product[:4] for product in made}


# What was changed behind the pipeline's back


@contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    """A file with other content, or without it, for a while."""
    before, facts = path.read_bytes(), path.stat()
    path.unlink()
    try:
        if content is not None:
            path.write_bytes(content)
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def made_by(workdir: Path, stage: str, purpose: str = "") -> Path:
    """The folder of the first task of a stage."""
    found = records(workdir).items()
    of_stage = [f for f, r in found if r["stage"] == stage and r["parameters"].get("purpose", "") == purpose]
    return min(of_stage, key=lambda folder: (folder / "record.json").stat().st_mtime_ns)


def test_tampered_table_is_refused(undisturbed: Undisturbed) -> None:
    rollouts = made_by(undisturbed.workdir, "rollout", "training") / "rollouts"
    with changed(rollouts, rollouts.read_bytes() + b"\0"):
        done = vapo("run", *TINY, "--workdir", undisturbed.workdir, "--set", "report.samples=2", "--cold")
    assert_refused(done, "rollouts", str(rollouts), "was changed", "--fresh")
    assert "--fresh" in vapo("run", "--help").stdout


@pytest.mark.parametrize(
    ("file", "content", "message", "setting"),
    [
        ("model.safetensors", None, "is missing from the store", "ppo_update.clip_high=0.32"),
        ("tokenizer.json", b"other", "was changed", "report.samples=1"),
    ],
)
def test_lost_or_changed_checkpoint_file_is_refused(
    undisturbed: Undisturbed, file: str, content: bytes | None, message: str, setting: str
) -> None:
    manifest = json.loads((made_by(undisturbed.workdir, "base_model") / "policy").read_text())
    digest = next(entry["sha256"] for entry in manifest["files"] if entry["path"] == file)
    stored = undisturbed.workdir / ".vapo" / "store" / "objects" / digest[:2] / digest
    with changed(stored, content):
        done = vapo("run", *TINY, "--workdir", undisturbed.workdir, "--set", setting, "--cold")
    assert_refused(done, "policy checkpoint", file, message, "--fresh")


# What the settings rule out only once there are responses: the tiny policy solves nothing


def test_dynamic_sampling_that_finds_nothing_says_what_to_do(undisturbed: Undisturbed) -> None:
    done = vapo(*("run", *TINY, *WITHOUT_CRITIC, "--set", "advantages.keep_groups=4", "--workdir", undisturbed.workdir))
    cure = ("raise rollout.prompts or rollout.samples", "problems that the policy solves sometimes")
    assert_refused(done, "none of the 8 groups", "advantages.keep_groups 4", *cure)


def test_a_critic_that_cannot_learn_says_why(undisturbed: Undisturbed) -> None:
    demanding = ("--set", "value_pretraining.must_beat_mean=true")
    done = vapo("run", *TINY, *demanding, "--workdir", undisturbed.workdir)
    assert_refused(done, "all 16 responses have reward -1", "take problems that the policy solves sometimes")
    tried = records(undisturbed.workdir).values()
    assert not any(r["section"].get("must_beat_mean") for r in tried if r["stage"] == "value_pretraining")


# Without a critic: groups and dynamic sampling, on chains so short that the policy solves some


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """One iteration of tiny with advantages from groups, keeping at most 4 of 8, and a KL term to the base model."""
    workdir = tmp_path_factory.mktemp("grouped")
    easier = ("problems.min_steps=1", "problems.max_steps=1", "base_model.steps=200", "rollout.max_new_tokens=16")
    chosen = ("advantages.keep_groups=4", "ppo_update.mini_batch=8", "ppo_update.kl_coef=0.1")
    settings = [part for setting in (*easier, *chosen) for part in ("--set", setting)]
    done = vapo("run", *TINY, *WITHOUT_CRITIC, *settings, "--workdir", workdir)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return Undisturbed(workdir, done)


def test_run_without_critic_has_no_stage_for_one(grouped: Undisturbed) -> None:
    assert grouped.done.stderr == ""
    pretraining = Counter(rollout=1, verification=1, value_pretraining=1, history=1)
    assert executed(grouped.folder) == TASKS - pretraining
    assert counts(grouped.done.stdout) == (sum((TASKS - pretraining).values()), 0)
    for record in records(grouped.workdir).values():
        assert not {"critic", "new_critic", "pretraining"} & {*record["inputs"], *record["outputs"]}, record["stage"]


def test_the_update_learns_from_groups_that_dynamic_sampling_kept(grouped: Undisturbed) -> None:
    folders = {stage: made_by(grouped.workdir, stage, "training") for stage in ("rollout", "verification")}
    credit = read_table(made_by(grouped.workdir, "advantages") / "experience", EXPERIENCE).to_pylist()
    prompts = read_table(folders["rollout"] / "rollouts", ROLLOUTS)["prompt_id"].to_pylist()
    correct = read_table(folders["verification"] / "rewards", REWARDS)["correct"].to_pylist()
    verdicts: dict[str, list[bool]] = {}
    for prompt, verdict in zip(prompts, correct, strict=True):
        verdicts.setdefault(prompt, []).append(verdict)
    informative = [prompt for prompt, of_group in verdicts.items() if len(set(of_group)) == 2]
    assert 0 < len(informative) < len(verdicts)
    kept = informative[:4]
    assert [row["trained"] for row in credit] == [prompt in kept for prompt in prompts]
    for row, prompt, verdict in zip(credit, prompts, correct, strict=True):
        assert len(set(row["advantages"])) == 1  # every token of a response has the same
        sign = 0 if prompt not in informative else 1 if verdict else -1
        assert (row["advantages"][0] > 0) - (row["advantages"][0] < 0) == sign
    values = {(row["stage"], row["name"]): row["value"] for row in history_of(grouped) if row["iteration"] == 1}
    assert values["advantages", "informative_share"] == len(informative) / 8
    assert values["advantages", "trained_share"] == len(kept) / 8
    assert values["ppo_update", "steps"] == -(-len(kept) * 4 // 8)
    assert values["ppo_update", "kl_loss"] >= 0
    assert not {"value_loss", "critic_grad_norm"} & {name for _, name in values}
    assert ("advantages", "explained_variance") not in values


def test_reference_is_the_base_model_and_the_policy_moves_away(grouped: Undisturbed) -> None:
    base = sha256(made_by(grouped.workdir, "base_model") / "policy")
    update = made_by(grouped.workdir, "ppo_update")
    inputs = records(grouped.workdir)[update]["inputs"]
    assert inputs["reference"]["sha256"] == inputs["policy"]["sha256"] == base
    assert sha256(update / "new_policy") != base


def test_report_without_critic(grouped: Undisturbed) -> None:
    page = (grouped.folder / "report.html").read_text()
    assert "Groups with correct and wrong responses" in page
    assert "Value-pretraining" not in page
    assert "Explained variance of the critic" not in page


# Interruptions


def test_kill_9_of_the_runner_leaves_no_process(disturbed: Disturbed) -> None:
    assert disturbed.runner_killed.status == -9
    assert disturbed.runner_killed.left == []


def test_kill_9_while_the_worker_starts_leaves_no_process(tmp_path: Path) -> None:
    with running(tmp_path, *TINY) as run:
        worker = run.wait_for(run.worker)
        run.process.kill()
        assert worker in marked(run.mark)  # it imports torch: the runner is gone before it looks
        assert run.left(30.0) == []


def test_interrupt_ends_with_130_and_one_line(disturbed: Disturbed) -> None:
    assert disturbed.interrupted.status == 130
    assert_one_line(disturbed.interrupted.stderr, "interrupted", "vapo run --resume")
    assert disturbed.interrupted.left == []


def test_killed_stage_ends_the_run_with_1_and_one_line(disturbed: Disturbed) -> None:
    assert disturbed.stage_killed.status == 1
    assert_one_line(disturbed.stage_killed.stderr, "error: stage ppo_update of iteration 1", "killed", "log.txt")
    assert "\x1b" not in disturbed.stage_killed.stderr
    assert disturbed.stage_killed.left == []


def test_resume_does_only_what_is_missing(disturbed: Disturbed, undisturbed: Undisturbed) -> None:
    assert disturbed.done.returncode == 0, disturbed.done.stderr
    assert folder_of(disturbed.done.stdout).name == undisturbed.folder.name
    assert executed(folder_of(disturbed.done.stdout)) == AFTER_PPO_UPDATE
    assert {path.name for path in folder_of(disturbed.done.stdout).iterdir()} == FILES


def test_another_place_crashes_and_no_worker_give_the_same_bytes(
    disturbed: Disturbed, undisturbed: Undisturbed
) -> None:
    """Here a worker made every model and table; there base_model, ppo_update and two rollouts ran without one."""
    before = {record["started"] for record in records(undisturbed.workdir).values()}
    assert before.isdisjoint(record["started"] for record in records(disturbed.workdir).values())
    made, known = products(disturbed.workdir), products(undisturbed.workdir)
    assert names_of(made) == names_of(known)
    assert made <= known  # which also holds what other tests made there
    ours, theirs = (objects(workdir) for workdir in (disturbed.workdir, undisturbed.workdir))
    assert len(ours) > 5
    assert ours <= theirs


def objects(workdir: Path) -> set[str]:
    """Digests of everything in the checkpoint store."""
    return {path.name for path in (workdir / ".vapo" / "store" / "objects").glob("*/*")}


def test_resume_has_nothing_left_to_do(disturbed: Disturbed) -> None:
    assert_refused(vapo("run", "--resume", "--workdir", disturbed.workdir), "no interrupted run", "give a recipe")
