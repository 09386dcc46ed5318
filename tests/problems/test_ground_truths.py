"""Ground truths are what the recipe says they are, before anything is sampled."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from vapo.errors import UserError
from vapo.problems.ground_truths import complaints


def test_integers() -> None:
    right = ["7", " -016\n", "+5", "0", "9" * 5000]
    wrong = ["", "7.0", "1,000", "٣", "seven", "1e3", "7 8", "--7", "½"]
    assert complaints("integer", right) == [""] * len(right)
    assert complaints("integer", wrong) == ["is no integer"] * len(wrong)


def test_any_text() -> None:
    assert complaints("text", ["x", "\\frac{"]) == ["", ""]


def test_mathematics() -> None:
    right = ["7", "1,000", "\\frac{1}{2}", "\\boxed{3}", "(1, 2)", "\\sqrt{2}", "7"]
    wrong = ["\\frac{1}{", "1/0", "9" * 5000, "__import__('os').system('true')", "9**9**9"]
    assert complaints("math", right) == [""] * len(right)
    found = complaints("math", right + wrong)
    assert found[: len(right)] == [""] * len(right)
    assert all(found[len(right) :]), found


def test_numbers_need_no_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "math_verify":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return found(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    assert complaints("math", ["7", "-1/2"]) == ["", ""]
    with pytest.raises(UserError, match=r"problems\.ground_truths 'math' needs the package 'math_verify': pip install"):
        complaints("math", ["\\sqrt{2}"])
