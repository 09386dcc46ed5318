"""Between the runs of a chain: one writes down what the next starts from, and where it lies; the next checks it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vapo import recipe
from vapo.tables import atomic_path, write_text


def hand_off(
    section: recipe.Section,
    *,
    handed_over: Path,
    store: str,
    chain: str,
    segment: int,
    segments: int,
    stopped: bool,
    sources: Mapping[str, Mapping[str, str]],
    **artifacts: Path,
) -> dict[str, float]:
    """Write where the artifacts lie: {chain, segment, segments, stopped, artifacts: {name: {uri, sha256, record}}}.

    Where the store is a bucket, the same stands there as an object (`key_of`), for whoever starts the next segment.

    Args:
        chain: what the runs of this training have in common, and no other's.
        segment: of `segments`, from 1.
        stopped: the target is reached, and no segment follows.
        sources: what is known of each artifact.

    Raises:
        UserError: the bucket refuses the object.
    """
    del section  # this stage has no settings
    facts = {name: {key: sources[name][key] for key in ("uri", "sha256", "record")} for name in sorted(artifacts)}
    said = {"chain": chain, "segment": segment, "segments": segments, "stopped": stopped, "artifacts": facts}
    text = json.dumps(said, indent=1) + "\n"
    write_text(handed_over, text)
    if store.startswith(("s3://", "minio://")):
        from vapo.store.connection import connect

        bucket, body = connect(store), text.encode()
        with bucket.told():
            bucket.client.put_object(bucket.name, bucket.key(key_of(chain, segment)), io.BytesIO(body), len(body))
    return {}


def take_over(section: recipe.Section, **paths: Path) -> dict[str, float]:
    """Copy every artifact NAME to new_NAME; that each is what the segment before has left was checked on the way in."""
    del section  # this stage has no settings
    for name, target in paths.items():
        if name.startswith("new_"):
            with atomic_path(target) as beside:
                shutil.copyfile(paths[name.removeprefix("new_")], beside)
    return {}


def key_of(chain: str, segment: int) -> str:
    """The object in the store that says what a segment has handed over."""
    return f"segments/{chain}/{segment}.json"


def read_handed_over(store: str, chain: str, segment: int) -> dict[str, Any] | None:
    """What a segment has handed over, from the bucket that is the run's store; None: not yet.

    Raises:
        UserError: the server or the bucket is not there, or refuses.
    """
    from minio.error import S3Error

    from vapo.store.connection import connect

    bucket = connect(store)
    with bucket.told():
        try:
            answer = bucket.client.get_object(bucket.name, bucket.key(key_of(chain, segment)))
        except S3Error as error:
            if error.code != "NoSuchKey":
                raise
            return None
        try:
            said: dict[str, Any] = json.loads(answer.read())
        finally:
            answer.close()
            answer.release_conn()
    return said
