"""What a person sees of a local run: live in a terminal, quiet lines otherwise, tables at the end."""

import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vapo.report.curves import history_of
from vapo.report.history import name_in_history
from vapo.report.results import last_evaluation, number, results_table

EXECUTING = re.compile(r"Executing task .*?'(?:\x1b\[\d+m)?(?P<task>[\w-]+)'")
FINISHED = re.compile(r"Task .*?'(?P<task>[\w-]+)'.*? finished with status (?:\x1b\[\d+m)?SUCCESS")
CACHED = re.compile(r"Task (?P<task>[\w-]+) cache hit \(key=(?P<key>\w+)\)")

COLUMNS = (  # heading, stage, metric, format: what stands in an iteration's line and in the table at the end
    ("reward", "verification", "reward_mean", "{:+.2f}"),
    ("accuracy", "verification", "accuracy", "{:.1%}"),
    ("held-out", "evaluation", "accuracy", "{:.1%}"),
    ("length", "rollout", "length_mean", "{:.0f}"),
    ("entropy", "ppo_update", "entropy", "{:.3f}"),
    ("expl. var.", "advantages", "explained_variance", "{:+.3f}"),
    ("clip low", "ppo_update", "clip_fraction_low", "{:.2%}"),
    ("clip high", "ppo_update", "clip_fraction_high", "{:.2%}"),
)


WHOLE = {"concatenation": "rollout"}  # stages that tell of all shards of another


@dataclass
class Task:
    """One executed task: its stage, wall time, and how much of it was the stage's own work (seconds)."""

    stage: str
    wall: float
    work: float

    @property
    def overhead(self) -> float:
        """Everything but the stage's own work: process start, imports, reading parameters, kfp."""
        return self.wall - self.work


@dataclass
class Watch:
    """Follows a run through its events and kfp's log lines."""

    console: Console
    planned: dict[str, int]  # stage -> tasks
    name: str
    live: bool
    on_metric: Callable[[dict[str, Any]], None]  # called with a row as in HISTORY for every metric that arrives
    on_record: Callable[[str], None] = lambda digest: None  # called with the record of every task that was executed
    on_hit: Callable[[str], None] = lambda key: None  # called with the beginning of every cache key that was found
    started: float = field(default_factory=time.monotonic)
    tasks: list[Task] = field(default_factory=list)
    cached: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    rows: dict[int, dict[str, str]] = field(default_factory=dict)
    error: dict[str, Any] | None = None
    current: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    work: float = 0.0
    task_started: float = 0.0
    display: Live | None = None

    def __enter__(self) -> "Watch":
        self.console.print(f"run {self.name}: {sum(self.planned.values())} tasks")
        if self.live:
            self.display = Live(self, console=self.console, refresh_per_second=4, transient=True)
            self.display.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.display:
            self.display.__exit__(None, None, None)

    def on_log(self, line: str) -> None:
        """A line of kfp.local's log."""
        if EXECUTING.search(line):
            self.task_started, self.work = time.monotonic(), 0.0
        elif found := CACHED.search(line):
            self.cached[_stage_of(found["task"])] += 1
            self.on_hit(found["key"])
        elif FINISHED.search(line) and self.current:
            self.tasks.append(Task(self.current["stage"], time.monotonic() - self.task_started, self.work))
            self.current, self.progress = {}, {}

    def on_event(self, event: dict[str, Any]) -> None:
        """A line that a stage printed."""
        kind = event["vapo"]
        if kind == "start":
            self.current, self.progress = event, {}
        elif kind == "progress":
            self.progress = event
        elif kind == "error":
            self.error = event
        elif kind == "bad_row":
            self._say(f"left out: {event['row']}")
        elif kind == "warning":
            self._say(f"warning: {event['message']}")
        elif kind == "end":
            self.work = event["seconds"]
            self.on_record(event.get("record", ""))
            self._end(event)

    def _end(self, event: dict[str, Any]) -> None:
        stage, purpose, iteration = event["stage"], event["purpose"], event["iteration"]
        if event.get("shards"):  # a part: the concatenation tells of the whole
            return
        stage = WHOLE.get(stage, stage)
        if stage != "history":
            shown = name_in_history(stage, purpose)
            for name, value in {"seconds": event["seconds"], **event["metrics"]}.items():
                self.on_metric({"iteration": iteration, "stage": shown, "name": name, "value": value})
        if purpose in ("", "training"):
            row = self.rows.setdefault(iteration, {})
            for heading, of_stage, metric, shape in COLUMNS:
                if stage == of_stage and metric in event["metrics"]:
                    row[heading] = shape.format(event["metrics"][metric])
        if stage == "ppo_update":
            self._say(f"iteration {iteration}: {self._row(iteration)}{self._eta()}")
        elif stage == "evaluation":
            k, accuracy = event["metrics"]["samples_per_prompt"], number(event["metrics"], "accuracy")
            when = f" after iteration {iteration}" if "ppo_update" in self.planned else ""  # `vapo evaluate` has none
            self._say(f"evaluation{when}: avg@{k:.0f} {accuracy}{self._eta()}")
        elif stage in ("problems", "base_model", "value_pretraining"):
            shown = " ".join(f"{name} {value:{_digits(value)}}" for name, value in event["metrics"].items())
            self._say(f"{stage}: {shown} ({event['seconds']:.0f} s)")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _row(self, iteration: int) -> str:
        return " ".join(f"{heading} {value}" for heading, value in self.rows[iteration].items())

    def _eta(self) -> str:
        left = self.seconds_left()
        return "" if left is None else f" · {_clock(time.monotonic() - self.started)}, {_clock(left)} left"

    def seconds_left(self) -> float | None:
        """Remaining tasks at the median wall time of their stage so far; None before anything is known."""
        walls: dict[str, list[float]] = defaultdict(list)
        for task in self.tasks:
            walls[task.stage].append(task.wall)
        if not walls:
            return None
        anything = statistics.median(w for found in walls.values() for w in found)
        total = 0.0
        for stage, count in self.planned.items():
            left = count - len(walls[stage]) - self.cached[stage]
            total += max(left, 0) * (statistics.median(walls[stage]) if walls[stage] else anything)
        return total

    def __rich__(self) -> Group:
        done, total = len(self.tasks) + sum(self.cached.values()), sum(self.planned.values())
        left = self.seconds_left()
        head = Text(f"{done}/{total} tasks  {_clock(time.monotonic() - self.started)}")
        head.append("" if left is None else f"  about {_clock(left)} left", style="dim")
        if not self.current:
            return Group(head)
        purpose = self.current["purpose"]
        shard = f", shard {self.current['shard'] + 1} of {self.current['shards']}" if "shards" in self.current else ""
        what = f"{self.current['stage']}{f' ({purpose})' if purpose not in ('', 'training') else ''}"
        line = Text(f"iteration {self.current['iteration']}  ")
        line.append(what + shard, style="bold")
        p = self.progress
        if not p:
            return Group(head, line)
        line.append(f"  {p['done']}/{p['total']} {p['unit']}  {p['rate']:,.0f} {p['rate_unit']}")
        line.append("".join(f"  {name} {value:.3g}" for name, value in p["metrics"].items()), style="dim")
        return Group(head, line, ProgressBar(total=p["total"], completed=p["done"], width=40))


def iterations_table(history: list[dict[str, Any]]) -> Table:
    """The table at the end of a run, from the rows of HISTORY: one line per iteration."""
    table = Table(title=None, box=None, header_style="bold")
    table.add_column("iteration", justify="right", no_wrap=True)
    for heading, *_ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    known: dict[tuple[int, str], dict[str, float]] = defaultdict(dict)
    for row in history:
        known[row["iteration"], row["stage"]][row["name"]] = row["value"]
    for iteration in sorted({row["iteration"] for row in history}):
        cells = []
        for _, stage, metric, shape in COLUMNS:
            found = known[iteration, stage]
            if metric not in found:
                cells.append("")
            elif stage == "evaluation":
                cells.append(escape(number(found, metric)))  # rich would read "[78.1, 85.7]" as its own markup
            else:
                cells.append(shape.format(found[metric]))
        table.add_row(str(iteration), *cells)
    return table


def evaluation_table(history: list[dict[str, Any]]) -> Table:
    """The table at the end of an evaluation: all problems and each family, with intervals."""
    heading, *lines = results_table(last_evaluation(history_of(history)))
    table = Table(box=None, header_style="bold")
    for text in heading:
        table.add_column(text, justify="left" if text == "family" else "right", no_wrap=True)
    for line in lines:
        table.add_row(*map(escape, line))
    return table


def last_accuracy(history: list[dict[str, Any]]) -> str:
    """The last evaluation's accuracy, say "82.0% [78.1, 85.7], avg@2 over 256 problems"."""
    found = last_evaluation(history_of(history))
    return f"{number(found, 'accuracy')}, avg@{found['samples_per_prompt']:.0f} over {found['problems']:.0f} problems,"


def overhead_table(tasks: list[Task]) -> Table:
    """Work and orchestration of every stage, in seconds per task: what the pipeline costs beside the learning."""
    table = Table(box=None, header_style="bold")
    for heading in ("stage", "tasks", "work, median", "orchestration, median", "orchestration, worst"):
        table.add_column(heading, justify="left" if heading == "stage" else "right", no_wrap=True)
    for stage in dict.fromkeys(t.stage for t in tasks):
        of_stage = [t for t in tasks if t.stage == stage]
        work, overhead = ([getattr(t, name) for t in of_stage] for name in ("work", "overhead"))
        table.add_row(
            stage,
            str(len(of_stage)),
            f"{statistics.median(work):.2f} s",
            f"{statistics.median(overhead):.2f} s",
            f"{max(overhead):.2f} s",
        )
    return table


def _stage_of(task: str) -> str:
    """A kfp task name, say "ppo-update-3", as its stage."""
    return re.sub(r"-\d+$", "", task).replace("-", "_")


def _digits(value: float) -> str:
    """A count is shown whole."""
    return ",.0f" if value == round(value) else ".4g"


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def console() -> Console:
    """The terminal, or lines that nothing wraps when the output is a file or a pipe."""
    # The stream is named: rich would otherwise follow sys.stdout, which kfp.local's log is redirected from.
    found = Console(file=sys.stdout)
    return found if found.is_terminal else Console(file=sys.stdout, width=160)
