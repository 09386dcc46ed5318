"""Where a run's checkpoints lie: a folder of the working directory, another one, a bucket, or the embedded server's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.seaweed import BUCKET, serving
from pipelines.workdir import Workdir
from vapo.store import check_store
from vapo.store.cache import FOLDER

EMBEDDED = "s3"


@contextmanager
def opened(store: str, workdir: Workdir) -> Iterator[str]:
    """The URI of a store that takes checkpoints, for as long as the block lasts.

    Args:
        store: as `runtime.store`: empty, EMBEDDED, a folder or a URI.

    Raises:
        UserError: it takes none; says why, and the cure.
    """
    uri = uri_of(store, workdir)
    cache = {} if FOLDER in os.environ else {FOLDER: str(workdir.objects)}
    with environ(cache):
        if store == EMBEDDED:
            with serving(workdir.server) as server, environ(server.environment):
                yield uri
        else:
            check_store(uri)
            yield uri


def uri_of(store: str, workdir: Workdir) -> str:
    """The URI that stages are told: see `opened`, which also looks whether the store is there."""
    if store in ("", EMBEDDED) or "://" in store:
        return {"": str(workdir.store), EMBEDDED: f"s3://{BUCKET}"}.get(store, store)
    return str(Path(store).resolve())


@contextmanager
def environ(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the stages' processes, as they were before afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
