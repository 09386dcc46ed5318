"""A working directory: run folders, and beside them the artifacts, cache and store that all its runs share."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vapo import __version__
from vapo.errors import UserError
from vapo.recipe import Recipe
from vapo.store import sha256_of
from vapo.tables import write_text

FORMAT = 1
RERUN = "rerun.json"  # in the folder of a rerun: what it does again (pipelines/rerunning.py)


@dataclass(frozen=True)
class Owner:
    """A process that executes a run, and since when (Unix seconds)."""

    run: str
    pid: str
    since: float


class Workdir:
    """One directory of runs.

    RUN/recipe.json, pipeline.yaml, log.txt, records.txt, report.html, lineage.html, tensorboard/ are a person's, and
    so are RUN-rerun-N/ and evaluations/NAME/; .vapo/ holds what all share: artifacts/ (kfp's), cache/ (kfp's), store/
    (checkpoint objects), models/ (links to them, as folders that Hugging Face reads), partial/ (what stages have
    finished that did not end), records/ (of all stages, by digest), and where checkpoints go to S3 objects/ (those that
    were read lately) and server/ (the embedded server's data, log and credentials).

    Raises:
        UserError: the directory was made by another version of this layout.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.shared = self.root / ".vapo"
        self.artifacts, self.cache, self.store, self.models, self.partial, self.objects, self.server = (
            self.shared / name for name in ("artifacts", "cache", "store", "models", "partial", "objects", "server")
        )
        self.records = self.shared  # as a store: it holds them in records/
        marker = self.shared / "format.json"
        if marker.is_file():
            found = json.loads(marker.read_text(encoding="utf-8"))
            if found.get("format") != FORMAT:
                raise UserError(
                    f"working directory {root} has format {found.get('format')} (vapo {found.get('vapo')}), this is "
                    f"format {FORMAT} (vapo {__version__}): choose another with --workdir"
                )
            return
        self.shared.mkdir(parents=True, exist_ok=True)
        write_text(marker, json.dumps({"format": FORMAT, "vapo": __version__}) + "\n")

    def run_folder(self, recipe: Recipe) -> Path:
        """The folder of a recipe's run: the same recipe has the same folder."""
        digest = hashlib.sha256(recipe.model_dump_json().encode()).hexdigest()[:6]
        return self.root / f"{recipe.name}-{digest}"

    def evaluation_folder(self, recipe: Recipe) -> Path:
        """The folder of a `vapo evaluate`, apart from the runs, since there is nothing in it to resume."""
        return self.root / "evaluations" / self.run_folder(recipe).name

    def runs(self) -> list[Path]:
        """All run folders, the latest begun last."""
        return sorted(
            (p.parent for p in self.root.glob("*/recipe.json")), key=lambda f: (f / "recipe.json").stat().st_mtime
        )

    def rerun_folder(self, run: str) -> Path:
        """A new folder for doing a part of a run again: the next number."""
        number = 1
        while True:
            folder = self.root / f"{run}-rerun-{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder

    def evaluations(self) -> list[Path]:
        """The folders of all evaluations."""
        return sorted(path.parent for path in self.root.glob("evaluations/*/recipe.json"))

    @contextmanager
    def executing(self, folder: Path) -> Iterator[None]:
        """Hold a run folder while its run is executed; it begins when nobody tidies (`alone`).

        Raises:
            UserError: another process holds it; names its process ID.
        """
        with ExitStack() as stack:
            with self._tidying(fcntl.LOCK_SH):
                stack.enter_context(locked(folder))
            yield

    @contextmanager
    def alone(self) -> Iterator[list[Owner]]:
        """The runs that are being executed now; no other begins before the block ends."""
        with self._tidying(fcntl.LOCK_EX):
            folders = [p for p in [*self.root.glob("*"), *self.root.glob("evaluations/*")] if p != self.shared]
            yield [owner for folder in folders if (owner := owner_of(folder))]

    @contextmanager
    def _tidying(self, how: int) -> Iterator[None]:
        with (self.shared / "lock").open("a") as lock:
            fcntl.flock(lock, how)
            yield

    def forget(self) -> None:
        """Empty the cache: every stage will be done anew, from its beginning. Artifacts and checkpoints stay.

        Raises:
            UserError: a run is being executed, which may be at what would go.
        """
        with self.alone() as owners:
            for owner in owners:
                raise UserError(
                    f"--fresh: run {owner.run} is being executed by process {owner.pid} and uses the cache: wait for "
                    "it, or use another --workdir"
                )
            for folder in (self.cache, self.partial):
                shutil.rmtree(folder, ignore_errors=True)

    def find(self, name: str) -> Path:
        """The folder of a run by its name.

        Raises:
            UserError: there is none; the message lists those there are.
        """
        folder = self.root / name
        if not (folder / "recipe.json").is_file():
            raise UserError(f"no run {name!r} in {self.root}: there are {[f.name for f in self.runs()]}")
        return folder

    def last_task(self, run: str) -> Path:
        """The folder of the task that wrote a run's page: from its record the lineage leads to everything.

        Raises:
            UserError: there is no such run, it did not end, or its artifacts are gone.
        """
        page = self.find(run) / "report.html"
        if not page.is_file():
            raise UserError(f"run {run!r} did not end: finish it first with 'vapo run --resume'")
        digest = sha256_of(page)
        for found in self.artifacts.glob("*/*report/page"):
            if sha256_of(found) == digest:
                return found.parent
        raise UserError(f"run {run!r}: the task that wrote {page} is not in {self.artifacts}: run it again")

    def interrupted(self) -> Path:
        """The folder of the latest run that did not end.

        Raises:
            UserError: every run ended, or there is none.
        """
        for folder in reversed(self.runs()):
            if not ended(folder):
                return folder
        raise UserError(f"no interrupted run in {self.root}: give a recipe, for example 'vapo run demo'")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder; the lock goes with the process, however it ends.

    Raises:
        UserError: another process holds it; names its process ID.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode().strip() or "unknown"
            raise UserError(
                f"run {folder.name} is being executed by process {owner}: wait for it, or use another --workdir"
            ) from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)


def owner_of(folder: Path) -> Owner | None:
    """Who executes a run; None if nobody does: a lock that a killed process left is none."""
    try:
        lock = (folder / "lock").open()
    except FileNotFoundError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Owner(folder.name, lock.read(32).strip() or "unknown", os.fstat(lock.fileno()).st_mtime)
    return None


def ended(folder: Path) -> bool:
    """Whether a run came to its end: it has its page, or a rerun the list of what came out."""
    if (folder / RERUN).is_file():
        return "outputs" in json.loads((folder / RERUN).read_text(encoding="utf-8"))
    return (folder / "report.html").is_file()
