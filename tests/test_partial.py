"""Folders that a killed stage finds again: by what it does, by one process at a time, and only until it ends well."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from tests.running import environment
from vapo.partial import PLACE, partial_folder

WORK = {"stage": "rollout", "seed": 0}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(PLACE, str(tmp_path))
    return tmp_path


def leave(identity: dict[str, object], name: str) -> Path:
    """Work that fails after it has written a file."""
    found = []
    with suppress(ZeroDivisionError), partial_folder(identity) as folder:
        (folder / name).touch()
        found.append(folder)
        1 / 0  # noqa: B018
    return found[0]


def test_it_is_found_again_until_the_work_ends_well(place: Path) -> None:
    folder = leave(WORK, "a")
    assert json.loads((folder / "identity.json").read_text()) == WORK
    assert leave(WORK, "b") == folder
    with partial_folder(dict(reversed(WORK.items()))) as found:
        assert found == folder
        assert {path.name for path in found.iterdir()} == {"identity.json", "a", "b"}
    assert not list(place.iterdir())


def test_other_work_has_another_folder(place: Path) -> None:
    assert leave(WORK, "a") != leave({**WORK, "seed": 1}, "a")
    assert len(list(place.iterdir())) == 2


def test_who_finds_it_held_works_elsewhere(place: Path) -> None:
    """Two runs that share a stage: neither waits, neither sees the other's half."""
    with partial_folder(WORK) as first:
        with partial_folder(WORK) as second:
            assert second != first
            (second / "a").touch()
        assert not second.exists()
        assert first.exists()
    assert not list(place.iterdir())


def test_a_killed_process_leaves_it_free(place: Path) -> None:
    code = "import os, sys; from vapo.partial import partial_folder\n"
    code += "with partial_folder({'stage': 'rollout', 'seed': 0}) as f: (f / 'a').touch(); os.kill(os.getpid(), 9)"
    done = subprocess.run([sys.executable, "-c", code], env={**environment(), PLACE: str(place)}, check=False)
    assert done.returncode == -9
    with partial_folder(WORK) as folder:
        assert folder.parent == place
        assert (folder / "a").is_file()


def test_without_a_place_it_is_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PLACE, raising=False)
    assert leave(WORK, "a") != leave(WORK, "a")
    with partial_folder(WORK) as folder:
        assert not list(folder.iterdir())
    assert not folder.exists()
