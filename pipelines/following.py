"""What a person sees of a run on a cluster: its stages and iterations as they come and go, and how it ended.

The API tells of a task its name, state and times (kubeflow/pipelines #14007, #9858: no error, no pod, no artifact).
"""

import re
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from pipelines.cluster import Cluster, NoAnswer
from pipelines.figures import Figures
from pipelines.runs import ENDED, get_run
from vapo.errors import Detached, StageFailed
from vapo.stage import STAGES

EVERY = 5.0  # seconds between two looks
PATIENCE = 900.0  # seconds without an answer until we give up; the run does not notice
# Tasks that are pipelines of their own, by the name that the graph gives them, or by kfp's key of it: servers differ.
PHASES = re.compile(r"(iterations?|block|evaluation|value-pretraining)(-\d+)*(-of-\d+)?")
EPOCH = datetime(1970, 1, 2, tzinfo=UTC)  # what has not ended ended in the year 1


@dataclass(frozen=True)
class Seen:
    """A task as the API tells of it: times are Unix seconds, 0 where there is none."""

    name: str
    state: str
    started: float
    ended: float

    @property
    def stage(self) -> str:
        """The stage that it executes, or an empty text: a sub-pipeline, a driver, a condition."""
        name = re.sub(r"-\d+$", "", self.name).replace("-", "_")
        return name if name in STAGES else ""

    @property
    def told(self) -> bool:
        """Whether its end is worth a line: an iteration, an evaluation, or what stands beside them."""
        return bool(PHASES.fullmatch(self.name)) or self.stage in ("problems", "base_model", "report")


@dataclass
class Following:
    """Shows what changed from one look to the next."""

    console: Console
    name: str
    planned: dict[str, int] = field(default_factory=dict)  # stage -> tasks; empty: unknown
    state: str = ""
    tasks: list[Seen] = field(default_factory=list)
    said: set[tuple[str, float]] = field(default_factory=set)
    begun: float = 0.0

    def look(self, run: Any) -> None:
        """Take in the run's present state, and say what is new."""
        self.begun = _seconds(run.created_at)
        details = run.run_details.task_details if run.run_details else None
        self.tasks = [
            Seen(t.display_name or "", t.state or "", _seconds(t.start_time), _seconds(t.end_time))
            for t in details or []
        ]
        for task in sorted(self.tasks, key=lambda task: task.ended):
            failed = task.state == "FAILED" and (task.stage or task.told)
            if (failed or (task.told and task.state == "SUCCEEDED")) and (task.name, task.started) not in self.said:
                self.said.add((task.name, task.started))
                took = f" in {clock(task.ended - task.started)}" if task.ended > task.started > 0 else ""
                self.say(f"{task.name}: {task.state.lower()}{took}")
        if run.state != self.state:
            self.state = run.state or "PENDING"
            self.say(f"run {self.name}: {self.state.lower()}")

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def failed(self) -> list[str]:
        """Names of the failed tasks: the stages, or whatever failed if none of them did."""
        names = [task.name for task in self.tasks if task.state == "FAILED"]
        stages = [task.name for task in self.tasks if task.state == "FAILED" and task.stage]
        return sorted(set(stages or names))

    def __rich__(self) -> Group:
        done = Counter(task.stage for task in self.tasks if task.stage and task.state in ENDED)
        if self.planned:  # a sub-pipeline may have the name of a stage, and counts as well
            done = Counter({stage: min(count, self.planned.get(stage, 0)) for stage, count in done.items()})
        total = f"/{sum(self.planned.values())}" if self.planned else ""
        elapsed = clock(time.time() - self.begun) if self.begun else ""
        head = Text(f"{self.name}  {self.state.lower()}  {sum(done.values())}{total} tasks  {elapsed}")
        lines = [head]
        for task in sorted(self.tasks, key=lambda task: task.started):
            if task.state != "RUNNING" or not (task.stage or task.told):
                continue
            of = f" {done[task.stage]}/{self.planned[task.stage]} done" if task.stage in self.planned else ""
            line = Text(f"{task.name}  ", style="bold")
            line.append(f"{clock(time.time() - task.started)}{of}", style="dim")
            lines.append(line)
        return Group(*lines)


def follow(
    cluster: Cluster,
    run: Any,
    console: Console,
    planned: dict[str, int] | None = None,
    every: float = EVERY,
    figures: Figures | None = None,
) -> Any:
    """Show a run until it has ended; returns it as it is then.

    Args:
        planned: stage -> how many tasks of it there will be.
        every: seconds between two looks.
        figures: says the metrics that its stages have left.

    Raises:
        StageFailed: it did not succeed.
        Detached: Ctrl-C; the run goes on.
        UserError: the server refuses, or has not answered for PATIENCE seconds; the run goes on.
    """
    shown = Following(console, run.display_name, planned or {})
    try:
        with (
            Live(shown, console=console, refresh_per_second=2, transient=True) if console.is_terminal else nullcontext()
        ):
            while True:
                if figures:
                    figures.look()
                shown.look(run)
                if run.state in ENDED:
                    break
                time.sleep(every)
                run = _patiently(cluster, run.run_id, shown.say)
    except KeyboardInterrupt:
        raise Detached(
            f"run {run.display_name} goes on: 'vapo watch {run.run_id} {cluster.options()}' shows it again, "
            f"'vapo stop {run.run_id} {cluster.options()}' ends it"
        ) from None
    if figures:
        figures.table()
    if run.state != "SUCCEEDED":
        raise StageFailed(_ending(cluster, run, shown))
    return run


def _ending(cluster: Cluster, run: Any, shown: Following) -> str:
    """What became of a run that did not succeed, where its logs are, and how it goes on."""
    failed = ", ".join(shown.failed())
    reason = " ".join((run.error.message or "").split())[:300] if run.error else ""
    return (
        f"run {run.display_name} {'was stopped' if run.state == 'CANCELED' else run.state.lower()}"
        + (f" in {failed}" if failed else "")
        + (f" ({reason})" if reason else "")
        + f": logs at {cluster.address(f'runs/details/{run.run_id}')}; 'vapo retry {run.run_id} {cluster.options()}' "
        "goes on from what is complete"
    )


def _patiently(cluster: Cluster, run_id: str, say: Callable[[str], None]) -> Any:
    """The run as it is, however often we have to ask within PATIENCE."""
    since, told = time.monotonic(), False
    while True:
        try:
            return get_run(cluster, run_id)
        except NoAnswer as error:
            if time.monotonic() - since > PATIENCE:
                raise
            if not told:
                say(f"{error}; the run goes on, and we ask again")
            told = True
            time.sleep(EVERY)


def _seconds(moment: datetime | None) -> float:
    return moment.timestamp() if moment and moment > EPOCH else 0.0


def clock(seconds: float) -> str:
    """Say "3:07", or "2:03:07"."""
    hours, rest = divmod(int(max(seconds, 0)), 3600)
    minutes = f"{rest // 60:02d}" if hours else f"{rest // 60}"
    return (f"{hours}:" if hours else "") + f"{minutes}:{rest % 60:02d}"
