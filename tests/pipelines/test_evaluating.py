"""`vapo evaluate` to its end: a run's policy on its own problems and on a file, what the cache serves, the page."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.running import TINY, assert_refused, counts, executed, folder_of, records, vapo
from vapo.recipe import read_resolved
from vapo.schemas import EVALUATION, HISTORY, PROMPTS, ROLLOUTS
from vapo.tables import read_table

pytestmark = pytest.mark.slow
EASY = ("problems.min_steps=1", "problems.max_steps=1", "base_model.steps=200", "rollout.max_new_tokens=16")
ONCE = Counter(problems=1, base_model=1, rollout=1, verification=1, evaluation=1, report=1, history=2)
FILE = [("plus", f"start {at} #3 +2 ?", str((at + 2) % 10)) for at in range(6)]
FILE += [("times", f"start {at} #8 x3 ?", str(3 * at % 10)) for at in range(3)]


class Place:
    """A working directory with a run of tiny whose policy solves some of its problems, and a problem file."""

    def __init__(self, folder: Path) -> None:
        settings = [part for setting in (*EASY, "evaluation.samples=4") for part in ("--set", setting)]
        self.workdir = folder / "work"
        done = vapo("run", *TINY, *settings, "--workdir", self.workdir)
        assert done.returncode == 0, (done.stdout, done.stderr)
        self.run = folder_of(done.stdout)
        self.last = self.metrics("evaluation")
        self.file = folder / "p.jsonl"
        rows = [{"prompt": prompt, "ground_truth": truth, "family": family} for family, prompt, truth in FILE]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def metrics(self, stage: str) -> dict[str, float]:
        """The metrics of a stage's latest task."""
        found = [(r["started"], r["metrics"]) for r in records(self.workdir).values() if r["stage"] == stage]
        return max(found, key=lambda pair: pair[0])[1]

    def evaluate(self, model: str | Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return vapo("evaluate", model, *arguments, "--set", "runtime.threads=1", "--workdir", self.workdir)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("evaluating"))


def test_a_run_on_its_own_problems_is_its_last_evaluation(place: Place) -> None:
    done = place.evaluate(place.run.name, "--problems", place.run.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert 0 < place.last["accuracy"] < 1
    assert place.metrics("evaluation") == place.last
    assert executed(folder_of(done.stdout)) == ONCE
    low, high, value = (100 * place.last[name] for name in ("accuracy_low", "accuracy_high", "accuracy"))
    assert f"accuracy {value:.1f}% [{low:.1f}, {high:.1f}], avg@4 over 16 problems, in " in done.stdout


def test_a_folder_on_a_file(place: Place) -> None:
    """The folder is the policy that the evaluation of the run unpacked."""
    (unpacked,) = (place.workdir / ".vapo" / "models").iterdir()
    asked = ("--problems", place.file, "--samples", "3", "--temperature", "0.5", "--top-p", "0.9")
    limit = ("--max-new-tokens", "12")
    done = place.evaluate(unpacked, *asked, *limit)
    assert (done.returncode, done.stderr) == (0, "")
    folder = folder_of(done.stdout)
    assert folder.parent == place.workdir / "evaluations"
    recipe = read_resolved(folder / "recipe.json")
    sampling = recipe.rollout_for_evaluation()
    assert (sampling.samples, sampling.temperature, sampling.top_p, sampling.max_new_tokens) == (3, 0.5, 0.9, 12)
    latest = max(records(place.workdir).values(), key=lambda record: record["started"])
    assert latest["stage"] == "report"
    tables = {name: Path(facts["path"]) for name, facts in latest["inputs"].items()}
    prompts = read_table(tables["evaluation_prompts"], PROMPTS).to_pylist()
    assert {(row["prompt"], row["ground_truth"]) for row in prompts} == {(p, t) for _, p, t in FILE}  # all of them
    assert len(read_table(tables["evaluation_rollouts"], ROLLOUTS)) == 3 * len(FILE)
    measured = read_table(tables["evaluation"], EVALUATION).to_pylist()
    assert Counter(row["family"] for row in measured) == {"plus": 6, "times": 3}
    history = {row["name"]: row["value"] for row in read_table(tables["history"], HISTORY).to_pylist()}
    for family in ("plus", "times"):
        rows = [row for row in measured if row["family"] == family]
        share = sum(row["correct"] for row in rows) / (3 * len(rows))
        assert history[f"accuracy/{family}"] == pytest.approx(share)
        assert re.search(rf"^ {family} +{len(rows)} +{100 * share:.1f}%", done.stdout, re.MULTILINE), done.stdout
    page = (folder / "report.html").read_text()
    assert "Held-out problems" in page
    assert "Token credit" not in page
    assert "start 3 #3 +2 ?" in page

    again = place.evaluate(unpacked, *asked, *limit)
    assert counts(again.stdout) == (0, sum(ONCE.values()))
    fewer = place.evaluate(unpacked, *asked, *limit, "--set", "problems.heldout=4")
    assert executed(folder_of(fewer.stdout))["problems"] == 1
    assert "over 4 problems" in fewer.stdout
    place.file.write_text(place.file.read_text() + '{"prompt": "start 9 #3 +2 ?", "ground_truth": "1"}\n')
    longer = place.evaluate(unpacked, *asked, *limit)
    assert executed(folder_of(longer.stdout))["problems"] == 1
    assert f"over {len(FILE) + 1} problems" in longer.stdout


def test_evaluations_are_no_runs(place: Place) -> None:
    refused = vapo("run", "--resume", "--workdir", place.workdir)
    assert_refused(refused, "no interrupted run")
    assert_refused(vapo("report", "nosuch", "--workdir", place.workdir), f"there are ['{place.run.name}']")


def test_a_bad_problem_file_is_one_line(place: Place) -> None:
    place.file.with_name("bad.jsonl").write_text('{"prompt": "1 + 1"}\n')
    done = place.evaluate(place.run.name, "--problems", place.file.with_name("bad.jsonl"))
    assert_refused(done, "bad.jsonl", "ground_truth")
