"""Which model and which problems `vapo evaluate` takes, where its other settings come from, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.asked import evaluation_recipe
from pipelines.workdir import Workdir
from vapo.errors import UserError
from vapo.recipe import Recipe, load_recipe
from vapo.store import save_checkpoint, sha256_of


@pytest.fixture
def place(tmp_path: Path) -> Workdir:
    """A working directory with a run of two iterations, `tiny-1`, and one that did not end, `tiny-2`."""
    workdir = Workdir(tmp_path / "work")
    (tmp_path / "model").mkdir()
    (tmp_path / "p.jsonl").write_text('{"prompt": "1 + 1", "ground_truth": "2"}\n')
    recipe = load_recipe("tiny", ["seed=3", "rollout.max_new_tokens=17", "evaluation.samples=5"])
    for run in ("tiny-1", "tiny-2"):
        (workdir.root / run).mkdir()
        (workdir.root / run / "recipe.json").write_text(recipe.model_dump_json())
    before: dict[str, Any] = {}
    for at, stage in enumerate(("base-model", "ppo-update", "ppo-update-2")):
        weights = tmp_path / f"weights-{at}"
        (weights / "optimizer").mkdir(parents=True)
        (weights / "model.safetensors").write_text(f"after {at}")
        (weights / "optimizer" / "state").write_text("state")
        manifest = workdir.artifacts / "vapo-tiny-2026" / stage / "policy"
        save_checkpoint(weights, manifest, store=str(workdir.store), kind="policy", facts={})
        kind = "ppo_update" if at else "base_model"
        record(manifest, stage=kind, parameters={"iteration": at} if at else {}, inputs=before, outputs={})
        before = {"policy": {"path": str(manifest)}}
    page = workdir.artifacts / "vapo-tiny-2026" / "report" / "page"
    page.parent.mkdir()
    page.write_text("the page")
    record(page, stage="report", parameters={}, inputs=before, outputs={"page": {"sha256": sha256_of(page)}})
    (workdir.root / "tiny-1" / "report.html").write_text("the page")
    return workdir


def record(output: Path, **facts: Any) -> None:
    (output.parent / "record.json").write_text(json.dumps(facts))


def asked(place: Workdir, model: str, problems: str, *settings: str, iteration: int | None = None) -> Recipe:
    here = place.root.parent
    found = {"MODEL": str(here / "model"), "FILE": str(here / "p.jsonl")}
    return evaluation_recipe(
        found.get(model, model), found.get(problems, problems), place, settings, iteration=iteration
    )


@pytest.mark.parametrize(("iteration", "after"), [(None, 2), (2, 2), (1, 1), (0, 0)])
def test_a_run_is_its_policy_after_an_iteration(place: Workdir, iteration: int | None, after: int) -> None:
    found = asked(place, "tiny-1", "FILE", iteration=iteration)
    folder = Path(found.base_model.path)
    assert (folder / "model.safetensors").read_text() == f"after {after}"
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]  # no training state
    assert asked(place, "tiny-1", "FILE", iteration=iteration) == found
    assert found.name == ("tiny-1-on-p" if iteration is None else f"tiny-1-{iteration}-on-p")


def test_settings_come_from_the_run_that_made_the_model(place: Workdir) -> None:
    found = asked(place, "tiny-1", "FILE")
    assert (found.seed, found.rollout.max_new_tokens, found.evaluation.samples) == (3, 17, 5)
    assert (found.problems.source, found.problems.heldout_share) == ("file", 1.0)
    assert found.problems.path == str(place.root.parent / "p.jsonl")
    assert found.rollout_for_evaluation().prompts >= 10**9  # however many the file holds


def test_a_folder_has_the_defaults(place: Workdir) -> None:
    found = asked(place, "MODEL", "FILE")
    assert found.base_model.path == str(place.root.parent / "model")
    assert (found.seed, found.rollout, found.evaluation) == (
        0,
        Recipe.model_fields["rollout"].default,
        found.evaluation,
    )
    assert (found.evaluation.samples, found.evaluation.top_p) == (32, 0.7)
    assert (found.name, found.report.title) == ("model-on-p", "model on p")


def test_a_recipe_or_a_run_lends_its_heldout_problems(place: Workdir) -> None:
    tiny = load_recipe("tiny")
    found = asked(place, "MODEL", "tiny")
    assert found.problems == tiny.problems.model_copy(update={"examples": 0})
    assert (found.evaluation, found.rollout.max_new_tokens) == (tiny.evaluation, tiny.rollout.max_new_tokens)
    of_run = asked(place, "MODEL", "tiny-1")
    assert (of_run.seed, of_run.evaluation.samples) == (3, 5)  # another seed has other problems
    mine = place.root.parent / "mine.toml"
    mine.write_text('extends = "tiny"\nseed = 9\n')
    assert asked(place, "tiny-1", str(mine)).seed == 9


def test_settings_have_the_last_word(place: Workdir) -> None:
    found = asked(place, "tiny-1", "FILE", "evaluation.samples=7", "problems.heldout=3", "report.title=mine")
    assert (found.evaluation.samples, found.problems.heldout, found.report.title) == (7, 3, "mine")


@pytest.mark.parametrize(
    ("model", "problems", "settings", "iteration", "said"),
    [
        ("nosuch", "FILE", (), None, "model 'nosuch': no folder of that name, and no run in"),
        ("MODEL", "nosuch.jsonl", (), None, "--problems 'nosuch.jsonl': no such file, no run in"),
        ("MODEL", "nosuch.toml", (), None, r"recipe file nosuch\.toml is not there"),
        ("MODEL", "FILE", (), 1, "--iteration 1 is for a run's name, but model"),
        ("tiny-1", "FILE", (), 3, "--iteration 3: run 'tiny-1' has policies after iterations 0 to 2"),
        ("tiny-2", "FILE", (), None, "run 'tiny-2' did not end: finish it first with 'vapo run --resume'"),
        ("MODEL", "FILE", ("evaluation.samples=0",), None, "evaluation.samples = 0"),
        ("MODEL", "FILE", ("evaluation.sample=4",), None, "did you mean 'samples'"),
        ("MODEL", "FILE", ("verification.grader=bogus",), None, "verification.grader = 'bogus'"),
    ],
)
def test_what_it_refuses(
    place: Workdir, model: str, problems: str, settings: tuple[str, ...], iteration: int | None, said: str
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        asked(place, model, problems, *settings, iteration=iteration)
    assert "\n" not in str(refused.value)


def test_a_run_whose_artifacts_are_gone(place: Workdir) -> None:
    (place.root / "tiny-1" / "report.html").write_text("another page")
    with pytest.raises(UserError, match=r"run 'tiny-1': the task that wrote .* is not in .*: run it again"):
        asked(place, "tiny-1", "FILE")


def test_changed_weights_in_the_store_are_refused(place: Workdir) -> None:
    next(path for path in place.store.rglob("*") if path.is_file() and path.read_text() == "after 2").write_text("x")
    with pytest.raises(UserError, match=r"model\.safetensors in the store .* was changed"):
        asked(place, "tiny-1", "FILE")
