"""The commands `vapo submit`, `watch`, `stop` and `retry`: what they print and end with, and what Ctrl-C does."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from tests.pipelines.kfp_server import KfpServer, tasks
from tests.running import assert_one_line, assert_refused, environment
from vapo.cli import main

TOKEN = "a-token-5f1c.that-nobody.may-see"
SUBMIT = ("submit", "tiny", "--store", "s3://bucket/prefix", "--every", "0.1")


@pytest.fixture
def vapo(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., CompletedProcess[str]]:
    """`vapo ARGUMENTS` as its entry point does it: without the two seconds that a process of its own takes to start."""

    def done(*arguments: str) -> CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["vapo", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return CompletedProcess(arguments, ended.value.code or 0, out, err)

    return done


def test_submit_wait_and_the_exit_codes(
    kfp: KfpServer, vapo: Callable[..., CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kfp.multi_user, kfp.tokens = True, (TOKEN,)
    kfp.scenario = [("RUNNING", tasks(("rollout", "RUNNING"))), ("FAILED", tasks(("rollout", "FAILED")))]
    monkeypatch.setenv("VAPO_KFP_HOST", kfp.url)
    monkeypatch.setenv("VAPO_KFP_NAMESPACE", "me")
    monkeypatch.setenv("VAPO_KFP_TOKEN", TOKEN)
    failed = vapo(*SUBMIT, "--wait")
    (run,) = kfp.runs
    assert failed.returncode == 1, failed
    assert_one_line(failed.stderr, "failed in rollout", f"vapo retry {run} --host {kfp.url} --namespace me")
    assert re.match(
        rf"pipeline vapo-tiny \w+: uploaded\nrun tiny-[\w-]+ {run}\n{kfp.url}/#/runs/details/{run}\n", failed.stdout
    )

    kfp.scenario = [("SUCCEEDED", [])]
    retried = vapo("retry", run[:8], "--wait", "--every", "0.1")
    assert (retried.returncode, retried.stderr) == (0, ""), retried
    watched = vapo("watch", run)
    assert (watched.returncode, watched.stderr) == (0, ""), watched
    assert watched.stdout.endswith(": succeeded\n")

    monkeypatch.setenv("VAPO_KFP_TOKEN", f"{TOKEN}-of-yesterday")
    refused = vapo("watch", "nope")
    assert_refused(refused, "refused the token of VAPO_KFP_TOKEN (401)")
    for done in (failed, retried, watched, refused):
        assert TOKEN not in done.stdout + done.stderr
    assert {header for _, header in kfp.asked} == {f"Bearer {TOKEN}", f"Bearer {TOKEN}-of-yesterday"}


def test_ctrl_c_leaves_the_run_going(kfp: KfpServer) -> None:
    kfp.scenario = [("RUNNING", tasks(("rollout", "RUNNING")))]
    process = subprocess.Popen(
        [sys.executable, "-m", "vapo", *SUBMIT, "--wait", "--host", kfp.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # Whoever runs these tests in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while kfp.count("run_service_get_run") < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    ((run_id, run),) = kfp.runs.items()
    assert (process.returncode, run["state"]) == (130, "RUNNING"), (out, err)
    assert kfp.count("run_service_terminate_run") == 0
    assert_one_line(err, "goes on", f"'vapo watch {run_id} --host {kfp.url}'", f"'vapo stop {run_id} --host {kfp.url}'")
