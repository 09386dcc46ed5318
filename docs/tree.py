"""Writes the file tree at the end of README.md: a module's sentence is its docstring's first line."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 34
START, END = "## The tree\n\n```\n", "```\n"
OTHERS = {  # what has no docstring
    ".ci/run": "what CI runs: tests, then checks",
    ".gitignore": "what git leaves out",
    "CHANGELOG.md": "what changed, with the measured effect",
    "LICENSE": "Apache-2.0",
    "Makefile": "demo, test, check, bench",
    "README.md": "this page",
    "components/images/Containerfile": "what every kind of image is made of",
    "docs/record.schema.json": "the JSON schema of a record",
    "pyproject.toml": "package, extras per dependency set, and the tools' settings",
    "requirements.lock": "exact versions of what a laptop needs",
    "requirements-dev.lock": "and of the tools for tests and checks",
    "requirements-vllm.lock": "and of vLLM for a CPU, which the tests start",
}


def sentence(path: Path) -> str:
    """One line of meaning for a file."""
    name = path.relative_to(ROOT).as_posix()
    text = path.read_text(encoding="utf-8") if name not in OTHERS else ""
    if path.suffix == ".py":
        documented = ast.get_docstring(ast.parse(text)) or ""
        return documented.split("\n\n")[0].replace("\n", " ").rstrip(".")
    if path.suffix == ".yaml":
        comment = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line[:1] == "#", text.splitlines())]
        return " ".join(comment).split(". ")[0].rstrip(".")
    if path.suffix in (".md", ".toml") and name not in OTHERS:
        return text.splitlines()[0].lstrip("# ").rstrip(".")
    return OTHERS[name]


def tree() -> str:
    """The whole tree, folders in order, tests by folder."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    lines, folder = [], ""
    for name in sorted((n for n in listed if (ROOT / n).is_file()), key=lambda n: (str(Path(n).parent), n)):
        path = Path(name)
        if name.startswith("tests/") and path.parent.name != "tests":
            continue  # they mirror the tree above
        if str(path.parent) != folder:
            folder = str(path.parent)
            package = ROOT / folder / "__init__.py"
            said = sentence(package) if package.is_file() else ""
            lines.append(f"{folder + '/':{WIDTH}}{said}".rstrip() if folder != "." else "")
        if path.name != "__init__.py" and not (folder.startswith("components/") and path.name == "component.py"):
            lines.append(f"{'  ' if folder != '.' else ''}{path.name}".ljust(WIDTH) + sentence(ROOT / name))
    lines.append("tests/*/".ljust(WIDTH) + "the same tree again, a test file per file")
    return "\n".join(line for line in lines if line) + "\n"


def main() -> None:
    """Rewrite README.md; with --check, only say whether it is true."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, _ = text.partition(START)
    new = head + START + tree() + END
    if "--check" in sys.argv:
        sys.exit("README.md's tree is not true: run 'python docs/tree.py'" if new != text else 0)
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
