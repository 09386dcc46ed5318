"""Two runs in one working directory at the same time, while `vapo gc --delete` runs again and again."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from pipelines.collecting import collect
from pipelines.workdir import Workdir
from tests.pipelines.conftest import Undisturbed
from tests.running import TINY, assert_refused, products, running, vapo

pytestmark = pytest.mark.slow
OTHER = (*TINY, "--set", "report.samples=3")  # another recipe, whose stages but the last give the same


@dataclass
class Together:
    """Both runs, the same again while it ran, and what gc said meanwhile."""

    workdir: Path
    ends: list[tuple[int, str, str]]
    refused: object
    said: list[str]
    objects: set[str]  # that were there before, and that nothing referred to


@pytest.fixture(scope="module")
def together(undisturbed: Undisturbed, tmp_path_factory: pytest.TempPathFactory) -> Together:
    """They find the objects of a run that was let go of: what they make is there already, and nothing refers to it."""
    workdir, said, refused = tmp_path_factory.mktemp("together"), [], None
    place = Workdir(workdir)
    theirs = undisturbed.workdir / ".vapo" / "store" / "objects"
    for path in theirs.glob("*/*"):
        kept = place.store / "objects" / path.parent.name / path.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(path.read_bytes())
    objects = {path.name for path in (place.store / "objects").glob("*/*")}
    with running(workdir, *TINY) as first, running(workdir, *OTHER) as second:
        while first.process.poll() is None or second.process.poll() is None:
            console = Console(file=io.StringIO(), width=160)
            # No run is kept but by being executed; near its end that would take what it has made as soon as it ended.
            collect(place, console, delete=True, keep=[] if near_the_end(workdir) else ["none"])
            said.append(console.file.getvalue())
            if refused is None and list(workdir.glob("tiny-*/recipe.json")) and first.process.poll() is None:
                refused = vapo("run", *TINY, "--workdir", workdir)
            time.sleep(1.0)
        ends = [first.end(), second.end()]
    return Together(workdir, ends, refused, said, objects)


def near_the_end(workdir: Path) -> bool:
    """Whether a run has updated its policy: an evaluation and the report are left."""
    return any('"vapo": "end", "stage": "ppo_update"' in log.read_text() for log in workdir.glob("tiny-*/log.txt"))


def test_both_end_well_and_give_what_they_give_alone(together: Together, undisturbed: Undisturbed) -> None:
    assert [status for status, *_ in together.ends] == [0, 0], together.ends
    made = products(together.workdir)
    assert len(made) > 20
    assert made <= products(undisturbed.workdir)


def test_the_same_recipe_is_refused_meanwhile(together: Together) -> None:
    assert_refused(together.refused, "is being executed by process", "--workdir")


def test_gc_spared_what_they_needed_and_took_the_rest(together: Together) -> None:
    assert len(together.said) > 3
    assert "is being executed by process" in "".join(together.said)
    for run in together.workdir.glob("tiny-*"):
        done = vapo("lineage", run.name, "--verify", "--workdir", together.workdir)
        assert done.returncode == 0, done.stderr
