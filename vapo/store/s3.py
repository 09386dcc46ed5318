"""Objects in an S3 bucket: streamed in parts, several at a time, up and down; reads go through the cache."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from vapo.store.cache import cache_of, fetch
from vapo.store.connection import connect
from vapo.store.manifest import StoredFile
from vapo.store.objects import Corrupted, name_of

PART = 8 << 20  # bytes of a part: up to PARTS_AT_ONCE + 1 of each file that is on its way are in memory
PARTS_AT_ONCE = 3  # of one file
BLOCK = 256 << 10  # bytes that pass from the network to the disk and from there to the digest at a time
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
        from minio.error import S3Error

        with self.bucket.told():
            try:
                found: int = self.bucket.client.stat_object(self.bucket.name, self._key(entry)).size
            except S3Error as error:
                if error.code != "NoSuchKey":
                    raise
            else:
                return found
        self.bucket.require()  # a HEAD cannot tell a missing bucket from a missing object
        return None

    def put(self, path: Path, entry: StoredFile) -> bool:
        from minio.error import S3Error

        if self.size(entry) == entry.bytes:
            return False
        with self.bucket.told(), path.open("rb") as file:
            try:
                self.bucket.client.put_object(
                    self.bucket.name,
                    self._key(entry),
                    file,
                    entry.bytes,
                    part_size=PART,
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
