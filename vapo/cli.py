"""The command line. It parses first and imports the heavy part after; exit codes: 0 done, 1 failed, 2 wrong input."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vapo import __version__
from vapo.errors import Detached, StageFailed, UserError, as_user_error

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
Host = Annotated[str, typer.Option("--host", help="of Kubeflow Pipelines; else VAPO_KFP_HOST", metavar="URL")]
Namespace = Annotated[
    str, typer.Option("--namespace", help="where runs are, if there are many users; else VAPO_KFP_NAMESPACE")
]
ServiceAccount = Annotated[str, typer.Option("--service-account", help="of the run's pods")]
TokenFile = Annotated[
    str,
    typer.Option(
        "--token-file",
        help="a file with a token; else VAPO_KFP_TOKEN, VAPO_KFP_TOKEN_FILE or the pod's service account",
        metavar="FILE",
    ),
]
RunOnCluster = Annotated[str, typer.Argument(help="a run's ID, its name, or the beginning of one", metavar="RUN")]
Every = Annotated[float, typer.Option("--every", min=0.1, help="seconds between two looks", metavar="SECONDS")]
Wait = Annotated[bool, typer.Option("--wait", help="show it until it ends; exit code 1 if it does not succeed")]
WORKDIR = Path("runs")
SKIP_BAD_ROWS = "problems.skip_bad_rows=true"


class Format(StrEnum):
    """What `vapo compile` writes."""

    IR = "ir"
    KUBERNETES = "kubernetes"


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
    from pipelines.rerunning import resume as go_on_with_rerun
    from pipelines.watching import console
    from pipelines.workdir import RERUN, Workdir
    from vapo.recipe import load_recipe, read_resolved

    if not recipe and not resume:
        raise UserError("give a recipe, for example 'vapo run demo', or --resume to continue the last interrupted run")
    if not recipe and (set_ or skip_bad_rows or store):
        raise UserError("--set needs a RECIPE, as --store does: --resume alone continues the interrupted run as it was")
    settings = [*(set_ or []), *([SKIP_BAD_ROWS] if skip_bad_rows else []), *_store(store)]
    resolved = load_recipe(recipe, settings) if recipe else None
    place = Workdir(workdir)
    interrupted = place.root if resolved else place.interrupted()
    resolved = resolved or read_resolved(interrupted / "recipe.json")
    check(resolved)
    if fresh:
        place.forget()
    if (interrupted / RERUN).is_file():
        go_on_with_rerun(interrupted, place, console(), warm=not cold)
    else:
        run_locally(resolved, place, console(), warm=not cold)


@app.command("compile")
def compile_(
    recipe: Recipe,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", dir_okay=False, help="the file; default RECIPE.yaml")
    ] = None,
    set_: Set = None,
    format_: Annotated[
        Format, typer.Option("--format", help="ir: what is uploaded; kubernetes: the objects Pipeline, PipelineVersion")
    ] = Format.IR,
) -> None:
    """Write the IR YAML that a cluster takes, or its objects Pipeline and PipelineVersion.

    Above iterations_per_run there is one file for each run of the chain.
    """
    from pipelines.compiling import compile_pipeline, summary
    from pipelines.gitops import as_text
    from pipelines.segments import file_of, segments
    from vapo.recipe import load_recipe
    from vapo.tables import write_text

    resolved = load_recipe(recipe, set_ or [])
    kubernetes = format_ == Format.KUBERNETES
    for segment in segments(resolved):
        ir = compile_pipeline(resolved, share=True, segment=segment)
        text = as_text(ir) if kubernetes else ir
        default = Path(f"{resolved.name}{'-kubernetes' if kubernetes else ''}.yaml")
        path = file_of(output or default, segment)
        write_text(path, text)
        which = f"iterations {segment.first}-{segment.last}, " if segment.of > 1 else ""
        typer.echo(f"{path}: {which}{len(text.encode()) / 1000:.0f} KB, {summary(ir)}")


@app.command()
def plan(
    recipe: Recipe,
    set_: Set = None,
    against: Annotated[
        str, typer.Option("--against", help="look at this run's records alone, not at all", metavar="RUN")
    ] = "",
    hardware: Annotated[
        Path | None, typer.Option("--hardware", dir_okay=False, help="what differs from vapo/plan/hardware.toml")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print every figure, and every task with its reason")] = False,
    workdir: Where = WORKDIR,
) -> None:
    """Say what a run will take before it starts: tasks, memory, time, bytes, and what the cache will serve.

    Memory, time and bytes are estimates: docs/scale.md has every formula with its source.
    """
    import json

    from pipelines.planning import planned
    from vapo.plan.text import as_json as jsonable
    from vapo.plan.text import show, terminal
    from vapo.recipe import load_recipe

    found = planned(load_recipe(recipe, set_ or []), workdir, against, hardware)
    if as_json:
        typer.echo(json.dumps(jsonable(found), indent=1))
    else:
        show(found, terminal())


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
def rerun(
    run: Annotated[str, typer.Argument(help="a run's name, or with --store a run ID of a cluster", metavar="RUN")],
    stage: Annotated[str, typer.Option("--stage", help="the stage, say advantages")],
    iteration: Annotated[
        int | None, typer.Option("--iteration", min=0, help="of the run; needed if the stage ran in several")
    ] = None,
    purpose: Annotated[
        str, typer.Option("--purpose", help="what it ran for: training, evaluation, value_pretraining")
    ] = "",
    downstream: Annotated[
        bool, typer.Option("--downstream", help="and everything that follows from it, to the report")
    ] = False,
    set_: Set = None,
    workdir: Where = WORKDIR,
    cold: Annotated[bool, typer.Option("--cold", help="start every stage from nothing, without a warm worker")] = False,
    store: Annotated[
        str, typer.Option("--store", help="of a run on a cluster: the bucket with its records", metavar="URI")
    ] = "",
    compile_to: Annotated[
        Path | None, typer.Option("--compile", dir_okay=False, help="with --store: write the pipeline, submit nothing")
    ] = None,
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    service_account: ServiceAccount = "",
) -> None:
    """Run a stage again from the artifacts that a run recorded, and say what came out the same.

    The result is a run of its own beside the other one, which stays as it is. With --store it is submitted to the
    cluster, as a pipeline of the same name.
    """
    from pipelines.rerunning import rerun as run_again
    from pipelines.watching import console
    from pipelines.workdir import Workdir
    from vapo.tables import write_text

    if not store:
        if compile_to or host:
            raise UserError("--compile and --host are for a run on a cluster: say where its records are with --store")
        place = Workdir(workdir)
        run_again(run, place, console(), stage, iteration, purpose, downstream, set_ or [], warm=not cold)
        return
    from pipelines.attending import submit_and_show
    from pipelines.cluster import connect
    from pipelines.recompiling import recompiled, tasks_in
    from pipelines.submitting import Order

    recipe, ir = recompiled(*tasks_in(store, run), stage, iteration, purpose, downstream, set_ or [])
    if compile_to:
        write_text(compile_to, ir)
        typer.echo(f"{compile_to}: {len(ir.encode()) / 1000:.0f} KB")
        return
    cluster = connect(host, namespace, token_file)
    order = Order("", service_account, cluster.namespace, {})
    submit_and_show(recipe, cluster, order, console(), None, ir=ir)


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(help="names of runs, the first one is what others are compared with")],
    iteration: Annotated[int | None, typer.Option("--iteration", min=0, help="of this one alone")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print everything as JSON")] = False,
    workdir: Where = WORKDIR,
) -> None:
    """Show what differs between runs: settings, artifacts, the columns of tables, metrics."""
    from pipelines.comparing import comparison
    from pipelines.watching import COLUMNS, console
    from pipelines.workdir import Workdir
    from vapo.compare.text import dump, tables

    found = comparison(runs, Workdir(workdir), iteration)
    if as_json:
        typer.echo(dump(found), nl=False)
        return
    for part in tables(found, COLUMNS):
        console().print(part)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="remove it; without this it is listed only")] = False,
    keep: Annotated[
        list[str] | None, typer.Option("--keep", help="keep only these runs, not all; none: no run", metavar="RUN")
    ] = None,
    store: Annotated[
        list[str] | None,
        typer.Option(
            "--store",
            help="also this folder or bucket, if no other machine or cluster keeps anything in it that is needed",
            metavar="URI",
        ),
    ] = None,
    older_than: Annotated[
        float | None,
        typer.Option("--older-than", min=0, help="hours: younger objects stay; 24 with --store, else 0", metavar="H"),
    ] = None,
    workdir: Where = WORKDIR,
) -> None:
    """List what no run refers to, and with --delete remove it: artifacts, cache entries, checkpoint objects.

    A run is kept as long as its folder is there. What a run that is being executed may need stays.
    """
    from pipelines.collecting import collect
    from pipelines.watching import console
    from pipelines.workdir import Workdir

    given = {"keep": keep or [], "stores": store or []}
    collect(Workdir(workdir), console(), delete=delete, **given, older_than=older_than)


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


@app.command()
def submit(
    recipe: Recipe,
    host: Host = "",
    namespace: Namespace = "",
    experiment: Annotated[str, typer.Option("--experiment", help="made if it is not there; default vapo-RECIPE")] = "",
    set_: Set = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option(
            "--param", help="a run-time parameter, say rollout_memory=128Gi; may be repeated", metavar="NAME=VALUE"
        ),
    ] = None,
    store: Store = "",
    service_account: ServiceAccount = "",
    token_file: TokenFile = "",
    wait: Wait = False,
    every: Every = 5.0,
) -> None:
    """Run a recipe on a cluster: its pipeline is uploaded, once per content, and a run of it is created."""
    from pipelines.attending import submit_and_show
    from pipelines.cluster import connect
    from pipelines.parameters import parsed
    from pipelines.submitting import Order
    from pipelines.watching import console
    from vapo.recipe import load_recipe

    resolved = load_recipe(recipe, [*(set_ or []), *_store(store)])
    given = parsed(parameters or [])
    cluster = connect(host, namespace, token_file)
    order = Order(experiment, service_account, cluster.namespace, given)
    submit_and_show(resolved, cluster, order, console(), every if wait else None)


@app.command()
def watch(
    run: RunOnCluster,
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    every: Every = 5.0,
) -> None:
    """Show a run on a cluster until it ends; Ctrl-C leaves it going. Exit code 1 if it does not succeed."""
    from pipelines.attending import attend
    from pipelines.cluster import connect
    from pipelines.runs import find_run
    from pipelines.watching import console

    cluster = connect(host, namespace, token_file)
    attend(cluster, find_run(cluster, run), console(), every)


@app.command()
def stop(run: RunOnCluster, host: Host = "", namespace: Namespace = "", token_file: TokenFile = "") -> None:
    """End a run on a cluster. What its finished tasks have made stays."""
    from pipelines.attending import stop_and_tell
    from pipelines.cluster import connect
    from pipelines.watching import console

    stop_and_tell(connect(host, namespace, token_file), run, console())


@app.command()
def retry(
    run: RunOnCluster,
    host: Host = "",
    namespace: Namespace = "",
    token_file: TokenFile = "",
    wait: Wait = False,
    every: Every = 5.0,
) -> None:
    """Let a run that failed or was stopped go on with what is missing, under the same ID."""
    from pipelines.attending import retry_and_show
    from pipelines.cluster import connect
    from pipelines.watching import console

    retry_and_show(connect(host, namespace, token_file), run, console(), every if wait else None)


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
        if isinstance(error, Detached):
            _leave(str(error), 130)
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
