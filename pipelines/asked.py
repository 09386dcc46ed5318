"""What `vapo evaluate` is asked for: from the names of a model and of problems to the recipe of its pipeline."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipelines.outside import files_of
from pipelines.stores import opened
from pipelines.workdir import Workdir
from vapo.errors import UserError
from vapo.lineage.record import FILE as RECORD
from vapo.recipe import Recipe, available_recipes, load_recipe, override, parse_recipe, read_resolved
from vapo.store import Manifest, model_only, open_checkpoint, read_manifest, sha256_of

PROMPTING = ("template", "chat_template_from")  # a run's policy is asked as it was trained
ALL = 10**9  # of a file's problems are taken, unless --set problems.heldout says how many


def evaluation_recipe(
    model: str, problems: str, workdir: Workdir, settings: Iterable[str] = (), *, iteration: int | None = None
) -> Recipe:
    """The recipe whose evaluation alone is run: its held-out problems, base_model.path, evaluation and grader.

    What neither the problems' recipe nor `settings` say comes from the run that made the model, else from the defaults.

    Args:
        model: a local Hugging Face folder, or a run's name: then its policy after `iteration`, the last if None.
        problems: a problem file, all of it; or a recipe or a run, whose held-out problems are taken.

    Raises:
        UserError: there is no such model, iteration or problem set, or the settings contradict.
    """
    made_by = None
    if (workdir.root / model / "recipe.json").is_file():
        made_by = read_resolved(workdir.root / model / "recipe.json")
        with opened(made_by.runtime.store, workdir):
            path = _policy_of(workdir, model, iteration)
    elif not Path(model).is_dir():
        raise UserError(
            f"model {model!r}: no folder of that name, and no run in {workdir.root}: there are "
            f"{[folder.name for folder in workdir.runs()]}"
        )
    elif iteration is not None:
        raise UserError(f"--iteration {iteration} is for a run's name, but model {model!r} is a folder: leave it out")
    else:
        path = Path(model).resolve()

    data, name = _problems(problems, workdir, made_by)
    data["base_model"] = {"path": str(path)}
    of_model = (Path(model).name or path.name) + ("" if iteration is None else f"-{iteration}")
    data["name"] = re.sub("[^a-z0-9]+", "-", f"{of_model}-on-{name}".lower()).strip("-")[:40].strip("-")
    data["report"] = {**data.get("report", {}), "title": f"{of_model} on {name}"}
    return override(parse_recipe(data, "vapo evaluate"), settings)


def _problems(problems: str, workdir: Workdir, made_by: Recipe | None) -> tuple[dict[str, Any], str]:
    """The settings that bring the problems, and a name for them."""
    path = Path(problems)
    if (workdir.root / problems / "recipe.json").is_file():
        return _heldout_alone(read_resolved(workdir.root / problems / "recipe.json")), problems
    if path.suffix == ".toml" or (not path.exists() and problems in available_recipes()):
        return _heldout_alone(load_recipe(problems)), path.stem
    if not files_of(path):
        raise UserError(
            f"--problems {problems!r}: no such file, no run in {workdir.root}, and no recipe: there are "
            f"{available_recipes()}"
        )
    data = made_by.model_dump(mode="json") if made_by else {}
    asked_as = {key: data["problems"][key] for key in PROMPTING} if made_by else {}
    # One file, all held out: nothing is trained on.
    sizes = {"heldout_share": 1.0, "heldout": ALL, "train": ALL}
    data["problems"] = {"source": "file", "path": str(path.resolve()), **asked_as, **sizes}
    return data, path.stem


def _heldout_alone(recipe: Recipe) -> dict[str, Any]:
    """A recipe's settings without worked examples: its held-out problems are the same without them."""
    data = recipe.model_dump(mode="json")
    data["problems"]["examples"] = 0
    return data


def _policy_of(workdir: Workdir, run: str, iteration: int | None) -> Path:
    """A folder with a run's policy after an iteration, as Hugging Face has it: links into the store, named by content.

    The lineage leads there: from the run's page to the last policy, and from each update to the policy before it.
    """
    record = _record(workdir.last_task(run) / RECORD)
    last = None
    while True:
        path = Path(record["inputs"]["policy"]["path"])
        record = _record(path.parent / RECORD)
        after = record["parameters"].get("iteration", 0)  # the base model's task knows none
        last = after if last is None else last
        if iteration in (None, after):
            return _unpacked(read_manifest(path, "policy"), workdir.models)
        if record["stage"] != "ppo_update" or iteration > last:
            raise UserError(f"--iteration {iteration}: run {run!r} has policies after iterations 0 to {last}")


def _record(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the record {path} ({error}): run its pipeline again") from None
    return found


def _unpacked(manifest: Manifest, models: Path) -> Path:
    """The folder, verified file by file; one that is not whole is made anew beside it, and takes its place."""
    folder = models / manifest.digest[:16]
    files = [file for file in manifest.files if model_only(file.path)]
    if folder.is_dir() and all(
        _is(folder / file.path, file.sha256) for file in files
    ):  # another evaluation may read it
        os.utime(folder)
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=models) as scratch:
        made = open_checkpoint(manifest, Path(scratch) / "model", model_only)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    return folder


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_of(path) == sha256
