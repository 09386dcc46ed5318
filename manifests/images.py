"""Writes components/images, which gives our images their published names, from components/images/references.toml."""

from __future__ import annotations

import re
import sys

from manifests.render import ROOT
from pipelines.images import references

WRITTEN = ROOT / "components" / "images" / "kustomization.yaml"
HEAD = """# The published names of our images, the last component of every overlay; `make manifests` writes it from
# components/images/references.toml.
apiVersion: kustomize.config.k8s.io/v1alpha1
kind: Component
images:
"""


def component(published: dict[str, str]) -> str:
    """The kustomization that puts published images, by kind, in the place of vapo-KIND."""
    return HEAD + "".join(_entry(kind, image) for kind, image in sorted(published.items()))


def _entry(kind: str, image: str) -> str:
    name, digest, tag = re.fullmatch(r"(.+?)(?:@(sha256:\w+)|:([\w.-]+))", image).groups()  # type: ignore[union-attr]
    version = f"digest: {digest}" if digest else f'newTag: "{tag}"'
    return f"  - name: vapo-{kind}\n    newName: {name}\n    {version}\n"


def main() -> int:
    """Write it, and say so if it has changed."""
    text = component(references())
    if not WRITTEN.is_file() or WRITTEN.read_text(encoding="utf-8") != text:
        WRITTEN.parent.mkdir(exist_ok=True)
        WRITTEN.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{WRITTEN.relative_to(ROOT.parent)}: written\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
