"""Whether vLLM can run is known before it is imported, and what is wanting is said with its cure."""

from __future__ import annotations

from importlib.machinery import ModuleSpec

import pytest

from vapo.errors import UserError
from vapo.recipe import Rollout
from vapo.rollout import installed

VLLM = Rollout(engine="vllm")


@pytest.fixture(autouse=True)
def there(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM for CPUs is installed, as far as this module can tell."""
    monkeypatch.setattr(installed, "find_spec", lambda name: ModuleSpec(name, None))
    monkeypatch.setattr(installed, "version", lambda name: "0.32.0")


def test_a_missing_system_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "NUMA", "libno-such-library.so.1")
    with pytest.raises(UserError, match=r"needs libno-such-library\.so\.1: .*libnuma1.*rollout\.engine to 'cpu'"):
        installed.check_installed(VLLM)


def test_the_build_for_gpus_does_not_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise installed.PackageNotFoundError(name)

    monkeypatch.setattr(installed, "NUMA", "libno-such-library.so.1")
    monkeypatch.setattr(installed, "version", absent)
    installed.check_installed(VLLM)


def test_what_is_there_and_the_cpu_engine_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "NUMA", "libc.so.6")
    installed.check_installed(VLLM)
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    installed.check_installed(Rollout())
