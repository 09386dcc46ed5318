"""2 GB of shards into an S3 server and out again: our verified store against plain parallel requests, in one run.

Plain is the SDK's own put_object and ranged get_object with the same parts and as many of them at once, and nothing is
hashed (but what the SDK signs over http). Both read the same files, against one SeaweedFS on this machine, in processes
of their own, in turns. Fails below 0.7 of plain's rate, or with 256 MB or more of memory.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SHARDS, SHARD = 4, 1 << 27
ROUNDS = (("plain", "ours"), ("ours", "plain")) * 2  # each moves SHARDS * SHARD bytes up and down: 2.1 GB in all
LEAST, MOST = 0.7, 256e6  # of plain's rate; bytes of memory
BLOCK = 256 << 10


def main() -> int:
    """Print seconds, rates and memory; 1 if ours is too slow or too large."""
    from pipelines.seaweed import BUCKET, serving

    seconds: dict[tuple[str, str], list[float]] = {}
    peak = 0
    with tempfile.TemporaryDirectory(prefix="vapo-benchmark-") as scratch, serving(Path(scratch) / "server") as server:
        environment = {**os.environ, **server.environment, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment.pop("VAPO_CACHE", None)
        for number, order in enumerate(ROUNDS):
            folder = Path(scratch) / f"round-{number}"
            _write(folder / "files")
            for direction in ("put", "get"):
                for way in order:
                    command = [sys.executable, __file__, way, direction, str(folder), f"s3://{BUCKET}/{number}"]
                    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                    took, memory = json.loads(done.stdout.splitlines()[-1])
                    seconds.setdefault((way, direction), []).append(took)
                    peak = max(peak, memory) if way == "ours" else peak
                    print(f"round {number + 1}: {way:5} {direction} {took:6.2f} s, {memory / 1e6:.0f} MB", flush=True)
            for file in (*folder.glob("files/*"), *folder.glob("opened-*/*")):
                file.unlink()
    size = SHARDS * SHARD / 1e6
    for direction in ("put", "get"):
        rates = {way: size / statistics.median(seconds[way, direction]) for way in ("ours", "plain")}
        print(f"{direction}: ours {rates['ours']:.0f} MB/s, plain {rates['plain']:.0f} MB/s (medians)")
    both = {
        way: [put + get for put, get in zip(seconds[way, "put"], seconds[way, "get"], strict=True)] for way in order
    }
    ratio = statistics.median(plain / ours for plain, ours in zip(both["plain"], both["ours"], strict=True))
    print(
        f"put + get of {size * len(ROUNDS) / 1e3:.1f} GB: {ratio:.2f} of plain's rate, median of {len(ROUNDS)} rounds "
        f"(at least {LEAST}); {peak / 1e6:.0f} MB of memory (below {MOST / 1e6:.0f})"
    )
    return 0 if ratio >= LEAST and peak < MOST else 1


def _write(folder: Path) -> None:
    """Shards that no store has seen before."""
    folder.mkdir(parents=True)
    for shard in range(SHARDS):
        with (folder / f"model-{shard}.safetensors").open("wb") as file:
            for _ in range(SHARD >> 20):
                file.write(os.urandom(1 << 20))


def work(way: str, direction: str, folder: Path, uri: str) -> None:
    """One measurement in this process: prints [seconds, bytes of memory at the peak]."""
    from vapo.store import open_checkpoint, read_manifest, save_checkpoint
    from vapo.store.connection import connect

    files, manifest = folder / "files", folder / "manifest.json"
    client = connect(uri).client
    client.bucket_exists(connect(uri).name)  # what is imported when first used
    started = time.perf_counter()
    if way == "plain":
        (plain_put if direction == "put" else plain_get)(uri, folder)
    elif direction == "put":
        save_checkpoint(files, manifest, store=uri, kind="policy", facts={})
    else:
        open_checkpoint(read_manifest(manifest, "policy"), folder / "opened-ours")
    took = time.perf_counter() - started
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak
    print(json.dumps([took, int(peak[1]) * 1024]))


def plain_put(uri: str, folder: Path) -> None:
    """Several files at a time, several parts of each."""
    from vapo.store.checkpoints import FILES_AT_ONCE
    from vapo.store.connection import connect
    from vapo.store.s3 import PART, PARTS_AT_ONCE

    bucket = connect(uri)

    def put(path: Path) -> None:
        with path.open("rb") as file:
            bucket.client.put_object(
                bucket.name,
                bucket.key(f"plain/{path.name}"),
                file,
                SHARD,
                part_size=PART,
                num_parallel_uploads=PARTS_AT_ONCE,
            )

    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(put, sorted((folder / "files").iterdir())))


def plain_get(uri: str, folder: Path) -> None:
    """As many ranges at a time, each written to its place."""
    from vapo.store.checkpoints import FILES_AT_ONCE
    from vapo.store.connection import connect
    from vapo.store.s3 import PART, PARTS_AT_ONCE

    bucket = connect(uri)
    (folder / "opened-plain").mkdir()
    names = sorted(path.name for path in (folder / "files").iterdir())
    opened = {name: os.open(folder / "opened-plain" / name, os.O_RDWR | os.O_CREAT) for name in names}

    def get(part: tuple[str, int]) -> None:
        name, position = part
        answer = bucket.client.get_object(bucket.name, bucket.key(f"plain/{name}"), position, PART)
        for block in answer.stream(BLOCK):
            os.pwrite(opened[name], block, position)
            position += len(block)
        answer.release_conn()

    with ThreadPoolExecutor(FILES_AT_ONCE * PARTS_AT_ONCE) as pool:
        list(pool.map(get, [(name, start) for name in names for start in range(0, SHARD, PART)]))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    else:
        sys.exit(main())
