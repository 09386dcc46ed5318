"""How to reach an S3 server: endpoint and credentials from the environment alone, and what to do when it fails.

s3:// reads AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, and if they are set AWS_SESSION_TOKEN, AWS_ENDPOINT_URL and
AWS_REGION; minio:// reads MINIO_ENDPOINT, MINIO_ACCESS_KEY, MINIO_SECRET_KEY and MINIO_REGION. An endpoint is a URL,
say http://minio-service.kubeflow:9000. On a cluster a Secret fills these variables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vapo.errors import UserError

RETRIES = 8  # of one request, after 0, 0.5, 1, 2, 4, 8, 8, 8 seconds and up to 0.5 more: half a minute
SLOWEST = 8.0  # seconds between two of them
CONNECT, ANSWER = 10.0, 120.0  # seconds to wait for a connection, and for bytes on it
NAMES = {  # scheme -> the variables of its access key, secret key and endpoint
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"),
    "minio": ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", "MINIO_ENDPOINT"),
}
NOT_NEEDED = {  # variables that need not be set; of s3:// the endpoint, too: without one it is Amazon's
    "s3": ("AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN", "AWS_REGION"),
    "minio": ("MINIO_REGION",),
}
AMAZON = "https://s3.amazonaws.com"
REFUSED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")


@dataclass(frozen=True)
class Bucket:
    """A bucket on a server: s3://NAME/PREFIX at URL."""

    uri: str
    client: Any  # minio.Minio
    url: str
    name: str
    prefix: str
    variables: tuple[str, str, str]

    def key(self, name: str) -> str:
        """An object's key, say "prefix/objects/9f/9f86d0..."."""
        return f"{self.prefix}/{name}" if self.prefix else name

    def require(self) -> None:
        """Whether there is a bucket.

        Raises:
            UserError: there is none.
        """
        with self.told():
            if not self.client.bucket_exists(self.name):
                raise self._missing()

    def _missing(self) -> UserError:
        return UserError(
            f"store {self.uri}: there is no bucket {self.name!r} at {self.url}: create it, or correct the store or "
            f"{self.variables[2]}"
        )

    @contextmanager
    def told(self) -> Iterator[None]:
        """What a server or the way there does wrong, told as the one line of a `UserError` with its cure."""
        from minio.error import InvalidResponseError, MinioException, S3Error
        from urllib3.exceptions import HTTPError

        access_key, secret_key, endpoint = self.variables
        try:
            yield
        except S3Error as error:
            if error.code == "NoSuchBucket":
                raise self._missing() from None
            if error.code in REFUSED:
                raise UserError(
                    f"store {self.uri}: {self.url} refused the credentials ({error.code}): correct {access_key} and "
                    f"{secret_key}, or let them write to the bucket"
                ) from None
            raise UserError(f"store {self.uri}: {self.url} answered {error.code}: {error.message}") from None
        except InvalidResponseError:
            raise UserError(f"store {self.uri}: {self.url} answers, but is no S3 server: correct {endpoint}") from None
        except (HTTPError, MinioException) as error:
            raise UserError(
                f"store {self.uri}: no answer from {self.url}, tried again and again ({_kind(error)}): start the "
                f"server or correct {endpoint}, then run the same command again"
            ) from None


def _kind(error: BaseException) -> str:
    """What went wrong at the bottom of it, say "NewConnectionError": the message itself may hold a signed address."""
    return type(getattr(error, "reason", None) or error).__name__


def connect(uri: str, environ: Mapping[str, str] = os.environ, retries: int = RETRIES) -> Bucket:
    """The bucket that a URI means; nothing is sent yet.

    Raises:
        UserError: the URI is malformed, a variable is not set, or the package `minio` is not installed.
    """
    parsed = urlsplit(uri)
    if "@" in parsed.netloc:
        raise UserError(
            f"store {parsed.scheme}://...: it must not hold credentials, they would be written down: set "
            f"{' and '.join(NAMES[parsed.scheme][:2])}"
        )
    if not parsed.netloc or parsed.query or parsed.fragment:
        raise UserError(f"store {uri!r}: write it as {parsed.scheme}://bucket/prefix")
    try:
        from minio import Minio
        from minio.helpers import check_bucket_name
    except ModuleNotFoundError as error:
        if error.name != "minio":
            raise
        raise UserError(f"store {uri}: the package 'minio' is not installed: pip install 'vapo[s3]'") from None
    variables = access_key, secret_key, endpoint = NAMES[parsed.scheme]
    unset = [name for name in (access_key, secret_key) if not environ.get(name)]
    url = environ.get(endpoint) or (AMAZON if parsed.scheme == "s3" else "")
    if not url:
        unset.append(endpoint)
    if unset:
        raise UserError(f"store {uri}: {' and '.join(unset)} must be set in the environment")
    server = urlsplit(url)
    if server.scheme not in ("http", "https") or not server.netloc or "@" in server.netloc or server.path.strip("/"):
        raise UserError(
            f"store {uri}: {endpoint} must be a URL without a path or credentials, say http://127.0.0.1:9000"
        )
    try:
        check_bucket_name(parsed.netloc, strict=True)
    except ValueError as error:
        raise UserError(f"store {uri}: {error}: correct the bucket's name") from None
    here = environ.get("AWS_REGION" if parsed.scheme == "s3" else "MINIO_REGION")
    client = Minio(
        server.netloc,
        environ[access_key],
        environ[secret_key],
        session_token=environ.get("AWS_SESSION_TOKEN") if parsed.scheme == "s3" else None,
        secure=server.scheme == "https",
        region=here or (None if url == AMAZON else "us-east-1"),  # None: the SDK asks
        http_client=_http(retries),
    )
    return Bucket(uri, client, url, parsed.netloc, parsed.path.strip("/"), variables)


def _http(retries: int) -> Any:
    """Connections that try again, whatever the method: each of our requests may be sent twice without harm."""
    import certifi
    import urllib3

    return urllib3.PoolManager(
        maxsize=32,
        timeout=urllib3.Timeout(connect=CONNECT, read=ANSWER),
        cert_reqs="CERT_REQUIRED",
        ca_certs=os.environ.get("SSL_CERT_FILE") or certifi.where(),
        retries=urllib3.Retry(
            total=retries,
            allowed_methods=None,
            status_forcelist=(500, 502, 503, 504),
            backoff_factor=0.25,
            backoff_max=SLOWEST,
            backoff_jitter=0.5,
        ),
    )
