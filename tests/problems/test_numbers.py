"""Numbers are compared exactly, as they are written, and nothing is evaluated."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vapo.problems.numbers import canonical, decide, number, plain


@given(st.integers(-(10**40), 10**40), st.integers(0, 4))
def test_an_integer_however_it_is_written(value: int, zeros: int) -> None:
    sign = "-" if value < 0 else ""
    ways = [
        f"{sign}{'0' * zeros}{abs(value)}",
        f"{value:,}",
        f"{value:,}".replace(",", "{,}"),
        f"{value:,}".replace(",", r"\,"),
        f"${value}$",
        rf"\text{{{value}}}",
        f"{value}.{'0' * zeros}",
        f"{value}".replace("-", "\u2212"),
        f"{value}^\\circ",
        f"{value}\\text{{ cm}}",
        *([f"+{value}"] if value >= 0 else []),
    ]
    for way in ways:
        assert decide(str(value), plain(way)) is True, way
        assert decide(str(value + 1), plain(way)) is False, way
        assert decide(str(-value - 1), plain(way)) is False, way
        assert canonical(plain(way)) == str(value)


@given(st.integers(-999, 999), st.integers(1, 999))
def test_a_fraction_is_its_value(above: int, below: int) -> None:
    value = Fraction(above, below)
    for way in (f"{above}/{below}", f"\\frac{{{above}}}{{{below}}}", f"\\dfrac{{{2 * above}}}{{{2 * below}}}"):
        assert number(plain(way)).value == value  # type: ignore[union-attr]
        assert decide(str(value), plain(way)) is True
        assert decide(str(value + Fraction(1, 10**9)), plain(way)) is False


@given(st.integers(-(10**9), 10**9), st.integers(1, 9))
def test_a_decimal_is_exact(digits: int, places: int) -> None:
    text = f"{digits / 10**places:.{places}f}" if abs(digits) < 2**50 else str(digits)
    assert number(text).value == Fraction(digits, 10**places)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("truth", "answer", "same"),
    [
        ("1/3", "0.333333", True),
        ("1/3", "0.33333", False),
        ("1/4", "0.2500001", False),  # has a finite decimal: nothing is rounded
        ("0", "0.0000001", False),
        ("0.333", "1/3", False),
        ("50\\%", "0.5", True),
        ("0.5", "50%", True),
        ("50", "50%", True),
        ("5", "50%", False),
        ("7 cm", "7 km", False),
        ("7", "1 2", False),
        ("3", "1 2", False),
        ("7", "x", None),
        ("x", "x", True),
        (r"\sqrt{2}", "1.4", None),
        ("7", "1/0", None),
        ("7", "9" * 1001, None),
    ],
)
def test_decide(truth: str, answer: str, same: bool | None) -> None:
    assert decide(plain(truth), plain(answer)) is same


@pytest.mark.parametrize(
    "text", ["2⁵", "½", "7!", "7^2", "7x", "0x7", "1e3", "7 or 8", "1,2", "seven", "", "-", ".", "/"]
)
def test_no_number(text: str) -> None:
    assert number(plain(text)) is None


@given(st.text(max_size=60))
def test_plain_is_stable(text: str) -> None:
    """What is plain stays so, but for wrappings deeper than any that mean something."""
    once = plain(text)
    assert number(once) == number(plain(once)) or "{" in text or "*" in text or "." in text
    decide("7", once)
