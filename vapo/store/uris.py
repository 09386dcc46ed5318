"""An artifact wherever it is kept, a file or an object in a bucket, as a file that can be read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vapo.store.connection import NAMES, connect


class UnreadableHere(Exception):
    """A URI of a kind that nothing here reads."""


@contextmanager
def local_copy(uri: str) -> Iterator[Path | None]:
    """The artifact as a file, for as long as the block lasts; None: it is not there.

    Args:
        uri: a path, or file://, s3:// or minio:// as Kubeflow writes them.

    Raises:
        UnreadableHere: another scheme.
        UserError: the bucket cannot be read.
    """
    parsed = urlsplit(uri)
    if parsed.scheme in NAMES:
        with tempfile.TemporaryDirectory() as scratch:
            yield _download(uri, Path(scratch) / "artifact")
    elif parsed.scheme in ("", "file"):
        path = Path(unquote(parsed.path) if parsed.scheme else uri)
        yield path if path.is_file() else None
    else:
        raise UnreadableHere(f"{uri}: give s3:// or minio:// as the pipeline's root")


def _download(uri: str, target: Path) -> Path | None:
    from minio.error import S3Error

    bucket = connect(uri)
    with bucket.told():
        try:
            bucket.client.fget_object(bucket.name, bucket.prefix, str(target))
        except S3Error as error:
            if error.code != "NoSuchKey":
                raise
            return None
    return target
