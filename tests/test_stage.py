"""What every stage does around its work: inputs are checked, outputs described, errors told once and passed on."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.running import environment, events_in
from vapo import __version__, worker
from vapo.errors import UserError
from vapo.lineage.software import LIBRARIES
from vapo.recipe import Problems, Verification
from vapo.schemas import PROMPTS, REWARDS, ROLLOUTS
from vapo.stage import Job, execute, run
from vapo.store import sha256_of
from vapo.tables import read_table, write_table

SMALL = Problems(train=8, heldout=4, examples=2, min_steps=3, max_steps=4)
TABLES = ("train_prompts", "heldout_prompts", "examples")


class Artifact:
    """What kfp hands to a component."""

    def __init__(self, path: Path, **metadata: Any) -> None:
        self.uri = f"store://{path.name}"
        self.path, self.metadata = str(path), metadata


def problems_job(folder: Path, section: str = SMALL.model_dump_json()) -> dict[str, Any]:
    outputs = {name: str(folder / name) for name in (*TABLES, "metrics")}
    uris = {name: f"store://{name}" for name in outputs}
    return asdict(Job("problems", section, {"seed": 3}, {}, outputs, time.time(), "image:1", uris))


def graded(folder: Path) -> dict[str, Artifact]:
    """One prompt and one correct response, as the verification stage's inputs."""
    write_table(
        folder / "prompts",
        PROMPTS,
        {"prompt_id": ["p"], "prompt": ["start 1 #1 +2 ?"], "ground_truth": ["3"], "family": ["f"], "difficulty": [1]},
    )
    rollouts = {"rollout_id": ["0/p/0"], "prompt_id": ["p"], "sample_index": [0], "seed": [7]}
    tokens = {"prompt_tokens": [[1, 2]], "response_tokens": [[3]], "rollout_logprobs": [[-0.5]]}
    text = {"response": ["answer 3"], "finish_reason": ["stop"]}
    write_table(folder / "rollouts", ROLLOUTS, {**rollouts, **tokens, **text})
    return {n: Artifact(folder / n, sha256=sha256_of(folder / n), record="its-record") for n in ("prompts", "rollouts")}


def verify(folder: Path, inputs: dict[str, Artifact]) -> dict[str, Artifact]:
    """Run the verification stage as its component does."""
    outputs = {name: Artifact(folder / "out" / name) for name in ("rewards", "metrics")}
    parameters = {"iteration": 4, "purpose": "training"}
    run("verification", section=Verification().model_dump_json(), parameters=parameters, inputs=inputs, outputs=outputs)
    return outputs


def told(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return events_in(capsys.readouterr().out)


def test_outputs_are_described(tmp_path: Path) -> None:
    found = execute(problems_job(tmp_path))
    assert set(found) == {*TABLES, "metrics"}
    for name, facts in found.items():
        assert facts["sha256"] == sha256_of(tmp_path / name)
        assert facts["bytes"] == (tmp_path / name).stat().st_size
        assert facts["stage"] == "problems"
    assert found["metrics"]["train_prompts"] == 8  # the Kubeflow UI shows an artifact's metadata
    assert "train_prompts" not in found["examples"]
    assert len(read_table(tmp_path / "train_prompts", PROMPTS)) == 8


def test_record_says_what_was_done(tmp_path: Path) -> None:
    before = time.time()
    found = execute(problems_job(tmp_path))
    text = (tmp_path / "record.json").read_bytes()
    assert {facts["record"] for facts in found.values()} == {hashlib.sha256(text).hexdigest()}
    record = json.loads(text)
    assert before <= record.pop("started") <= record.pop("ended") <= time.time()
    metrics = json.loads((tmp_path / "metrics").read_text())
    assert record.pop("seconds") == metrics.pop("seconds") >= 0
    assert record.pop("python").startswith("3.")
    assert record.pop("host")["cpus"] >= 1
    assert set(record.pop("libraries")) <= set(LIBRARIES)
    assert re.fullmatch(r"([0-9a-f]{40}(-dirty)?)?", record.pop("commit"))
    rows = {"train_prompts": 8, "heldout_prompts": 4, "examples": 2, "metrics": None}
    facts = {
        name: {
            "path": str(tmp_path / name),
            "uri": f"store://{name}",
            "sha256": sha256_of(tmp_path / name),
            "bytes": (tmp_path / name).stat().st_size,
            "rows": rows[name],
            "tokens": None,
        }
        for name in (*TABLES, "metrics")
    }
    section = SMALL.model_dump(mode="json")
    assert record == {
        "format": 3,
        "run": "",
        "stage": "problems",
        "iteration": 0,
        "purpose": "",
        "seed": 3,
        "parameters": {"seed": 3},
        "section": section,
        "section_sha256": hashlib.sha256(json.dumps(section, sort_keys=True).encode()).hexdigest(),
        "inputs": {},
        "parents": [],
        "outputs": facts,
        "metrics": metrics,
        "image": "image:1",
        "vapo": __version__,
    }
    assert metrics == {"train_prompts": 8, "heldout_prompts": 4, "examples": 2}


def test_same_job_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (execute(problems_job(tmp_path / name)) for name in ("first", "second"))
    for name in TABLES:
        assert first[name]["sha256"] == second[name]["sha256"]
    other = problems_job(tmp_path / "third")
    other["parameters"]["seed"] = 4
    assert execute(other)["train_prompts"]["sha256"] != first["train_prompts"]["sha256"]


def test_a_job_is_told_from_start_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(problems_job(tmp_path))
    events = told(capsys)
    assert [e["vapo"] for e in events if e["vapo"] != "progress"] == ["start", "end"]
    assert events[0] == {"vapo": "start", "stage": "problems", "iteration": 0, "purpose": ""}
    assert events[-1]["metrics"] == {"train_prompts": 8, "heldout_prompts": 4, "examples": 2}
    assert events[-1]["seconds"] >= 0
    assert events[-1]["before"] >= 0


def test_component_call_fills_the_metadata(tmp_path: Path) -> None:
    outputs = verify(tmp_path, graded(tmp_path))
    shown = outputs["rewards"].metadata.pop("lineage")  # the metrics are a table in the Kubeflow UI: not there
    assert "lineage" not in outputs["metrics"].metadata
    assert outputs["rewards"].metadata == {
        "sha256": sha256_of(tmp_path / "out" / "rewards"),
        "bytes": (tmp_path / "out" / "rewards").stat().st_size,
        "stage": "verification",
        "iteration": 4,
        "record": sha256_of(tmp_path / "out" / "record.json"),
    }
    assert outputs["metrics"].metadata["reward_mean"] in (-1.0, 1.0)
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert "left_out" not in shown
    assert shown["section"] == record["section"]
    assert shown["parents"] == record["parents"] == ["its-record"]
    assert shown["outputs"]["rewards"] == {k: v for k, v in record["outputs"]["rewards"].items() if k != "path"}
    assert shown.keys() == record.keys()
    assert record["inputs"]["rollouts"] == {
        "path": str(tmp_path / "rollouts"),
        "uri": "store://rollouts",
        "sha256": sha256_of(tmp_path / "rollouts"),
        "bytes": (tmp_path / "rollouts").stat().st_size,
        "record": "its-record",
    }
    assert len(read_table(tmp_path / "out" / "rewards", REWARDS)) == 1


def test_an_input_that_is_none_is_left_out(tmp_path: Path) -> None:
    execute(problems_job(tmp_path))
    outputs = {name: Artifact(tmp_path / "h" / name) for name in ("new_history", "metrics")}
    inputs = {"previous": None, "problems": Artifact(tmp_path / "metrics"), "rollout": None}
    run("history", section="", parameters={"iteration": 0, "purpose": "training"}, inputs=inputs, outputs=outputs)
    record = json.loads((tmp_path / "h" / "record.json").read_text())
    assert set(record["inputs"]) == {"problems"}


def test_changed_input_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = graded(tmp_path)
    with (tmp_path / "rollouts").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"input rollouts: .* was changed since it was written"):
        verify(tmp_path, inputs)
    errors = [event for event in told(capsys) if event["vapo"] == "error"]
    assert len(errors) == 1
    assert errors[0]["user"] is True
    assert errors[0]["stage"] == "verification"
    assert (errors[0]["iteration"], errors[0]["purpose"]) == (4, "training")
    assert str(tmp_path / "rollouts") in errors[0]["message"]
    assert not (tmp_path / "out").exists()


def test_missing_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = graded(tmp_path)
    (tmp_path / "prompts").unlink()
    with pytest.raises(UserError, match=r"input prompts: .* is not there"):
        verify(tmp_path, inputs)
    assert [event["user"] for event in told(capsys) if event["vapo"] == "error"] == [True]


def test_an_input_without_a_digest_is_taken(tmp_path: Path) -> None:
    inputs = graded(tmp_path)
    for artifact in inputs.values():
        artifact.metadata.clear()  # as an importer's
    assert (verify(tmp_path, inputs)["rewards"].metadata["bytes"]) > 0


@pytest.mark.parametrize("section", ['{"tarin": 8}', '{"train": ', '{"train": -1}'])
def test_unexpected_error_is_told_as_ours_and_propagates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], section: str
) -> None:
    with pytest.raises(
        ValueError, match="Problems"
    ) as caught:  # pydantic's: a recipe never lets such a section through
        execute(problems_job(tmp_path, section))
    assert not isinstance(caught.value, UserError)
    errors = [event for event in told(capsys) if event["vapo"] == "error"]
    assert len(errors) == 1
    assert errors[0]["user"] is False
    assert type(caught.value).__name__ in errors[0]["message"]
    assert not (tmp_path / "record.json").exists()


def test_failure_in_the_middle_leaves_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = problems_job(tmp_path)
    (tmp_path / "examples").mkdir()  # a folder where the last table should go
    with pytest.raises(IsADirectoryError):
        execute(job)
    assert [event["user"] for event in told(capsys) if event["vapo"] == "error"] == [False]
    assert {path.name for path in tmp_path.iterdir()} <= {"train_prompts", "heldout_prompts", "examples"}


def test_a_stage_leaves_when_nobody_reads_its_output_any_more() -> None:
    program = "import time; from vapo.progress import leave_with_reader; leave_with_reader(); print(1); time.sleep(600)"
    command = [sys.executable, "-u", "-c", program]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment())
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.stdout.close()
        assert process.wait(timeout=5.0) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()


def test_a_stage_without_torch_does_not_wait_for_a_worker_that_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = str(tmp_path / "worker")
    worker.starting(address).touch()
    monkeypatch.setenv(worker.ADDRESS, address)
    begun = time.monotonic()
    assert verify(tmp_path, graded(tmp_path))["rewards"].metadata["stage"] == "verification"
    assert time.monotonic() - begun < 20.0  # for torch it would wait a minute


def test_a_stage_does_without_a_worker_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = tmp_path / "w"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(address))  # what a killed worker leaves: a socket that nobody listens to
    monkeypatch.setenv(worker.ADDRESS, str(address))
    outputs = verify(tmp_path, graded(tmp_path))
    assert read_table(Path(outputs["rewards"].path), REWARDS)["correct"].to_pylist() == [True]
