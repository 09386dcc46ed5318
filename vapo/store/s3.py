"""Objects in an S3 bucket: streamed in parts, several at a time, up and down; reads go through the cache."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vapo.store.cache import cache_of, fetch
from vapo.store.connection import connect
from vapo.store.manifest import StoredFile
from vapo.store.objects import Corrupted, Kept, name_of

PART = 8 << 20  # bytes of a part: up to PARTS_AT_ONCE + 1 of each file that is on its way are in memory
PARTS_AT_ONCE = 3  # of one file
MOST_PARTS = 10_000  # of one file, by S3's rules: beyond 84 GB parts are larger
BLOCK = 256 << 10  # bytes that pass from the network to the disk and from there to the digest at a time
REFRESH = 12 * 3600.0  # seconds: half of what `vapo gc` spares in a bucket
MOST_COPIED = 5 << 30  # bytes that S3 copies in one request
MOST_BREAKS = 5  # of the connection within one part


class S3Store:
    """PREFIX/objects/9f/9f86d0... in a bucket; see `ObjectStore`.

    A multipart upload is visible when it is complete, and not before; one that fails is aborted. Writing an object that
    is there already would change nothing, since its name is its content: so a retry needs no condition.
    """

    def __init__(self, uri: str) -> None:
        self.uri, self.bucket = uri, connect(uri)
        self.cache = cache_of(os.environ)

    def check(self) -> None:
        bucket = connect(self.uri, retries=2)  # somebody waits for the answer
        probe = bucket.key("objects/probe")
        with bucket.told():  # the right to write, tried without leaving anything
            upload = bucket.client._create_multipart_upload(bucket.name, probe, {})
            bucket.client._abort_multipart_upload(bucket.name, probe, upload)

    def size(self, entry: StoredFile) -> int | None:
        found = self._stat(entry)
        return None if found is None else int(found.size)

    def _stat(self, entry: StoredFile) -> Any:
        """What the server says of an object; None: it is not there."""
        from minio.error import S3Error

        with self.bucket.told():
            try:
                return self.bucket.client.stat_object(self.bucket.name, self._key(entry))
            except S3Error as error:
                if error.code != "NoSuchKey":
                    raise
        self.bucket.require()  # a HEAD cannot tell a missing bucket from a missing object
        return None

    def put(self, path: Path, entry: StoredFile) -> bool:
        from minio.error import S3Error

        found = self._stat(entry)
        if found is not None and found.size == entry.bytes and self._young(found, entry):
            return False
        with self.bucket.told(), path.open("rb") as file:
            try:
                self.bucket.client.put_object(
                    self.bucket.name,
                    self._key(entry),
                    file,
                    entry.bytes,
                    part_size=max(PART, -(-entry.bytes // MOST_PARTS)),
                    num_parallel_uploads=PARTS_AT_ONCE,
                )
            except S3Error as error:
                # The last request was done, but its answer was lost, and the retry finds the upload completed.
                if error.code != "NoSuchUpload" or self.size(entry) != entry.bytes:
                    raise
        return True

    def get(self, entry: StoredFile, target: Path) -> None:
        if self.cache is None:
            fetch(entry, target, self._download)
        else:
            self.cache.get(entry, target, self._download)

    def _young(self, found: Any, entry: StoredFile) -> bool:
        """Whether an object that is wanted again is safe from `vapo gc`, which spares what is younger than a day; an
        older one is made young by copying it onto itself, which moves no bytes over the network.
        """
        from minio.commonconfig import REPLACE, CopySource

        if time.time() - found.last_modified.timestamp() < REFRESH:
            return True
        if entry.bytes > MOST_COPIED:
            return False
        key = self._key(entry)
        with self.bucket.told():
            self.bucket.client.copy_object(
                self.bucket.name, key, CopySource(self.bucket.name, key), metadata={}, metadata_directive=REPLACE
            )
        return True

    def kept(self) -> Iterator[Kept]:
        with self.bucket.told():
            for found in self.bucket.client.list_objects(self.bucket.name, self.bucket.key("objects/"), recursive=True):
                yield Kept(found.object_name.rpartition("/")[2], found.size, found.last_modified.timestamp())

    def remove(self, found: Iterable[Kept]) -> Iterator[Kept]:
        for each in found:
            entry = StoredFile("", each.name, each.bytes)
            now = self._stat(entry)
            if now is None or now.last_modified.timestamp() > each.used:
                continue
            with self.bucket.told():
                self.bucket.client.remove_object(self.bucket.name, self._key(entry))
            yield each

    def advice(self) -> str:
        with self.bucket.told():
            status = self.bucket.client.get_bucket_versioning(self.bucket.name).status
        if status != "Enabled":
            return ""
        return (
            f"the bucket {self.bucket.name} keeps old versions: what is removed is hidden, and its space is free when "
            "a lifecycle rule of the bucket expires noncurrent versions"
        )

    def address(self, entry: StoredFile) -> str:
        return f"{self.bucket.uri.rstrip('/')}/{name_of(entry)}"

    def _key(self, entry: StoredFile) -> str:
        return self.bucket.key(name_of(entry))

    def _download(self, entry: StoredFile, target: Path) -> None:
        """Ranges in parallel, each to its place in the file; the digest follows in order, out of the page cache."""
        starts = range(0, entry.bytes, PART)
        digest = hashlib.sha256()
        file = os.open(target, os.O_RDWR | os.O_CREAT)
        try:
            os.truncate(file, entry.bytes)
            with self.bucket.told(), ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                futures = [pool.submit(self._range, entry, start, file) for start in starts]
                try:
                    for start, future in zip(starts, futures, strict=True):
                        end = future.result()
                        for position in range(start, end, BLOCK):
                            digest.update(os.pread(file, min(BLOCK, end - position), position))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        finally:
            os.close(file)
        if digest.hexdigest() != entry.sha256:
            raise Corrupted

    def _range(self, entry: StoredFile, start: int, file: int) -> int:
        """Write one part of an object into the file, and try the rest of it again where the connection broke off."""
        from urllib3.exceptions import HTTPError

        end, position, broken = min(start + PART, entry.bytes), start, None
        for _ in range(1 + MOST_BREAKS):
            answer = self.bucket.client.get_object(self.bucket.name, self._key(entry), position, end - position)
            try:
                for block in answer.stream(BLOCK):
                    os.pwrite(file, block, position)
                    position += len(block)
            except HTTPError as error:
                broken = error
            finally:
                answer.release_conn()
            if position == end:
                return end
        raise broken or Corrupted
