"""A Kubeflow Pipelines server: how it is reached, what is asked of it again, and what goes wrong told in one line."""

import json
import logging
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kfp
import urllib3
from kfp_server_api import ApiException
from urllib3.exceptions import HTTPError, MaxRetryError

from pipelines.tokens import TOKEN, TOKEN_FILE, Token, find_token
from vapo.errors import UserError

HOST, NAMESPACE = "VAPO_KFP_HOST", "VAPO_KFP_NAMESPACE"
UI = "KF_PIPELINES_UI_ENDPOINT"  # kfp's own variable: where the UI is, if not where the API is
PATIENCE = (10, 60)  # seconds to wait for a connection, and for an answer
GATEWAY = (502, 503, 504)  # what stands between may have passed the request on, or not
# Whether to ask again: a connection that never stood, whatever the request; an answer that did not come, only if
# asking twice does no harm. Half a minute altogether.
RETRIES = urllib3.Retry(
    total=6,
    allowed_methods=("GET",),
    status_forcelist=(429, *GATEWAY),
    backoff_factor=0.25,
    backoff_max=8.0,
    backoff_jitter=0.25,
)
FIRST = RETRIES.new(total=2)  # somebody waits, and may have mistyped the host
SAID = 300  # characters of a server's message that are shown
IN_POD = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Missing(UserError):
    """There is no such thing on the server."""


class Exists(UserError):
    """There is such a thing already."""


class NoAnswer(UserError):
    """The request may have been done, or not."""


@dataclass(frozen=True)
class Cluster:
    """A server that was asked, and answered."""

    host: str
    namespace: str  # of a server for many users; empty: it is for one
    client: Any  # kfp.Client: its generated calls are public, as client.runs.run_service_get_run
    token: Token | None

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """One call of the generated client; it is tried again where that does no harm (RETRIES).

        Raises:
            UserError: one line that says what went wrong, and the cure.
        """
        try:
            answer = function(*arguments, _request_timeout=PATIENCE, **named)
        except ApiException as error:
            raise self._refused(error) from None
        except HTTPError as error:
            raise self._unreachable(error) from None
        # A web page would be taken for an answer in which everything is left out.
        kind = _api(self.client).last_response.getheader("content-type") or "nothing"
        if "json" not in kind:
            raise _no_api(self.host, f"it answers with {kind.partition(';')[0]}, perhaps the page of a login")
        return answer

    def address(self, what: str) -> str:
        """The UI's page, say of "runs/details/ID"."""
        return f"{os.environ.get(UI, self.host).rstrip('/')}/#/{what}"

    def options(self) -> str:
        """How the command line finds this server again."""
        return f"--host {self.host}" + (f" --namespace {self.namespace}" if self.namespace else "")

    def _refused(self, error: ApiException) -> UserError:
        said = self._said(error)
        if error.status == 401:
            if self.token is None:
                return UserError(f"{self.host} asks for a token (401): set {TOKEN}, or {TOKEN_FILE} to a file with one")
            return UserError(
                f"{self.host} refused the token of {self.token.source} (401): it has expired, or is for another "
                "server: get a new one"
            )
        if error.status == 403:
            where = f"namespace {self.namespace!r}" if self.namespace else "this server"
            return UserError(
                f"{self.host} forbids it in {where} (403{said}): name another --namespace, or let the token's owner in"
            )
        kinds = {404: Missing, 409: Exists, **dict.fromkeys(GATEWAY, NoAnswer)}
        return kinds.get(error.status, UserError)(f"{self.host} refused the request ({error.status}{said})")

    def _said(self, error: ApiException) -> str:
        """What the server said about its refusal, say ": experiment not found"; without the token."""
        try:
            body = json.loads(error.body or "")
            text = str(body.get("message") or body.get("error") or "")
        except (ValueError, AttributeError):
            text = str(error.reason or "")
        text = " ".join(text.split())
        text = self.token.hidden(text) if self.token else text
        return f": {text[:SAID]}" if text else ""

    def _unreachable(self, error: HTTPError) -> UserError:
        reason = error.reason if isinstance(error, MaxRetryError) and error.reason else error
        kind = type(reason).__name__
        kinds = {
            "NameResolutionError": "there is no host of that name",
            "NewConnectionError": "nothing listens there",
            "ConnectTimeoutError": "nothing answers there",
            "SSLError": "its certificate is not trusted, or it speaks no TLS; SSL_CERT_FILE names another authority",
            "ReadTimeoutError": "the answer did not come",
            "ProtocolError": "the connection broke off",
            "IncompleteRead": "the connection broke off",
            "ResponseError": str(reason),
        }
        return NoAnswer(f"{self.host}: {kinds.get(kind, kind)}, tried again and again: check --host and the network")


def connect(host: str = "", namespace: str = "", token_file: str = "") -> Cluster:
    """The server at `host` (else HOST), once it has answered.

    Args:
        host: URL below which /apis/v2beta1 lies.
        namespace: where runs are, for servers with many users; else NAMESPACE, else the pod's own.

    Raises:
        UserError: there is no such server, or it is another kind, or what it needs is not given.
    """
    host = _checked(host or os.environ.get(HOST, ""))
    # It would say of every attempt that it failed; what is left of it in the end is one line.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    token = find_token(token_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        # The namespace is said with every request. Were none given here, kfp would ask the server five times, log a
        # traceback of each failure, and write what it found into the home folder.
        client = kfp.Client(host, namespace="-", credentials=token, ssl_ca_cert=os.environ.get("SSL_CERT_FILE"))
    _try_again(client, FIRST)
    cluster = Cluster(host, namespace or os.environ.get(NAMESPACE, ""), client, token)
    try:
        health = cluster.call(client.healthzs.healthz_service_get_healthz)
    except Missing:
        raise _no_api(host, _version_one(client, host) or "there is no /apis/v2beta1/healthz") from None
    _try_again(client, RETRIES)
    if not health.multi_user:
        return Cluster(host, "", client, token)
    if not cluster.namespace and IN_POD.is_file():
        return Cluster(host, IN_POD.read_text(encoding="utf-8").strip(), client, token)
    if not cluster.namespace:
        raise UserError(f"{host} has many users, each with a namespace: give --namespace, or set {NAMESPACE}")
    return cluster


def _checked(host: str) -> str:
    if not host:
        raise UserError(
            f"no cluster is named: give --host URL, or set {HOST}, say http://127.0.0.1:8080 after "
            "'kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80'"
        )
    parsed = urlsplit(host)
    if parsed.scheme not in ("http", "https") or not parsed.hostname or re.search(r"\s", host):
        raise UserError(
            f"--host {host!r}: write a URL, say http://127.0.0.1:8080 or https://kubeflow.example.com/pipeline"
        )
    if "@" in parsed.netloc or parsed.query:
        raise UserError(f"--host: it must not hold credentials or a query: set {TOKEN} or {TOKEN_FILE}")
    return host.partition("#")[0].rstrip("/")  # as copied from the browser


def _no_api(host: str, why: str) -> UserError:
    return UserError(
        f"{host} is not the API of Kubeflow Pipelines 2: {why}: correct --host, say http://127.0.0.1:8080 of a "
        f"port-forward or https://kubeflow.example.com/pipeline, or set {TOKEN}"
    )


def _version_one(client: Any, host: str) -> str:
    """Why there is no v2beta1 API, if it is a server of version 1."""
    pools = _api(client).rest_client.pool_manager
    try:
        answer = pools.request("GET", f"{host}/apis/v1beta1/healthz", timeout=PATIENCE[0])
    except HTTPError:
        return ""
    found = answer.status == 200 and "json" in answer.headers.get("content-type", "")
    return "it is a server of version 1" if found else ""


def _try_again(client: Any, retries: urllib3.Retry) -> None:
    """From now on, requests are tried again so often: kfp.Client has no argument for it."""
    pools = _api(client).rest_client.pool_manager
    pools.clear()
    pools.connection_pool_kw["retries"] = retries


def _api(client: Any) -> Any:
    """The generated client's transport, which all calls of a kfp.Client share."""
    return client._run_api.api_client
