"""Twenty kills of one run, in every stage, of runner, stage and store: it makes what it would have made without."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pipelines.conftest import Undisturbed
from tests.running import (
    TINY,
    Running,
    children,
    counts,
    events,
    events_in,
    folder_of,
    kill,
    marked,
    products,
    running,
    vapo,
)
from vapo.stage import STAGES

pytestmark = pytest.mark.slow
KILLS = 20
VICTIMS = ("runner", "stage", "store")


@dataclass(frozen=True)
class Moment:
    """When to kill what: so far into a task (a share of the time it took undisturbed)."""

    task: int  # in the order of the run
    share: float
    victim: str


def moments(stages: list[str], draw: random.Random) -> list[Moment]:
    """One in every stage, the others anywhere; in the order of the run."""
    first = [draw.choice([i for i, name in enumerate(stages) if name == stage]) for stage in dict.fromkeys(stages)]
    chosen = sorted(first + [draw.randrange(len(stages)) for _ in range(KILLS - len(first))])
    victims = [VICTIMS[i % 2] for i in range(KILLS - 4)] + ["store"] * 4
    draw.shuffle(victims)
    return [Moment(task, draw.random(), victim) for task, victim in zip(chosen, victims, strict=True)]


def strike(run: Running, victim: str) -> None:
    """Kill -9. A run whose store is gone would try for half a minute to reach it, so its runner follows."""
    lines = marked(run.mark)
    if victim == "stage":
        worker = run.worker()
        own = children(worker) if worker else []
        for pid in own or [pid for pid in children(run.process.pid) if "executor_main" in lines.get(pid, "")]:
            kill(pid)
        return
    if victim == "store":
        for pid in (pid for pid, line in lines.items() if line.split(" ")[0].endswith("weed")):
            kill(pid)
        time.sleep(0.3)
    kill(run.process.pid)


def struck(run: Running, moment: Moment, tasks: list[tuple[str, int, str]], seconds: list[float]) -> str:
    """Wait for the moment and strike; returns the stage that was under way."""
    # Evaluations sample in the same way each time: the name of the second one's task is that of the first's.
    later = set(tasks[moment.task :]) - set(tasks[: moment.task])

    def begun() -> tuple[str, int, str] | None:
        told = (e for e in events_in(run.log()) if e["vapo"] == "start")
        return next((key for e in told if (key := (e["stage"], e["iteration"], e["purpose"])) in later), None)

    found = run.wait_for(begun)
    time.sleep(moment.share * seconds[tasks.index(found)])
    strike(run, moment.victim)
    run.process.wait(120.0)  # whatever it left is killed after the block: nobody waits for a worker that imports torch
    return str(found[0])


def test_twenty_kills_change_nothing(undisturbed: Undisturbed, tmp_path: Path) -> None:
    told = events(undisturbed.folder)
    tasks = [(e["stage"], e["iteration"], e["purpose"]) for e in told if e["vapo"] == "start"]
    seconds = [e["seconds"] for e in told if e["vapo"] == "end"]
    assert len(tasks) == len(seconds) == 21
    hit: Counter[str] = Counter()
    arguments: tuple[str, ...] = (*TINY, "--store", "s3")
    for moment in moments([task[0] for task in tasks], random.Random(6)):
        cold = () if STAGES[tasks[moment.task][0]].torch else ("--cold",)  # torch in vain takes most of the time
        with running(tmp_path, *arguments, *cold) as run:
            hit[struck(run, moment, tasks, seconds)] += 1
        arguments = ("--resume",)
    assert sum(hit.values()) == KILLS
    assert hit.keys() == {stage for stage, *_ in tasks}, hit

    done = vapo("run", "--resume", "--workdir", tmp_path)
    assert done.returncode == 0, done.stderr
    assert counts(done.stdout)[1] > 10
    made, known = products(tmp_path), products(undisturbed.workdir)
    assert made <= known
    assert {(stage, *rest[:3]) for stage, *rest in made} >= {(s, i, p, n) for s, i, p, n in wanted(undisturbed)}
    run_name = folder_of(done.stdout).name
    verified = vapo("lineage", run_name, "--verify", "--workdir", tmp_path)
    assert verified.returncode == 0, verified.stderr
    assert "21 stages" in verified.stdout


def wanted(undisturbed: Undisturbed) -> set[tuple[str, int, str, str]]:
    """The outputs of the undisturbed run, by stage, iteration, purpose and name."""
    found = json.loads(vapo("lineage", undisturbed.folder.name, "--json", "--workdir", undisturbed.workdir).stdout)
    return {
        (record["stage"], record["iteration"], record["purpose"], name)
        for record in found["records"]
        for name in set(record["outputs"]) - {"metrics", "page", "lineage"}
    }
