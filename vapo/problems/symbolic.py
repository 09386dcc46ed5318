"""math-verify's verdict on two expressions, and where ours differs from it; runs in a grading worker alone.

Only its LaTeX grammar is used: its other reader takes the last number of any text, and puts it through Python's eval.
Its time-outs are off (they need SIGALRM, and raise a BaseException): the worker has limits of its own. Two things make
it several times faster and change no result: the grammar is tried without full context first, and expressions whose
values differ are not simplified to find that out.
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from typing import Any

WARM = (
    (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("[0,1)", "(0, 1]"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{2\pi}{3}", r"\frac{2}{3}\cdot\pi"),
    ("x=5", "1,2"),
    (r"\left(1,2\right)", r"(-\infty, 3) \cup \{4\}"),
)
POINTS = (("17/10", "1/7"), ("31/9", "2/11"))  # (first value, step) for unknowns in order of their names
CLOSE = 1e-6  # a decimal for a number that has none, relative


def prepare() -> None:
    """Import math-verify and build its grammar's tables, once, before workers are forked."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    for truth, answer in WARM:
        compare(truth, answer)


def check(truth: str) -> str:
    """What is wrong with a ground truth, or ""."""
    sympy = importlib.import_module("sympy")
    parsed = _parsed(truth)
    if not parsed:
        return "is no number and no LaTeX expression that math-verify can read"
    if any(getattr(p, "has", lambda *_: False)(sympy.nan, sympy.zoo) for p in parsed):
        return "is undefined (it divides by zero)"
    return ""


def compare(truth: str, answer: str) -> str:
    """matched, different or unparseable, for plain texts."""
    wanted, given = _parsed(truth), _parsed(answer)
    if not given:
        return "unparseable"
    if _clearly_different(wanted[0], given[0]):
        return "different"
    # In this order: verify is not symmetric.
    if not importlib.import_module("math_verify").verify([*wanted], [*given], timeout_seconds=None):
        return "different"
    return "different" if _contradiction(given[0]) or _rounded_away(wanted[0], given[0]) else "matched"


@lru_cache(maxsize=1)
def _fast_grammar() -> None:
    """Have latex2sympy parse with ANTLR's SLL prediction first, and with LL only what that cannot read.

    Where SLL reads a text LL reads it alike (Parr et al., Adaptive LL(*) Parsing, OOPSLA 2014), and an
    interval costs 1 ms instead of 18. Integers are made by int(): sympy would put each through Python's eval.
    """
    prediction = importlib.import_module("antlr4.atn.PredictionMode").PredictionMode
    kind: Any = importlib.import_module("latex2sympy2_extended.latex2sympy2")._Latex2Sympy
    integer = importlib.import_module("sympy").Integer
    create, parse, parse_number = kind.create_parser, kind.parse, kind.parse_number

    def parse_integer(self: Any, text: str) -> Any:
        digits = text.replace(",", "")
        return integer(int(digits)) if digits.isascii() and digits.isdigit() else parse_number(self, text)

    def create_parser(self: Any, text: str) -> Any:
        parser = create(self, text)
        parser._interp.predictionMode = prediction.SLL if getattr(self, "sll", False) else prediction.LL
        return parser

    def parse_twice(self: Any, text: str) -> Any:
        try:
            self.sll = True
            return parse(self, text)
        except Exception:  # noqa: BLE001 - it raises plain Exceptions at what it cannot read
            self.sll = False
            return parse(self, text)

    kind.create_parser, kind.parse, kind.parse_number = create_parser, parse_twice, parse_integer


@lru_cache(maxsize=512)  # a prompt's ground truth is compared with each of its responses
def _parsed(text: str) -> tuple[Any, ...]:
    math_verify = importlib.import_module("math_verify")
    _fast_grammar()
    found = math_verify.parse(
        f"${text}$", [math_verify.LatexExtractionConfig()], fallback_mode="no_fallback", parsing_timeout=None
    )
    return tuple(found)


def _clearly_different(wanted: Any, given: Any) -> bool:
    """Whether two expressions have other values somewhere, by far more than rounding: then no algebra makes them equal.

    Symbols, percent and what has no plain value are left to math-verify, which has its ways with them.
    """
    sympy = importlib.import_module("sympy")
    for e in (wanted, given):
        if not isinstance(e, sympy.Expr) or e.is_Symbol or e.has(sympy.UnevaluatedExpr, sympy.Integral, sympy.Limit):
            return False
    names = sorted(wanted.free_symbols | given.free_symbols, key=lambda symbol: (symbol.name, str(symbol.assumptions0)))
    for first, step in POINTS:
        values = {name: sympy.Rational(first) + i * sympy.Rational(step) for i, name in enumerate(names)}
        try:
            a, b = (complex(e.subs(values).evalf(20)) for e in (wanted, given))
        except Exception:  # noqa: BLE001 - no plain value here: a function without a name, an overflow
            return False
        if not abs(a - b) > 1e-3 * (abs(a) + abs(b)):
            return False
    return True


def _contradiction(given: Any) -> bool:
    """Whether an answer without unknowns is a wrong equation: math-verify takes "7 = 8" for 8."""
    sympy = importlib.import_module("sympy")
    equations = given.args if type(given).__name__ == "And" else (given,)
    if given.free_symbols or not all(isinstance(e, sympy.Eq) for e in equations):
        return False
    return any(sympy.simplify(e.lhs - e.rhs) != 0 for e in equations)


def _rounded_away(wanted: Any, given: Any) -> bool:
    """Whether two numbers are equal to math-verify only because it rounds to six places: 3/10^8 is not 2/10^8."""
    sympy = importlib.import_module("sympy")
    if not all(isinstance(e, sympy.Expr) and e.is_number and not e.has(sympy.UnevaluatedExpr) for e in (wanted, given)):
        return False
    a, b = (complex(e.evalf(30)) for e in (wanted, given))
    return not abs(a - b) <= CLOSE * abs(a)
