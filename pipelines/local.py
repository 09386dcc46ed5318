"""Run a recipe's compiled pipeline on this machine through kfp.local: subprocesses, caching, a warm worker."""

import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kfp.dsl.base_component import BaseComponent
from rich.console import Console

from pipelines.compiling import compile_pipeline, stages_of
from pipelines.ledger import Ledger
from pipelines.standalone import evaluation_pipeline
from pipelines.stores import environ, opened
from pipelines.tensorboard import EventFile, write_events
from pipelines.training import training_pipeline
from pipelines.watching import Task, Watch, evaluation_table, iterations_table, last_accuracy, overhead_table
from pipelines.workdir import Workdir
from vapo import __version__, partial, worker
from vapo.errors import StageFailed, UserError, as_user_error
from vapo.lineage import records
from vapo.lineage.graph import node_at
from vapo.lineage.software import source_digest
from vapo.progress import ATTENDED, parse
from vapo.recipe import Recipe
from vapo.rollout import installed as rollout_installed
from vapo.schemas import HISTORY
from vapo.tables import read_table, write_text
from vapo.train import installed as train_installed
from vapo.train.nodes import check as check_nodes

COLOURS = re.compile(r"\x1b\[\d*m")  # kfp.local writes them whatever the output is


@dataclass(frozen=True)
class Finished:
    """What a run leaves: its folder, the HISTORY rows, and the tasks that were executed rather than cached."""

    folder: Path
    history: list[dict[str, Any]]
    tasks: list[Task]


def check(recipe: Recipe) -> None:
    """Before anything is touched: whether there is all that a recipe's engines need.

    Raises:
        UserError: an engine is not installed, or the cluster that nodes are asked of does not answer.
    """
    rollout_installed.check_installed(recipe.rollout)
    train_installed.check_installed(recipe.train)
    if recipe.train.nodes > 1:
        check_nodes(recipe.train, recipe.runtime.store)


def run(recipe: Recipe, workdir: Workdir, console: Console, *, warm: bool = True) -> Finished:
    """Execute the training pipeline; what is complete in the working directory's cache is not done again.

    Raises:
        UserError: a stage met something the user can cure.
        StageFailed: a stage failed otherwise.
    """
    folder = workdir.run_folder(recipe)
    with workdir.executing(folder), opened(recipe.runtime.store, workdir) as store:
        outputs, watch = execute(recipe, training_pipeline, folder, workdir, store, console, warm)
        history = _rows(outputs)
        write_events(folder / "tensorboard", history)
    console.print(iterations_table(history))
    accuracy = [row["value"] for row in history if (row["stage"], row["name"]) == ("evaluation", "accuracy")]
    change = f"{accuracy[0]:.1%} -> {accuracy[-1]:.1%} ({100 * (accuracy[-1] - accuracy[0]):+.1f} points)"
    if (last := history[-1]["iteration"]) < recipe.iterations:
        change += (
            f", target_accuracy {recipe.target_accuracy:.1%} reached after iteration {last} of {recipe.iterations}"
        )
    summary(console, watch, f"held-out accuracy {change}", folder / "report.html")
    return Finished(folder, history, watch.tasks)


def evaluate(recipe: Recipe, workdir: Workdir, console: Console, *, warm: bool = True) -> Finished:
    """Execute the evaluation pipeline of a recipe, likewise; raises what `run` does."""
    folder = workdir.evaluation_folder(recipe)
    with workdir.executing(folder), opened(recipe.runtime.store, workdir) as store:
        outputs, watch = execute(recipe, evaluation_pipeline, folder, workdir, store, console, warm)
    history = _rows(outputs)
    console.print(evaluation_table(history))
    summary(console, watch, f"accuracy {last_accuracy(history)}", folder / "report.html")
    return Finished(folder, history, watch.tasks)


def execute(
    recipe: Recipe,
    pipeline_of: Callable[[Recipe], BaseComponent],
    folder: Path,
    workdir: Workdir,
    store: str,
    console: Console,
    warm: bool,
    marks: Mapping[str, str] = MappingProxyType({}),
) -> tuple[dict[str, Any], Watch]:
    """Execute a recipe's pipeline and leave its page in the folder, if it has one: (its outputs, who watched).

    Args:
        marks: as in `compile_pipeline`.
    """
    ledger = Ledger(folder, workdir.cache)  # before the recipe: what has one and no ledger is of an older vapo
    with tempfile.TemporaryDirectory(prefix="vapo-") as scratch:
        write_text(folder / "recipe.json", recipe.model_dump_json(indent=1) + "\n")
        (folder / "report.html").unlink(missing_ok=True)
        # OpenMP threads that spin long make a stage five times slower when anything else wants a core (docs/log.md).
        environment = {"TMPDIR": scratch, "PYTHONUNBUFFERED": "1", "GOMP_SPINCOUNT": "2000", ATTENDED: "1"}
        environment[partial.PLACE] = str(workdir.partial)
        environment[records.STORE] = os.environ.get(records.STORE) or str(workdir.records)
        if recipe.runtime.threads:
            environment["OMP_NUM_THREADS"] = str(recipe.runtime.threads)
        with environ(environment), warm_worker(Path(scratch), folder / "worker.txt", warm):
            ir = compile_pipeline(recipe, local_image(), pipeline_of, marks=marks)
            write_text(folder / "pipeline.yaml", ir)
            events = EventFile(folder / "tensorboard")
            told = (events.add, ledger.executed, ledger.served)
            with Watch(console, stages_of(ir), folder.name, console.is_terminal, *told) as watch:
                try:
                    outputs = _execute(ir, workdir, store, folder / "log.txt", watch)
                finally:
                    events.close()
        ledger.ended()
        if "page" in outputs:
            show(Path(outputs["page"].path), folder)
    return outputs, watch


def show(page: Path, folder: Path) -> None:
    """Put what the report stage made into a run's folder."""
    shutil.copyfile(page.with_name("lineage"), folder / "lineage.html")
    shutil.copyfile(page, folder / "report.html")  # last: with it the run has ended


def _rows(outputs: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the HISTORY that the page shows: where a run ends early, the page alone is always an output."""
    page = Path(outputs["page"].path)
    return read_table(Path(node_at(page.parent).record.inputs["history"].path), HISTORY).to_pylist()


def local_image() -> str:
    """The image name of a local run: it holds a digest of vapo's source, so that changed code misses the cache."""
    return f"python-vapo:{__version__}-{source_digest()[:12]}"


def _execute(ir: str, workdir: Workdir, store: str, log: Path, watch: Watch) -> dict[str, Any]:
    from kfp import components, local

    warnings.filterwarnings("ignore", category=FutureWarning, module="kfp")
    pipeline = components.load_component_from_text(ir)
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(workdir.artifacts),
        enable_caching=True,
        cache_root=str(workdir.cache),
    )
    with log.open("w", encoding="utf-8", errors="replace") as file:
        try:
            with redirect_stdout(_Tee(file, watch)), _cache_hits(watch):
                task = pipeline(store=store)
        except Exception as error:
            raise _explained(error, watch, log) from error
    outputs: dict[str, Any] = task.outputs
    return outputs


@contextmanager
def _cache_hits(watch: Watch) -> Iterator[None]:
    """kfp.local tells of cache hits on the root logger, below the level that it shows."""
    root, handler = logging.getLogger(), logging.Handler(logging.INFO)
    handler.emit = lambda record: watch.on_log(record.getMessage())  # type: ignore[method-assign]
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def _explained(error: Exception, watch: Watch, log: Path) -> Exception:
    """What went wrong in the words of the stage that failed: kfp only says which task it was."""
    if watch.error and watch.error["user"]:
        return UserError(watch.error["message"])
    if cure := as_user_error(error):
        return cure
    if watch.error:
        stage, message = watch.error["stage"], watch.error["message"]
        return StageFailed(f"stage {stage} failed: {message}; its traceback is in {log}")
    if watch.current:
        stage, iteration = watch.current["stage"], watch.current["iteration"]
        return StageFailed(
            f"stage {stage} of iteration {iteration} ended without a word: it was killed, perhaps for want of memory; "
            f"the log is {log}, and the same command goes on from there"
        )
    return StageFailed(f"{COLOURS.sub('', str(error))}; the log is {log}")


class _Tee(io.TextIOBase):
    """kfp.local's standard output: stages' events and log lines go to the watch, everything to the log file."""

    def __init__(self, file: io.TextIOBase, watch: Watch) -> None:
        self.file, self.watch, self.line = file, watch, ""

    def write(self, text: str) -> int:
        self._log(text)
        *lines, self.line = (self.line + text).split("\n")
        for line in lines:
            event = parse(line)
            if event:
                self.watch.on_event(event)
            else:
                self.watch.on_log(line)
        return len(text)

    def flush(self) -> None:
        self._log("")

    def _log(self, text: str) -> None:
        try:
            self.file.write(text)
            self.file.flush()
        except OSError:
            return  # a full disk must not hide the event that says so


@contextmanager
def warm_worker(scratch: Path, log: Path, wanted: bool) -> Iterator[None]:
    """The process that forks stages which need torch; without it, if it fails, they start alone."""
    if not wanted:
        yield
        return
    address = scratch / "worker"
    worker.starting(str(address)).touch()
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, "-m", "vapo.worker", str(address), str(os.getpid())]
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        with environ({worker.ADDRESS: str(address)}):
            yield
    finally:
        process.terminate()
        process.wait()


def summary(console: Console, watch: Watch, outcome: str, page: Path | None) -> None:
    """What the tasks cost, what came out, and where to read on."""
    if watch.tasks:
        console.print(overhead_table(watch.tasks))
    console.print(
        f"{outcome} in {time.monotonic() - watch.started:.0f} s; {len(watch.tasks)} tasks executed, "
        f"{sum(watch.cached.values())} served from the cache",
        highlight=False,
    )
    if page:
        console.print(f"report: {page}", soft_wrap=True, highlight=False)
