"""Endpoint and credentials: out of the environment, whole or refused, and never in what is said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.running import ROOT
from vapo.errors import UserError
from vapo.store.connection import connect

AWS = {"AWS_ACCESS_KEY_ID": "who", "AWS_SECRET_ACCESS_KEY": "hush-hush"}
MINIO = {"MINIO_ACCESS_KEY": "who", "MINIO_SECRET_KEY": "hush-hush", "MINIO_ENDPOINT": "http://minio:9000"}


def test_where_objects_are() -> None:
    found = connect("s3://bucket/a/prefix/", AWS)
    assert (found.url, found.name, found.key("objects/x")) == (
        "https://s3.amazonaws.com",
        "bucket",
        "a/prefix/objects/x",
    )
    assert connect("s3://bucket", AWS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9000/"}).key("objects/x") == "objects/x"
    assert connect("minio://bucket", MINIO).url == "http://minio:9000"


@pytest.mark.parametrize(
    ("uri", "environ", "said"),
    [
        ("s3://bucket", {}, "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY must be set in the environment"),
        ("s3://bucket", AWS | {"AWS_SECRET_ACCESS_KEY": ""}, ": AWS_SECRET_ACCESS_KEY must be set"),
        ("minio://bucket", AWS, "MINIO_ACCESS_KEY and MINIO_SECRET_KEY and MINIO_ENDPOINT must be set"),
        ("s3://bucket", AWS | {"AWS_ENDPOINT_URL": "127.0.0.1:9000"}, "AWS_ENDPOINT_URL must be a URL"),
        ("s3://bucket", AWS | {"AWS_ENDPOINT_URL": "http://h/path"}, "AWS_ENDPOINT_URL must be a URL without a path"),
        ("minio://bucket", MINIO | {"MINIO_ENDPOINT": "http://who:hush-hush@h"}, "MINIO_ENDPOINT must be a URL"),
        ("s3://who:hush-hush@bucket/x", AWS, "store s3://...: it must not hold credentials"),
        ("s3:///prefix", AWS, "write it as s3://bucket/prefix"),
        ("s3://bucket?key=1", AWS, "write it as s3://bucket/prefix"),
        ("s3://no/x", AWS, "invalid bucket name no: correct the bucket's name"),
    ],
)
def test_what_is_refused(uri: str, environ: dict[str, str], said: str) -> None:
    with pytest.raises(UserError) as refused:
        connect(uri, environ)
    assert said in str(refused.value)
    assert "hush-hush" not in str(refused.value)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "minio").mkdir()
    (tmp_path / "minio" / "__init__.py").write_text("raise ModuleNotFoundError('no', name='minio')")
    script = "from vapo.store import save_checkpoint as s; s('.', 'm', store='s3://bucket', kind='policy', facts={})"
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=path, cwd=tmp_path)
    assert done.stderr.endswith("store s3://bucket: the package 'minio' is not installed: pip install 'vapo[s3]'\n")
