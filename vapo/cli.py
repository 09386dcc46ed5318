"""The command line. It parses first and imports the heavy part after; exit codes: 0 done, 1 failed, 2 wrong input."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vapo import __version__
from vapo.errors import StageFailed, UserError, as_user_error

app = typer.Typer(
    help="VAPO: value-based reinforcement learning for long chains of thought, as a Kubeflow pipeline.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Recipe = Annotated[str, typer.Argument(help="a recipe's name (demo, tiny) or a .toml file", metavar="RECIPE")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="override one key; may be repeated", metavar="SECTION.KEY=VALUE")
]
Where = Annotated[Path, typer.Option("--workdir", file_okay=False, help="where runs, artifacts and the cache are kept")]
SkipBadRows = Annotated[
    bool, typer.Option("--skip-bad-rows", help="leave rows of the problem files out that are wrong; they are listed")
]
Store = Annotated[
    str,
    typer.Option(
        "--store",
        help="where checkpoints go, runtime.store: a folder, s3://bucket/prefix, minio://bucket/prefix, or s3 for a "
        "server started here",
        metavar="URI",
    ),
]
WORKDIR = Path("runs")
SKIP_BAD_ROWS = "problems.skip_bad_rows=true"


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        typer.echo(f"vapo {__version__}")
        raise typer.Exit


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="a recipe's name or a .toml file", metavar="[RECIPE]")] = "",
    set_: Set = None,
    workdir: Where = WORKDIR,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the last interrupted run, if no RECIPE is given")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="forget the working directory's cache first")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="start every stage from nothing, without a warm worker")] = False,
    skip_bad_rows: SkipBadRows = False,
    store: Store = "",
) -> None:
    """Run the whole pipeline on this machine, with progress and a report at the end.

    What is already complete in the working directory is served from the cache: the same command continues an
    interrupted run, and a changed setting redoes only what depends on it.
    """
    from pipelines.local import check
    from pipelines.local import run as run_locally
    from pipelines.watching import console
    from pipelines.workdir import Workdir
    from vapo.recipe import load_recipe

    if not recipe and not resume:
        raise UserError("give a recipe, for example 'vapo run demo', or --resume to continue the last interrupted run")
    if not recipe and (set_ or skip_bad_rows or store):
        raise UserError("--set needs a RECIPE, as --store does: --resume alone continues the interrupted run as it was")
    settings = [*(set_ or []), *([SKIP_BAD_ROWS] if skip_bad_rows else []), *_store(store)]
    resolved = load_recipe(recipe, settings) if recipe else None
    place = Workdir(workdir)
    resolved = resolved or place.interrupted()
    check(resolved)
    if fresh:
        place.forget()
    run_locally(resolved, place, console(), warm=not cold)


@app.command("compile")
def compile_(
    recipe: Recipe,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", dir_okay=False, help="the file; default RECIPE.yaml")
    ] = None,
    set_: Set = None,
) -> None:
    """Write the IR YAML that a cluster takes."""
    from pipelines.compiling import compile_pipeline, stages_of
    from vapo.recipe import load_recipe
    from vapo.tables import write_text

    resolved = load_recipe(recipe, set_ or [])
    ir = compile_pipeline(resolved, share=True)
    path = output or Path(f"{resolved.name}.yaml")
    write_text(path, ir)
    tasks = stages_of(ir)
    shown = ", ".join(f"{count} {stage}" for stage, count in tasks.items())
    typer.echo(f"{path}: {len(ir.encode()) / 1000:.0f} KB, {sum(tasks.values())} tasks ({shown})")


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="a run's name, as 'vapo run' printed it", metavar="RUN")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override a [report] key", metavar="report.KEY=VALUE")
    ] = None,
    workdir: Where = WORKDIR,
) -> None:
    """Write a run's report again; --set report.samples=30 shows more of it. Everything else comes from the cache."""
    from pipelines.local import run as run_locally
    from pipelines.watching import console
    from pipelines.workdir import Workdir
    from vapo.recipe import override, read_resolved

    place = Workdir(workdir)
    wrong = [text for text in set_ or [] if not text.startswith("report.")]
    if wrong:
        raise UserError(f"--set {wrong[0]}: 'vapo report' changes the [report] section only; use 'vapo run' for others")
    run_locally(override(read_resolved(place.find(run) / "recipe.json"), set_ or []), place, console())


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a local Hugging Face folder, or a run's name", metavar="MODEL")],
    problems: Annotated[
        str,
        typer.Option("--problems", help="a problem file; or a recipe or run: its held-out problems", metavar="FILE"),
    ],
    samples: Annotated[int | None, typer.Option("--samples", min=1, help="responses to each problem, k")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0.0, help="0 is greedy")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0)] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="per response")] = None,
    grader: Annotated[str, typer.Option("--grader", help="the grader's name, as verification.grader")] = "",
    iteration: Annotated[
        int | None, typer.Option("--iteration", min=0, help="of a run: its policy after that one, not the last")
    ] = None,
    set_: Set = None,
    workdir: Where = WORKDIR,
    cold: Annotated[bool, typer.Option("--cold", help="start every stage from nothing, without a warm worker")] = False,
    skip_bad_rows: SkipBadRows = False,
    store: Store = "",
) -> None:
    """Measure a model: avg@k, pass@k and cons@k with confidence intervals, overall and per family of problems.

    What no option says comes from the problems' recipe, else from the run's, else from the defaults.
    """
    from pipelines.asked import evaluation_recipe
    from pipelines.local import check
    from pipelines.local import evaluate as evaluate_locally
    from pipelines.watching import console
    from pipelines.workdir import Workdir

    given = {
        "evaluation.samples": samples,
        "evaluation.temperature": temperature,
        "evaluation.top_p": top_p,
        "rollout.max_new_tokens": max_new_tokens,
        "verification.grader": grader or None,
    }
    settings = [f"{key}={value}" for key, value in given.items() if value is not None]
    place = Workdir(workdir)
    if skip_bad_rows:
        settings.append(SKIP_BAD_ROWS)
    settings += _store(store)
    recipe = evaluation_recipe(model, problems, place, [*settings, *(set_ or [])], iteration=iteration)
    check(recipe)
    evaluate_locally(recipe, place, console(), warm=not cold)


@app.command()
def lineage(
    what: Annotated[
        str,
        typer.Argument(help="a run's name, an artifact's path, or the beginning of its sha256", metavar="RUN|ARTIFACT"),
    ],
    iteration: Annotated[
        int | None, typer.Option("--iteration", min=0, help="of a run: its policy after that one, not its page")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="recompute every digest, in the store too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the records and the edges between them")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", dir_okay=False, help="write the graph as a page to this file")
    ] = None,
    store: Annotated[
        str, typer.Option("--store", help="of a run on a cluster: its runtime.store; RUN is its ID", metavar="URI")
    ] = "",
    workdir: Where = WORKDIR,
) -> None:
    """Show where an artifact comes from: every stage that led to it, back to the prompts and the seed.

    With --verify the exit code is 1 if anything is missing or was changed since.
    """
    from pipelines.lineage import lineage_in, lineage_of, store_of
    from pipelines.stores import opened
    from pipelines.workdir import Workdir
    from vapo.lineage.graph import dump
    from vapo.lineage.page import page
    from vapo.lineage.text import lines
    from vapo.lineage.verify import verify as wrong_with
    from vapo.tables import write_text

    place = Workdir(workdir)
    graph = lineage_in(store, what, iteration) if store else lineage_of(place, what, iteration)
    if html:
        write_text(html, page(graph))
    if as_json:
        typer.echo(dump(graph), nl=False)
    elif html:
        typer.echo(f"{html}: {len(graph.nodes)} stages")
    elif not verify:
        typer.echo("\n".join(lines(graph)))
    if verify:
        with opened(store_of(graph), place):
            wrong = wrong_with(graph)
        for line in wrong:
            typer.echo(line, err=True)
        outputs = sum(len(node.record.outputs) for node in graph.nodes)
        if wrong:
            raise StageFailed(f"{len(wrong)} findings in the lineage of {graph.target}, listed above")
        if not as_json:
            typer.echo(
                f"{graph.target} {graph.sha256[:12]}: {len(graph.nodes)} stages, {outputs} artifacts, all as recorded"
            )


def _store(store: str) -> list[str]:
    """The setting that --store is; a folder's path is made whole, since a run can be continued from elsewhere."""
    folder = store and store != "s3" and "://" not in store
    return [f"runtime.store={Path(store).resolve() if folder else store}"] if store else []


def main() -> None:
    """Entry point of `vapo`."""
    try:
        status = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except Exception as error:
        if cure := as_user_error(error):
            _leave(f"error: {cure}", 2)
        if isinstance(error, typer.Exit):
            sys.exit(error.exit_code)
        if hasattr(error, "format_message"):  # click's own complaint about the command line
            if not error.format_message():  # no command was given: the help is on the screen already
                sys.exit(2)
            _leave(f"error: {error.format_message()}", 2)
        if isinstance(error, StageFailed):
            _leave(f"error: {error}", 1)
        raise
    if status == 130:  # typer makes it of Ctrl-C, and returns it
        _leave(
            "interrupted; what is complete is kept: the same command, or 'vapo run --resume', goes on from there", 130
        )
    sys.exit(status)


def _leave(line: str, status: int) -> None:
    sys.stderr.write(" ".join(line.split()) + "\n")
    sys.exit(status)


if __name__ == "__main__":
    main()
