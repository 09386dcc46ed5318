"""Ranks under torchrun: one result, one error in its own words, and nobody who outlives whom they work for."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.running import environment, events_in, kill, marked
from vapo.errors import UserError
from vapo.recipe import Advantages, PpoUpdate, Train, ValuePretraining
from vapo.schemas import EXPERIENCE
from vapo.stage import Job, execute
from vapo.tables import ragged, read_table
from vapo.train.launch import launch

from .conftest import World

pytestmark = pytest.mark.slow
TWO = Train(ranks=2)


def estimate(world: World, name: str = "experience", train: Train = TWO) -> dict[str, Any]:
    """The advantages stage as its component runs it: what its outputs are described by."""
    inputs = {n: {"path": str(world.root / n), "sha256": ""} for n in ("rollouts", "rewards", "critic")}
    outputs = {"experience": str(world.root / name), "metrics": str(world.root / f"{name}-metrics")}
    section = Advantages(alpha=0.3, train=train).model_dump_json()
    return execute(asdict(Job("advantages", section, {"iteration": 1}, inputs, outputs, time.time())))


def update_paths(world: World) -> tuple[dict[str, Path], dict[str, Path]]:
    """Inputs and outputs of an update of the world's models."""
    new = {f"new_{kind}": world.root / f"next_{kind}" for kind in ("policy", "critic")}
    names = ("rollouts", "rewards", "experience", "policy", "critic")
    return {**{name: world.root / name for name in names}, "reference": world.policy}, new


def test_a_stage_on_two_ranks_is_told_once(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    alone = estimate(world, "alone", Train())
    capfd.readouterr()
    found = estimate(world)
    out, err = capfd.readouterr()
    assert err == ""
    assert [event["vapo"] for event in events_in(out)] == ["start", "progress", "end"]
    columns = [ragged(read_table(world.root / n, EXPERIENCE), "advantages")[0] for n in ("alone", "experience")]
    np.testing.assert_allclose(columns[1], columns[0], atol=1e-6)
    for name in ("explained_variance", "value_mean", "advantage_std"):
        assert found["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-6)


def test_the_users_error_is_one_line(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    """Both ranks meet it; torchrun's account of that is not the user's."""
    estimate(world, train=Train())
    world.new_policy("policy2", seed=5)
    capfd.readouterr()
    inputs, outputs = update_paths(world)
    inputs["policy"] = world.root / "policy2"
    parameters = {"iteration": 1, "seed": 0, "store": world.objects}
    with pytest.raises(UserError, match=r"^the critic was trained for policy \w{12}, this policy is \w{12}: [^\n]*$"):
        launch("ppo_update", PpoUpdate(train=TWO), inputs, outputs, parameters)
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    assert "torchrun" not in out + err
    assert not (world.root / "next_policy").exists()


def test_another_error_comes_with_its_ranks_traceback(world: World, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = {name: world.root / name for name in ("rollouts", "rewards", "critic")}
    outputs, parameters = {"experience": world.experience}, {"iteration": 1, "nonsense": 1}
    with pytest.raises(RuntimeError, match=r"^rank [01] failed: TypeError: [^\n]* keyword argument 'nonsense'$"):
        launch("advantages", Advantages(train=TWO), inputs, outputs, parameters)
    err = capfd.readouterr()[1]
    assert err.count("Traceback") == 1
    assert "in _run" in err
    assert "ChildFailedError" not in err


ENDLESS = """
import json, sys
from pathlib import Path
from vapo.recipe import ValuePretraining
from vapo.train.launch import launch
paths = {name: Path(path) for name, path in json.loads(sys.argv[2]).items()}
section = ValuePretraining.model_validate_json(sys.argv[1])
outputs = {name: paths.pop(name) for name in ("critic", "pretraining")}
launch("value_pretraining", section, paths, outputs, {"seed": 0, "store": sys.argv[3]})
"""


@pytest.mark.parametrize("end", ["parent killed", "parent interrupted", "rank killed"])
def test_nobody_is_left(world: World, end: str) -> None:
    """Ranks that would train for hours, and what happens to one of the processes; five seconds later all are gone."""
    import json

    names = ("rollouts", "rewards", "policy", "pretraining")
    paths = {name: str(world.root / name) for name in names} | {"critic": str(world.root / "new_critic")}
    section = ValuePretraining(max_steps=10**7, patience=10**6, min_steps=10**7, reward_model_steps=10**7, train=TWO)
    mark = uuid.uuid4().hex
    command = [sys.executable, "-c", ENDLESS, section.model_dump_json(), json.dumps(paths), world.objects]
    environ = {**environment(mark), "OMP_NUM_THREADS": "1", "TMPDIR": str(world.root)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if '"progress"' in line:
                break
        before = marked(mark)
        ranks = [pid for pid, shown in before.items() if "vapo.train.rank" in shown and "distributed.run" not in shown]
        assert (len(before), len(ranks)) == (4, 2), before
        strike: dict[str, Callable[[], Any]] = {
            "parent killed": lambda: kill(process.pid),
            "parent interrupted": lambda: process.send_signal(signal.SIGINT),
            "rank killed": lambda: kill(ranks[1]),
        }
        strike[end]()
        _, err = process.communicate(timeout=60)
        deadline = time.monotonic() + 5
        while (left := marked(mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left
        if end == "rank killed":
            assert "RuntimeError: a rank was killed, perhaps for want of memory: lower the stage's token_budget" in err
        assert not (world.root / "new_critic").exists()
    finally:
        for pid in marked(mark):
            kill(pid)
        process.kill()
        process.wait()
