"""How a Kubeflow Pipelines server is reached, and what goes wrong: every fault is one line with its cure."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from pipelines import cluster as module
from pipelines.cluster import Missing, NoAnswer, connect
from pipelines.runs import get_run
from pipelines.tokens import find_token
from tests.pipelines.kfp_description import faults, find, operations
from tests.pipelines.kfp_server import Fault, KfpServer
from vapo.errors import UserError

TOKEN = "a-token-5f1c.that-nobody.may-see"
ID = "00000000-0000-4000-8000-000000000000"


# The description


def test_the_description_is_the_published_one() -> None:
    """Read out of kfp-server-api: 40 operations at 2.17, and what this project needs of them is there."""
    named = {operation.name: operation for operation in operations()}
    assert len(named) == 40
    create = named["run_service_create_run"]
    assert (create.method, create.path, create.body, create.response) == (
        "POST",
        "/apis/v2beta1/runs",
        "V2beta1Run",
        "V2beta1Run",
    )
    assert named["run_service_list_runs"].query == {
        "namespace": "str",
        "experiment_id": "str",
        "page_token": "str",
        "page_size": "int",
        "sort_by": "str",
        "filter": "str",
    }
    assert named["upload_pipeline_version"].file == "uploadfile"
    retry, parameters = find("POST", f"/apis/v2beta1/runs/{ID}:retry")
    assert (retry.name, parameters) == ("run_service_retry_run", {"run_id": ID})


@pytest.mark.parametrize(
    "body",
    [
        {"displayname": "a"},
        {"display_name": 1},
        {"state": "DONE"},
        {"created_at": "yesterday"},
        {"runtime_config": {"parameters": []}},
        {"run_details": {"task_details": [{"name": "rollout"}]}},
    ],
)
def test_the_description_is_strict(body: dict) -> None:
    assert faults(body, "V2beta1Run", "run")
    assert not faults({"display_name": "a", "state": "RUNNING"}, "V2beta1Run", "run")


# Tokens


def test_the_token_is_sent_as_bearer_and_not_shown(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    kfp.tokens = (TOKEN,)
    monkeypatch.setenv("VAPO_KFP_TOKEN", f"{TOKEN}\n")
    found = connect(kfp.url)
    assert [header for _, header in kfp.asked] == [f"Bearer {TOKEN}"]
    assert TOKEN not in repr(found)


def test_a_token_file_is_read_before_every_request(kfp: KfpServer, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("first")
    kfp.tokens = ("first", "second")
    cluster = connect(kfp.url, token_file=str(path))
    path.write_text("second\n")
    with pytest.raises(Missing):
        get_run(cluster, ID)
    assert [header for _, header in kfp.asked] == ["Bearer first", "Bearer second"]


@pytest.mark.usefixtures("kfp")
def test_where_the_token_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("option", "file", "projected"):
        (tmp_path / name).write_text(name)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "absent"))
    assert find_token() is None
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(tmp_path / "projected"))
    assert find_token().value() == "projected"
    monkeypatch.setenv("VAPO_KFP_TOKEN_FILE", str(tmp_path / "file"))
    assert find_token().value() == "file"
    monkeypatch.setenv("VAPO_KFP_TOKEN", "environment")
    assert find_token().value() == "environment"
    assert find_token(str(tmp_path / "option")).value() == "option"


@pytest.mark.parametrize("token", ["", "two words", "line\nbreak", "ümlaut"])
@pytest.mark.usefixtures("kfp")
def test_what_is_no_token_is_refused_unseen(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VAPO_KFP_TOKEN", token)
    with pytest.raises(UserError, match="VAPO_KFP_TOKEN is empty, or holds blanks") as error:
        connect("http://127.0.0.1:9")
    assert not token or token not in str(error.value)


@pytest.mark.usefixtures("kfp")
def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--token-file .*absent\) cannot be read \(FileNotFoundError\)"):
        connect("http://127.0.0.1:9", token_file=str(tmp_path / "absent"))


def test_an_expired_token(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server sends the token back, and nobody sees it all the same."""
    kfp.tokens = ("another",)
    monkeypatch.setenv("VAPO_KFP_TOKEN", TOKEN)
    with pytest.raises(UserError, match=r"refused the token of VAPO_KFP_TOKEN \(401\): it has expired") as error:
        connect(kfp.url)
    assert TOKEN not in str(error.value)


def test_no_token_where_one_is_wanted(kfp: KfpServer) -> None:
    kfp.tokens = (TOKEN,)
    with pytest.raises(UserError, match=r"asks for a token .* set VAPO_KFP_TOKEN"):
        connect(kfp.url)


# Hosts


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("", "give --host URL, or set VAPO_KFP_HOST"),
        ("kubeflow.example.com", "write a URL"),
        ("ftp://kubeflow.example.com", "write a URL"),
        ("http://name:secret@127.0.0.1:9", "must not hold credentials"),
        ("http://127.0.0.1:9?token=secret", "must not hold credentials"),
        ("http://127.0.0.1:9", "nothing listens there"),
        ("http://nowhere.invalid", "there is no host of that name"),
        ("https://{server}", "its certificate is not trusted, or it speaks no TLS"),
    ],
)
def test_a_wrong_host_is_one_line(kfp: KfpServer, host: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        connect(host.replace("{server}", kfp.url.removeprefix("http://")))
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.usefixtures("kfp")
def test_a_host_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", (0.3, 0.3))
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(NoAnswer, match="the answer did not come"):
        connect(f"http://127.0.0.1:{silent.getsockname()[1]}")


def test_a_web_page_is_not_the_api(kfp: KfpServer) -> None:
    kfp.page = "<html><body>Log in</body></html>"
    with pytest.raises(UserError, match="not the API of Kubeflow Pipelines 2: it answers with text/html"):
        connect(kfp.url)


def test_a_server_of_version_1(kfp: KfpServer) -> None:
    kfp.version = 1
    with pytest.raises(UserError, match="it is a server of version 1"):
        connect(kfp.url)


def test_a_host_as_copied_from_the_browser(kfp: KfpServer) -> None:
    assert connect(f"{kfp.url}/#/runs").host == kfp.url


# Namespaces


def test_a_server_for_one_user_takes_no_namespace(kfp: KfpServer) -> None:
    assert connect(kfp.url, namespace="me").namespace == ""


def test_a_server_for_many_users_wants_one(kfp: KfpServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kfp.multi_user = True
    with pytest.raises(UserError, match="give --namespace, or set VAPO_KFP_NAMESPACE"):
        connect(kfp.url)
    (tmp_path / "namespace").write_text("of-the-pod")
    monkeypatch.setattr(module, "IN_POD", tmp_path / "namespace")
    assert connect(kfp.url).namespace == "of-the-pod"
    monkeypatch.setenv("VAPO_KFP_NAMESPACE", "of-the-environment")
    assert connect(kfp.url).namespace == "of-the-environment"
    assert connect(kfp.url, namespace="me").namespace == "me"


# The way there


@pytest.mark.parametrize("fault", [{}, {"status": 503}, {"status": 429}])
def test_a_question_is_asked_again(kfp: KfpServer, fault: dict) -> None:
    """A connection that breaks off in mid-answer, a gateway that is overloaded."""
    cluster = connect(kfp.url)
    kfp.faults += [Fault("GET", "runs", **fault) for _ in range(3)]
    with pytest.raises(Missing, match=r"run .* not found"):
        get_run(cluster, ID)
    assert not kfp.faults


def test_it_gives_up_in_the_end(kfp: KfpServer) -> None:
    cluster = connect(kfp.url)
    kfp.faults += [Fault("GET", "runs") for _ in range(20)]
    with pytest.raises(NoAnswer, match="the connection broke off, tried again and again"):
        get_run(cluster, ID)
    assert len(kfp.faults) == 20 - 1 - module.RETRIES.total


def test_a_request_that_may_have_been_done_is_not_sent_again(kfp: KfpServer) -> None:
    cluster = connect(kfp.url)
    kfp.faults += [Fault("POST", "runs")] * 2
    with pytest.raises(NoAnswer):
        cluster.call(cluster.client.runs.run_service_terminate_run, ID)
    assert len(kfp.faults) == 1
