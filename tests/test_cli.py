"""The command line: quick to answer, and every mistake of the user's is exit code 2 and one line with the cure."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.workdir import Workdir, locked
from tests.running import TINY, assert_one_line, assert_refused, environment, running, vapo
from vapo import __version__
from vapo.recipe import available_recipes, load_recipe

HEAVY = ("torch", "transformers", "kfp", "pyarrow", "numpy", "pipelines", "vapo.recipe")
COMMANDS = ("run", "compile", "report", "evaluate", "submit", "watch", "stop", "retry")


# Quick answers


def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(3):
        begun = time.monotonic()
        done = vapo("--help")
        seconds.append(time.monotonic() - begun)
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert statistics.median(seconds) < 1.0, seconds  # half a second on an idle machine


@pytest.mark.parametrize("arguments", [["--help"], *([command, "--help"] for command in COMMANDS), ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; sys.argv[0] = 'vapo'\nfrom vapo.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment()
    )
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.strip()


def test_version() -> None:
    assert vapo("--version").stdout == f"vapo {__version__}\n"


def test_no_command_shows_the_help() -> None:
    done = vapo()
    assert (done.returncode, done.stderr) == (2, "")
    assert all(command in done.stdout for command in COMMANDS)


# Mistakes on the command line and in the recipe


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        pytest.param(["bogus"], ["bogus"], id="unknown command"),
        pytest.param(["run", "tiny", "--bogus"], ["--bogus"], id="unknown option"),
        pytest.param(["compile"], ["RECIPE"], id="recipe left out"),
        pytest.param(["run"], ["give a recipe", "--resume"], id="neither recipe nor resume"),
        pytest.param(["run", "nosuch"], ["'nosuch'", *available_recipes()], id="unknown recipe"),
        pytest.param(["compile", "nosuch"], ["'nosuch'", *available_recipes()], id="unknown recipe to compile"),
        pytest.param(["run", "nosuch.toml"], ["nosuch.toml", *available_recipes()], id="recipe file not there"),
        pytest.param(
            ["run", "tiny", "--set", "ppo_update.cliphigh=0.3"],
            ["unknown key 'ppo_update.cliphigh'", "did you mean 'clip_high'?"],
            id="misspelt key",
        ),
        pytest.param(["run", "tiny", "--set", "ppo_updates.clip_high=0.3"], ["ppo_update"], id="misspelt section"),
        pytest.param(["run", "tiny", "--set", "ppo_update.clip_high"], ["--set section.key=value"], id="no value"),
        pytest.param(["run", "tiny", "--set", "=3"], ["--set section.key=value"], id="no key"),
        pytest.param(["run", "tiny", "--set", "a.b.c.d=3"], ["--set section.key=value"], id="too deep"),
        pytest.param(["run", "tiny", "--set", "iterations.x=3"], ["'iterations'", "section"], id="not a section"),
        pytest.param(
            ["run", "tiny", "--set", "ppo_update.clip_high=high"],
            ["ppo_update.clip_high = 'high'", "number"],
            id="not a number",
        ),
        pytest.param(["run", "tiny", "--set", "iterations=0"], ["iterations = 0", "greater than 0"], id="out of range"),
        pytest.param(
            ["run", "tiny", "--set", "rollout.temperature=0.5", "--set", "seed=-1"], ["seed = -1"], id="two faults"
        ),
        pytest.param(
            ["run", "tiny", "--set", "ppo_update.mini_batch=33"], ["33", "32 responses", "lower it"], id="contradiction"
        ),
        pytest.param(["run", "--resume", "--set", "seed=1"], ["--set needs a RECIPE"], id="set with resume alone"),
        pytest.param(["run", "--resume", "--store", "s3"], ["--store does"], id="store with resume alone"),
        pytest.param(["run", "--resume"], ["no interrupted run"], id="nothing to resume"),
        pytest.param(["report", "nosuch"], ["no run 'nosuch'", "there are []"], id="unknown run"),
        pytest.param(["report", "x", "--set", "seed=1"], ["[report] section only"], id="report changes the run"),
        pytest.param(["evaluate", "model"], ["Missing option", "--problems"], id="nothing to evaluate on"),
        pytest.param(["evaluate", "--problems", "p.jsonl"], ["MODEL"], id="nothing to evaluate"),
        pytest.param(
            ["evaluate", "nosuch", "--problems", "p.jsonl"], ["model 'nosuch'", "there are []"], id="no such model"
        ),
        pytest.param(
            ["evaluate", ".", "--problems", "nosuch.jsonl"],
            ["--problems 'nosuch.jsonl'", *available_recipes()],
            id="no such problems",
        ),
        pytest.param(["evaluate", ".", "--problems", "p.jsonl", "--samples", "0"], ["--samples"], id="no samples"),
        pytest.param(
            ["evaluate", ".", "--problems", "p.jsonl", "--temperature", "-1"], ["--temperature"], id="below zero"
        ),
        pytest.param(["evaluate", ".", "--problems", "p.jsonl", "--top-p", "0"], ["top_p = 0.0"], id="nothing to draw"),
        pytest.param(
            ["evaluate", ".", "--problems", "p.jsonl", "--grader", "bogus"],
            ["verification.grader = 'bogus'", "'answer_line'"],
            id="unknown grader",
        ),
        pytest.param(
            ["evaluate", ".", "--problems", "p.jsonl", "--iteration", "1"],
            ["--iteration 1", "leave it out"],
            id="no run",
        ),
        pytest.param(
            ["evaluate", ".", "--problems", "p.jsonl", "--set", "evaluation.sample=1"],
            ["'evaluation.sample'", "did you mean 'samples'?"],
            id="misspelt key of an evaluation",
        ),
        pytest.param(["run", "tiny", "--workdir", "notes.txt"], ["notes.txt"], id="workdir is a file"),
        pytest.param(
            ["run", "tiny", "--skip-bad-rows"],
            ["skip_bad_rows True", "'file' or 'hub'"],
            id="no rows to skip",
        ),
        pytest.param(
            ["evaluate", ".", "--problems", "tiny", "--skip-bad-rows"],
            ["skip_bad_rows True"],
            id="nor here",
        ),
        pytest.param(["compile", "tiny", "-o", "."], ["'.'"], id="output is a folder"),
        pytest.param(["run", "broken.toml"], ["broken.toml", "not valid TOML"], id="recipe is not TOML"),
        pytest.param(["run", "child.toml"], ["child.toml", "extends = 'nosuch'", *available_recipes()], id="no parent"),
        pytest.param(["compile", "loop.toml"], ["loop.toml", "extends itself"], id="its own parent"),
        pytest.param(
            ["compile", "tiny", "--set", "advantages.estimator=group_normalised"],
            ["'group_normalised'", "value_pretraining.max_steps is 4", "set it to 0"],
            id="a critic for nothing",
        ),
        pytest.param(
            ["compile", "tiny", "--set", "resources.rollout.memory=64GB"],
            ["resources.rollout.memory '64GB'", "say '64Gi'"],
            id="memory with a typo",
        ),
        pytest.param(
            ["compile", "tiny", "--set", "resources.ppo_update.accelerator=nvidia.com/gpu"],
            ["resources.ppo_update.accelerators 0 with accelerator 'nvidia.com/gpu'", "say how many"],
            id="no accelerator of a kind",
        ),
        pytest.param(
            ["compile", "tiny", "--set", f"resources.every.node_selector={{pool = '{'a' * 64}'}}"],
            ["resources.every.node_selector.pool", "at most 63"],
            id="label too long",
        ),
        pytest.param(["run", "typo.toml"], ["typo.toml", "'roll_out'", "'rollout'"], id="misspelt key in a file"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    (tmp_path / "notes.txt").write_text("not a folder\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "1 + 1", "ground_truth": "2"}\n')
    (tmp_path / "broken.toml").write_text("iterations = = 3\n")
    (tmp_path / "typo.toml").write_text("[roll_out]\nprompts = 3\n")
    (tmp_path / "child.toml").write_text('extends = "nosuch"\n')
    (tmp_path / "loop.toml").write_text('extends = "loop.toml"\n')
    assert_refused(vapo(*arguments, cwd=tmp_path), *parts)


def test_unknown_run_lists_those_there_are(tmp_path: Path) -> None:
    for name in ("demo-123456", "tiny-abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text(load_recipe("tiny").model_dump_json())
    assert_refused(vapo("report", "tiny", "--workdir", tmp_path), "'tiny'", "'demo-123456'", "'tiny-abcdef'")


def test_workdir_of_another_format(tmp_path: Path) -> None:
    (tmp_path / ".vapo").mkdir()
    (tmp_path / ".vapo" / "format.json").write_text(json.dumps({"format": 99, "vapo": "9.9.9"}))
    done = vapo("run", *TINY, "--workdir", tmp_path)
    assert_refused(done, str(tmp_path), "format 99", "vapo 9.9.9", __version__, "--workdir")
    assert [path.name for path in tmp_path.iterdir()] == [".vapo"]


def test_resolved_recipe_of_another_version(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-123456"
    folder.mkdir()
    (folder / "recipe.json").write_text('{"name": "tiny", "gamma": 1}')
    assert_refused(vapo("report", folder.name, "--workdir", tmp_path), "recipe.json", "'gamma'")


def test_a_run_that_is_being_executed_is_left_alone(tmp_path: Path) -> None:
    folder = Workdir(tmp_path).run_folder(load_recipe("tiny", ["runtime.threads=1"]))
    with locked(folder):
        done = vapo("run", *TINY, "--workdir", tmp_path)
    assert_refused(done, folder.name, f"process {os.getpid()}", "--workdir")
    assert [path.name for path in folder.iterdir()] == ["lock"]


def test_problem_file_that_is_not_there(tmp_path: Path) -> None:
    source = ["problems.source=file", f"problems.path={tmp_path}/nothing.jsonl", "problems.examples=0"]
    settings = [part for text in [*source, f"base_model.path={tmp_path}"] for part in ("--set", text)]
    done = vapo("run", *TINY, *settings, "--workdir", tmp_path / "work", "--cold")
    assert_refused(done, "problems.path", f"{tmp_path}/nothing.jsonl")


def test_model_folder_without_a_tokenizer(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 8, "vocab_size": 16}
    (model / "config.json").write_text(json.dumps(config))
    (model / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    done = vapo("run", *TINY, "--set", f"base_model.path={model}", "--workdir", tmp_path / "work", "--cold")
    assert_refused(done, "base_model.path", str(model), "tokenizer.json")


# Compiling


def test_compile_writes_what_kubeflow_takes(tmp_path: Path) -> None:
    from kfp import components

    done = vapo("compile", "tiny", "-o", "out/tiny.yaml", "--set", "iterations=2", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out/tiny.yaml: ")
    assert done.stdout.count("\n") == 1
    assert "26 tasks" in done.stdout
    assert "2 ppo_update" in done.stdout
    loaded = components.load_component_from_file(str(tmp_path / "out" / "tiny.yaml"))
    assert loaded.name == "vapo-tiny"
    assert "vapo-rollout:" in (tmp_path / "out" / "tiny.yaml").read_text()


def test_compile_names_its_file_after_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("iterations = 1\n[problems]\nexamples = 10\n")
    done = vapo("compile", "mine.toml", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.glob("*.yaml")] == ["mine.yaml"]


def test_compile_without_critic(tmp_path: Path) -> None:
    done = vapo("compile", "grpo", "--set", "iterations=1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("grpo.yaml: ")
    assert "1 ppo_update" in done.stdout
    assert "value_pretraining" not in done.stdout


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "vapo-test", str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system needs the right to mount one: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_full_disk_is_one_line_and_the_run_goes_on_afterwards(small_disk: Path) -> None:
    workdir = small_disk / "work"
    settings = ("--set", "problems.examples=3000")  # about half a megabyte
    (small_disk / "other-peoples-data").write_bytes(bytes(2_700_000))
    done = vapo("run", *TINY, *settings, "--workdir", workdir, "--cold")
    assert_refused(done, "no space left", "free some space", "the same command")
    assert not list(workdir.glob(".vapo/artifacts/*/problems/record.json"))
    assert not list(workdir.glob(".vapo/artifacts/*/problems/.*"))  # nothing half-written stays
    (small_disk / "other-peoples-data").unlink()
    with running(workdir, *TINY, *settings) as run:
        run.started("base_model")
        assert list(workdir.glob(".vapo/artifacts/*/problems/record.json"))
        run.process.send_signal(signal.SIGINT)
        status, _, err = run.end()
    assert status == 130
    assert_one_line(err, "interrupted")
