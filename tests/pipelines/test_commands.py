"""Tasks' commands: no shell, the same work, failures and signals that reach whoever waits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kfp import dsl

from pipelines.commands import PROGRAM, without_shell
from pipelines.compiling import compile_pipeline
from vapo.recipe import load_recipe


@dsl.component(base_image="python-none", install_kfp_package=False)
def doubled(number: int, result: dsl.OutputPath(int)) -> None:  # type: ignore[valid-type]
    """Twice a number; 7 is refused; 0 waits for a signal."""
    import sys
    import time
    from pathlib import Path

    if number == 7:
        sys.exit(3)
    print("begun", flush=True)
    time.sleep(0 if number else 60)
    Path(result).write_text(str(2 * number))


def started(number: int, folder: Path) -> subprocess.Popen[str]:
    """The component's task as kfp.local and a container start it, with nothing on PATH."""
    container = doubled.component_spec.implementation.container
    command = without_shell(list(container.command))
    given = {
        "inputs": {"parameterValues": {"number": number}},
        "outputs": {
            "parameters": {"result": {"outputFile": str(folder / "result")}},
            "outputFile": str(folder / "executor_output.json"),
        },
    }
    arguments = ["--executor_input", json.dumps(given), "--function_to_execute", "doubled"]
    environment = {**os.environ, "PATH": "", "TMPDIR": str(folder / "scratch")}
    (folder / "scratch").mkdir()
    return subprocess.Popen(
        [sys.executable, *command[1:], *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_it_does_the_work_and_leaves_nothing_behind(tmp_path: Path) -> None:
    process = started(21, tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "result").read_text() == "42"
    assert not list((tmp_path / "scratch").iterdir())


def test_a_failure_is_the_exit_code(tmp_path: Path) -> None:
    process = started(7, tmp_path)
    process.communicate(timeout=60)
    assert process.returncode == 3


def test_a_signal_reaches_the_stage(tmp_path: Path) -> None:
    process = started(0, tmp_path)
    assert process.stdout is not None
    assert any("begun" in line for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM


@pytest.mark.parametrize(
    "command",
    [
        ["sh", "-c", "echo hello"],
        ["python3", "-m", "kfp.dsl.executor_main"],
        ["sh", "-ec", "pip install kfp; python3 -m kfp.dsl.executor_main", "source"],
    ],
)
def test_other_commands_are_refused(command: list[str]) -> None:
    with pytest.raises(ValueError, match="lightweight"):
        without_shell(command)


@pytest.mark.parametrize("share", [False, True])
def test_every_task_of_a_pipeline_starts_python(share: bool) -> None:
    ir = next(iter(yaml.safe_load_all(compile_pipeline(load_recipe("tiny"), share=share))))
    containers = [e["container"] for e in ir["deploymentSpec"]["executors"].values() if "container" in e]
    assert containers
    for container in containers:
        program, flag, script, source = container["command"]
        assert (program, flag, script) == ("python3", "-c", PROGRAM)
        assert "python3" not in source  # kfp.local puts its own Python's path wherever it reads that
