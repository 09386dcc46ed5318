"""`vapo run --store`: the same results wherever checkpoints lie, no secret written down, what is wrong said at once."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.seaweed import BUCKET, SeaweedFS, serving
from pipelines.stores import opened
from pipelines.workdir import Workdir
from tests.pipelines.conftest import Undisturbed
from tests.running import (
    SECRET,
    TINY,
    assert_refused,
    counts,
    events_in,
    folder_of,
    kill,
    products,
    records,
    running,
    vapo,
)
from vapo.cli import _store
from vapo.store import read_manifest

pytestmark = pytest.mark.slow


@dataclass
class Embedded:
    """The tiny recipe with its checkpoints in the embedded server; killed, interrupted, resumed, and run again."""

    workdir: Path
    left: list[list[str]]  # command lines of the processes that were there after each interruption
    told: str  # by all of them
    log: str  # of the one that did the rest
    done: subprocess.CompletedProcess[str]
    again: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    workdir, left, told = tmp_path_factory.mktemp("embedded"), [], ""
    for arguments, stage in (((*TINY, "--store", "s3"), "base_model"), (("--resume",), "rollout")):
        with running(workdir, *arguments) as run:
            run.started(stage)
            if stage == "base_model":
                kill(run.process.pid)
            else:
                run.process.send_signal(signal.SIGINT)
                assert run.process.wait(30) == 130
            left.append(run.left(5.0))
            told += "".join(run.end()[1:])
    done = vapo("run", "--resume", "--workdir", workdir)
    assert done.returncode == 0, (done.stdout, done.stderr)
    log = (folder_of(done.stdout) / "log.txt").read_text()
    again = vapo("run", *TINY, "--store", "s3", "--workdir", workdir)
    return Embedded(workdir, left, told + done.stdout + done.stderr + again.stdout + again.stderr, log, done, again)


def test_an_embedded_server_is_gone_after_kill_9_and_ctrl_c(embedded: Embedded) -> None:
    assert embedded.left == [[], []]


def test_the_results_are_those_with_a_folder(embedded: Embedded, undisturbed: Undisturbed) -> None:
    made, known = products(embedded.workdir), products(undisturbed.workdir)
    assert len(made) > 20
    assert made <= known
    assert not (embedded.workdir / ".vapo" / "store").exists()


def test_the_whole_run_again_is_served_from_the_cache(embedded: Embedded) -> None:
    assert embedded.again.returncode == 0, embedded.again.stderr
    assert counts(embedded.again.stdout) == (0, 21)
    assert folder_of(embedded.again.stdout) == folder_of(embedded.done.stdout)


def test_manifests_name_the_store_and_no_port(embedded: Embedded) -> None:
    found = [
        (json.loads((folder / name).read_text()), record)
        for folder, record in records(embedded.workdir).items()
        for name in {"policy", "new_policy", "critic", "new_critic"} & record["outputs"].keys()
    ]
    assert {manifest["store"] for manifest, _ in found} == {f"s3://{BUCKET}"}
    assert {r["parameters"]["store"] for _, r in found} == {f"s3://{BUCKET}"}


def test_value_pretraining_uploads_the_critic_and_nothing_of_the_policy(embedded: Embedded) -> None:
    folders = {record["stage"]: folder for folder, record in records(embedded.workdir).items()}
    policy = read_manifest(folders["base_model"] / "policy", "policy")
    critic = read_manifest(folders["value_pretraining"] / "critic", "critic")
    new = {file.sha256: file.bytes for file in critic.files}.items() - {f.sha256: f.bytes for f in policy.files}.items()
    assert 0 < len(new) < len(critic.files)  # the tokenizer is the policy's
    told = [event for event in events_in(embedded.log) if event["vapo"] in ("start", "stored")]
    # Stages follow one another: what is told after a start is that stage's.
    after = [told[i + 1] for i, event in enumerate(told) if event.get("stage") == "value_pretraining"]
    written = {"files": len(critic.files), "new_files": len(new), "new_bytes": sum(size for _, size in new)}
    assert after == [{"vapo": "stored", **written}]


def test_nothing_writes_a_secret_down(embedded: Embedded) -> None:
    server = SeaweedFS(embedded.workdir / ".vapo" / "server")
    assert len(server.secret_key) > 30
    files = [path for path in embedded.workdir.rglob("*") if path.is_file()]
    assert len(files) > 100
    for secret in (SECRET, server.secret_key):
        holding = [path for path in files if secret.encode() in path.read_bytes()]
        assert holding == ([server.folder / "s3.json"] if secret == server.secret_key else [])
        assert secret not in embedded.told


def test_lineage_recomputes_the_digests_in_the_bucket(embedded: Embedded) -> None:
    run = folder_of(embedded.done.stdout).name
    done = vapo("lineage", run, "--verify", "--workdir", embedded.workdir)
    assert done.returncode == 0, done.stderr
    assert "all as recorded" in done.stdout


def test_gc_looks_into_the_embedded_server(embedded: Embedded) -> None:
    def objects() -> list[int]:
        """Of the server: kept, and not referred to."""
        done = vapo("gc", "--workdir", embedded.workdir)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if line.strip().startswith("objects, embedded"))
        return [int(line.split()[at]) for at in (2, 5)]

    kept, left = objects()
    assert (kept > 5, left) == (True, 0)
    with serving(embedded.workdir / ".vapo" / "server") as server:
        server.client().put_object(BUCKET, f"objects/00/{'0' * 64}", io.BytesIO(b"left"), 4)
    assert objects() == [kept, 1]
    done = vapo("gc", "--delete", "--workdir", embedded.workdir)
    assert "4 B freed" in done.stdout
    assert objects() == [kept, 0]


def test_evaluate_finds_the_checkpoints_again(embedded: Embedded) -> None:
    name = folder_of(embedded.done.stdout).name
    asked = ("--problems", "tiny", "--store", "s3", "--samples", "2", "--set", "runtime.threads=1")
    measured = vapo("evaluate", name, *asked, "--workdir", embedded.workdir)
    assert measured.returncode == 0, measured.stderr
    assert "accuracy" in measured.stdout
    assert not (embedded.workdir / ".vapo" / "store").exists()


def test_a_lost_shard_is_named_before_any_work(embedded: Embedded) -> None:
    """Also where the local cache still has it. `vapo report` knows where the run's checkpoints are."""
    folder = next(f for f, r in records(embedded.workdir).items() if r["stage"] == "ppo_update")
    lost = next(f for f in read_manifest(folder / "new_policy", "policy").files if f.path == "tokenizer.json")
    key = f"objects/{lost.sha256[:2]}/{lost.sha256}"
    assert (embedded.workdir / ".vapo" / "objects" / key).is_file()
    with serving(embedded.workdir / ".vapo" / "server") as server:
        kept = server.client().get_object(BUCKET, key).read()
        server.client().remove_object(BUCKET, key)
        assert len(kept) == lost.bytes
    name = folder_of(embedded.done.stdout).name
    done = vapo("report", name, "--set", "report.samples=2", "--workdir", embedded.workdir)
    assert_refused(done, "policy checkpoint", f"tokenizer.json is missing from the store s3://{BUCKET}", "--fresh")


@pytest.mark.parametrize(
    ("uri", "variables", "said"),
    [
        ("s3://no-such-bucket/x", {}, ("there is no bucket 'no-such-bucket'", "create it")),
        (f"s3://{BUCKET}/x", {"AWS_SECRET_ACCESS_KEY": SECRET}, ("refused the credentials", "AWS_SECRET_ACCESS_KEY")),
        (f"s3://{BUCKET}/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, ("no answer", "AWS_ENDPOINT_URL")),
        (f"s3://who:{SECRET}@{BUCKET}/x", {}, ("runtime.store = s3://...: it must not hold credentials",)),
    ],
)
def test_a_store_that_takes_nothing_is_refused_at_once(
    seaweed: SeaweedFS, tmp_path: Path, uri: str, variables: dict[str, str], said: tuple[str, ...]
) -> None:
    done = vapo("run", *TINY, "--store", uri, "--workdir", tmp_path, **{**seaweed.environment, **variables})
    assert_refused(done, *said)
    assert SECRET not in done.stdout + done.stderr
    assert not list((tmp_path / ".vapo").glob("artifacts/*"))  # before any work


def test_which_store_a_name_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VAPO_CACHE", raising=False)
    workdir = Workdir(tmp_path / "work")
    meant = {"": workdir.store, "elsewhere": tmp_path / "elsewhere", str(tmp_path / "x"): tmp_path / "x"}
    for store, folder in meant.items():
        with opened(store, workdir) as uri:
            assert uri == str(folder)
            assert os.environ["VAPO_CACHE"] == str(workdir.objects)
            assert folder.is_dir()
    with opened((tmp_path / "y").as_uri(), workdir) as uri:
        assert uri == f"file://{tmp_path}/y"
    assert "VAPO_CACHE" not in os.environ
    assert _store("elsewhere") == [f"runtime.store={tmp_path}/elsewhere"]  # the same, wherever the run is continued
    assert _store("s3://b/x") == ["runtime.store=s3://b/x"]
    assert _store("") == []
