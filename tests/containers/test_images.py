"""The cpu image, built here and run as a cluster runs it: no root, no shell, only /tmp to write to, weights from S3.

The tasks are the compiled pipeline's own, started by kfp.local's DockerRunner. One function of it is replaced
(`engine.run_and_wait`), because it can take a container that failed for a success.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from kfp import components, dsl, local
from kfp.dsl.base_component import BaseComponent

from components.advantages.component import advantages
from components.images import build
from components.verification.component import verification
from pipelines.compiling import compile_pipeline
from pipelines.seaweed import BUCKET, SeaweedFS
from pipelines.stores import environ
from tests.containers.engine import BASE, OUT_OF_MEMORY, Unavailable, dockerd, python_base, run_and_wait
from tests.running import TINY, records, vapo
from vapo import __version__
from vapo.lineage.software import commit, source_digest
from vapo.recipe import Recipe, load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.containers]

USER = "10001:10001"
IMAGE = f"vapo-cpu:{__version__}"
LIMITS = ["--network=host", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL", "--security-opt=no-new-privileges"]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The cpu image on a Python made of Debian's packages, as `make images` builds it."""
    pytest.importorskip("docker", reason="kfp's DockerRunner wants the package docker")
    context = tmp_path_factory.mktemp("context")
    try:
        with dockerd() as environment, environ(environment):
            python_base()
            try:
                assert build.main(["--kind=cpu", f"--base={BASE}", "--engine=docker", f"--folder={context}"]) == 0
            finally:
                shutil.rmtree(context)
            yield IMAGE
    except Unavailable as why:
        pytest.skip(f"no containers here: {why}")


@dataclass
class Finished:
    """A run of the tiny recipe in subprocesses: its first iteration's records, and what they read, for another user."""

    inputs: Path
    verification: dict[str, Any]
    advantages: dict[str, Any]


@pytest.fixture(scope="module")
def finished(image: str, seaweed: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Its checkpoints lie in S3."""
    workdir = tmp_path_factory.mktemp("finished")
    store = f"runtime.store=s3://{BUCKET}/containers"
    done = vapo("run", *TINY, "--set", store, "--workdir", workdir, **seaweed.environment)
    assert done.returncode == 0, (done.stdout, done.stderr)
    found = {(r["stage"], r["purpose"], r["iteration"]): r for r in records(workdir).values()}
    run = Finished(tmp_path_factory.mktemp("inputs"), found["verification", "training", 1], found["advantages", "", 1])
    run.inputs.chmod(0o755)
    for record, name in ((run.verification, "prompts"), (run.verification, "rollouts"), (run.advantages, "critic")):
        shutil.copyfile(record["inputs"][name]["path"], run.inputs / name)  # tables are their writer's alone
    return run


class Outputs(NamedTuple):
    rewards: dsl.Dataset
    experience: dsl.Dataset


def grading(run: Finished, **digests: str) -> str:
    """The compiled pipeline: verification and advantages of the run's first iteration.

    Args:
        digests: sha256 of inputs, instead of what is true.
    """

    def imported(record: dict[str, Any], name: str, kind: type[dsl.Artifact]) -> Any:
        source = record["inputs"][name]
        metadata = {"sha256": digests.get(name, source["sha256"]), "record": source["record"]}
        return dsl.importer(artifact_uri=str(run.inputs / name), artifact_class=kind, metadata=metadata).output

    def pipeline_of(recipe: Recipe) -> BaseComponent:
        @dsl.pipeline(name="grading")
        def graded() -> Outputs:
            rollouts = imported(run.verification, "rollouts", dsl.Dataset)
            rewards = verification(
                section=json.dumps(run.verification["section"]),
                block_start=run.verification["iteration"],
                offset=0,
                purpose="training",
                prompts=imported(run.verification, "prompts", dsl.Dataset),
                rollouts=rollouts,
            ).outputs["rewards"]
            experience = advantages(
                section=json.dumps(run.advantages["section"]),
                block_start=run.advantages["iteration"],
                offset=0,
                rollouts=rollouts,
                rewards=rewards,
                critic=imported(run.advantages, "critic", dsl.Model),
            ).outputs["experience"]
            return Outputs(rewards=rewards, experience=experience)

        return graded

    return compile_pipeline(load_recipe("tiny"), IMAGE, pipeline_of)


@dataclass
class Ran:
    """What the pipeline left, and what its containers said."""

    outputs: dict[str, Any]
    log: str


def in_containers(
    ir: str, run: Finished, seaweed: SeaweedFS, root: Path, monkeypatch: pytest.MonkeyPatch, memory: str = "3g"
) -> Ran:
    """Run it; raises what kfp.local raises for a task that failed, with what the containers said as a note."""
    from docker.types import Mount

    root.mkdir()
    root.chmod(0o777)  # the volume that outputs are written to; the user of the image owns nothing here
    monkeypatch.setattr("kfp.local.docker_task_handler.run_docker_container", run_and_wait)
    local.init(
        runner=local.DockerRunner(
            network_mode="host",
            user=USER,
            read_only=True,
            tmpfs={"/tmp": ""},
            cap_drop=["ALL"],
            security_opt=["no-new-privileges"],
            mem_limit=memory,
            memswap_limit=memory,
            mounts=[Mount(str(run.inputs), str(run.inputs), type="bind", read_only=True)],
            environment={**seaweed.environment, "OMP_NUM_THREADS": "1"},
        ),
        pipeline_root=str(root),
    )
    said = StringIO()
    try:
        with redirect_stdout(said):
            task = components.load_component_from_text(ir)()
    except RuntimeError as error:
        error.add_note(said.getvalue())
        raise
    return Ran(task.outputs, said.getvalue())


@pytest.fixture(scope="module")
def ran(finished: Finished, seaweed: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("containers") / "root"
        yield in_containers(grading(finished), finished, seaweed, root, patch)


def test_the_artifacts_are_those_of_subprocesses(ran: Ran, finished: Finished) -> None:
    for name, record in (("rewards", finished.verification), ("experience", finished.advantages)):
        theirs, ours = Path(ran.outputs[name].path), Path(record["outputs"][name]["path"])
        assert theirs != ours
        assert theirs.read_bytes() == ours.read_bytes()
        assert theirs.stat().st_uid == 10001


def test_the_weights_came_from_the_server(finished: Finished) -> None:
    assert "s3://" in (finished.inputs / "critic").read_text(encoding="utf-8")


def test_the_records_say_which_image_and_which_commit(ran: Ran) -> None:
    for artifact in ran.outputs.values():
        record = json.loads((Path(artifact.path).parent / "record.json").read_text(encoding="utf-8"))
        assert record["image"] == IMAGE
        assert record["commit"] == commit()


def test_a_changed_input_fails_the_task(
    finished: Finished, seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="FAILURE") as caught:
        in_containers(grading(finished, prompts="0" * 64), finished, seaweed, tmp_path / "root", monkeypatch)
    assert "was changed since it was written" in "".join(caught.value.__notes__)
    assert not list(tmp_path.rglob("experience"))


def test_a_task_that_wants_too_much_memory_fails(
    finished: Finished, seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="FAILURE") as caught:
        in_containers(grading(finished), finished, seaweed, tmp_path / "root", monkeypatch, memory="48m")
    assert OUT_OF_MEMORY in "".join(caught.value.__notes__)
    assert not list(tmp_path.rglob("experience"))


def test_a_container_that_fails_at_once_is_not_a_success(image: str) -> None:
    import docker

    client = docker.from_env()
    try:
        for code in (3, 0):
            assert (
                run_and_wait(
                    client, image, ["python3", "-S", "-c", f"import os; os._exit({code})"], {}, network_mode="host"
                )
                == code
            )
    finally:
        client.close()


def inspected(image: str) -> dict[str, Any]:
    done = subprocess.run(["docker", "image", "inspect", image], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)[0]["Config"]
    return found


def test_the_image_is_what_a_restricted_pod_takes(image: str) -> None:
    config = inspected(image)
    assert config["User"] == USER  # a number: the kubelet cannot look names up
    assert not config.get("Entrypoint")  # kfp's command is the whole command
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert config["Labels"]["org.opencontainers.image.revision"] == commit()
    shell = subprocess.run(["docker", "run", "--rm", *LIMITS, image, "sh", "-c", "true"], capture_output=True)
    assert shell.returncode == 127  # so the tests above needed none


def test_nothing_of_this_machine_is_in_the_image(image: str) -> None:
    history = subprocess.run(["docker", "history", "--no-trunc", image], capture_output=True, text=True, check=True)
    text = history.stdout + json.dumps(inspected(image))
    assert "index-url" not in text.lower()
    assert not [name for name in os.environ if name.startswith("PIP_") and name in text]


LOOK = """
import json, os, sys
import kfp.dsl.executor_main, minio, vapo.worker
vapo.worker.preload()
from importlib.metadata import distributions
from vapo.lineage.software import source_digest
specs = [m.__spec__ for m in list(sys.modules.values()) if getattr(m, "__spec__", None) and m.__spec__.cached]
print(json.dumps({
    "source": source_digest(),
    "compiled": sum(os.path.exists(s.cached) for s in specs) / len(specs),
    "installed": {d.name: d.version for d in distributions(path=["/opt/libraries"])},
}))
"""


def test_its_code_is_this_code_compiled_and_its_libraries_are_the_locks(image: str) -> None:
    done = subprocess.run(
        ["docker", "run", "--rm", *LIMITS, image, "python3", "-c", LOOK], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["source"] == source_digest()
    assert found["compiled"] > 0.99
    locked = build.pins()
    installed = {build.canonicalize_name(name): version for name, version in found["installed"].items()}
    named = {name: version.partition("+")[0] for name, version in installed.items() if name in locked}
    assert named == {name: locked[name] for name in named}
    # Where torch comes for CUDA it brings libraries that no lock names.
    assert all(name.startswith(("nvidia-", "cuda-", "triton")) for name in installed.keys() - locked.keys())
