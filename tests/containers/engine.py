"""A container engine of the tests' own where no registry is: dockerd, a base of Debian packages, honest exit codes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BASE = "vapo-test-base:python"
PACKAGES = "python3,libstdc++6"  # and what they ask for: no shell, no pip
OUT_OF_MEMORY = "the kernel ended the container: it wanted more than its memory limit"
START = 60.0  # seconds that the daemon has


class Unavailable(Exception):
    """Why there are no containers here."""


@contextmanager
def dockerd() -> Iterator[dict[str, str]]:
    """A daemon in a folder of its own; yields the environment that leads to it. Nothing of it is left afterwards.

    Raises:
        Unavailable: it is not installed, or cannot start without privileges that this machine does not give.
    """
    missing = [name for name in ("docker", "dockerd", "mmdebstrap") if not shutil.which(name)]
    if missing:
        raise Unavailable(f"{', '.join(missing)} not installed (Debian: apt-get install docker.io mmdebstrap)")
    if os.geteuid() != 0:
        raise Unavailable("dockerd starts as root only")
    folder = Path(tempfile.mkdtemp(prefix="vapo-docker-"))  # short: a socket's path has 108 bytes
    host = f"unix://{folder}/socket"
    command = [str(shutil.which("dockerd")), "--host", host, "--data-root", f"{folder}/data"]
    command += ["--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid"]
    command += ["--bridge=none", "--iptables=false", "--ip6tables=false"]
    environment = {**os.environ, "DOCKER_HOST": host, "DOCKER_BUILDKIT": "0", "DOCKER_CONFIG": f"{folder}/config"}
    try:
        with (folder / "log").open("wb") as log:
            tied = [sys.executable, "-m", "pipelines.seaweed", str(os.getpid())]  # killed when this process is
            process = subprocess.Popen([*tied, *command], stdout=log, stderr=log)
        try:
            _wait(process, environment, folder / "log")
            yield {name: environment[name] for name in ("DOCKER_HOST", "DOCKER_BUILDKIT", "DOCKER_CONFIG")}
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        _remove(folder)


def _wait(process: subprocess.Popen[bytes], environment: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + START
    while subprocess.run(["docker", "version"], env=environment, capture_output=True).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            said = log.read_text(errors="replace").strip().splitlines()
            raise Unavailable(f"dockerd does not start here: {said[-1] if said else 'it says nothing'}")
        time.sleep(0.2)


def _remove(folder: Path) -> None:
    """The daemon's folder, from which a killed daemon may have left file systems mounted."""
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for place in sorted((m for m in mounts if m.startswith(f"{folder}/")), reverse=True):
        subprocess.run(["umount", "--lazy", place], check=False)
    shutil.rmtree(folder)


def python_base() -> None:
    """Make BASE: Debian's Python without a shell, as an image of the daemon that the environment names.

    Raises:
        Unavailable: Debian's packages cannot be had, or its Python is not the version of this one.
    """
    release = dict(
        line.partition("=")[::2] for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines() if line
    )
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        command = ["mmdebstrap", "--quiet", "--variant=extract", f"--include={PACKAGES}"]
        suite = release.get("VERSION_CODENAME", "")
        made = subprocess.run([*command, suite, archive.name], capture_output=True, text=True, errors="replace")
        if made.returncode:
            raise Unavailable(f"mmdebstrap fails: {made.stderr.strip().splitlines()[-1]}")
        subprocess.run(["docker", "import", archive.name, BASE], check=True, capture_output=True)
    check = f"import sys; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
    ran = subprocess.run(
        ["docker", "run", "--rm", "--network", "host", BASE, "python3", "-c", check], capture_output=True, text=True
    )
    if ran.returncode:
        raise Unavailable(f"Debian's Python is not {sys.version_info[:2]}, or cannot run: {ran.stderr.strip()}")


def run_and_wait(client: Any, image: str, command: list[str], volumes: dict[str, Any], **arguments: Any) -> int:
    """What kfp's DockerRunner does for a task, but the exit code is the container's, however fast it ends.

    kfp has the daemon remove the container when it ends, and takes one that it no longer finds for a success
    (kubeflow/pipelines #13332). This one is removed after its exit code was read.
    """
    container = client.containers.run(image=image, command=command, detach=True, volumes=volumes, **arguments)
    try:
        for line in container.logs(stream=True):
            sys.stdout.write(line.decode(errors="replace"))
        code: int = container.wait()["StatusCode"]
        container.reload()
        if container.attrs["State"]["OOMKilled"]:
            sys.stdout.write(OUT_OF_MEMORY + "\n")
        return code
    finally:
        container.remove(force=True)
